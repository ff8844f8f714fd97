"""What a machine has shown of itself: measured once, learnt from pictures, never in anybody's way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ideogram_app.generation.captions import parse_prompt
from ideogram_app.machine import microbench as probe
from ideogram_app.machine.gpu_specs import MeasuredRates
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.profile import FILE, Observation, ProfileStore
from ideogram_app.records import Request
from ideogram_app.studio.local_backend import LocalBackend
from tests.plan_by_name import plan, planned

CARD = Hardware(
    kind="cuda",
    name="NVIDIA GeForce RTX 3060",
    compute_capability=(8, 6),
    device_memory_bytes=12 * 10**9,
    device_free_bytes=11 * 10**9,
    torch="2.13.0",
)
SEEN = Observation("ideogram-4", "w8a8", 1024, 1024, 300, 3.0)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A probe that answers at once; every call is noted."""
    calls: list[torch.device] = []

    def answer(device: torch.device, folder: Path | None = None) -> MeasuredRates:
        calls.append(device)
        return MeasuredRates(25.0, 100.0, 12e9, 2e9)

    monkeypatch.setattr(probe, "probe", answer)
    return calls


def test_a_card_is_measured_once_and_remembered_by_the_next_program(probed: list[torch.device], tmp_path: Path) -> None:
    first = ProfileStore(tmp_path).known(CARD)
    assert first and first.measured == MeasuredRates(25.0, 100.0, 12e9, 2e9)
    assert ProfileStore(tmp_path).known(CARD) == first and len(probed) == 1


@pytest.mark.parametrize(
    "machine",
    [
        Hardware(name="A processor", torch="2.13.0"),
        Hardware(kind="cuda", name="Full", device_free_bytes=10**9),
        Hardware(kind="cuda", name="Old", device_free_bytes=10**10, torch_supports_device=False),
    ],
    ids=lambda machine: machine.name,
)
def test_what_cannot_be_measured_is_left_alone(machine: Hardware, probed: list[torch.device], tmp_path: Path) -> None:
    assert ProfileStore(tmp_path).known(machine) is None and probed == []


def test_a_card_that_refuses_is_asked_once_and_still_learns_from_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[int] = []

    def refuse(*_: object) -> MeasuredRates:
        calls.append(1)
        raise RuntimeError("the device is busy")

    monkeypatch.setattr(probe, "probe", refuse)
    learning = ProfileStore(tmp_path)
    assert learning.known(CARD) is None and learning.known(CARD) is None and len(calls) == 1
    learning.note(CARD, SEEN)
    known = learning.known(CARD)
    assert known and known.share("ideogram-4", "w8a8")


def test_a_folder_that_cannot_be_written_to_keeps_nobody_from_drawing(
    probed: list[torch.device], tmp_path: Path
) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    learning = ProfileStore(tmp_path / "data")
    assert learning.known(CARD)
    learning.note(CARD, SEEN)


@pytest.mark.slow
def test_a_picture_drawn_on_a_processor_tells_the_next_plan_how_long_a_step_takes(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "data")
    machine = backend.detect()
    assert backend.known(machine) is None and plan(machine, "miniature").predicted.seconds_per_step is None
    request = Request("miniature", parse_prompt("a red circle").caption, ("reference",), "turbo-12", 64, 64)
    results = []
    for number in range(3):
        events = backend.compare(planned(request, machine), tmp_path / str(number))
        results += [event.result for event in events if event.result]
    assert (tmp_path / "data" / FILE).exists()
    known = backend.known(machine)
    expected = plan(machine, "miniature", width=64, height=64, recipe="reference", known=known)
    seconds = sorted(result.seconds_per_step or 0 for result in results)
    # 2048 tokens of text stand for a caption not known yet and are timed as 300; this one has some 60
    assert seconds[0] / 2 < (expected.predicted.seconds_per_step or 0) < 20 * seconds[-1]
    assert backend.loaded() == "Reference of Miniature"
    backend.unload()
    assert backend.loaded() == ""
