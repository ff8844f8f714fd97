"""What is offered when memory ran out, for every kind, phase and size of card: pure, and without torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ideogram_app.catalog.models import check_size
from ideogram_app.catalog.reasons import NOTHING
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning import inputs as job
from ideogram_app.planning.fallbacks import ENCODER_MODES, SMALLEST_RECIPE, apply_fallback, fallbacks
from ideogram_app.planning.inputs import PlanInputs, within
from ideogram_app.planning.oom import PHASE_WORDS, OutOfMemory
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.records import Fallback, Request
from ideogram_app.wire import from_json, to_json
from tests.machines import said

GB, GIB = 10**9, 2**30
INT8 = "int8-w8a8-rotated"
STORED = 60 * GB  # everything that a plan could want to write is there


@pytest.fixture(autouse=True, scope="module")
def counted_once() -> Iterator[None]:
    """A ladder plans the same sizes many times, and what they take does not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "footprint", functools.cache(job.footprint))
        yield


def card(name: str, capability: tuple[int, int], gib: float, **known: Any) -> Hardware:
    usual: dict[str, Any] = {
        "device_memory_bytes": int(gib * GIB),
        "device_free_bytes": int(gib * GIB * 0.93),
        "host_memory_bytes": 32 * GIB,
        "host_free_bytes": 24 * GIB,
        "disk_free_bytes": 500 * GB,
    }
    return Hardware(kind="cuda", name=name, compute_capability=capability, **(usual | known))


CARDS = [
    card("NVIDIA GeForce RTX 2060", (7, 5), 6),
    card("NVIDIA GeForce RTX 4060", (8, 9), 8),
    card("NVIDIA GeForce RTX 3060", (8, 6), 12),
    card("NVIDIA GeForce RTX 4060 Ti", (8, 9), 16),
    card("NVIDIA GeForce RTX 3090", (8, 6), 24),
]
RTX_4060, RTX_3060, RTX_3090 = CARDS[1], CARDS[2], CARDS[4]
REQUEST = Request("ideogram-4", wrap_plain("a red circle"), (INT8,), width=1024, height=1024, seed=7)


def planned(hardware: Hardware, request: Request, recipe: str) -> Plan:
    """As the program plans it: within the limits of the request."""
    return plan(inputs(hardware, request, recipe))


def inputs(hardware: Hardware, request: Request, recipe: str) -> PlanInputs:
    ready = (INT8, SMALLEST_RECIPE)
    return PlanInputs.of_request(request, hardware, recipe=recipe, stored_bytes=STORED, ready=ready)


def offered(
    hardware: Hardware, request: Request, shortage: OutOfMemory, ready: tuple[str, ...] = (INT8, SMALLEST_RECIPE)
) -> tuple[Plan, tuple[Fallback, ...]]:
    before = planned(hardware, request, request.recipes[0])
    failed = inputs(hardware, request, request.recipes[0])
    return before, fallbacks(failed, before, shortage, ready, request.recipes)


def peak(which: Plan, kind: str) -> int:
    return which.predicted.peak_device_bytes if kind == "device" else which.predicted.peak_host_bytes


@pytest.mark.slow
@pytest.mark.parametrize("hardware", CARDS, ids=lambda row: row.name[-8:])
@pytest.mark.parametrize("recipe", [INT8, SMALLEST_RECIPE])
@pytest.mark.parametrize("size", [(1024, 1024), (2048, 1152)], ids=str)
@pytest.mark.parametrize("kind", ["device", "host", "locked", "commit"])
def test_every_rung_is_a_plan_that_fits_and_expects_less_of_what_ran_out(
    hardware: Hardware, recipe: str, size: tuple[int, int], kind: str
) -> None:
    request = replace(REQUEST, recipes=(recipe,), width=size[0], height=size[1])
    for phase, wanted in zip(("", *PHASE_WORDS), (None, GB, 40 * 2**20, None, 2 * GB, 12 * GB), strict=True):
        before, found = offered(hardware, request, OutOfMemory(kind, wanted, phase))
        assert before.fits
        for rung in found:
            again = apply_fallback(request, recipe, rung)
            after = planned(hardware, again, rung.recipe)
            check_size(rung.width, rung.height)
            assert after.fits and peak(after, kind) < peak(before, kind)
            assert again.caption == request.caption and again.seed == request.seed
            assert rung.same_picture is ((rung.recipe, rung.width, rung.height) == (recipe, *size))
            assert rung.title and rung.reason.text.endswith(".") and "None" not in rung.title + rung.reason.text
            expected = rung.reason.numbers
            assert expected["peak"] == peak(after, kind) == peak(before, kind) - expected["saved"]
            assert from_json(Fallback, to_json(rung)) == rung
            if kind != "device":
                in_ram = after.streamed_bytes if after.residency == "streamed" else 0
                assert in_ram <= before.streamed_bytes, "what is streamed rests in RAM"


@pytest.mark.parametrize("hardware", CARDS, ids=lambda row: row.name[-8:])
@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize("phase", ["load", "encode", "denoise", "decode"])
def test_a_ladder_ends_and_every_step_of_it_goes_down(hardware: Hardware, kind: str, phase: str) -> None:
    request, peaks = REQUEST, []
    for _ in range(40):
        before, found = offered(hardware, request, OutOfMemory(kind, GB, phase))
        peaks.append((before.recipe == INT8, before.width, peak(before, kind)))
        if not found:
            break
        request = apply_fallback(request, request.recipes[0], found[0])
    assert not found
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def test_the_same_picture_comes_first_then_the_smallest_recipe_then_a_smaller_picture() -> None:
    _, found = offered(RTX_3090, REQUEST, OutOfMemory("device", 2 * GB, "denoise"))
    assert [(rung.recipe, rung.width, rung.same_picture) for rung in found] == [
        (INT8, 1024, True),
        (SMALLEST_RECIPE, 1024, False),
        (INT8, 768, False),
    ]
    first, second, third = found
    assert first.title.startswith("Stream ") and said([first.reason], "same_picture")
    assert said([second.reason], "smaller_recipe") and not said([second.reason], "not_prepared")
    assert said([third.reason], "smaller_picture") and third.reason.numbers["share"] == 0.5625


def test_what_the_titles_name_is_what_changes() -> None:
    _, found = offered(RTX_3060, replace(REQUEST, recipes=(SMALLEST_RECIPE,)), OutOfMemory("device", 4 * GB, "decode"))
    assert "from RAM" in found[0].title and "encode layer by layer" in found[0].title
    _, found = offered(RTX_3090, replace(REQUEST, recipes=(SMALLEST_RECIPE,)), OutOfMemory("device", GB, "denoise"))
    assert found[0].title == "Let the text encoder go after reading"
    large = replace(REQUEST, recipes=(SMALLEST_RECIPE,), width=2048, height=2048)
    _, found = offered(RTX_3090, large, OutOfMemory("device", 4 * GB, "decode"))
    assert found[0].title.startswith("Decode in tiles of ") and said([found[0].reason], "tiles_blended")


@pytest.mark.parametrize("hardware", CARDS, ids=lambda row: row.name[-8:])
def test_where_reading_failed_the_text_encoder_takes_less_room(hardware: Hardware) -> None:
    before, found = offered(hardware, REQUEST, OutOfMemory("device", GB, "encode"))
    for rung in found:
        after = planned(hardware, apply_fallback(REQUEST, INT8, rung), rung.recipe)
        lighter = ENCODER_MODES.index(after.encoder) - ENCODER_MODES.index(before.encoder)
        assert lighter > 0 or before.encoder == ENCODER_MODES[-1]
        assert (rung.width, rung.height) == (1024, 1024), "a smaller picture is no shorter a caption"


def test_for_ram_the_disk_comes_first_and_never_more_streaming_from_ram() -> None:
    before, found = offered(RTX_3060, REQUEST, OutOfMemory("locked", 3 * GB, "load"))
    assert before.residency == "streamed" and "from disk" in found[0].title and found[0].same_picture
    assert found[0].host_limit_bytes and found[0].device_limit_bytes is None
    after = planned(RTX_3060, apply_fallback(REQUEST, INT8, found[0]), INT8)
    assert after.residency == "disk"


def test_where_nothing_takes_less_nothing_is_offered() -> None:
    """Q4_K with all of its weights on the device holds no more in RAM than it takes to load one matrix."""
    before, found = offered(RTX_3090, replace(REQUEST, recipes=(SMALLEST_RECIPE,)), OutOfMemory("host", 3 * GB, "load"))
    assert before.residency == "resident" and found == ()


def test_a_recipe_that_is_not_prepared_is_offered_and_says_so() -> None:
    _, found = offered(RTX_3090, REQUEST, OutOfMemory("device", 2 * GB, "load"), ready=(INT8,))
    assert [rung.recipe for rung in found] == [INT8, SMALLEST_RECIPE] and said([found[1].reason], "not_prepared")
    full = replace(RTX_3090, disk_free_bytes=GB)
    failed = replace(inputs(full, REQUEST, INT8), stored_bytes=0)
    found = fallbacks(failed, planned(full, REQUEST, INT8), OutOfMemory("device", 2 * GB, "load"), ready=(INT8,))
    assert SMALLEST_RECIPE not in [rung.recipe for rung in found], "there is no room to prepare it"


def test_the_smallest_recipe_is_not_offered_where_it_is_drawn_beside() -> None:
    both = replace(REQUEST, recipes=(INT8, SMALLEST_RECIPE))
    _, found = offered(RTX_3090, both, OutOfMemory("device", 2 * GB, "load"))
    assert SMALLEST_RECIPE not in [rung.recipe for rung in found]
    swapped = apply_fallback(both, INT8, Fallback("", NOTHING, SMALLEST_RECIPE, 1024, 1024))
    assert swapped.recipes == (SMALLEST_RECIPE,), "each recipe once"


@pytest.mark.parametrize("size", [(1024, 768), (768, 1344), (2048, 352), (1216, 832)])
def test_a_smaller_picture_keeps_its_shape_on_the_grid(size: tuple[int, int]) -> None:
    request = replace(REQUEST, width=size[0], height=size[1])
    _, found = offered(RTX_3090, request, OutOfMemory("device", 2 * GB, "denoise"))
    smaller = found[-1]
    assert smaller.width < size[0] and smaller.height < size[1]
    assert abs(smaller.width / size[0] - smaller.height / size[1]) <= 16 / min(size)  # half a step a side


def test_limits_of_the_request_stay_and_only_get_lower() -> None:
    request = replace(REQUEST, device_limit_bytes=18 * GB, host_limit_bytes=20 * GB)
    _, found = offered(RTX_3090, request, OutOfMemory("device", GB, "denoise"))
    assert all((rung.device_limit_bytes or 0) < 18 * GB and rung.host_limit_bytes == 20 * GB for rung in found)
    _, found = offered(RTX_4060, request, OutOfMemory("host", GB, "load"))
    assert found and all((rung.host_limit_bytes or 0) < 20 * GB for rung in found)


def test_a_limit_on_ram_is_no_more_than_is_free() -> None:
    assert within(RTX_3060, None) == RTX_3060
    assert within(RTX_3060, GB).host_free_bytes == GB
    assert within(RTX_3060, 900 * GB).host_free_bytes == 24 * GIB
    assert within(Hardware(), GB).host_free_bytes == GB
