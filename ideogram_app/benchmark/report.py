"""Report of a benchmark: measured rows as frozen dataclasses, a text table, the JSON object, its file name.

Field names are names on the wire (`Benchmark` in the design): `ms_per_step` is the median, `spread` is (slowest -
fastest) / median, shares are between 0 and 1, sizes are bytes. Null means not measured, never zero.

Left out: judgement; whether a row is fast enough is for whoever reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.machine.gpu_specs import Ceiling
from ideogram_app.machine.hardware import Hardware
from ideogram_app.text import gb


@dataclass(frozen=True)
class Families:
    """Shares of a step's time; together 1."""

    gemm: float
    attention: float
    other: float


@dataclass(frozen=True)
class MeasuredRow:
    """One row."""

    name: str
    recipe: str  # stock rows name the recipe of the same storage
    ms_per_step: float  # median over `steps` steps of both transformers
    spread: float | None  # None where one step was timed
    share_of_ceiling: float  # the time that the counted work would take at the ceiling, over `ms_per_step`
    # of the device, or of the process where it has none: weights and inputs, and what a step took besides
    peak_memory_bytes: int
    families: Families | None  # of one step under the profiler; None where it was not profiled
    fastest_ms: float  # what other programs on the machine disturb least
    tops: float  # counted work over time; the work is that of the true caption: padding is no work
    kept_bytes: int  # weights and inputs
    steps: int
    build_seconds: float
    first_step_seconds: float
    busy: float | None = None  # on a device, time in kernels over time of a step: 1 where launches hide
    group: int = 0  # rows of one group lay in memory together and were timed in turn
    note: str = ""


@dataclass(frozen=True)
class MissingRow:
    """A row that was asked for and not measured, and why; `failed` where something broke, not where it did not fit."""

    name: str
    reason: str
    failed: bool = False


@dataclass(frozen=True)
class Benchmark:
    """A whole session, in `seconds` of the `budget`."""

    hardware: Hardware
    versions: dict[str, str]
    ceiling: Ceiling  # of the first group of rows
    rows: tuple[MeasuredRow, ...]
    commit: str
    shape: str
    size: tuple[int, int]
    text_tokens: int
    padded_tokens: int
    steps: int
    device: str
    dtype: str
    step_tflop: float  # counted work of one step
    group_ceilings: tuple[Ceiling, ...]  # each measured before and after its group; the higher numbers count
    missing: tuple[MissingRow, ...]
    notes: tuple[str, ...]  # groups, what was shortened, why this computing type
    seconds: float
    budget: float


def table(found: Benchmark) -> str:
    """The session in lines of text."""
    best = found.ceiling
    int8 = f"{best.tops_int8:.2f} TOPS INT8" if best.tops_int8 else "no INT8 product"
    bf16 = f"{best.tflops_bf16:.2f} TFLOPS bf16" if best.tflops_bf16 else "no bf16 product"
    own = "" if best.dtype == "bfloat16" else f", {best.tflops:.2f} TFLOPS {best.dtype}"
    lines = [
        f"{found.shape}, {found.size[0]} x {found.size[1]}, {found.text_tokens} text tokens, {found.dtype} on "
        f"{found.hardware.name}: {found.step_tflop:.2f} TFLOP a step",
        f"Ceiling  {bf16}{own}, {int8}, copy {best.copy_gb_s:.0f} GB/s",
        "",
        f"{'row':<28} {'ms/step':>10} {'spread':>7} {'TOPS':>8} {'ceiling':>8}  {'gemm':>5} {'attn':>5} {'other':>5} "
        f"{'peak':>9}",
    ]
    for row in found.rows:
        kinds = row.families
        split = [f"{share:5.0%}" for share in (kinds.gemm, kinds.attention, kinds.other)] if kinds else ["    –"] * 3
        spread = "–" if row.spread is None else f"{row.spread:.1%}"
        lines.append(
            f"{row.name:<28} {row.ms_per_step:10.1f} {spread:>7} {row.tops:8.3g} {row.share_of_ceiling:8.1%}  "
            f"{' '.join(split)} {gb(row.peak_memory_bytes):>9}"
        )
    lines += [f"{gone.name:<28} not measured: {gone.reason}" for gone in found.missing]
    lines += [f"- {note}" for note in found.notes]
    for note in dict.fromkeys(row.note for row in found.rows if row.note):
        lines.append(f"- {', '.join(row.name for row in found.rows if row.note == note)}: {note}")
    return "\n".join(lines)


def file_name(found: Benchmark) -> str:
    """The name of a session's file: benchmark-nvidia-h100-ideogram-4-1024.json."""
    name = found.hardware.name if found.device != "cpu" else "cpu"
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return f"benchmark-{'-'.join(words)}-{found.shape.replace('=', '-')}-{found.size[0]}.json"
