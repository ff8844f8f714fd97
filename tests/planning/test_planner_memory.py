"""What a plan makes of free memory: on the device, in RAM, on disk, and around the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.machine.hardware import DeviceUser
from ideogram_app.planning.activations import Drawing
from ideogram_app.planning.footprint import footprint
from ideogram_app.planning.inputs import TILE_SIDES, WINDOWS_LOCKED_SHARE, PlanInputs
from ideogram_app.planning.placement import place, with_slots
from ideogram_app.planning.profile import MachineProfile, MeasuredRates
from ideogram_app.text import gb
from tests.machines import (
    GB,
    GIB,
    INT8,
    Q4_K,
    RTX_3060,
    RTX_3090,
    RTX_4060,
    RTX_4090,
    RTX_5090,
    RX_9070_XT,
    geforce,
    said,
)
from tests.plan_by_name import plan

# Free memory counts.


def test_the_sentence_for_a_24_gb_card_has_both_numbers() -> None:
    decided = plan(replace(RTX_3090, device_free_bytes=23_100_000_000), "ideogram-4")
    first = decided.reasons[0]
    assert first.text == "INT8 W8A8 rotated keeps both transformers (17.3 GB) in the 23.1 GB that are free."
    assert first.code == "resident" and first.numbers["free"] == 23_100_000_000
    assert gb(first.numbers["weights"]) == "17.3 GB"


def test_free_memory_counts_and_not_the_total() -> None:
    browser = (DeviceUser("chrome", 9 * GB),)
    busy = plan(replace(RTX_3090, device_free_bytes=15 * GB, device_users=browser), "ideogram-4")
    assert (busy.recipe, busy.residency) == (INT8, "streamed")
    told = said(busy.reasons, "device_users")
    assert told and "chrome (9.0 GB)" in told.text


def test_what_others_hold_is_suggested_to_be_freed() -> None:
    busy = replace(RX_9070_XT, device_memory_bytes=32 * GIB)
    assert plan(busy, "ideogram-4").suggestion.code == "more_device_memory"


def test_a_reserve_is_left_free_and_named() -> None:
    decided = plan(RTX_3090, "ideogram-4", reserve_bytes=6 * GB)
    assert decided.residency == "streamed"
    assert decided.predicted.peak_device_bytes <= (RTX_3090.device_free_bytes or 0) - 6 * GB
    told = said(decided.reasons, "reserve")
    assert told and told.numbers == {"reserve": 6 * GB}


@pytest.mark.parametrize("limit", range(4, 20))
@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (2048, 2048)], ids=str)
def test_a_limit_is_kept_in_every_phase_and_named(limit: int, size: tuple[int, int]) -> None:
    decided = plan(RTX_3090, "ideogram-4", width=size[0], height=size[1], limit_bytes=limit * GB)
    told = said(decided.reasons, "limit")
    assert told and told.numbers == {"limit": limit * GB}
    assert not decided.fits or decided.predicted.peak_device_bytes <= limit * GB
    assert decided.fits or limit < 8


def test_a_reserve_and_a_limit_together_leave_the_smaller_of_both() -> None:
    free = RTX_3090.device_free_bytes or 0
    both = plan(RTX_3090, "ideogram-4", reserve_bytes=free - 14 * GB, limit_bytes=16 * GB)
    assert both.predicted == plan(RTX_3090, "ideogram-4", limit_bytes=14 * GB).predicted


def test_a_described_card_without_free_memory_is_assumed_to_serve_a_desktop() -> None:
    assert plan(replace(RTX_3090, device_free_bytes=None), "ideogram-4").recipe == INT8


# What travels.


def test_a_streamed_plan_says_how_many_blocks_of_each_transformer_travel() -> None:
    decided = plan(RTX_4060, "ideogram-4")
    block = footprint(Drawing(MODELS["ideogram-4"], RECIPES[INT8], (1024, 1024), 2)).block
    first, second = decided.streamed_blocks
    assert decided.slots == 2 and 0 < second <= first <= second + 1 <= 34
    assert decided.streamed_bytes == (first + second) * block
    assert decided.predicted.peak_host_bytes > decided.streamed_bytes


def test_no_block_travels_that_would_have_had_room() -> None:
    decided = plan(RTX_3060, "ideogram-4")
    block = footprint(Drawing(MODELS["ideogram-4"], RECIPES[INT8], (1024, 1024), 2)).block
    assert 0 <= (RTX_3060.device_free_bytes or 0) - decided.predicted.peak_device_bytes < 1.1 * block


def test_a_little_too_little_memory_streams_a_little_of_int8() -> None:
    decided = plan(replace(RTX_3090, device_free_bytes=19 * GB), "ideogram-4")
    assert (decided.recipe, decided.residency) == (INT8, "streamed")
    assert 0 < decided.streamed_bytes < 0.2 * decided.predicted.weight_bytes


def test_resident_plans_let_nothing_travel() -> None:
    decided = plan(RTX_3090, "ideogram-4")
    assert (decided.streamed_bytes, decided.streamed_blocks, decided.slots) == (0, (0, 0), 0)


def test_copies_that_hide_cost_no_more_than_the_overhead() -> None:
    whole = plan(RTX_4090, "ideogram-4").predicted.seconds_per_step
    part = plan(RTX_4090, "ideogram-4", limit_bytes=12 * GB).predicted.seconds_per_step
    assert whole and part and whole < part < 1.07 * whole


def test_a_third_place_is_taken_where_it_makes_a_step_faster() -> None:
    """Where copies take about as long as computing, now and then one is late, unless another block is ready.

    At 8 GB that is so somewhere between 6 and 16 GB/s; where exactly depends on how many blocks must travel.
    """
    slots = set()
    for link in range(6, 17):
        known = MachineProfile(MeasuredRates(link=link * 1e9))
        job = PlanInputs(RTX_4090, MODELS["ideogram-4"], (1024, 1024), limit_bytes=8 * GB, known=known)
        placed = place(job, RECIPES[INT8])
        slots.add(placed.slots)
        two, three = (
            with_slots(job, replace(placed, streamed_blocks=(0, 0), slots=0), [link * 1e9], count) for count in (2, 3)
        )
        assert two and three and two.seconds and three.seconds
        assert sum(three.streamed_blocks) == sum(two.streamed_blocks) + 1
        assert placed.slots == (3 if three.seconds < two.seconds else 2)
    assert slots == {2, 3}


def test_a_slow_link_is_waited_for_and_said_so() -> None:
    """A card in a slot of four PCIe 3 lanes: 12 GB of blocks at 3 GB/s take longer than the step itself."""
    known = MachineProfile(MeasuredRates(link=3e9))
    decided = plan(RTX_4090, "ideogram-4", recipe=INT8, limit_bytes=8 * GB, known=known)
    waiting = decided.streamed_bytes / 3e9
    assert decided.predicted.seconds_per_step == pytest.approx(waiting, rel=0.01)
    slow, measured = (said(decided.reasons, row) for row in ("copies_waited_for", "measured"))
    assert slow and slow.numbers["copying"] == pytest.approx(waiting) and slow.numbers["waits"] > 0
    assert measured and measured.numbers == {"link": 3.0}


# RAM.


def test_windows_locks_less_ram_than_is_free() -> None:
    """The 14.5 GB that an RTX 2060 would need are free, but Windows locks 40 % of 32 GiB: 13.7 GB."""
    hardware = geforce("RTX 2060", (7, 5), 6, 32)
    assert plan(hardware, "ideogram-4").recipe == INT8
    windows = plan(replace(hardware, os="Windows 11"), "ideogram-4")
    assert (windows.recipe, windows.residency) == (Q4_K, "streamed")
    assert windows.streamed_bytes <= WINDOWS_LOCKED_SHARE * 32 * GIB
    (row,) = (row for row in windows.rejected if (row.recipe, row.residency) == (INT8, "streamed"))
    assert row.reason.code == "no_ram_to_stream+windows_locks_half"


def test_too_little_ram_for_int8_says_how_much_more_would_do() -> None:
    hardware = geforce("RTX 3060", (8, 6), 12, 16)
    suggestion = plan(hardware, "ideogram-4").suggestion
    assert suggestion.code == "more_ram_streams" and "INT8 W8A8 rotated" in suggestion.text
    more = (hardware.host_free_bytes or 0) + int(suggestion.numbers["missing"])
    assert plan(replace(hardware, host_free_bytes=more), "ideogram-4").recipe == INT8


def test_little_ram_leaves_the_disk_and_too_little_leaves_nothing() -> None:
    # 2.0 GB for the process, 2.0 to pack one matrix, 1.9 for the layers that run once a picture, and two blocks
    slow = plan(replace(RTX_4060, host_free_bytes=round(6.5 * GB)), "ideogram-4")
    assert (slow.recipe, slow.residency) == (Q4_K, "disk")
    assert said(slow.reasons, "ram_lacks")
    none = plan(replace(RTX_4060, host_free_bytes=2 * GB), "ideogram-4")
    assert none.recipe is None and said([none.suggestion], "free_ram")


def test_each_device_that_blocks_come_to_from_disk_has_two_buffers_in_ram() -> None:
    few = replace(RTX_4060, host_free_bytes=7 * GB)
    one, two = (
        plan(replace(few, device_count=count), "ideogram-4", recipe=Q4_K, limit_bytes=5 * GB) for count in (1, 2)
    )
    assert one.residency == two.residency == "disk" and all(two.streamed_blocks)
    assert two.branch_devices == ("cuda:0", "cuda:1")
    assert two.predicted.locked_host_bytes == 2 * one.predicted.locked_host_bytes > 0


# Disk space.


def test_a_full_disk_refuses_and_names_how_much_is_missing() -> None:
    decided = plan(replace(RTX_3090, disk_free_bytes=30 * GB), "ideogram-4")
    assert decided.recipe is None and not decided.fits
    missing = [gb(each.numbers["missing"]) for each in decided.reasons if each.code == "disk_lacks"]
    assert missing == ["30.9 GB", "21.5 GB"]  # the better recipe first
    assert said([decided.suggestion], "free_disk")


def test_a_disk_that_holds_only_the_smaller_recipe_gets_it() -> None:
    assert plan(replace(RTX_3090, disk_free_bytes=53 * GB), "ideogram-4").recipe == Q4_K


def test_what_is_stored_already_need_not_fit_again() -> None:
    hardware = replace(RTX_3090, disk_free_bytes=GB)
    assert not plan(hardware, "ideogram-4").fits
    assert plan(hardware, "ideogram-4", stored_bytes=56 * GB).recipe == INT8


def test_a_recipe_that_is_ready_needs_no_disk_even_after_its_download_was_deleted() -> None:
    hardware = replace(RTX_3090, disk_free_bytes=GB)
    decided = plan(hardware, "ideogram-4", ready=(Q4_K,))
    assert (decided.recipe, decided.fits) == (Q4_K, True)
    assert not plan(hardware, "ideogram-4", recipe="fp8", ready=(Q4_K,)).fits


# What surrounds the steps.


def test_a_large_picture_is_decoded_in_the_largest_tiles_that_fit() -> None:
    whole = plan(RTX_3090, "ideogram-4")
    assert (whole.decode, whole.decode_tile) == ("whole", 0)
    sides = []
    for free in (9, 12, 16, 20, 24, 30, 40):
        decided = plan(
            replace(RTX_3090, device_free_bytes=free * GB), "ideogram-4", width=2048, height=2048, recipe=Q4_K
        )
        assert (decided.decode == "tiled") is (decided.decode_tile > 0)
        assert decided.decode_tile in (0, *TILE_SIDES)
        if decided.decode_tile:
            told = said(decided.reasons, "decoded_in_tiles")
            assert told and told.numbers["side"] == decided.decode_tile
        sides.append(decided.decode_tile or 2048)
    assert sides == sorted(sides) and sides[-1] == 2048


def test_the_encoder_stays_visits_or_passes_through_as_memory_allows() -> None:
    homes = [plan(replace(RTX_5090, device_free_bytes=free * GB), "ideogram-4").encoder for free in (6, 7, 12, 24, 40)]
    assert homes == ["streamed", "streamed", "staged", "staged", "resident"]


def test_a_short_caption_takes_less_memory_and_is_named() -> None:
    short, long = (plan(RTX_3060, "ideogram-4", text_tokens=tokens) for tokens in (100, 2048))
    assert short.streamed_bytes <= long.streamed_bytes
    told = said(short.reasons, "caption")
    assert told and told.numbers["tokens"] == 100
    assert not said(long.reasons, "caption")


def test_a_longer_caption_takes_longer() -> None:
    times = [plan(RTX_3090, "ideogram-4", text_tokens=n).predicted.seconds_per_step or 0.0 for n in (10, 300, 1000)]
    assert times == sorted(set(times))
    # the longest stands for one that is not known: memory is planned for it, time for a usual one
    assert plan(RTX_3090, "ideogram-4").predicted.seconds_per_step == times[1]
