"""Microbenchmarks: what a device does at best in matrix products, copies from RAM and reads from disk.

    probe(device, folder)                   about two seconds, once on a machine (planning/profile.py stores it)
    measure_ceiling(device, dtype)          about three: larger products, the computing type too, copies on the device

The fastest run of a moment counts, because a peak is what nothing passes: clocks, power limits, a narrow slot and a
driver are in it.

Left out: FP8 and FP4 units, which no recipe uses, and attention, for which no ceiling is agreed on. Reading a file
measures the disk only where its pages can be told to leave memory first, on Linux and macOS; elsewhere it is left out
rather than taken for as fast as RAM.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ideogram_app.machine.capabilities import multiplies_bfloat16
from ideogram_app.machine.gpu_specs import Ceiling, MeasuredRates
from ideogram_app.machine.hardware import compute_capability
from ideogram_app.machine.meter import PhaseMeter

SECONDS_EACH = 0.3  # of repeats after the first, which warms up; of a ceiling likewise:
CEILING_SECONDS = 0.4
# M, N, K of feed_forward.w1 of the published model for 4096 tokens; a processor gets what it can repeat: 5 GFLOP.
Shape = tuple[int, int, int]
ON_A_DEVICE: Shape = (4096, 12288, 4608)
ON_A_CPU: Shape = (512, 2304, 2304)
LINK_BYTES = 2**28  # a block of the published model in INT8, about
DISK_BYTES, LEAST_DISK_BYTES, CHUNK_BYTES = 2**30, 2**28, 2**24  # read at most, worth measuring, at once
DISK_SECONDS = 0.7
F_NOCACHE = 48  # macOS: reads of this file neither use nor fill the cache
# M, N, K: a large square, and feed_forward.w1 of the published model for 4096 tokens. A processor gets the sizes that
# it can repeat: 17 GFLOP.
CEILING_ON_A_DEVICE: tuple[Shape, ...] = ((8192, 8192, 8192), (4096, 12288, 4608))
CEILING_ON_A_CPU: tuple[Shape, ...] = ((2048, 2048, 2048), (512, 4608, 4608))
COPIED_BYTES = {"cpu": 2**28}  # larger than any cache; 1 GiB elsewhere


def probe(device: torch.device, folder: Path | None = None) -> MeasuredRates:
    """Measure a device, and the disk that holds a folder by its largest file (None leaves the disk out).

    Returns:
        None for what the device does not have, or what could not be measured.
    """
    shape = ON_A_CPU if device.type == "cpu" else ON_A_DEVICE
    dtype = _dense_type(device)
    return MeasuredRates(
        _or_none(lambda: dense_tflops(device, dtype, *shape)),
        _or_none(lambda: int8_tops(device, *shape)),
        _or_none(lambda: link_bytes_per_second(device)) if device.type == "cuda" else None,
        disk_bytes_per_second(folder) if folder else None,
    )


def dense_tflops(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, depth: int, limit: float = SECONDS_EACH
) -> float:
    """x (rows, depth) @ w.T, w (columns, depth), as a Linear computes it."""
    x = torch.randn(rows, depth, device=device).to(dtype)
    weight = torch.randn(columns, depth, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = fastest(lambda: torch.mm(x, weight.t(), out=out), device, limit)
    return 2 * rows * columns * depth / seconds / 1e12


def int8_tops(device: torch.device, rows: int, columns: int, depth: int, limit: float = SECONDS_EACH) -> float:
    """The same in INT8, summed in INT32: the weight stored by rows and used transposed, the fast layout."""
    x = torch.randint(-127, 128, (rows, depth), device=device, dtype=torch.int8)
    weight = torch.randint(-127, 128, (columns, depth), device=device, dtype=torch.int8)
    seconds = fastest(lambda: torch._int_mm(x, weight.t()), device, limit)
    return 2 * rows * columns * depth / seconds / 1e12


def link_bytes_per_second(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    return LINK_BYTES / fastest(lambda: target.copy_(source, non_blocking=True), device)


def disk_bytes_per_second(folder: Path) -> float | None:
    """Bytes a second of reading the folder's largest file from its start, not from memory; None where there is no file
    worth reading, or where the system cannot be told to forget it first."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is None or largest.stat().st_size < LEAST_DISK_BYTES:
        return None
    with contextlib.suppress(OSError), largest.open("rb", buffering=0) as file:
        if _forget(file.fileno()):
            return _read_rate(file.readinto)
    return None


def fastest(work: Callable[[], object], device: torch.device, limit: float = SECONDS_EACH) -> float:
    """Seconds of the fastest of repeated runs, after one that warms up. Each is timed alone and pays for a launch and a
    wait: some 20 us of the millisecond or more that these sizes take."""
    work()
    best, spent = float("inf"), 0.0
    while spent < limit:
        meter = PhaseMeter(device)
        with meter.phase("run"):
            work()
        best, spent = min(best, meter.seconds["run"]), spent + meter.seconds["run"]
    return best


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measure it; None for a product that the device does not have."""
    shapes = CEILING_ON_A_CPU if device.type == "cpu" else CEILING_ON_A_DEVICE
    own = max(dense_tflops(device, dtype, *shape, CEILING_SECONDS) for shape in shapes)
    problems: list[str] = []

    def best(what: str, rate: Callable[[Shape], float]) -> float | None:
        try:
            return max(rate(shape) for shape in shapes)
        except (RuntimeError, NotImplementedError) as refused:
            problems.append(f"No {what} product on this device: {str(refused).splitlines()[0]:.120}")
            return None

    def bf16(shape: Shape) -> float:
        return dense_tflops(device, torch.bfloat16, *shape, CEILING_SECONDS)

    in_bf16 = own if dtype == torch.bfloat16 else best("bfloat16", bf16)
    int8 = best("INT8", lambda shape: int8_tops(device, *shape, CEILING_SECONDS))
    return Ceiling(
        tflops_bf16=in_bf16,
        tops_int8=int8,
        copy_gb_s=_copy_gb_s(device),
        tflops=own,
        dtype=str(dtype).removeprefix("torch."),
        problem=" ".join(problems),
    )


def _dense_type(device: torch.device) -> torch.dtype:
    """What the device multiplies dense matrices in (kernels/dense.py)."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if multiplies_bfloat16(compute_capability(device)) else torch.float32


def _or_none(rate: Callable[[], float]) -> float | None:
    """None where the device refuses, for want of the operation or of memory."""
    try:
        return rate()
    except (RuntimeError, NotImplementedError):
        return None


def _forget(file: int) -> bool:
    """Have the pages of an open file leave memory; whether the system could be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return True
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(file, F_NOCACHE, 1)
        return True
    return False


def _read_rate(read: Callable[[bytearray], int | None]) -> float:
    """Bytes a second of reading on, until the end or for a moment."""
    chunk, taken, start = bytearray(CHUNK_BYTES), 0, time.perf_counter()
    while taken < DISK_BYTES and time.perf_counter() - start < DISK_SECONDS:
        got = read(chunk)
        if not got:
            break
        taken += got
    return taken / (time.perf_counter() - start)


def _copy_gb_s(device: torch.device) -> float:
    source = torch.zeros(COPIED_BYTES.get(device.type, 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device, CEILING_SECONDS)
    return 2 * source.numel() / seconds / 1e9
