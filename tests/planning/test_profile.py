"""What a machine has shown of itself: kept, read back, learnt from pictures, and counted with by the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ideogram_app.machine.gpu_specs import CARDS, MeasuredRates, find_rates
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.planner import Plan
from ideogram_app.planning.profile import (
    FILE,
    RECENT_PICTURES,
    MachineProfile,
    Observation,
    key,
    known_rates,
    learn,
    read,
    with_rates,
    write,
)
from tests.plan_by_name import plan

GIB = 2**30
NAME = "NVIDIA GeForce RTX 3090"
CARD = Hardware(
    kind="cuda",
    name=NAME,
    compute_capability=(8, 6),
    device_memory_bytes=24 * GIB,
    device_free_bytes=23 * GIB,
    host_memory_bytes=64 * GIB,
    host_free_bytes=50 * GIB,
    disk_free_bytes=500 * 10**9,
)
PROCESSOR = Hardware(name="AMD Ryzen 9", host_free_bytes=20 * 10**9, disk_free_bytes=500 * 10**9)
EVERYTHING = MachineProfile(
    MeasuredRates(61.5, 213.0, 23.9e9, 3.1e9), {"miniature/w8a8": (0.011, 0.012), "ideogram-4/w4a8": (0.4,)}
)


def observed(decided: Plan, seconds: float, text_tokens: int = 300) -> Observation:
    """A picture that was drawn by this plan, at so many seconds a step."""
    return Observation(
        decided.model,
        decided.arithmetic,
        decided.width,
        decided.height,
        text_tokens,
        seconds,
        decided.streamed_bytes,
        decided.streamed_blocks,
        decided.residency == "disk",
        len(set(decided.branch_devices)),
    )


# The file.


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data" / FILE
    write(file, key(NAME, "2.13.0"), EVERYTHING)
    assert read(file, key(NAME, "2.13.0")) == EVERYTHING
    assert [path.name for path in file.parent.iterdir()] == [FILE]


def test_machines_and_versions_of_torch_share_a_file(tmp_path: Path) -> None:
    file, other = tmp_path / FILE, MachineProfile(MeasuredRates(1.0))
    write(file, key(NAME, "2.13.0"), EVERYTHING)
    write(file, key("AMD Ryzen 9", "2.13.0"), other)
    write(file, key("AMD Ryzen 9", "2.14.0"), MachineProfile())
    assert read(file, key(NAME, "2.13.0")) == EVERYTHING
    assert read(file, key("AMD Ryzen 9", "2.13.0")) == other
    assert read(file, key(NAME, "2.14.0")) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{oops",
        b"\xff\xfe\x00garbage",
        b"[]",
        b"null",
        b'{"machines": []}',
        b'{"machines": {"this": 3}}',
        b'{"machines": {"this": {"measured": {"link": -1.0}}}}',
        b'{"machines": {"this": {"measured": {"link": NaN}}}}',
        b'{"machines": {"this": {"measured": {"link": "fast"}}}}',
        b'{"machines": {"this": {"shares": {"miniature/w8a8": [0.0]}}}}',
        b'{"machines": {"this": {"shares": {"miniature/w8a8": "many"}}}}',
    ],
)
def test_a_damaged_or_alien_file_is_as_good_as_none_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / FILE
    file.write_bytes(content)
    assert read(file, "this") is None
    write(file, "this", EVERYTHING)
    assert read(file, "this") == EVERYTHING


def test_nothing_is_read_where_there_is_no_file(tmp_path: Path) -> None:
    assert read(tmp_path / "nowhere" / FILE, "this") is None
    assert read(tmp_path, "this") is None  # a folder


def test_a_row_that_is_damaged_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / FILE
    write(file, "good", EVERYTHING)
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows["machines"]["bad"] = {"measured": 7}
    file.write_text(json.dumps(rows), encoding="utf-8")
    assert read(file, "bad") is None and read(file, "good") == EVERYTHING


# Measured rates.


def test_measured_rates_stand_in_place_of_published_ones_one_by_one() -> None:
    published = find_rates(NAME)
    assert known_rates(NAME, None) == published == known_rates(NAME, MachineProfile())
    rates = known_rates(NAME, MachineProfile(MeasuredRates(link=6e9, disk=1e9)))
    assert published and rates == replace(published, link=6e9, disk=1e9)
    assert known_rates("Radeon", MachineProfile(MeasuredRates(link=6e9))) is None
    known = known_rates("Radeon", MachineProfile(MeasuredRates(tflops_16bit=50.0)))
    assert known and (known.tflops_16bit, known.tops_int8) == (50.0, 50.0)


def test_what_was_not_measured_anew_stays_and_shares_fall_only_with_their_peaks() -> None:
    disk_later = with_rates(EVERYTHING, MeasuredRates(disk=5e9))
    assert disk_later.measured == MeasuredRates(61.5, 213.0, 23.9e9, 5e9) and disk_later.shares == EVERYTHING.shares
    faster = with_rates(EVERYTHING, MeasuredRates(tflops_16bit=70.0))
    assert faster.measured == MeasuredRates(70.0, 213.0, 23.9e9, 3.1e9) and faster.shares == {}
    assert with_rates(None, MeasuredRates(link=1e9)) == MachineProfile(MeasuredRates(link=1e9))


def test_what_was_measured_is_told() -> None:
    (told,) = (each for each in plan(CARD, "ideogram-4", known=EVERYTHING).reasons if each.code == "measured")
    assert told.numbers == {"tflops_16bit": 61.5, "tops_int8": 213.0, "link": 23.9, "disk": 3.1}


# Learning from pictures.


@pytest.mark.parametrize("measured", [None, MeasuredRates(61.5, 213.0, 23.9e9)])
@pytest.mark.parametrize("recipe", ["int8-w8a8-rotated", "gguf-q4_k", "fp8", "reference"])
def test_a_plan_predicts_the_time_that_was_measured(recipe: str, measured: MeasuredRates | None) -> None:
    before = plan(CARD, "ideogram-4", recipe=recipe, known=MachineProfile(measured))
    known = learn(MachineProfile(measured), NAME, observed(before, 2.5))
    after = plan(CARD, "ideogram-4", recipe=recipe, known=known)
    if recipe == "reference":  # most of it travels, and copying is what it waits for at this pace
        assert after.residency == "streamed"
        return
    assert after.predicted.seconds_per_step == pytest.approx(2.5)
    assert "learned" in [each.code for each in after.reasons]


@pytest.mark.parametrize("limit", [8, 12, 16])
def test_a_streamed_plan_predicts_it_too_where_copies_hide(limit: int) -> None:
    how: dict[str, Any] = {"recipe": "int8-w8a8-rotated", "limit_bytes": limit * 10**9}
    known = learn(None, NAME, observed(plan(CARD, "ideogram-4", **how), 2.5))
    assert plan(CARD, "ideogram-4", **how, known=known).predicted.seconds_per_step == pytest.approx(2.5, rel=0.001)


def test_two_devices_are_learnt_as_the_longer_of_the_two() -> None:
    pair = replace(CARD, device_count=2)
    known = learn(None, NAME, observed(plan(pair, "ideogram-4"), 1.3))
    assert plan(pair, "ideogram-4", known=known).predicted.seconds_per_step == pytest.approx(1.3)
    alone = plan(CARD, "ideogram-4", known=known).predicted.seconds_per_step
    assert alone and 1.9 * 1.3 < alone < 2 * 1.3


def test_a_step_that_waited_for_copies_teaches_nothing() -> None:
    """12.7 GB at 12 GB/s take 1.06 s: a step of 1.2 s may have waited, one of 2 s did not."""
    moved = Observation("ideogram-4", "w8a8", 1024, 1024, 300, 1.2, 12_700_000_000, (25, 25))
    card = "NVIDIA GeForce RTX 4060"
    assert learn(EVERYTHING, card, replace(moved, streamed_bytes=24_000_000_000)) == EVERYTHING
    assert learn(MachineProfile(), card, moved) == MachineProfile()
    assert learn(MachineProfile(), card, replace(moved, seconds=2.0)).share("ideogram-4", "w8a8") is not None


def test_a_step_without_a_time_teaches_nothing() -> None:
    for seconds in (0.0, -1.0, float("nan")):
        assert learn(None, NAME, Observation("miniature", "w8a8", 128, 128, 20, seconds)) == MachineProfile()


def test_a_processor_learns_the_time_of_the_miniature_without_any_published_peak() -> None:
    before = plan(PROCESSOR, "miniature", recipe="gguf-q4_k")
    assert before.predicted.seconds_per_step is None
    known = learn(None, PROCESSOR.name, observed(before, 0.125))
    assert plan(PROCESSOR, "miniature", recipe="gguf-q4_k", known=known).predicted.seconds_per_step == pytest.approx(
        0.125
    )
    larger = plan(PROCESSOR, "miniature", recipe="gguf-q4_k", width=256, height=256, known=known)
    assert (larger.predicted.seconds_per_step or 0) > 1.5 * 0.125  # four times the image, the same text
    assert plan(PROCESSOR, "miniature", recipe="reference", known=known).predicted.seconds_per_step is None


def test_what_the_miniature_shows_is_not_taken_for_the_published_model() -> None:
    known = learn(None, NAME, Observation("miniature", "w8a8", 128, 128, 20, 0.02))
    published = plan(CARD, "ideogram-4")
    assert plan(CARD, "ideogram-4", known=known).predicted == published.predicted


def test_one_slow_picture_among_several_does_not_count_and_old_ones_are_forgotten() -> None:
    known: MachineProfile | None = None
    for seconds in (1.0, 1.0, 30.0, 1.0):
        known = learn(known, PROCESSOR.name, Observation("miniature", "w8a8", 128, 128, 300, seconds))
    predicted = plan(PROCESSOR, "miniature", known=known).predicted.seconds_per_step
    assert predicted == pytest.approx(1.0)
    for _ in range(RECENT_PICTURES):
        known = learn(known, PROCESSOR.name, Observation("miniature", "w8a8", 128, 128, 300, 2.0))
    assert known and len(known.shares["miniature/w8a8"]) == RECENT_PICTURES
    assert plan(PROCESSOR, "miniature", known=known).predicted.seconds_per_step == pytest.approx(2.0)


def test_the_choice_follows_what_was_learnt() -> None:
    """INT8 that turns out far slower here than Q4_K, as it may with another kernel, gives way where it streams."""
    streamed = replace(CARD, device_free_bytes=12 * 10**9)
    assert plan(streamed, "ideogram-4").recipe == "int8-w8a8-rotated"
    known = learn(None, NAME, Observation("ideogram-4", "w8a8", 1024, 1024, 300, 8.0))
    known = learn(known, NAME, Observation("ideogram-4", "w4a8", 1024, 1024, 300, 4.0))
    assert plan(streamed, "ideogram-4", known=known).recipe == "gguf-q4_k"


def test_every_card_of_the_table_can_be_remembered() -> None:
    for name in CARDS:
        assert learn(None, f"NVIDIA {name}", Observation("ideogram-4", "w8a8", 512, 512, 100, 1.0)).shares
