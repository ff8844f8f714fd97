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
from ideogram_app.machine.microbench import Shape, dense_tflops, fastest, int8_tops

CEILING_SECONDS = 0.4  # of repeats after the first, which warms up
# M, N, K: a large square, and feed_forward.w1 of the published model for 4096 tokens. A processor gets the sizes that
# it can repeat: 17 GFLOP.
CEILING_ON_A_DEVICE: tuple[Shape, ...] = ((8192, 8192, 8192), (4096, 12288, 4608))
CEILING_ON_A_CPU: tuple[Shape, ...] = ((2048, 2048, 2048), (512, 4608, 4608))
COPIED_BYTES = {"cpu": 2**28}  # larger than any cache; 1 GiB elsewhere


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measure it; about three seconds.

    Returns:
        Teraflops in bfloat16 and in the computing type, INT8 teraops, gigabytes a second read and written by a copy;
        None for a product that the device does not have.
    """
    shapes = CEILING_ON_A_CPU if device.type == "cpu" else CEILING_ON_A_DEVICE
    own = max(dense_tflops(device, dtype, *shape, CEILING_SECONDS) for shape in shapes)
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
        else best("bfloat16", lambda shape: dense_tflops(device, torch.bfloat16, *shape, CEILING_SECONDS))
    )
    int8 = best("INT8", lambda shape: int8_tops(device, *shape, CEILING_SECONDS))
    name = str(dtype).removeprefix("torch.")
    return Ceiling(bf16, int8, _copy_gb_s(device), own, name, " ".join(problems))


def _copy_gb_s(device: torch.device) -> float:
    source = torch.zeros(COPIED_BYTES.get(device.type, 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device, CEILING_SECONDS)
    return 2 * source.numel() / seconds / 1e9
