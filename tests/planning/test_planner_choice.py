"""Which recipe a plan takes: quality first, what was asked for, one device or two, bits in a product."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.reasons import NOTHING
from ideogram_app.catalog.recipes import RECIPES, find_recipe
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.activations import Drawing
from ideogram_app.planning.footprint import device_bytes, footprint
from ideogram_app.planning.inputs import DeviceAssignment, PlanInputs
from ideogram_app.planning.placement import place
from ideogram_app.planning.policy import PREFERRED_RECIPES, SLOWER_AT_MOST, STREAMED_AT_MOST, reason_against
from ideogram_app.planning.profile import MachineProfile, MeasuredRates
from tests.machines import (
    GB,
    GTX_1060,
    GTX_1660,
    INT8,
    PROCESSOR,
    Q4_K,
    RTX_2080_TI,
    RTX_3060,
    RTX_3090,
    RTX_4060,
    RTX_4060_TI,
    RTX_4090,
    RX_9070_XT,
    geforce,
    machine,
    said,
)
from tests.plan_by_name import plan

# Quality first, unless it costs more than 1.3 times the time.


@pytest.mark.parametrize(("link_gb", "recipe"), [(24, INT8), (8, INT8), (6, Q4_K), (3, Q4_K)])
def test_int8_gives_way_where_its_blocks_take_too_long_to_arrive(link_gb: float, recipe: str) -> None:
    decided = plan(RTX_4090, "ideogram-4", limit_bytes=8 * GB, known=MachineProfile(MeasuredRates(link=link_gb * 1e9)))
    assert decided.recipe == recipe
    if recipe == Q4_K:
        first = decided.reasons[0]
        assert first.code == "not_taken+too_slow_from_ram"
        assert first.numbers["times"] > first.numbers["accepted"] == SLOWER_AT_MOST


@pytest.mark.parametrize(("times", "accepted"), [(0.9, True), (1.0, True), (1.299, True), (1.301, False), (2.0, False)])
def test_the_rule_is_1_3_times_the_time_and_no_more(times: float, accepted: bool) -> None:
    assert SLOWER_AT_MOST == 1.3
    job = PlanInputs(RTX_4060, MODELS["ideogram-4"], (1024, 1024))
    better, smaller = (place(job, find_recipe(name)) for name in PREFERRED_RECIPES)
    against = reason_against(job, replace(better, seconds=3.0 * times), replace(smaller, seconds=3.0))
    assert against.code == ("" if accepted else "too_slow_from_ram")


def test_a_resident_int8_is_taken_whatever_it_costs() -> None:
    job = PlanInputs(RTX_3090, MODELS["ideogram-4"], (1024, 1024))
    better, smaller = (place(job, find_recipe(name)) for name in PREFERRED_RECIPES)
    assert reason_against(job, replace(better, seconds=9.0), replace(smaller, seconds=1.0)) is NOTHING


@pytest.mark.parametrize("over", [False, True])
def test_where_no_time_is_known_a_fifth_may_travel_and_no_more(over: bool) -> None:
    job = PlanInputs(RX_9070_XT, MODELS["ideogram-4"], (1024, 1024))
    better, smaller = (place(job, find_recipe(name)) for name in PREFERRED_RECIPES)
    assert better.seconds is None
    moved = int(STREAMED_AT_MOST * better.size.weights / better.size.block) + over
    against = reason_against(job, replace(better, streamed_blocks=(moved, 0)), smaller)
    assert against.code == ("too_much_travels" if over else "")


def test_times_measured_on_an_unknown_card_replace_the_share() -> None:
    known = MachineProfile(MeasuredRates(tflops_16bit=90.0, tops_int8=300.0, link=24e9))
    decided = plan(RX_9070_XT, "ideogram-4", known=known)
    assert (decided.recipe, decided.residency) == (INT8, "streamed")
    assert decided.predicted.seconds_per_step is not None


@pytest.mark.parametrize(("disk_gb", "recipe"), [(None, Q4_K), (0.5, Q4_K), (7.0, INT8)])
def test_int8_from_disk_needs_a_disk_that_was_measured_and_is_fast(disk_gb: float | None, recipe: str) -> None:
    known = MachineProfile(MeasuredRates(disk=disk_gb * 1e9 if disk_gb else None))
    decided = plan(geforce("RTX 3060", (8, 6), 12, 16), "ideogram-4", known=known)
    assert decided.recipe == recipe
    assert recipe == Q4_K or decided.residency == "disk"


def test_a_disk_that_was_not_measured_is_said_to_be_assumed() -> None:
    few = replace(RTX_4060, host_free_bytes=round(6.5 * GB))
    assumed = plan(few, "ideogram-4").reasons[1]
    assert said([assumed], "disk_assumed") and assumed.numbers["gigabytes"] == 2.0
    measured = plan(few, "ideogram-4", recipe=Q4_K, known=MachineProfile(MeasuredRates(disk=1e9)))
    assert measured.residency == "disk" and said(measured.reasons, "ram_lacks") is measured.reasons[0]
    assert not said(measured.reasons, "disk_assumed")


def test_the_time_of_a_laptop_part_is_said_to_be_that_of_the_slowest() -> None:
    laptop = geforce("RTX 4060 Laptop GPU", (8, 9), 8, 32)
    assert said(plan(laptop, "ideogram-4").reasons, "laptop")
    assert not said(plan(RTX_4060, "ideogram-4").reasons, "laptop")
    measured = MachineProfile(MeasuredRates(60.0, 240.0, 12e9))
    assert not said(plan(laptop, "ideogram-4", known=measured).reasons, "laptop")


def test_four_bits_are_rejected_with_both_times() -> None:
    decided = plan(RTX_4060, "ideogram-4")
    (row,) = (row for row in decided.rejected if row.recipe == Q4_K)
    told = row.reason.numbers
    assert row.reason.code == "closer_in_time"
    assert told["seconds"] == decided.predicted.seconds_per_step == pytest.approx(told["times"] * told["best"])
    assert told["accepted"] == SLOWER_AT_MOST and told["saved"] > 0


# Recipes asked for by name.


def test_a_recipe_asked_for_is_kept_where_it_can_run_at_all() -> None:
    hardware = replace(RTX_3060, host_free_bytes=60 * GB)
    for recipe in RECIPES:
        decided = plan(hardware, "ideogram-4", recipe=recipe)
        assert decided.requested_recipe == recipe
        assert decided.recipe == recipe
    assert plan(RTX_3060, "ideogram-4", recipe="int8-w8a8").residency == "streamed"


def test_a_recipe_asked_for_is_never_swapped() -> None:
    hardware = replace(RTX_3090, disk_free_bytes=53 * GB)
    decided = plan(hardware, "ideogram-4", recipe="int8-w8a8")
    assert (decided.recipe, decided.fits, decided.requested_recipe) == (None, False, "int8-w8a8")
    assert [row.recipe for row in decided.rejected] == ["int8-w8a8"]
    assert decided.suggestion.code == "unasked" and "GGUF Q4_K" in decided.suggestion.text


def test_int8_asked_for_on_a_card_without_units_says_so() -> None:
    decided = plan(GTX_1060, "ideogram-4", recipe="int8-w8a8")
    assert decided.recipe == "int8-w8a8"
    assert said(decided.reasons, "int8_asked")


# Two devices.


def test_two_cards_take_one_transformer_each_where_one_is_too_small() -> None:
    decided = plan(replace(RTX_4060_TI, device_count=2), "ideogram-4")
    assert (decided.recipe, decided.residency) == (INT8, "resident")
    assert decided.branch_devices == ("cuda:0", "cuda:1")


def test_two_cards_take_one_transformer_each_also_where_one_would_do() -> None:
    alone, pair = (plan(replace(RTX_3090, device_count=count), "ideogram-4") for count in (1, 2))
    assert alone.branch_devices == ("cuda:0", "cuda:0") and pair.branch_devices == ("cuda:0", "cuda:1")
    one, two = alone.predicted.seconds_per_step, pair.predicted.seconds_per_step
    # the conditional transformer sees 4096 tokens of the image and 300 of text, the other the image alone
    assert one and two and 4396 / 8492 < two / one < 1.02 * 4396 / 8492
    (row,) = (row for row in pair.rejected if row.recipe == INT8)
    assert row.reason.code == "alone_slower"
    assert (row.reason.numbers["seconds"], row.reason.numbers["best"]) == (one, two)


def test_the_conditional_transformer_has_the_freer_card_and_each_its_own_part_on_the_road() -> None:
    decided = plan(replace(RTX_4060_TI, device_count=2, devices_free_bytes=(5 * GB, 14 * GB)), "ideogram-4")
    assert (decided.recipe, decided.residency) == (INT8, "streamed")
    assert decided.branch_devices == ("cuda:1", "cuda:0") and decided.device == "cuda:1"
    assert decided.streamed_blocks[0] == 0 < decided.streamed_blocks[1]
    assert decided.predicted.peak_device_bytes <= 14 * GB


def test_the_peak_is_that_of_the_fuller_of_two_devices() -> None:
    two = replace(RTX_4060_TI, device_count=2, devices_free_bytes=(14 * GB, 14 * GB))
    decided = plan(two, "ideogram-4")
    size = footprint(Drawing(MODELS["ideogram-4"], RECIPES[INT8], (1024, 1024), 2))
    assert decided.predicted.peak_device_bytes >= device_bytes(max(size.branches), size.workspace)


def test_cards_of_two_kinds_are_paired_only_if_both_speeds_are_known() -> None:
    two = replace(RTX_4090, device_count=2, devices_free_bytes=(22 * GB, 11 * GB))
    slow = replace(two, device_names=("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"))
    strange = replace(two, device_names=("NVIDIA GeForce RTX 4090", "NVIDIA Titan V"))
    for hardware in (slow, strange):
        assert plan(hardware, "ideogram-4").branch_devices == ("cuda:0", "cuda:0")
    alike = replace(two, device_names=("NVIDIA GeForce RTX 4090",) * 2)
    assert plan(alike, "ideogram-4").branch_devices == ("cuda:0", "cuda:1")
    decided = plan(slow, "ideogram-4")
    told = said((row.reason for row in decided.rejected), "pair_slower")
    assert told and told.numbers["seconds"] > told.numbers["best"] == decided.predicted.seconds_per_step


@pytest.mark.parametrize(
    ("first", "second", "free", "code"),
    [
        (RTX_3090, "NVIDIA GeForce RTX 2080 Ti", (10 * GB, 11 * GB), "pair_unlike"),
        (RTX_3060, "Tesla V100-SXM2-32GB", (11 * GB, 32 * GB), "pair_unlike"),
        (RTX_2080_TI, "NVIDIA GeForce RTX 4090", (11 * GB, 24 * GB), "pair_unlike"),
    ],
)
def test_cards_that_compute_in_different_ways_are_not_paired_and_the_plan_says_why(
    first: Hardware, second: str, free: tuple[int, int], code: str
) -> None:
    """Known by their names alone, as a machine is that somebody describes."""
    two = replace(first, device_count=2, devices_free_bytes=free, device_names=(first.name, second))
    decided = plan(two, "ideogram-4")
    assert decided.fits and decided.branch_devices == ("cuda:0", "cuda:0")
    told = said(decided.reasons, "not_paired")
    assert told and told.code == f"not_paired+{code}" and second in told.text


def test_of_three_cards_the_one_that_torch_does_not_serve_is_left_out() -> None:
    three = replace(
        RTX_3060,
        device_count=3,
        devices_free_bytes=(11 * GB, 30 * GB, 10 * GB),
        device_names=(RTX_3060.name, "Tesla V100-SXM2-32GB", RTX_3060.name),
        device_capabilities=((8, 6), (7, 0), (8, 6)),
        devices_supported=(True, False, True),
    )
    decided = plan(three, "ideogram-4")
    assert decided.branch_devices == ("cuda:0", "cuda:2") and not said(decided.reasons, "not_paired")


def test_the_machine_may_be_described_by_another_card_than_the_first() -> None:
    names = ("Tesla V100-SXM2-32GB", RTX_3060.name)
    two = replace(
        RTX_3060,
        device_count=2,
        device_index=1,
        devices_free_bytes=(30 * GB, 11 * GB),
        device_names=names,
        devices_supported=(False, True),
    )
    lists_too_few = replace(two, devices_free_bytes=(30 * GB,))
    assert plan(lists_too_few, "ideogram-4").branch_devices == ("cuda:1", "cuda:1")
    decided, alone = plan(two, "ideogram-4"), plan(replace(RTX_3060, device_free_bytes=11 * GB), "ideogram-4")
    assert decided.branch_devices == ("cuda:1", "cuda:1")
    assert decided.predicted == alone.predicted


def test_a_freer_card_of_another_kind_does_not_work_alone() -> None:
    names = ("NVIDIA GeForce RTX 4090", "NVIDIA Titan V")
    hardware = replace(RTX_4090, device_count=2, devices_free_bytes=(11 * GB, 12 * GB), device_names=names)
    decided = plan(hardware, "ideogram-4")
    assert decided.branch_devices == ("cuda:0", "cuda:0") and decided.predicted.peak_device_bytes <= 11 * GB


def test_of_two_equal_cards_the_freer_one_would_work_alone() -> None:
    job = PlanInputs(
        replace(RTX_4090, device_count=2, devices_free_bytes=(11 * GB, 12 * GB)), MODELS["miniature"], (128, 128), ""
    )
    assert job.device_assignments()[0] == (DeviceAssignment(1, 12 * GB, (0, 1)),) and job.device_free == 12 * GB


def test_two_devices_without_known_times_are_used_too() -> None:
    amd = machine("AMD Radeon RX 7900 XTX", (11, 0), 24, kind="rocm", device_count=2)
    decided = plan(amd, "ideogram-4")
    assert decided.branch_devices == ("cuda:0", "cuda:1")
    assert decided.reasons[0].code == "resident_pair"


# Arithmetic.


def test_turing_is_told_whose_int8_products_it_gets() -> None:
    for card in (RTX_2080_TI, RTX_3090, GTX_1660):
        assert bool(said(plan(card, "ideogram-4").reasons, "int8_of_pytorch")) == (card is RTX_2080_TI)


@pytest.mark.parametrize(
    ("hardware", "arithmetic"),
    [(RTX_3090, "w4a8"), (GTX_1660, "w4a16"), (PROCESSOR, "w4a16"), (replace(RTX_3090, kind="rocm"), "w4a16")],
    ids=["Ampere", "Turing without tensor cores", "a processor", "AMD"],
)
def test_four_bit_weights_meet_int8_units_where_there_are_some(hardware: Hardware, arithmetic: str) -> None:
    model = "miniature" if hardware.kind == "cpu" else "ideogram-4"
    decided = plan(hardware, model, recipe=Q4_K)
    assert decided.arithmetic == arithmetic
    row = "q4_k_to_int8" if arithmetic == "w4a8" else "q4_k_to_dense"
    assert bool(said(decided.reasons, row)) == (hardware.kind != "cpu")
