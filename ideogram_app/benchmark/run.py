"""One benchmark: the ceiling first, then rows built, warmed up, timed in turn and profiled, within a budget.

Rows that lie in memory together are timed step by step in turn, so that a drift of the device's clock meets all of them
alike. Where not all fit, groups follow one another, each between two measurements of the ceiling that its shares refer
to. A row that cannot run is left out with its reason; nothing is left out in silence.

Left out: several devices, and repeating the whole run; the spread over steps is what one run can know.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ideogram_app.benchmark.limits import (
    LONG_STEP_SECONDS,
    SETUP_STEPS,
    SPARE,
    Clock,
    TimeUp,
    Turns,
    arrange,
    setup_seconds,
    time_limit,
    turns,
)
from ideogram_app.benchmark.ours import build_ours
from ideogram_app.benchmark.profiling import Profile, profile_step
from ideogram_app.benchmark.report import Benchmark, MeasuredRow, MissingRow
from ideogram_app.benchmark.rows import Row, absent, int8_share, row_bytes
from ideogram_app.benchmark.shapes import Question
from ideogram_app.benchmark.stock import build_stock, load_packages
from ideogram_app.benchmark.weights import Tiles
from ideogram_app.errors import AppError
from ideogram_app.machine.gpu_specs import Flops
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.meter import PhaseMeter, bytes_in_use, release, trim
from ideogram_app.machine.microbench import Ceiling, measure_ceiling
from ideogram_app.machine.versions import commit, versions
from ideogram_app.planning.step_time import step_flops
from ideogram_app.text import gb

# What ends a row without anything being wrong, and what its packages, kernels and drivers raise when a version, a type
# or a device does not suit them. Either way the other rows are timed all the same.
EXPECTED = (AppError, TimeUp, torch.OutOfMemoryError)
FAILURES = (RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError)


@dataclass
class Ready:
    """A row that is built and warm. seconds: of build, first step and a warm step; times: of the steps that count."""

    row: Row
    step: Callable[[], Tensor]
    note: str
    kept_bytes: int
    busy_bytes: int
    build: float
    first: float
    warm: float
    times: list[float] = field(default_factory=list)
    profile: Profile = field(default_factory=Profile)


class BenchmarkRun:
    """What one benchmark knows while it goes on."""

    def __init__(
        self, question: Question, device: torch.device, budget: float, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.question, self.device, self._say = question, device, say
        self.dtype: torch.dtype = getattr(torch, question.dtype)
        self.work = step_flops(question.model, question.width, question.height, question.text_tokens)
        self.clock = Clock(budget)
        self.ceilings: list[Ceiling] = []
        self.measured: list[MeasuredRow] = []
        self.missing: list[MissingRow] = []
        self.notes: list[str] = []

    def all(self, rows: Sequence[Row], hardware: Hardware) -> Benchmark:
        """Measure every row that can be."""
        self.ceilings.append(self._ceiling())
        present = self._screen(rows)
        free = hardware.host_free_bytes if self.device.type == "cpu" else hardware.device_free_bytes
        sizes = [row_bytes(row, self.question) for row in present]
        groups, too_large = arrange(sizes, free)
        for index in too_large:
            needs = sizes[index].kept + sizes[index].busy
            self._skip(present[index], f"Needs about {gb(needs)}, and {gb(free or 0)} are free.")
        if len(groups) > 1:
            names = "; ".join(", ".join(present[index].name for index in group) for group in groups)
            self.notes.append(
                f"Not all rows fit into {gb(free or 0)} together, so {len(groups)} groups were timed one after "
                f"another, each against a ceiling of its own: {names}."
            )
        to_come = sum(len(group) for group in groups)
        for number, group in enumerate(groups):
            if number:
                release(self.device)
                self.ceilings.append(self._ceiling())
            self._group([present[index] for index in group], number, to_come)
            to_come -= len(group)
        order = [row.name for row in rows]
        return self._report(hardware, sorted(self.measured, key=lambda row: order.index(row.name)))

    def say(self, line: str) -> None:
        """Tell an onlooker, with the seconds so far."""
        self._say(f"{self.clock.spent:4.0f} s  {line}")

    def _ceiling(self) -> Ceiling:
        self.say("the ceiling: large products and a copy")
        found = measure_ceiling(self.device, self.dtype)
        release(self.device)  # of what the products took, gigabytes that rows may need
        return found

    def _screen(self, rows: Sequence[Row]) -> list[Row]:
        """The rows whose packages are installed."""
        present = []
        for row in rows:
            reason = absent(row)
            if reason:
                self._skip(row, reason)
            else:
                present.append(row)
        return present

    def _group(self, rows: Sequence[Row], number: int, to_come: int) -> None:
        """Build, time and profile rows that lie in memory together; all of them are gone afterwards.

        Args:
            to_come: rows that are still to be timed, these included.
        """
        ready = self._all_ready(rows)
        share = SPARE * self.clock.left * len(rows) / to_come
        chosen = turns(share, [row.warm for row in ready], self.question.steps)
        timed = self._all_timed(ready, chosen, share)
        self._profile(timed if chosen.profiled else [])
        if self.clock.left > 0:
            self.ceilings[number] = self.ceilings[number].better(self._ceiling())
        self.measured += [self._measured(made, number) for made in timed]
        if any(made.row.compiled for made in ready):
            torch.compiler.reset()  # lets go of the compiled code, which may keep what it was compiled for

    def _all_ready(self, rows: Sequence[Row]) -> list[Ready]:
        """The rows that could be built and warmed up in their share of the time."""
        tiles = Tiles(self.device, self.dtype)
        ready: list[Ready] = []
        for row in rows:
            warm = self._set_up(row, tiles, setup_seconds(self.clock.left, [made.warm for made in ready]))
            if warm:
                ready.append(warm)
        return ready

    def _all_timed(self, ready: Sequence[Ready], chosen: Turns, seconds: float) -> list[Ready]:
        """Time the chosen rows in turn; those of which a step was timed, reasons noted for the others."""
        kept = [ready[index] for index in chosen.kept]
        for slow in (made for index, made in enumerate(ready) if index not in chosen.kept):
            self._skip(slow.row, f"A step takes {slow.warm:.1f} s, and {seconds:.0f} s were left to its group.")
        if kept and chosen.steps < self.question.steps:
            self.notes.append(f"Timed {chosen.steps} of {self.question.steps} steps: the budget allows no more.")
        if kept and not chosen.profiled:
            self.notes.append("No step was profiled: the budget allows no more.")
        self._time(kept, chosen.steps)
        for made in (made for made in kept if not made.times):
            self._skip(made.row, "The budget was over before a step of it was timed.")
        return [made for made in kept if made.times]

    def _set_up(self, row: Row, tiles: Tiles, seconds: float) -> Ready | None:
        """Build a row and take two steps; None, with its reason noted, where that cannot be done in the seconds."""
        least = self._ideal_seconds(row)
        if least > seconds:
            self._skip(
                row, f"A step takes {least:.1f} s or more, and {seconds:.1f} s are left to build and warm it up."
            )
            return None
        self.say(f"{row.name}: build and warm up, {seconds:.0f} s at most")
        try:
            with time_limit(seconds):
                if row.kind != "ours":
                    load_packages(row)
                return self._build(row, tiles)
        except EXPECTED as problem:
            self._skip(row, _reason(problem))
        except _failures() as problem:
            self.say(traceback.format_exc())
            self._skip(row, f"It failed: {_reason(problem)}", failed=True)
        release(self.device)
        return None

    def _build(self, row: Row, tiles: Tiles) -> Ready:
        trim()
        before, meter = bytes_in_use(self.device), PhaseMeter(self.device)
        steps = SETUP_STEPS + self.question.steps + 1  # the profiled one
        with meter.phase("build"):
            build = build_ours if row.kind == "ours" else build_stock
            step, note = build(row, self.question, tiles, steps)
        kept = max(0, bytes_in_use(self.device) - before)  # a process may shrink meanwhile
        warmed: list[float] = []
        while len(warmed) < SETUP_STEPS:
            trim()
            with PhaseMeter(self.device) as memory, memory.phase("step"):
                step()
            warmed.append(memory.seconds["step"])
            if self.device.type == "cpu" and not row.compiled and warmed[0] > LONG_STEP_SECONDS:
                break
        busy = memory.peak_above_start_bytes  # of the last, which compiles nothing
        return Ready(row, step, note, kept, busy, meter.seconds["build"], warmed[0], warmed[-1])

    def _time(self, rows: Sequence[Ready], steps: int) -> None:
        """Steps in turn."""
        for turn in range(steps):
            for row in rows:
                if self.clock.left < (row.warm if turn else 0):
                    self.notes.append(f"The budget was over after {turn} of {steps} steps.")
                    return
                meter = PhaseMeter(self.device)
                with meter.phase("step"):
                    row.step()
                row.times.append(meter.seconds["step"])
            self.say(f"step {turn + 1} of {steps} of {len(rows)} rows")

    def _profile(self, rows: Sequence[Ready]) -> None:
        """A step of each under the profiler, while there is time."""
        for number, row in enumerate(rows):
            if self.clock.left < row.warm:
                self.notes.append(f"{number} of {len(rows)} rows were profiled: the budget was over.")
                return
            self.say(f"{row.row.name}: profile")
            row.profile = profile_step(row.step, self.device)

    def _measured(self, row: Ready, group: int) -> MeasuredRow:
        median = statistics.median(row.times)
        kernel_seconds, first_seconds = row.profile.kernel_seconds, row.profile.first_seconds
        partly = f" Profiled: the first {first_seconds:.1f} s of a step." if first_seconds else ""
        return MeasuredRow(
            name=row.row.name,
            recipe=row.row.recipe.name,
            ms_per_step=1000 * median,
            spread=(max(row.times) - min(row.times)) / median if len(row.times) > 1 else None,
            share_of_ceiling=self._ideal_seconds(row.row, group) / median,
            peak_memory_bytes=row.kept_bytes + row.busy_bytes,
            families=row.profile.families,
            fastest_ms=1000 * min(row.times),
            tops=(self.work.matrices + self.work.attention) / median / 1e12,
            kept_bytes=row.kept_bytes,
            steps=len(row.times),
            build_seconds=row.build,
            first_step_seconds=row.first,
            busy=None if kernel_seconds is None else kernel_seconds / median,
            group=group,
            note=f"{row.note}{partly}".strip(),
        )

    def _ideal_seconds(self, row: Row, group: int = -1) -> float:
        """What the counted work takes at the ceiling of a group; the last one measured where none is named."""
        return ideal_seconds(self.work, int8_share(row, self.question.model.conditional), self.ceilings[group])

    def _skip(self, row: Row, reason: str, failed: bool = False) -> None:
        self.say(f"{row.name}: not measured. {reason}")
        self.missing.append(MissingRow(row.name, reason, failed))

    def _report(self, hardware: Hardware, measured: Sequence[MeasuredRow]) -> Benchmark:
        question = self.question
        return Benchmark(
            hardware=hardware,
            versions=versions(),
            ceiling=self.ceilings[0],
            rows=tuple(measured),
            commit=commit(),
            shape=question.shape,
            size=(question.width, question.height),
            text_tokens=question.text_tokens,
            padded_tokens=question.padding,
            steps=question.steps,
            device=str(self.device),
            dtype=question.dtype,
            step_tflop=(self.work.matrices + self.work.attention) / 1e12,
            group_ceilings=tuple(self.ceilings),
            missing=tuple(self.missing),
            notes=tuple(dict.fromkeys(self.notes)),
            seconds=self.clock.spent,
            budget=self.clock.budget,
        )


def ideal_seconds(work: Flops, int8: float, ceiling: Ceiling) -> float:
    """Seconds of a step in which every product runs at its ceiling and nothing else takes time.

    Args:
        int8: the share of the matrices that is multiplied in INT8; attention always is in the computing type.
    """
    dense = ((1 - int8) * work.matrices + work.attention) / (ceiling.tflops * 1e12)
    fast = ceiling.tops_int8 or ceiling.tflops
    return dense + int8 * work.matrices / (fast * 1e12)


def _failures() -> tuple[type[Exception], ...]:
    """`FAILURES`, and what Triton raises where a kernel does not compile or does not fit a card."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return FAILURES
    return (*FAILURES, TritonError)


def _reason(problem: BaseException) -> str:
    first = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {first[0]:.200}" if first else type(problem).__name__
