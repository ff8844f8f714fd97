"""Which of several placed recipes to take: quality first, unless it costs too much time.

Two rules. What was asked for by name is never swapped. Else the recipe closest to the reference is taken wherever it
runs, on the device or with some of its blocks on the road, unless a step would take more than `SLOWER_AT_MOST` times
as long as with the next one. Where it cannot be told how long a step takes, no more than a small share of the weights
is put on the road. Every recipe and every home that was passed over keeps a sentence with its numbers.

Left out: weighing quality in numbers. The ladder is an order, and people see both pictures (comparison/compare.py).
"""

from __future__ import annotations

from ideogram_app.machine.capabilities import int8_units
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.option import Candidate
from ideogram_app.text import gb, in_seconds

# What an unasked plan picks from, best quality first. Of the INT8 family the rotated one: on the miniature its error is
# that of bf16 itself (velocity 1.66 % against 1.65; int8-w8a8 3.8 as calibrated), it needs no calibration, and keeping
# all fragile layers instead, which is as good, makes 23.2 GB of 19.8 (benchmarks/results/int8-family.json).
PREFERRED_RECIPES = ("int8-w8a8-rotated", "gguf-q4_k")
# The better recipe may cost this much more time, for its quality: 20 steps that take a minute may take 78 seconds.
SLOWER_AT_MOST = 1.3
# Where no time is known no more of the better recipe than this may be on the road: a fifth is 3.5 GB a step, 0.3 s over
# the narrowest link in planning/step_time.py, which any card that has INT8 units hides behind its own work.
STREAMED_AT_MOST = 0.2


def choose_candidate(job: PlanInputs, options: tuple[Candidate, ...]) -> tuple[Candidate, tuple[str, ...]]:
    """The first option that nothing speaks against, else the last; with a sentence for each that was passed over."""
    passed: list[str] = []
    for option in options[:-1]:
        against = reason_against(job, option, options[-1])
        if not against:
            return option, tuple(passed)
        passed.append(f"Not {option.recipe.title}: {against}" if option.fits else against)
    return options[-1], tuple(passed)


def reason_against(job: PlanInputs, better: Candidate, smaller: Candidate) -> str:
    """Why the better recipe is not the one to take, or ""."""
    if not better.fits:
        return better.reason
    if not job.published:
        return ""  # the miniature shows INT8 everywhere: plain torch does it where kernels are missing
    units = int8_units(job.hardware)
    if units or not smaller.fits or better.residency == "resident":
        return units
    rates = job.rates()
    if better.residency == "disk" and (rates is None or rates.disk is None):
        disk = f"{gb(better.streamed)} would be read in every step, and how fast is not measured."
        return f"{_missing_ram(better)}from disk {disk}"
    if better.seconds is not None and smaller.seconds is not None:
        return _too_slow(better, smaller)
    share = better.streamed / better.size.weights
    if share > STREAMED_AT_MOST:
        return (
            f"{gb(better.streamed)} of its {gb(better.size.weights)} find no room in the {gb(job.device_free)} that "
            f"are free, and {share:.0%} on the road are too many while nobody knows how long a step takes on this "
            f"device (at most {STREAMED_AT_MOST:.0%})."
        )
    return ""


def comparison(better: Candidate, smaller: Candidate) -> str:
    """Why the smaller recipe was not taken, though it fits."""
    saved = f"It would save {gb(better.size.weights - smaller.size.weights)}"
    closer = f"{better.recipe.title} is closer to the reference"
    if better.residency == smaller.residency == "resident" or not (better.seconds and smaller.seconds):
        return f"{saved}, but {closer} and has room."
    ratio = better.seconds / smaller.seconds
    return (
        f"{saved} and take {in_seconds(smaller.seconds)} a step, but {closer} and takes {in_seconds(better.seconds)}: "
        f"{ratio:.2f} times as long, and {SLOWER_AT_MOST} are accepted."
    )


def _too_slow(better: Candidate, smaller: Candidate) -> str:
    """Both have times."""
    slow, fast = better.seconds or 0.0, smaller.seconds or 0.0
    if slow <= SLOWER_AT_MOST * fast:
        return ""
    way = "read from disk" if better.residency == "disk" else "brought from RAM"
    return (
        f"with {gb(better.streamed)} {way} in every step it would take {in_seconds(slow)}, {slow / fast:.1f} times as "
        f"long as {smaller.recipe.title} ({in_seconds(fast)}); at most {SLOWER_AT_MOST} times are accepted."
    )


def _missing_ram(option: Candidate) -> str:
    """What keeps its blocks from RAM, as the beginning of a longer sentence."""
    short = min((row.missing for row in option.passed if row.residency == "streamed" and row.lacks == "ram"), default=0)
    return f"RAM lacks {gb(short)} to stream it; " if short else ""
