"""Fallbacks when memory ran out: `fallbacks(...) -> (Fallback, ...)`, the first that helps first, and pure.

In this order. The same picture with less of it on the device: more of its weights streamed, the text encoder staged or
streamed, the picture decoded in tiles; for RAM, the weights read from disk. Then GGUF Q4_K, the smallest recipe. Then a
smaller picture of the same shape. Every fallback is a plan made again within a lower limit that expects less of what
ran out than the plan that failed, so retrying ends. Where none is left, `OutOfMemory.sentence` still says what helps.

Left out: fewer steps and shorter captions, which save next to no memory, and retrying (generation/retry.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from ideogram_app.catalog.models import PIXELS_PER_TOKEN
from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.errors import RequestError
from ideogram_app.planning.footprint import HOST_PROCESS_BYTES
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.oom import OutOfMemory
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.policy import PREFERRED_RECIPES
from ideogram_app.records import Fallback, Request
from ideogram_app.text import gb

SMALLEST_RECIPE = PREFERRED_RECIPES[-1]
SPARE_BYTES = 512 * 2**20  # beside what was wanted: what else the failed plan did not see coming, nobody knows
UNKNOWN_SHARE = 1 / 8  # of the expected peak, where nobody said how much was wanted
# The last request is not all that was missing, and may be one that another plan never makes (a picture decoded in
# tiles): all of it is saved where some plan does that, else half, else a quarter.
GIVEN_UP = (1.0, 0.5, 0.25)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the peak, where only a lighter text encoder helps
SIDES = (3 / 4, 1 / 2, 3 / 8, 1 / 4)  # of a smaller picture; half a side is a quarter of the pixels
ENCODER_MODES = ("resident", "staged", "streamed")  # of the text encoder, the lightest last
DRAWING_PHASES = ("", "denoise", "decode")  # phases whose memory grows with the picture


def fallbacks(
    inputs: PlanInputs, planned: Plan, oom: OutOfMemory, ready: Collection[str], beside: Collection[str] = ()
) -> tuple[Fallback, ...]:
    """The ways to go on.

    Args:
        inputs: of the plan that failed, on the machine as it is after everything loaded was released.
        planned: the plan that failed.
        ready: recipes that are prepared; others can be offered, but take a preparation first.
        beside: the recipes that are drawn anyway.
    """
    failed = _Failed(inputs, planned, oom, frozenset(ready))
    same = failed.less(failed.recipe, inputs.size)
    found = [_same_picture(failed, same)] if same else []
    if SMALLEST_RECIPE not in (failed.recipe, *beside):
        lighter = failed.less(SMALLEST_RECIPE, inputs.size)
        found += [_smallest_recipe(failed, lighter)] if lighter else []
    smaller = _largest_smaller_picture(failed) if not found or oom.phase in DRAWING_PHASES else None
    return (*found, _smaller_picture(failed, smaller)) if smaller else tuple(found)


def apply_fallback(request: Request, recipe: str, fallback: Fallback) -> Request:
    """The request with one of its recipes drawn by a fallback; caption, seed and everything else stay."""
    swapped = dict.fromkeys(fallback.recipe if name == recipe else name for name in request.recipes)
    return replace(
        request,
        recipes=tuple(swapped),
        width=fallback.width,
        height=fallback.height,
        device_limit_bytes=fallback.device_limit_bytes,
        host_limit_bytes=fallback.host_limit_bytes,
    )


@dataclass(frozen=True)
class _Found:
    """A plan that expects less, and what it was computed from."""

    plan: Plan
    inputs: PlanInputs


@dataclass(frozen=True)
class _Failed:
    """What failed, and plans that would take less."""

    inputs: PlanInputs
    planned: Plan
    oom: OutOfMemory
    ready: frozenset[str]

    @property
    def recipe(self) -> str:
        return self.inputs.recipe or self.planned.recipe or SMALLEST_RECIPE

    @property
    def of_device(self) -> bool:
        return self.oom.kind == "device"

    def peak(self, which: Plan) -> int:
        """Expected, of the memory that ran out."""
        return which.predicted.peak_device_bytes if self.of_device else which.predicted.peak_host_bytes

    def less(self, recipe: str, size: tuple[int, int]) -> _Found | None:
        """A plan for this that fits and expects less of what ran out, with as much given up as can be."""
        peak = self.peak(self.planned)
        wanted = self.oom.wanted_bytes or round(peak * UNKNOWN_SHARE)
        limits = [peak - round((wanted + SPARE_BYTES) * share) for share in GIVEN_UP]
        if self.while_encoding:  # the peak is that of another phase, so that less of it need not help this one
            limits += [round(limits[0] * share) for share in SHARES]
        lightest_failed = ENCODER_MODES.index(self.planned.encoder) if self.while_encoding else -1
        for limit in limits:
            found = self._within(recipe, size, limit)
            lighter = ENCODER_MODES.index(found.plan.encoder) > lightest_failed
            if found.plan.fits and self.peak(found.plan) < peak and lighter:
                return found
        return None

    @property
    def while_encoding(self) -> bool:
        """Whether the text encoder found no room, and could take less."""
        return self.of_device and self.oom.phase == "encode" and self.planned.encoder != ENCODER_MODES[-1]

    def _within(self, recipe: str, size: tuple[int, int], peak: int) -> _Found:
        """The plan for a peak of that many bytes at most."""
        inputs = replace(self.inputs, size=size, recipe=recipe, ready=self.ready | {self.recipe})
        if self.of_device:
            inputs = replace(inputs, limit_bytes=peak)
        else:
            inputs = replace(inputs, host_limit_bytes=peak + HOST_PROCESS_BYTES)
        return _Found(plan(inputs), inputs)


def _largest_smaller_picture(failed: _Failed) -> _Found | None:
    """The largest picture of the same shape that fits: with the same recipe, else with the smallest."""
    for recipe in dict.fromkeys((failed.recipe, SMALLEST_RECIPE)):
        for share in SIDES:
            across, down = (round(side * share / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in failed.inputs.size)
            try:
                found = failed.less(recipe, (across, down))
            except RequestError:  # smaller than can be drawn, and so is the rest
                break
            if found and (across, down) != failed.inputs.size:
                return found
    return None


def _same_picture(failed: _Failed, found: _Found) -> Fallback:
    changes = _changes(failed.planned, found.plan)
    title = ", ".join(changes) if changes else "hold less at a time"
    is_cut = found.plan.decode_tile != failed.planned.decode_tile and found.plan.decode_tile
    why = reason("same_picture") + (reason("tiles_blended") if is_cut else NOTHING)
    return _fallback(title[0].upper() + title[1:], why, failed, found, same_picture=True)


def _smallest_recipe(failed: _Failed, found: _Found) -> Fallback:
    title = find_recipe(SMALLEST_RECIPE).title
    why = reason("smaller_recipe", title=title, weights=found.plan.predicted.weight_bytes)
    why += NOTHING if SMALLEST_RECIPE in failed.ready else reason("not_prepared")
    return _fallback(f"{title}, {_residency(found.plan)}", why, failed, found)


def _smaller_picture(failed: _Failed, found: _Found) -> Fallback:
    width, height, recipe = found.plan.width, found.plan.height, found.plan.recipe or SMALLEST_RECIPE
    other = "" if recipe == failed.recipe else f", {find_recipe(recipe).title}"
    other += f", {_residency(found.plan)}" if found.plan.streamed_bytes > failed.planned.streamed_bytes else ""
    why = reason("smaller_picture", share=width * height / math.prod(failed.inputs.size))
    return _fallback(f"{width} × {height}{other}", why, failed, found)


def _fallback(title: str, why: Reason, failed: _Failed, found: _Found, same_picture: bool = False) -> Fallback:
    """What is offered; its reason ends with what is expected of memory and, where known, of time."""
    before, after = failed.planned.predicted.seconds_per_step, found.plan.predicted.seconds_per_step
    peak = failed.peak(found.plan)
    cost = reason(
        "less_memory_timed" if before and after and f"{before:.1f}" != f"{after:.1f}" else "less_memory",
        peak=peak,
        memory="device memory" if failed.of_device else "RAM",
        saved=failed.peak(failed.planned) - peak,
        seconds=after,
        before=before,
    )
    return Fallback(
        title=title,
        reason=why + cost,
        recipe=found.plan.recipe or failed.recipe,
        width=found.plan.width,
        height=found.plan.height,
        device_limit_bytes=found.inputs.limit_bytes,
        host_limit_bytes=found.inputs.host_limit_bytes,
        same_picture=same_picture,
    )


def _changes(before: Plan, after: Plan) -> list[str]:
    """What the second plan holds less of, in a few words each."""
    changes = []
    if (after.residency, after.streamed_bytes) != (before.residency, before.streamed_bytes) and after.streamed_bytes:
        source = "disk" if after.residency == "disk" else "RAM"
        changes.append(f"stream {gb(after.streamed_bytes)} from {source}")
    if after.encoder != before.encoder:
        how = {"staged": "let the text encoder go after reading", "streamed": "encode layer by layer"}
        changes.append(how.get(after.encoder, ""))
    if after.decode_tile != before.decode_tile and after.decode_tile:
        changes.append(f"decode in tiles of {after.decode_tile} pixels")
    return [change for change in changes if change]


def _residency(which: Plan) -> str:
    """Where its weights live, in a word or two."""
    if which.residency == "resident" or not which.streamed_bytes:
        return "resident"
    return f"{gb(which.streamed_bytes)} streamed from {'disk' if which.residency == 'disk' else 'RAM'}"
