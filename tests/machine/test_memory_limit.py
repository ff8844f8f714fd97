"""Limits of torch's allocator where a driver never says that memory ran out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.comparison.compare import compare
from ideogram_app.generation.session import Session
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory_limit import memory_limits
from ideogram_app.planning.footprint import DEVICE_CONTEXT_BYTES
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.records import Request
from tests.machines import GB, RTX_3060, RTX_3090, RX_9070_XT, apple, said
from tests.plan_by_name import plan, planned

WINDOWS, WSL = "Windows 11", "Linux 5.15.167.4-microsoft-standard-WSL2"
CONTEXT = 600_000_000


def limited(hardware: Hardware, *usable: tuple[int, int]) -> list[tuple[int, int]]:
    return [(limit.device, limit.bytes) for limit in memory_limits(hardware, usable, CONTEXT)]


@pytest.mark.parametrize("system", [WINDOWS, WSL])
def test_torch_gets_what_may_be_used_less_the_drivers_context(system: str) -> None:
    card = replace(RTX_3060, os=system)
    (limit,) = memory_limits(card, [(0, 10 * GB)], CONTEXT)
    assert limit.bytes == 10 * GB - CONTEXT and limit.reason.numbers == {"limit": limit.bytes}
    assert card.device_memory_bytes and limit.fraction == limit.bytes / card.device_memory_bytes < 1


@pytest.mark.parametrize(
    "hardware",
    [
        replace(RTX_3060, os="Linux 6.8.0-45-generic"),
        RTX_3060,  # a described machine that names no system
        replace(RX_9070_XT, os=WINDOWS),
        replace(apple(16), os="Darwin 24.1.0"),
        replace(RTX_3060, kind="cpu", os=WINDOWS),
        replace(RTX_3060, os=WINDOWS, device_memory_bytes=None),
    ],
)
def test_nothing_is_limited_where_the_driver_refuses_itself_or_sizes_are_unknown(hardware: Hardware) -> None:
    assert limited(hardware, (0, 10 * GB)) == []


def test_a_device_without_room_for_a_context_has_no_limit_and_none_is_above_its_memory() -> None:
    card = replace(RTX_3060, os=WINDOWS, device_memory_bytes=8 * GB)
    assert limited(card, (0, CONTEXT)) == [] and limited(card, (0, 0)) == []
    assert limited(card, (0, 20 * GB)) == [(0, 8 * GB)]


def test_each_of_two_devices_has_a_fraction_of_its_own_memory() -> None:
    two = replace(RTX_3090, os=WINDOWS, device_count=2, devices_memory_bytes=(24 * GB, 12 * GB))
    fractions = [limit.fraction for limit in memory_limits(two, [(0, 12 * GB), (1, 12 * GB)], 0)]
    assert fractions == [0.5, 1.0]


def test_a_limit_is_never_below_what_the_plan_expects_torch_to_hold() -> None:
    for wishes in ({}, {"limit_bytes": 8 * GB}, {"reserve_bytes": 2 * GB}):
        card: Any = replace(RTX_3060, os=WINDOWS)
        decided = plan(card, "ideogram-4", **wishes)
        (limit,) = PlanInputs.of(card, "ideogram-4", **wishes).memory_limits
        expected = decided.predicted.device
        assert decided.fits and expected and expected.allocated + expected.slack <= limit.bytes
        assert limit.bytes <= wishes.get("limit_bytes", 12 * GB) - DEVICE_CONTEXT_BYTES
        told = said(decided.reasons, "kept_within")
        assert told and told.numbers["limit"] == limit.bytes
    assert not said(plan(RTX_3060, "ideogram-4").reasons, "kept_within")


def test_a_comparison_sets_the_limit_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: calls.append(limit))
    request = Request("miniature", "a red circle", ("reference",), "turbo-12", 128, 128, device_limit_bytes=4 * GB)
    for system, expected in ((WINDOWS, 1), ("Linux 6.8.0", 0)):
        calls.clear()
        pictures = compare(planned(request, replace(RTX_3060, os=system)), Session(Store(tmp_path), tmp_path))
        assert next(pictures).phase == "encode"
        pictures.close()
        assert len(calls) == expected
        assert all(device == 0 and 0 < fraction < 4 * GB / 12e9 for fraction, device in calls)


def test_a_card_that_refuses_a_limit_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*limit: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", refuse)
    for limit in memory_limits(replace(RTX_3060, os=WINDOWS), [(0, 10 * GB)], CONTEXT):
        limit.apply()


def test_what_torch_then_raises_is_a_shortage_of_the_device_and_not_of_windows_promises() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 12.00 GiB of which 3.10 GiB is "
        "free. 8.50 GiB allowed; Of the allocated memory 8.00 GiB is allocated by PyTorch, and 0 bytes is reserved."
    )
    found = classify(torch.OutOfMemoryError(text), "denoise", windows=True)
    assert found == OutOfMemory("device", 2 * 2**30, "denoise", 2**29)
