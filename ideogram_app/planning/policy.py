"""Selection policy among placed recipes: quality first, unless it costs too much time.

What was asked for by name is never swapped. Else the recipe closest to the reference is taken wherever it runs, on the
device or with some of its blocks streamed, unless a step would take more than `SLOWER_AT_MOST` times as long as with
the next one. Where nobody knows how long a step takes, no more than a small share of the weights is streamed. Every
rejected recipe and placement has a sentence with its numbers.

Left out: weighing quality in numbers. The preferred recipes are an order, and people see both pictures
(comparison/compare.py).
"""

from __future__ import annotations

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.machine.capabilities import int8_units
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.placement import Candidate

# What an unasked plan picks from, best quality first. Of the INT8 family the rotated one: on the miniature its error is
# that of bf16 itself (velocity 1.66 % against 1.65; int8-w8a8 3.8 as calibrated), it needs no calibration, and keeping
# all fragile layers instead, which is as good, makes 23.2 GB of 19.8 (benchmarks/results/int8-family.json).
PREFERRED_RECIPES = ("int8-w8a8-rotated", "gguf-q4_k")
# The better recipe may cost this much more time, for its quality: 20 steps that take a minute may take 78 seconds.
SLOWER_AT_MOST = 1.3
# Where no time is known no more of the better recipe than this may be streamed: a fifth is 3.5 GB a step, 0.3 s over
# the narrowest link in planning/step_time.py, which any card that has INT8 units hides behind its own work.
STREAMED_AT_MOST = 0.2


def choose_candidate(inputs: PlanInputs, candidates: tuple[Candidate, ...]) -> tuple[Candidate, tuple[Reason, ...]]:
    """The first candidate that nothing speaks against, else the last; with a sentence for each that was rejected."""
    rejected: list[Reason] = []
    for candidate in candidates[:-1]:
        against = reason_against(inputs, candidate, candidates[-1])
        if not against:
            return candidate, tuple(rejected)
        rejected.append(reason("not_taken", title=candidate.recipe.title, why=against) if candidate.fits else against)
    return candidates[-1], tuple(rejected)


def reason_against(inputs: PlanInputs, better: Candidate, smaller: Candidate) -> Reason:
    """Why the better recipe is not the one to take, as a clause."""
    if not better.fits:
        return better.reason
    if not inputs.published:
        return NOTHING  # the miniature shows INT8 everywhere: plain torch does it where kernels are missing
    units = int8_units(inputs.hardware)
    if units or not smaller.fits or better.residency == "resident":
        return units
    rates = inputs.rates()
    if better.residency == "disk" and (rates is None or rates.disk is None):  # RAM cannot hold its blocks
        missing = [row.missing for row in better.rejected if row.residency == "streamed" and row.lacks == "ram"]
        return reason("disk_unmeasured", missing=min(missing), moved=better.streamed)
    if better.seconds is not None and smaller.seconds is not None:
        return _too_slow(better, better.seconds, smaller, smaller.seconds)
    share = better.streamed / better.size.weights  # where times are not known
    if share <= STREAMED_AT_MOST:
        return NOTHING
    return reason(
        "too_much_travels",
        moved=better.streamed,
        weights=better.size.weights,
        free=inputs.device_free,
        share=share,
        accepted=STREAMED_AT_MOST,
    )


def comparison(better: Candidate, smaller: Candidate) -> Reason:
    """Why the smaller recipe was not taken, though it fits."""
    saved, title = better.size.weights - smaller.size.weights, better.recipe.title
    if better.residency == smaller.residency == "resident" or not (better.seconds and smaller.seconds):
        return reason("closer_with_room", saved=saved, title=title)
    return reason(
        "closer_in_time",
        saved=saved,
        title=title,
        best=smaller.seconds,
        seconds=better.seconds,
        times=better.seconds / smaller.seconds,
        accepted=SLOWER_AT_MOST,
    )


def _too_slow(better: Candidate, slow: float, smaller: Candidate, fast: float) -> Reason:
    if slow <= SLOWER_AT_MOST * fast:
        return NOTHING
    return reason(
        "too_slow_from_disk" if better.residency == "disk" else "too_slow_from_ram",
        moved=better.streamed,
        seconds=slow,
        times=slow / fast,
        title=smaller.recipe.title,
        best=fast,
        accepted=SLOWER_AT_MOST,
    )
