"""Measured peaks: what a processor gives, what is left out, and how a disk is read. No times are asserted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ideogram_app.machine import microbench as probing
from ideogram_app.machine.microbench import disk_bytes_per_second, fastest, probe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products and files, and one repeat."""
    monkeypatch.setattr(probing, "ON_A_CPU", (32, 64, 64))
    monkeypatch.setattr(probing, "LEAST_DISK_BYTES", 2**20)
    monkeypatch.setattr(probing.fastest, "__defaults__", (0.0001,))
    for measured in (probing.dense_tflops, probing.int8_tops):
        monkeypatch.setattr(measured, "__defaults__", (0.0001,))


def test_a_processor_is_measured_as_far_as_it_goes() -> None:
    found = probe(CPU)
    assert found.tflops_16bit and found.tflops_16bit > 0
    assert found.tops_int8 and found.tops_int8 > 0
    assert found.link is None and found.disk is None


def test_what_a_device_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("not implemented for this device")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    found = probe(CPU)
    assert found.tops_int8 is None and found.tflops_16bit


def test_the_largest_file_of_a_folder_is_read_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "small").write_bytes(b"x" * 10)
    large = tmp_path / "below" / "large"
    large.write_bytes(os.urandom(3 * 2**20))
    forgotten: list[int] = []

    def forget(file: int) -> bool:
        forgotten.append(os.fstat(file).st_ino)
        return True

    monkeypatch.setattr(probing, "_forget", forget)
    rate = disk_bytes_per_second(tmp_path)
    assert rate and rate > 0
    assert forgotten == [large.stat().st_ino]


def test_a_disk_is_not_measured_without_a_large_file_or_a_way_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk_bytes_per_second(tmp_path / "nowhere") is None
    assert disk_bytes_per_second(tmp_path) is None
    (tmp_path / "small").write_bytes(b"x" * 1000)
    assert disk_bytes_per_second(tmp_path) is None
    (tmp_path / "large").write_bytes(b"x" * 2**21)
    monkeypatch.setattr(probing, "_forget", lambda file: False)
    assert disk_bytes_per_second(tmp_path) is None
    assert probe(CPU, tmp_path).disk is None


def test_the_first_run_warms_up_and_is_not_timed() -> None:
    runs: list[int] = []
    assert fastest(lambda: runs.append(0), CPU, limit=0.0) == float("inf")
    assert len(runs) == 1


@pytest.mark.gpu
def test_a_card_is_measured_whole() -> None:
    found = probe(torch.device("cuda"))
    assert found.tflops_16bit and found.tops_int8 and found.link
