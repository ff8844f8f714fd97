"""The planner as a whole: more is never worse, sizes and wishes. Without torch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.errors import RequestError
from ideogram_app.machine.gpu_specs import MeasuredRates
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.activations import Drawing
from ideogram_app.planning.footprint import device_bytes, encoder_weights, footprint, room_for_weights
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.placement import Candidate, place
from ideogram_app.planning.planner import Plan
from ideogram_app.planning.policy import PREFERRED_RECIPES
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.text import gb
from tests.machines import GB, INT8, RTX_3060, RTX_3090, RTX_4060, RTX_4060_TI, RTX_4090, RTX_5090, label
from tests.plan_by_name import plan

# More is never worse.


def gigabytes(first: int, last: int) -> list[int]:
    """Bytes in steps of 0.7 GB: two or three blocks."""
    return list(range(first * GB, last * GB, 7 * GB // 10))


@pytest.mark.parametrize("recipe", PREFERRED_RECIPES)
@pytest.mark.parametrize("link", [24e9, 6e9, 2e9])
def test_more_free_memory_never_makes_a_recipe_slower_or_lets_more_travel(recipe: str, link: float) -> None:
    order = [None, "disk", "streamed", "resident"]
    known = MachineProfile(MeasuredRates(link=link))
    rows = []
    for free in gigabytes(2, 40):
        hardware = replace(RTX_4090, device_free_bytes=free, device_memory_bytes=48 * GB)
        decided = plan(hardware, "ideogram-4", recipe=recipe, known=known)
        time = decided.predicted.seconds_per_step or 1e9 if decided.fits else 1e9
        moved = decided.streamed_bytes if decided.fits else 1e12
        rows.append((-order.index(decided.residency), round(time, 9), moved))
    for before, after in itertools.pairwise(rows):
        assert all(later <= earlier for earlier, later in zip(before, after, strict=True))


@pytest.mark.parametrize("link", [24e9, 6e9, 2e9])
def test_more_free_memory_gives_a_better_recipe_or_a_faster_step_or_the_same(link: float) -> None:
    """Where both are copied most of the time, Q4_K gains more from memory, so the choice may turn to it: faster."""
    known = MachineProfile(MeasuredRates(link=link))
    before: Plan | None = None
    for free in gigabytes(5, 40):
        hardware = replace(RTX_4090, device_free_bytes=free, device_memory_bytes=48 * GB)
        after = plan(hardware, "ideogram-4", known=known)
        if before is not None and before.recipe and after.recipe:
            better = PREFERRED_RECIPES.index(before.recipe) - PREFERRED_RECIPES.index(after.recipe)
            slower = (after.predicted.seconds_per_step or 0) > (before.predicted.seconds_per_step or 0) + 1e-9
            assert better > 0 or not slower
        before = after


@pytest.mark.parametrize("hardware", [RTX_4060, RTX_3060, RTX_4060_TI], ids=label)
def test_more_ram_never_gives_a_worse_recipe_or_a_slower_home(hardware: Hardware) -> None:
    order = [None, "disk", "streamed", "resident"]
    ranks = []
    for free in gigabytes(3, 40):
        decided = plan(replace(hardware, host_free_bytes=free), "ideogram-4")
        recipe = 0 if decided.recipe is None else 2 - PREFERRED_RECIPES.index(decided.recipe)
        ranks.append((recipe, order.index(decided.residency)))
    assert ranks == sorted(ranks)


def test_larger_pictures_never_need_less() -> None:
    peaks = [
        plan(RTX_5090, "ideogram-4", width=side, height=side, recipe=INT8).predicted.peak_device_bytes
        for side in (256, 512, 1024)
    ]
    assert peaks == sorted(peaks)


# Wishes and sizes.


@pytest.mark.parametrize("wish", [{"recipe": "int4"}, {"width": 1000}, {"width": 64, "height": 2048}])
def test_unknown_wishes_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        plan(RTX_3090, "ideogram-4", **wish)


def test_an_unknown_model_is_refused_with_those_that_exist() -> None:
    with pytest.raises(RequestError, match="miniature"):
        plan(RTX_3090, "ideogram-5")


def test_room_for_weights_is_the_inverse_of_device_bytes() -> None:
    for kept in (10**9, 19 * GB):
        assert abs(room_for_weights(device_bytes(kept, GB), GB) - kept) <= 2


def test_sizes_of_the_published_pair_are_those_that_were_counted() -> None:
    """On disk; on the device, where the layers that run once a picture are guests; and in RAM, where those rest."""
    pair = MODELS["ideogram-4"]
    sizes = {
        name: footprint(Drawing(pair, RECIPES[name], (1024, 1024), 2))
        for name in ("reference", "int8-w8a8", "gguf-q4_k")
    }
    made = [gb(size.disk - size.download - encoder_weights(pair, 2)) for size in sizes.values()]
    assert made == ["37.1 GB", "19.3 GB", "11.3 GB"]
    assert [gb(size.weights) for size in sizes.values()] == ["34.7 GB", "17.3 GB", "9.8 GB"]
    assert [gb(size.once) for size in sizes.values()] == ["2.0 GB", "1.7 GB", "1.0 GB"]


def test_an_option_holds_what_stays_and_the_places_of_what_travels() -> None:
    job = PlanInputs(RTX_4060, MODELS["ideogram-4"], (1024, 1024))
    option: Candidate = place(job, RECIPES[INT8])
    moved = sum(option.streamed_blocks)
    expected = option.size.weights - (moved - option.slots) * option.size.block
    assert option.held(option.assignments[0]) == expected
