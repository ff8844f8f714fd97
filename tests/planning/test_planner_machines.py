"""What each machine of a table runs and why, then machines without a device that torch can use."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.machine.attention import MATH
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.activations import Drawing, step_bytes
from ideogram_app.planning.planner import Plan
from ideogram_app.text import gb
from ideogram_app.wire import from_json, to_json
from tests.machines import GTX_1060, H100, INT8, MACHINES, PROCESSOR, Q4_K, RTX_5090, TABLE, apple, label, said
from tests.plan_by_name import plan

IDEOGRAM = MODELS["ideogram-4"]
DEEP = IDEOGRAM.conditional


@pytest.mark.parametrize(("hardware", "recipe", "residency", "dtype", "code"), TABLE, ids=label)
def test_each_machine_gets_what_suits_it_and_is_told_why(
    hardware: Hardware, recipe: str | None, residency: str | None, dtype: str, code: str
) -> None:
    decided = plan(hardware, "ideogram-4")
    assert (decided.recipe, decided.residency, decided.compute_dtype) == (recipe, residency, dtype)
    assert decided.fits is (recipe is not None)
    assert decided.reasons[0].code == code, decided.reasons[0]


@pytest.mark.parametrize("hardware", MACHINES, ids=label)
def test_every_plan_has_reasons_survives_the_wire_and_stays_within_free_memory(hardware: Hardware) -> None:
    for model in MODELS:
        decided = plan(hardware, model)
        assert decided.reasons and all(each.code and each.text.endswith(".") for each in decided.reasons)
        assert all(row.reason.code and row.reason.text.endswith(".") for row in decided.rejected)
        assert from_json(Plan, to_json(decided)) == decided
        if decided.fits and hardware.device_free_bytes:
            assert decided.predicted.peak_device_bytes <= hardware.device_free_bytes
        if not decided.fits:
            assert decided.suggestion and decided.rejected


@pytest.mark.parametrize("hardware", MACHINES, ids=label)
def test_every_better_home_and_recipe_was_rejected_with_numbers(hardware: Hardware) -> None:
    decided = plan(hardware, "ideogram-4")
    rejected = {(row.recipe, row.residency): row.reason for row in decided.rejected}
    if decided.residency in ("streamed", "disk"):
        resident = rejected[decided.recipe, "resident"]
        assert resident.code in ("no_room_for_both", "no_room_for_one")
        assert resident.numbers["needed"] > resident.numbers["free"]
    if decided.residency == "disk":
        assert rejected[decided.recipe, "streamed"]
    if decided.recipe == Q4_K:
        assert any(recipe == INT8 for recipe, _ in rejected)
    if decided.recipe == INT8:
        (other,) = (reason for (recipe, _), reason in rejected.items() if recipe == Q4_K)
        assert other.code in ("closer_with_room", "closer_in_time") and gb(other.numbers["saved"]) == "7.6 GB"


@pytest.mark.parametrize("hardware", MACHINES, ids=label)
def test_the_miniature_fits_everywhere_and_shows_int8(hardware: Hardware) -> None:
    decided = plan(hardware, "miniature")
    assert (decided.recipe, decided.residency, decided.fits) == (INT8, "resident", True)
    assert decided.predicted.download_bytes == 0
    assert decided.predicted.seconds_per_step is None  # too small to fill a card: no peak says how long it takes


def test_a_mac_holds_one_run_of_scores_however_large_the_picture_is() -> None:
    """All of them would be 20 GB and more of 2048 x 2048 pixels, and Metal aborts the process from 4 GiB on."""
    large = plan(apple(36), "ideogram-4", width=2048, height=2048)
    assert (large.recipe, large.residency) == (Q4_K, "resident")
    assert large.predicted.device and large.predicted.device.activations < 10**10, "decoding it whole takes the most"
    recipe, sides = RECIPES[Q4_K], (1024, 2048)
    small, wide = (step_bytes(Drawing(IDEOGRAM, recipe, (side, side), 2, attention=MATH), DEEP, True) for side in sides)
    assert wide < 4 * small, "it grows with the picture, and no longer with its square"


# torch, and machines without a device.


def test_a_torch_without_kernels_for_the_card_refuses_and_says_which_to_install() -> None:
    pascal = plan(replace(GTX_1060, torch_supports_device=False, torch="2.13.0+cu130"), "ideogram-4")
    assert pascal.recipe is None and pascal.suggestion.code == "torch_cuda_12_6"
    assert pascal.reasons[0].code == "no_kernels" and "sm_61" in pascal.reasons[0].text
    blackwell = plan(replace(RTX_5090, torch_supports_device=False), "ideogram-4")
    assert blackwell.suggestion.code == "torch_cuda_12_8"


def test_the_miniature_runs_on_the_processor_where_torch_has_no_kernels() -> None:
    decided = plan(replace(GTX_1060, torch_supports_device=False), "miniature")
    assert (decided.device, decided.compute_dtype, decided.fits) == ("cpu", "float32", True)


def test_a_processor_is_sent_to_the_miniature_and_told_why_the_card_is_not_used() -> None:
    decided = plan(
        replace(PROCESSOR, problem="The driver lists an RTX 3090, but this PyTorch is CPU-only."), "ideogram-4"
    )
    assert decided.suggestion.code == "torch_for_cuda+use_miniature"
    assert decided.reasons[0].code == "problem+no_gpu" and "RTX 3090" in decided.reasons[0].text


def test_the_miniature_on_a_processor_computes_in_float32_and_is_sized_so() -> None:
    decided = plan(PROCESSOR, "miniature")
    assert decided.compute_dtype == "float32"
    assert decided.predicted.weight_bytes == 20_777_728  # without the projection of a text that one branch never sees


def test_a_data_centre_card_is_told_that_int8_gains_little() -> None:
    decided = plan(H100, "ideogram-4")
    assert decided.encoder == "resident"
    told = said(decided.reasons, "reference_fits")
    assert told and told.code == "reference_fits+int8_gains_little"
    assert gb(told.numbers["weights"]) == "34.7 GB" and round(told.numbers["times"]) == 2
