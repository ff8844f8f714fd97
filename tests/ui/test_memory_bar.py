"""Memory in use now: what is read, what is shown of it, and when a tab is told."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ideogram_app.machine import memory
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow, memory_now
from ideogram_app.studio.state import State
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.memory_bar import MOVED, has_moved, kept_loaded, memory_bar
from tests.fake_backend import Fake

GB = 10**9
CARD = Hardware(kind="cuda", name="Card", device_memory_bytes=24 * GB, device_free_bytes=22 * GB)
BUSY = MemoryNow(24 * GB, 13 * GB, 10 * GB, 32 * GB, 20 * GB, 6 * GB)


def torch_that(initialized: bool = True, **counters: Any) -> SimpleNamespace:
    """A torch of which only the counters are asked."""
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized,
        mem_get_info=lambda index: (13 * GB, 24 * GB),
        memory_reserved=lambda index: 10 * GB,
    )
    return SimpleNamespace(cuda=cuda, xpu=cuda, **counters)


def read(monkeypatch: pytest.MonkeyPatch, hardware: Hardware, torch: Any) -> MemoryNow:
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(memory, "host_memory", lambda: (32 * GB, 20 * GB))
    return memory_now(hardware)


def test_without_a_machine_or_a_device_only_ram_is_told() -> None:
    for hardware in (None, Hardware(), replace(CARD, kind="cpu")):
        now = memory_now(hardware)
        assert (now.device_total, now.device_free, now.device_ours, now.device_others) == (None, None, None, None)
        assert now.host_total and now.host_free and now.host_ours
        assert 0 < now.host_ours < now.host_total and 0 < now.host_free <= now.host_total


def test_resident_memory_of_this_process_is_ours() -> None:
    before = memory_now().host_ours or 0
    with mmap(-1, 64 * 2**20) as held:  # pages of its own: a heap may give out some that it has already
        held[::4096] = bytes([1]) * len(held[::4096])  # every page is touched, so that it is really there
        assert (memory_now().host_ours or 0) - before > 32 * 2**20


@pytest.mark.parametrize("kind", ["cuda", "rocm", "xpu"])
def test_of_a_device_the_allocators_share_is_ours_and_the_rest_the_others(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    now = read(monkeypatch, replace(CARD, kind=kind), torch_that())
    assert (now.device_total, now.device_free, now.device_ours, now.device_others) == (24 * GB, 13 * GB, 10 * GB, GB)


@pytest.mark.parametrize(
    "torch", [None, torch_that(initialized=False)], ids=["torch not loaded", "device not used yet"]
)
def test_a_device_that_was_not_touched_keeps_what_was_detected(monkeypatch: pytest.MonkeyPatch, torch: Any) -> None:
    now = read(monkeypatch, CARD, torch)
    assert (now.device_total, now.device_free, now.device_ours) == (24 * GB, 22 * GB, 0)


def test_where_device_and_ram_are_one_no_more_is_free_than_for_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torch_that(mps=SimpleNamespace(driver_allocated_memory=lambda: 2 * GB))
    now = read(monkeypatch, replace(CARD, kind="mps"), torch)
    assert (now.device_free, now.device_ours) == (20 * GB, 2 * GB)


def test_reading_never_loads_torch() -> None:
    code = (
        "import sys; from ideogram_app.machine.hardware import Hardware;"
        "from ideogram_app.machine.memory import memory_now;"
        "memory_now(Hardware(kind='cuda', device_memory_bytes=1, device_free_bytes=1)); print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_both_bars_say_in_words_what_they_draw() -> None:
    shown = memory_bar(BUSY, reserve_bytes=2 * GB)
    device, host = re.findall(r'role="meter" [^>]+>', shown)
    assert 'aria-label="Device memory in use"' in device and 'aria-label="RAM in use"' in host
    spoken = "10.0 GB this program, 1.00 GB others, 13.0 GB of 24.0 GB free, 2.00 GB reserved"
    assert f'aria-valuetext="{spoken}"' in device and 'aria-valuenow="11000000000"' in device
    assert re.findall(r"width:([\d.]+)%", shown) == ["41.7", "4.2", "8.3", "18.8", "18.8"]
    assert shown.count('class="reserve"') == 1


def test_on_a_machine_without_a_device_there_is_one_bar() -> None:
    shown = memory_bar(replace(BUSY, device_total=None, device_free=None, device_ours=None), reserve_bytes=2 * GB)
    assert shown.count('role="meter"') == 1 and "Device" not in shown and "reserve" not in shown


@pytest.mark.parametrize("name", ["device_free", "device_ours", "host_free", "host_ours"])
def test_a_tab_is_told_when_a_part_has_moved_by_a_hundredth_of_the_whole(name: str) -> None:
    whole = (BUSY.device_total if name.startswith("device") else BUSY.host_total) or 0
    for share, told in ((0.9, False), (1.1, True), (-0.9, False), (-1.1, True)):
        later = replace(BUSY, **{name: getattr(BUSY, name) + round(whole * MOVED * share)})
        assert has_moved(BUSY, later) is told


def test_a_device_that_appears_is_told_at_once() -> None:
    assert has_moved(replace(BUSY, device_total=None, device_free=None, device_ours=None), BUSY)


def test_what_is_kept_loaded_is_named_with_its_time_and_a_button() -> None:
    assert kept_loaded(State()) == ""
    shown = kept_loaded(State(loaded="INT8 <W8A8>", unloads_at=1_000_000.0))
    assert "INT8 &lt;W8A8&gt; stays loaded until" in shown and 'data-act="unload"' in shown
    assert "until" not in kept_loaded(State(loaded="INT8"))


def test_the_studio_asks_its_backend_and_keeps_the_reserve(tmp_path: Path) -> None:
    studio = Studio(Fake(in_use=BUSY), tmp_path, reserve_bytes=2 * GB)
    assert studio.memory() == BUSY and studio.reserve_bytes == 2 * GB
