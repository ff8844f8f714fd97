"""What this device does at best, measured: large products in the computing type and in INT8, and copying.

Each is run for a moment and its fastest run counts, because a ceiling is what nothing passes. Products are square and
of a transformer's own shape, whichever is faster. Achieved times are shares of this rather than of a data sheet:
clocks, power limits and drivers are in it.

Left out: FP8 and FP4 units, which no recipe uses; attention, for which no ceiling is agreed on, so it is held against
that of products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ideogram_app.benchmark.report import Ceiling
from ideogram_app.measure import Meter

SECONDS_EACH = 0.4  # of repeats after the first, which warms up
# M, N, K: a large square, and feed_forward.w1 of the published model for 4096 tokens. A processor gets the sizes that
# it can repeat: 17 GFLOP.
Shape = tuple[int, int, int]
ON_A_DEVICE: tuple[Shape, ...] = ((8192, 8192, 8192), (4096, 12288, 4608))
ON_A_CPU: tuple[Shape, ...] = ((2048, 2048, 2048), (512, 4608, 4608))
COPIED_BYTES = {"cpu": 2**28}  # larger than any cache; 1 GiB elsewhere


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measure it; about three seconds.

    Returns:
        Teraflops in bfloat16 and in the computing type, INT8 teraops, gigabytes a second read and written by a copy;
        None for a product that the device does not have.
    """
    shapes = ON_A_CPU if device.type == "cpu" else ON_A_DEVICE
    own = max(_dense_tflops(device, dtype, *shape) for shape in shapes)
    problems: list[str] = []

    def best(what: str, rate: Callable[[Shape], float]) -> float | None:
        try:
            return max(rate(shape) for shape in shapes)
        except (RuntimeError, NotImplementedError) as refused:
            problems.append(f"No {what} product on this device: {str(refused).splitlines()[0]:.120}")
            return None

    bf16 = (
        own
        if dtype == torch.bfloat16
        else best("bfloat16", lambda shape: _dense_tflops(device, torch.bfloat16, *shape))
    )
    int8 = best("INT8", lambda shape: _int8_tops(device, *shape))
    name = str(dtype).removeprefix("torch.")
    return Ceiling(bf16, int8, _copy_gb_s(device), own, name, " ".join(problems))


def _dense_tflops(device: torch.device, dtype: torch.dtype, rows: int, columns: int, depth: int) -> float:
    """x (rows, depth) @ w.T, w (columns, depth), as a Linear computes it."""
    x = torch.randn(rows, depth, device=device).to(dtype)
    weight = torch.randn(columns, depth, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = fastest(lambda: torch.mm(x, weight.t(), out=out), device)
    return 2 * rows * columns * depth / seconds / 1e12


def _int8_tops(device: torch.device, rows: int, columns: int, depth: int) -> float:
    """The same in INT8, summed in INT32: the weight stored by rows and used transposed, the fast layout."""
    x = torch.randint(-127, 128, (rows, depth), device=device, dtype=torch.int8)
    weight = torch.randint(-127, 128, (columns, depth), device=device, dtype=torch.int8)
    seconds = fastest(lambda: torch._int_mm(x, weight.t()), device)
    return 2 * rows * columns * depth / seconds / 1e12


def _copy_gb_s(device: torch.device) -> float:
    source = torch.zeros(COPIED_BYTES.get(device.type, 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device)
    return 2 * source.numel() / seconds / 1e9


def fastest(work: Callable[[], object], device: torch.device, limit: float = SECONDS_EACH) -> float:
    """Seconds of the fastest of repeated runs, after one that warms up.

    Runs are timed one by one, and so each pays for a launch and a wait: some 20 us of the millisecond or more that
    these sizes take.
    """
    work()
    best, spent = float("inf"), 0.0
    while spent < limit:
        meter = Meter(device)
        with meter.phase("run"):
            work()
        best, spent = min(best, meter.seconds["run"]), spent + meter.seconds["run"]
    return best
