"""Limits of a benchmark: which rows fit into memory together, how many steps into the time budget; an alarm.

Decisions here are arithmetic on numbers that were counted or measured; session.py acts on them and reports them.
`time_limit` is what holds where arithmetic cannot know, a first step with compilation in it: it breaks off between two
operations, by the system's alarm clock. Left out: breaking off a single long operation, and Windows, which has no such
clock; there a row may pass the budget by one step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ideogram_app.benchmark.rows import RowMemory

# Of free memory that rows may fill: blocks are rounded up and leave gaps, and libraries take their own.
FILLED = 0.9
SETUP_STEPS = 2  # one that compiles, tunes and allocates, one that shows what a step takes
# Where a first step takes so long on a processor, compilation is no part of it, and it shows that by itself.
LONG_STEP_SECONDS = 5.0
PROFILED_STEPS = 1.5  # that a profiled step may take the time of: the profiler's own start and its records
SPARE = 0.9  # of the seconds left that are given out: steps in turn take longer than one row's alone
# Of the seconds left that a row may spend on being built and warmed up: earlier rows come before later ones, but none
# takes everything.
SETUP_SHARE = 0.5
LEAST_SECONDS = 0.05  # an alarm of zero would be none


class TimeUp(RuntimeError):
    """The seconds given are over. A RuntimeError, as torch.compile hands on what is raised inside it."""


class Clock:
    """Seconds of a budget."""

    def __init__(self, budget: float) -> None:
        self.budget, self._start = budget, time.perf_counter()

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return self.budget - self.spent


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in the body once the seconds are over; no limit off the main thread and on Windows."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeUp(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(LEAST_SECONDS, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def group_rows(sizes: Sequence[RowMemory], free: int | None) -> tuple[list[list[int]], list[int]]:
    """Put rows into groups that lie in memory together, each row into the first group where it fits.

    Where nobody knows how many bytes are free, in `free`, everything fits. Returns groups of row numbers, and the
    numbers of rows that fit nowhere, not even alone.
    """
    groups: list[list[int]] = []
    too_large: list[int] = []
    for index, size in enumerate(sizes):
        if not _fits([size], free):
            too_large.append(index)
            continue
        for group in groups:
            if _fits([size, *(sizes[other] for other in group)], free):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups, too_large


def setup_seconds(left: float, ready: Sequence[float]) -> float:
    """What a row may spend on being built and warmed up, beside a step of each row that waits, in `ready` seconds."""
    return max(0.0, left - sum(ready)) * SETUP_SHARE


@dataclass(frozen=True)
class Turns:
    """What is timed: how many steps of each row, which rows (numbers), and whether a step of each is profiled."""

    steps: int
    rows: tuple[int, ...]
    profiled: bool


def turns(seconds: float, steps: Sequence[float], asked: int) -> Turns:
    """Turns that the seconds allow, given those of one step of each row: fewer turns, no profile, then fewer rows."""
    left = list(range(len(steps)))
    while left:
        whole = sum(steps[index] for index in left)
        affordable = seconds / whole if whole > 0 else asked + PROFILED_STEPS
        if affordable >= 1 + PROFILED_STEPS:
            return Turns(min(asked, int(affordable - PROFILED_STEPS)), tuple(left), True)
        if affordable >= 1:
            return Turns(min(asked, int(affordable)), tuple(left), False)
        left.remove(max(left, key=lambda index: steps[index]))
    return Turns(0, (), False)


def _fits(sizes: Sequence[RowMemory], free: int | None) -> bool:
    return free is None or sum(size.kept for size in sizes) + max(size.busy for size in sizes) <= FILLED * free
