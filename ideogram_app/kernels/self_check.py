"""Self-check of the kernels on the user's own device: each against its truth, wrong or slow ones replaced by the next.

    implementations of one kernel, best first       triton -> int_mm -> torch -> plain
    check_kernels(...)                              every case, all its candidates: right or not, and how fast
    self_check_assembly.assembled(...)              one `Kernels` of the implementations that the rows name

A candidate is out where it is wrong, does not compile or launch, or hangs past its limit. Of those that are right the
first is taken, unless a later one is clearly faster: what is best by the table (choice.py) need not be so on a card
that nobody has seen. torch.compile's and Triton's autotuning measure too, but take the fastest whether it is right or
not. Left out: where results are kept (self_check_record.py), and the inputs (self_check_cases.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ideogram_app.errors import DeviceError
from ideogram_app.kernels import choice
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.self_check_cases import Case, Trial
from ideogram_app.kernels.self_check_record import RIGHT, Checked, RecordFile
from ideogram_app.kernels.self_check_trial import LIMIT_SECONDS, NoRoom, TrialFailed, attempt, told
from ideogram_app.machine.microbench import fastest

log = logging.getLogger(__name__)

BEST_FIRST = ("triton", "int_mm", "torch", "plain")
LAST = "plain"
# Of the time of the one before, at most so much: noise of short runs is within a tenth. Plans count with the memory of
# the device's own set, so plain torch is taken for its speed only where a fused kernel cannot be what it should be.
WORTH_TAKING, PLAIN_WORTH_TAKING = 0.9, 0.5
TIMED_SECONDS, ROUNDS = 0.01, 3  # of repeats, for each candidate of each size, and how often all take their turn
Build = Callable[[str], Any]


@dataclass(frozen=True)
class Standing:
    """One candidate of one case. wrong: why it is out, "" where it is right."""

    name: str
    wrong: str = ""
    error: float | None = None
    seconds: float = 0.0

    def after(self, timed: float | str) -> Standing:
        """With the seconds of one more size, or out for what kept it from being timed."""
        return replace(self, wrong=timed) if isinstance(timed, str) else replace(self, seconds=self.seconds + timed)


def ladder(first: str) -> tuple[str, ...]:
    """Names of the sets to try where `first` is the one for the device, best first; plain torch ends it."""
    known = BEST_FIRST[BEST_FIRST.index(first) :] if first in BEST_FIRST else (first, LAST)
    return tuple(name for name in known if name in choice.KERNEL_SETS)


def pick(kernel: str, standings: Sequence[Standing]) -> Checked:
    """The candidate to engage: the first that is right, or a later one that is clearly faster."""
    refused = [f"{each.name} {each.wrong}" for each in standings if each.wrong]
    right = [each for each in standings if not each.wrong]
    if not right:
        return Checked(kernel, "", f"no implementation is right here: {'; '.join(refused)}")
    best, slower = right[0], []
    for other in right[1:]:
        worth = PLAIN_WORTH_TAKING if other.name == LAST else WORTH_TAKING
        if other.seconds < worth * best.seconds:
            slower.append(f"{best.name} takes {in_ms(best.seconds)}, {other.name} {in_ms(other.seconds)}")
            best = other
    others = [each for each in right if each is not best and best.seconds]
    compared = [f"{each.name} takes {each.seconds / best.seconds:.1f} times as long" for each in others]
    said = [*refused, *slower] or ["; ".join([RIGHT, *compared])]
    return Checked(kernel, best.name, "; ".join(said), best.error, best.seconds or None)


def in_ms(seconds: float) -> str:
    """Of a kernel: three figures, however short it is."""
    return f"{seconds * 1000:.3g} ms"


def check_kernels(
    cases: Sequence[Case],
    names: Sequence[str],
    build: Build,
    device: torch.device,
    record: RecordFile,
    limit: float = LIMIT_SECONDS,
) -> list[Checked]:
    """A row for every case; one for which there is no memory gets none.

    Args:
        names, build: candidates, best first, and what makes one of a name.
        record: where it is noted what is tried, so that a crash is known at the next start.

    Raises:
        DeviceError: the device no longer answers.
    """
    tried = record.tried()
    rows = []
    hanging = False
    try:
        for case in cases:
            try:
                rows.append(_CaseCheck(case, build, device, record, limit, tried).row(names))
            except (NoRoom, torch.OutOfMemoryError, MemoryError):
                log.warning("No memory to check %s; it is used unchecked", case.kernel)
    except DeviceError:
        hanging = True  # the next start must know what was tried
        raise
    finally:
        if not hanging:
            record.came_back()
    return rows


class _CaseCheck:
    """One case, all candidates."""

    def __init__(
        self,
        case: Case,
        build: Build,
        device: torch.device,
        record: RecordFile,
        limit: float,
        tried: tuple[str, str] | None,
    ) -> None:
        self.case, self.build, self.device, self.record, self.limit = case, build, device, record, limit
        self.tried = tried

    def row(self, names: Sequence[str]) -> Checked:
        """The last candidate, the slowest, is tried only where fewer than two others are right: to be compared with.

        On a processor times are shown and decide nothing: others take turns on it, and a few rows say little of runs
        that are made to fit a cache (kernels/processor.py compares its products itself).
        """
        if not self.case.timed or self.device.type == "cpu":
            return pick(self.case.kernel, self._until_one_is_right(names))
        standings = self.standings(names[:-1] if len(names) > 2 else names)
        if len(names) > 2 and sum(not each.wrong for each in standings) < 2:
            standings += self.standings(names[-1:])
        return pick(self.case.kernel, standings)

    def _until_one_is_right(self, names: Sequence[str]) -> list[Standing]:
        found: list[Standing] = []
        for name in names:
            found += self.standings([name])
            if not found[-1].wrong:
                break
        return found

    def standings(self, names: Sequence[str]) -> list[Standing]:
        made: dict[str, Any] = {}
        found = {name: Standing(name) for name in names}
        for name in names:
            try:
                candidate = self._built(name)
            except TrialFailed as problem:
                found[name] = Standing(name, str(problem))
                continue
            if any(_same(candidate, other, self.case.part) for other in made.values()):
                del found[name]  # two sets may share a kernel
                continue
            made[name] = candidate
        for trial in self.case.trials():
            works: dict[str, Callable[[], Any]] = {}
            for name, candidate in made.items():
                if not found[name].wrong:
                    found[name], works[name] = self._judged(found[name], trial, candidate)
            if self.case.timed and trial.timed:
                for name, seconds in self._timed(
                    {name: works[name] for name in works if not found[name].wrong}
                ).items():
                    found[name] = found[name].after(seconds)
        return list(found.values())

    def _built(self, name: str) -> Any:
        if self.tried == (self.case.kernel, name):
            raise TrialFailed("did not come back when it was last tried; `check` tries it again")
        try:
            return self.build(name)
        except Exception as problem:  # an import of Triton may fail in any way; the next set serves
            raise TrialFailed(f"cannot be used: {told(problem)}") from problem

    def _judged(self, before: Standing, trial: Trial, candidate: Any) -> tuple[Standing, Callable[[], Any]]:
        """The standing after one more trial, and the work to be timed."""
        self.record.trying(self.case.kernel, before.name)
        try:
            work, got = attempt(lambda: _first(trial, candidate), self.device, self.limit)
        except TrialFailed as problem:
            return replace(before, wrong=str(problem)), _nothing
        if trial.judge is None:
            return before, work
        verdict = trial.judge(got)
        if verdict.wrong:
            return replace(before, wrong=f"is wrong: {verdict.wrong}", error=verdict.error), _nothing
        return replace(before, error=max(before.error or 0.0, verdict.error or 0.0)), work

    def _timed(self, works: Mapping[str, Callable[[], Any]]) -> dict[str, float | str]:
        """The fastest run of each in seconds, or why there is none; in rounds, so that a busy moment meets them all."""
        best: dict[str, float | str] = {}
        for _ in range(ROUNDS):
            for name, work in works.items():
                before = best.get(name, float("inf"))
                if isinstance(before, str):
                    continue
                try:
                    seconds = attempt(partial(fastest, work, self.device, TIMED_SECONDS), self.device, self.limit)
                    best[name] = min(before, seconds)
                except TrialFailed as problem:
                    best[name] = str(problem)
        return best


def _nothing() -> None:
    """What is wrong is not timed."""


def _first(trial: Trial, candidate: Any) -> tuple[Callable[[], Any], Any]:
    work = trial.prepare(candidate)
    return work, work()


def _same(one: Any, other: Any, part: str) -> bool:
    """Whether two candidates would run the same function for this part."""
    if not isinstance(one, Kernels) or not isinstance(other, Kernels) or not hasattr(one, part):
        return False
    first, second = (getattr(each, part) for each in (one, other))
    return getattr(first, "__func__", first) is getattr(second, "__func__", second)
