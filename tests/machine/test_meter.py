"""Seconds and peaks: phases add up, and a large allocation is seen at its size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy
import pytest
import torch

from ideogram_app.machine import meter as measure
from ideogram_app.machine.meter import HostPeak, PhaseMeter, bytes_in_use, release, trim
from tests.waiting import wait_until

MEGABYTE = 1_000_000


def test_a_large_array_raises_the_peak_by_its_size_even_when_it_is_gone_at_the_end() -> None:
    release(torch.device("cpu"))
    with HostPeak() as peak:
        block = numpy.ones(200 * MEGABYTE, dtype=numpy.uint8)
        wait_until(lambda: peak.above_start > 180 * MEGABYTE)
        del block
    assert 180 * MEGABYTE < peak.above_start < 300 * MEGABYTE


def test_phases_of_the_same_name_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter((10.0, 12.5, 20.0, 21.5))  # at the clock: when each phase begins and ends
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    meter = PhaseMeter(torch.device("cpu"))
    for _ in range(2):
        with meter.phase("work"):
            pass
    assert meter.seconds == {"work": 4.0}


def test_a_phase_that_fails_is_timed_too() -> None:
    meter = PhaseMeter(torch.device("cpu"))
    with pytest.raises(KeyError), meter.phase("work"):
        raise KeyError("x")
    assert "work" in meter.seconds


def test_without_a_device_of_its_own_memory_the_process_counts() -> None:
    with PhaseMeter(torch.device("cpu")) as meter:
        pass
    assert meter.peak_device_bytes is None and meter.peak_device_reserved_bytes is None
    assert meter.peak_above_start_bytes == meter.peak_host_bytes >= 0


def test_what_is_held_grows_by_what_is_kept_and_shrinks_when_it_is_given_back() -> None:
    trim()
    before = bytes_in_use(torch.device("cpu"))
    block = torch.ones(200 * MEGABYTE, dtype=torch.uint8)
    kept = bytes_in_use(torch.device("cpu")) - before
    assert 180 * MEGABYTE < kept < 300 * MEGABYTE
    del block
    trim()
    assert bytes_in_use(torch.device("cpu")) - before < 100 * MEGABYTE


def test_a_peak_above_the_start_leaves_out_what_was_there_before() -> None:
    before = torch.ones(100 * MEGABYTE, dtype=torch.uint8)
    with PhaseMeter(torch.device("cpu")) as meter:
        block = torch.ones(200 * MEGABYTE, dtype=torch.uint8)
        wait_until(lambda: meter.peak_host_bytes > 180 * MEGABYTE)
        del block
    assert 180 * MEGABYTE < meter.peak_above_start_bytes < 290 * MEGABYTE
    assert len(before) == 100 * MEGABYTE


@pytest.mark.gpu
def test_a_device_leaves_out_what_was_there_before() -> None:
    before = torch.ones(100 * MEGABYTE, dtype=torch.uint8, device="cuda")
    held = bytes_in_use(torch.device("cuda"))
    with PhaseMeter(torch.device("cuda")) as meter:
        block = torch.ones(50 * MEGABYTE, dtype=torch.uint8, device="cuda")
        del block
    assert held >= 100 * MEGABYTE and len(before) == 100 * MEGABYTE
    assert 50 * MEGABYTE <= meter.peak_above_start_bytes < 60 * MEGABYTE


@pytest.mark.gpu
def test_a_device_counts_its_own_peak() -> None:
    with PhaseMeter(torch.device("cuda")) as meter:
        block = torch.ones(50 * MEGABYTE, dtype=torch.uint8, device="cuda")
        del block
    assert meter.peak_device_bytes is not None and meter.peak_device_bytes >= 50 * MEGABYTE
