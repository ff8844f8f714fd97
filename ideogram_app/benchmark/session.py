"""Benchmark session: ceiling first, then rows built, warmed up, timed in turn, profiled, within a budget.

Rows that lie in memory together are timed step by step in turn, so that a drift of the device's clock meets all of them
alike. Where not all fit, groups follow one another, each between two measurements of the ceiling that its shares refer
to. A row that cannot run is left out with its reason; nothing is left out in silence.

Left out: several devices, and repeating the whole session; the spread over steps is what one can know.
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
    group_rows,
    setup_seconds,
    time_limit,
    turns,
)
from ideogram_app.benchmark.ours import build_ours
from ideogram_app.benchmark.profiling import Profile, profile_step
from ideogram_app.benchmark.report import Benchmark, MeasuredRow, MissingRow
from ideogram_app.benchmark.rows import Row, int8_share, missing_packages, row_bytes
from ideogram_app.benchmark.shapes import Workload
from ideogram_app.benchmark.stock import build_stock, load_packages
from ideogram_app.benchmark.weights import Tiles
from ideogram_app.errors import AppError
from ideogram_app.machine.gpu_specs import Ceiling, Flops
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.meter import PhaseMeter, bytes_in_use, release, trim
from ideogram_app.machine.microbench import measure_ceiling
from ideogram_app.machine.versions import commit, versions
from ideogram_app.planning.step_time import step_flops
from ideogram_app.text import gb

# What ends a row without anything being wrong, and what its packages, kernels and drivers raise when a version, a type
# or a device does not suit them. Either way the other rows are timed all the same.
EXPECTED = (AppError, TimeUp, torch.OutOfMemoryError)
FAILURES = (RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError)


@dataclass
class WarmRow:
    """A row that is built and warm. build, first, warm: seconds of building, of the first step, of a warm one."""

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


class BenchmarkSession:
    """What one benchmark knows while it goes on."""

    def __init__(
        self, workload: Workload, device: torch.device, budget: float, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.workload, self.device, self._say = workload, device, say
        self.dtype: torch.dtype = getattr(torch, workload.dtype)
        self.work = step_flops(workload.model, workload.width, workload.height, workload.text_tokens)
        self.clock = Clock(budget)
        self.ceilings: list[Ceiling] = []
        self.missing: list[MissingRow] = []
        self.notes: list[str] = []

    def all(self, rows: Sequence[Row], hardware: Hardware) -> Benchmark:
        """Measure every row that can be."""
        self.ceilings.append(self._ceiling())
        groups, measured = self._groups(rows, hardware), list[MeasuredRow]()
        to_come = sum(map(len, groups))
        for number, group in enumerate(groups):
            if number:
                release(self.device)
                self.ceilings.append(self._ceiling())
            measured += self._measure_group(group, number, to_come)
            to_come -= len(group)
        order, workload = [row.name for row in rows], self.workload
        return Benchmark(
            hardware=hardware,
            versions=versions(),
            ceiling=self.ceilings[0],
            rows=tuple(sorted(measured, key=lambda row: order.index(row.name))),
            commit=commit(),
            shape=workload.shape,
            size=(workload.width, workload.height),
            text_tokens=workload.text_tokens,
            padded_tokens=workload.padding,
            steps=workload.steps,
            device=str(self.device),
            dtype=workload.dtype,
            step_tflop=(self.work.matrices + self.work.attention) / 1e12,
            group_ceilings=tuple(self.ceilings),
            missing=tuple(self.missing),
            notes=tuple(dict.fromkeys(self.notes)),
            seconds=self.clock.spent,
            budget=self.clock.budget,
        )

    def say(self, line: str) -> None:
        """Report progress, with the seconds so far."""
        self._say(f"{self.clock.spent:4.0f} s  {line}")

    def _ceiling(self) -> Ceiling:
        self.say("the ceiling: large products and a copy")
        found = measure_ceiling(self.device, self.dtype)
        release(self.device)  # of what the products took, gigabytes that rows may need
        return found

    def _groups(self, rows: Sequence[Row], hardware: Hardware) -> list[list[Row]]:
        """The rows whose packages are installed, in groups that fit into free memory together."""
        present = [row for row in rows if not missing_packages(row)]
        for row in rows:
            if row not in present:
                self._skip(row, missing_packages(row))
        free = hardware.host_free_bytes if self.device.type == "cpu" else hardware.device_free_bytes
        sizes = [row_bytes(row, self.workload) for row in present]
        numbers, too_large = group_rows(sizes, free)
        for index in too_large:
            needs = sizes[index].kept + sizes[index].busy
            self._skip(present[index], f"Needs about {gb(needs)}, and {gb(free or 0)} are free.")
        groups = [[present[index] for index in group] for group in numbers]
        if len(groups) > 1:
            names = "; ".join(", ".join(row.name for row in group) for group in groups)
            self.notes.append(
                f"Not all rows fit into {gb(free or 0)} together, so {len(groups)} groups were timed one after "
                f"another, each against a ceiling of its own: {names}."
            )
        return groups

    def _measure_group(self, rows: Sequence[Row], number: int, to_come: int) -> list[MeasuredRow]:
        """Build, time and profile rows that lie in memory together, of `to_come` that wait; all are gone afterwards."""
        tiles, warm = Tiles(self.device, self.dtype), list[WarmRow]()
        for row in rows:
            if made := self._set_up(row, tiles, setup_seconds(self.clock.left, [made.warm for made in warm])):
                warm.append(made)
        share = SPARE * self.clock.left * len(rows) / to_come
        chosen = turns(share, [row.warm for row in warm], self.workload.steps)
        timed = self._time(warm, chosen, share)
        self._profile(timed if chosen.profiled else [])
        if self.clock.left > 0:
            self.ceilings[number] = self.ceilings[number].better(self._ceiling())
        if any(made.row.compiled for made in warm):
            torch.compiler.reset()  # lets go of the compiled code, which may keep what it was compiled for
        return [self._measured(made, number) for made in timed]

    def _time(self, warm: Sequence[WarmRow], chosen: Turns, seconds: float) -> list[WarmRow]:
        """Time the chosen rows in turn; those of which a step was timed, reasons noted for the others."""
        timed = [warm[index] for index in chosen.rows]
        for slow in (made for index, made in enumerate(warm) if index not in chosen.rows):
            self._skip(slow.row, f"A step takes {slow.warm:.1f} s, and {seconds:.0f} s were left to its group.")
        if timed and chosen.steps < self.workload.steps:
            self.notes.append(f"Timed {chosen.steps} of {self.workload.steps} steps: the budget allows no more.")
        if timed and not chosen.profiled:
            self.notes.append("No step was profiled: the budget allows no more.")
        self._take_turns(timed, chosen.steps)
        for made in (made for made in timed if not made.times):
            self._skip(made.row, "The budget was over before a step of it was timed.")
        return [made for made in timed if made.times]

    def _set_up(self, row: Row, tiles: Tiles, seconds: float) -> WarmRow | None:
        """Build a row and take two steps; None, with its reason noted, where that cannot be done in the seconds."""
        least = self._ceiling_seconds(row)
        if least > seconds:
            left = f"{seconds:.1f} s are left to build and warm it up."
            self._skip(row, f"A step takes {least:.1f} s or more, and {left}")
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

    def _build(self, row: Row, tiles: Tiles) -> WarmRow:
        trim()
        before, meter = bytes_in_use(self.device), PhaseMeter(self.device)
        steps = SETUP_STEPS + self.workload.steps + 1  # the profiled one
        with meter.phase("build"):
            build = build_ours if row.kind == "ours" else build_stock
            step, note = build(row, self.workload, tiles, steps)
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
        return WarmRow(row, step, note, kept, busy, build=meter.seconds["build"], first=warmed[0], warm=warmed[-1])

    def _take_turns(self, rows: Sequence[WarmRow], steps: int) -> None:
        """A step of each row, so many times."""
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

    def _profile(self, rows: Sequence[WarmRow]) -> None:
        """A step of each under the profiler, while there is time."""
        for number, row in enumerate(rows):
            if self.clock.left < row.warm:
                self.notes.append(f"{number} of {len(rows)} rows were profiled: the budget was over.")
                return
            self.say(f"{row.row.name}: profile")
            row.profile = profile_step(row.step, self.device)

    def _measured(self, row: WarmRow, group: int) -> MeasuredRow:
        median = statistics.median(row.times)
        kernel_seconds, first_seconds = row.profile.kernel_seconds, row.profile.first_seconds
        partly = f" Profiled: the first {first_seconds:.1f} s of a step." if first_seconds else ""
        return MeasuredRow(
            name=row.row.name,
            recipe=row.row.recipe.name,
            ms_per_step=1000 * median,
            spread=(max(row.times) - min(row.times)) / median if len(row.times) > 1 else None,
            share_of_ceiling=self._ceiling_seconds(row.row, group) / median,
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

    def _ceiling_seconds(self, row: Row, group: int = -1) -> float:
        return ceiling_seconds(self.work, int8_share(row, self.workload.model.conditional), self.ceilings[group])

    def _skip(self, row: Row, reason: str, failed: bool = False) -> None:
        self.say(f"{row.name}: not measured. {reason}")
        self.missing.append(MissingRow(row.name, reason, failed))


def ceiling_seconds(work: Flops, int8: float, ceiling: Ceiling) -> float:
    """Seconds of a step in which every product runs at its ceiling and nothing else takes time.

    The share `int8` of the matrices is multiplied in INT8; attention always is in the computing type.
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
