"""Prediction intervals: 90 % ranges round what a plan expects, from assumed widths and this machine's own errors.

    interval(STEP, 4.2, assumed, "drawn", scores)    the range round 4.2 seconds
    outcomes_of(result, "miniature")                 what a plan said of a picture, and what came of it

Conformal prediction with weights: the range that would have held nine tenths of the earlier errors, whatever their
distribution (Barber, Candès, Ramdas and Tibshirani, "Conformal prediction beyond exchangeability", 2023). An error is
the logarithm of measured over expected (of memory the difference, since a process may hold it already), in units of
the width that was assumed for it (a normalised score), so that a large picture predicted from small ones and the third
of one size teach the same scale; beyond that width an error counts in quarters of the expected number. The older it is,
the less it counts. The picture to come, for which the method puts infinity, stands at the limits of what was assumed:
the range of a machine that has drawn nothing is the assumption itself (planning/assumptions.py).

The range is the shortest that holds enough and has the expected number inside, so one odd picture of many falls
outside. Left out: a guarantee of the level, which needs errors that do not depend on one another; how often ranges
held is counted instead, and shown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ideogram_app.records import Interval, Result

Factors = tuple[float, float]  # of an expected number: at the lower limit, at most 1, and at the upper, at least 1

STEP, PICTURE, DEVICE, HOST, DOWNLOAD = QUANTITIES = ("step", "picture", "device memory", "RAM", "download")
IN_BYTES = (DEVICE, HOST)  # errors are differences: what is added to a process that has drawn before may be nothing
LEVEL = 0.9
KEPT = 40  # outcomes of each quantity: with fewer than 20, nine tenths of the weight are the smallest and the largest
# Chosen by simulation, so that machines with errors of every shape stay within 85 and 96 %
# (tests/planning/test_intervals.py): an error's weight one picture later, the weight of what was assumed, and how far
# a few errors are stretched. Between two of n points lie as many of n + 1 equal parts as they are apart, one less than
# the points that a range with both ends holds: hence the last one.
AGEING = 0.97
ASSUMED_WEIGHT = 0.5
CLOSING = 1.0
STRETCH, SURE = 3.0, 2.0  # by 3 / (their weight + 2)
NARROWEST = 0.02  # no assumed width is less than 2 %, which keeps a score finite
BEYOND = 0.25  # the unit of what an error has beyond its assumed width: a quarter of the expected number


@dataclass(frozen=True)
class Outcome:
    """One number that a plan expected of a picture, its interval, and what was measured.

    Raises:
        ValueError: numbers that nothing could have been predicted or measured as.
    """

    quantity: str
    basis: str
    expected: float
    measured: float
    low: float
    high: float
    assumed: Factors
    model: str = ""

    def __post_init__(self) -> None:
        positive = [self.expected, self.high, *self.assumed]
        positive += [] if self.quantity in IN_BYTES else [self.measured, self.low]
        numbers = (*positive, self.measured, self.low)
        possible = all(math.isfinite(number) and number >= 0 for number in numbers) and all(positive)
        if not possible or self.quantity not in QUANTITIES:
            raise ValueError("an outcome holds positive numbers of a known quantity")

    @classmethod
    def of(cls, quantity: str, expected: float, said: Interval, measured: float, model: str = "") -> Outcome:
        """What was measured of a number that was given with an interval."""
        return cls(quantity, said.basis, expected, measured, said.low, said.high, said.assumed, model)

    @property
    def held(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def score(self) -> float:
        """The error in units of the assumed width: -1 and 1 are its limits, 0 is what was expected."""
        below, above = _widths(self.quantity, self.assumed)
        ratio = self.measured / self.expected
        error = ratio - 1 if self.quantity in IN_BYTES else math.log(ratio)
        width, size = below if error < 0 else above, abs(error)
        return math.copysign(size / width if size <= width else 1 + (size - width) / BEYOND, error)


@dataclass(frozen=True)
class Held:
    """How many of the last intervals held what was measured, and of how many."""

    held: int
    of: int


def interval(quantity: str, expected: float, assumed: Factors, basis: str, scores: Sequence[float] = ()) -> Interval:
    """The interval round an expected number; scores: of earlier outcomes on the same basis, the newest last."""
    below, above = _widths(quantity, assumed)
    low, high = _shortest(scores, below, above)
    if quantity in IN_BYTES:  # counted, so that errors have no tail to make room for
        down, up = _error(low, below), _error(high, above)
        return Interval(expected * max(0.0, 1 - down), expected * (1 + up), basis, assumed)
    weight = sum(AGEING**age for age in range(len(scores)))
    down, up = _error(_stretched(-low, weight), below), _error(_stretched(high, weight), above)
    return Interval(expected * math.exp(-down), expected * math.exp(up), basis, assumed)


def scores_of(outcomes: Sequence[Outcome], quantity: str, basis: str, model: str = "") -> tuple[float, ...]:
    """Scores of one quantity of one model whose expected numbers rested on the same basis, the newest last."""
    like = (quantity, basis, model)
    return tuple(row.score for row in outcomes if (row.quantity, row.basis, row.model) == like)


def outcomes_of(result: Result, model: str) -> tuple[Outcome, ...]:
    """What a plan said of a picture that was drawn, and what came of it; without what was not predicted or measured."""
    said, seconds = result.predicted, result.seconds.total - result.seconds.load
    rows = (
        (STEP, said.seconds_per_step, said.seconds_per_step_range, result.seconds_per_step),
        (PICTURE, said.seconds_per_picture, said.seconds_per_picture_range, seconds),
        (DEVICE, result.predicted_device_bytes, said.device_bytes_range, result.peak_device_bytes),
        (HOST, result.predicted_host_bytes, said.host_bytes_range, result.peak_host_bytes),
    )
    return tuple(
        Outcome.of(quantity, expected, given, measured, model)
        for quantity, expected, given, measured in rows
        if given and expected and measured is not None and (measured > 0 or quantity in IN_BYTES)
    )


def kept(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The last `KEPT` outcomes of every quantity, in their order."""
    left, rows = dict.fromkeys(QUANTITIES, KEPT), []
    for row in reversed(outcomes):
        if left[row.quantity]:
            left[row.quantity] -= 1
            rows.append(row)
    return tuple(reversed(rows))


def held(outcomes: Collection[Outcome]) -> dict[str, Held]:
    """How often intervals held, for each quantity that was observed."""
    rows = {name: [row.held for row in outcomes if row.quantity == name] for name in QUANTITIES}
    return {name: Held(sum(found), len(found)) for name, found in rows.items() if found}


def _widths(quantity: str, assumed: Factors) -> tuple[float, float]:
    """Of the errors below and above that were assumed, both positive."""
    low, high = assumed
    widths = (1 - low, high - 1) if quantity in IN_BYTES else (-math.log(low), math.log(high))
    return max(widths[0], NARROWEST), max(widths[1], NARROWEST)


def _error(score: float, width: float) -> float:
    """How large an error is at a score: the inverse of `Outcome.score`, without its sign."""
    return abs(score) * width if abs(score) <= 1 else width + (abs(score) - 1) * BEYOND


def _shortest(scores: Sequence[float], below: float, above: float) -> tuple[float, float]:
    """The shortest range of scores that has 0 inside and holds `LEVEL` of the weight; below, above: assumed widths."""
    ages = range(len(scores) - 1, -1, -1)
    points = [(score, AGEING**age) for score, age in zip(scores, ages, strict=True)]
    points = sorted([*points, (-1.0, ASSUMED_WEIGHT / 2), (1.0, ASSUMED_WEIGHT / 2)])
    sums = [0.0, *accumulate(own for _, own in points)]
    needed = min(LEVEL * sums[-1] + CLOSING, sums[-1]) - 1e-9  # sums of rounded numbers
    found, end = [], 0
    for start, (score, _) in enumerate(points):
        if start and score > 0:
            break
        while end < len(points) and sums[end] - sums[start] < needed:
            end += 1
        if sums[end] - sums[start] < needed:
            break
        low, high = min(0.0, score), max(0.0, points[end - 1][0])
        found.append((_error(low, below) + _error(high, above), low, high))
    _, low, high = min(found)
    return low, high


def _stretched(limit: float, weight: float) -> float:
    """A limit set by few errors, moved outward: their largest is not the largest that there will be. What was assumed
    is moved only by errors beyond it."""
    wider = limit * (1 + STRETCH / (weight + SURE)) if weight else limit
    return wider if limit > 1 else min(wider, 1.0)
