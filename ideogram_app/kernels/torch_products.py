"""INT8 products of PyTorch itself, a run of rows at a time, and the two sets of kernels that need no Triton.

    torch     products by `torch._int_mm` (cuBLAS, hipBLASLt)     NVIDIA from sm_75 on, AMD
    plain     products in float32, summed exactly                 everywhere else

Both have runs.py between the matrices. INT32 sums of a run lie in memory until the `finish` of who asked has made
numbers of them: here `plain.epilogue`, in fused/matmul.py a kernel. Left out: torch's `_scaled_mm`, and products whose
scales its own kernels apply, of which no two releases have had the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ideogram_app.kernels import plain, runs
from ideogram_app.kernels.contract import QuantizedActivations
from ideogram_app.quantization import int8
from ideogram_app.quantization.rows import INT32_ROWS, WIDENED_AT_ONCE

LEAST_ROWS = 17  # of torch._int_mm on CUDA
PADDED_ROWS = 32
# (sums (m, N) int32, row scales (m, 1), scale (N,), bias (N,) or None, dtype, out (m, N)): numbers, written to `out`.
Finish = Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype, Tensor], Any]
Multiply = Callable[[Tensor, Tensor], Tensor]  # (int8 (m, K), int8 (N, K)) -> int32 (m, N)


def int_mm(
    x: QuantizedActivations,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    finish: Finish = runs.epilogue,
) -> Tensor:
    """`Kernels.matmul` by torch's own INT8 product.

    K and N are multiples of 8 on CUDA. Few rows are padded, for CUDA's product wants more than 16.
    """
    return _in_runs(_int_mm, INT32_ROWS, finish, x, values, scale, bias, dtype)


def exact_float(
    x: QuantizedActivations, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`plain.matmul`, in memory that does not grow with the number of rows."""
    rows = max(1, WIDENED_AT_ONCE // len(values))
    return _in_runs(int8.int32_product, rows, runs.epilogue, x, values, scale, bias, dtype)


@cache
def int_mm_problem(device: torch.device) -> str:
    """Why `torch._int_mm` cannot be used on a device; "" where it can. Tried once, with the largest sums there are.

    Raises:
        torch.OutOfMemoryError: no room to try; the next call tries again.
    """
    left = torch.full((PADDED_ROWS, 4608), -128, dtype=torch.int8)
    right = torch.full((64, 4608), 127, dtype=torch.int8)
    right[1::2] = -128
    try:
        made = torch._int_mm(left.to(device), right.to(device).t()).cpu()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError) as problem:  # not built, not for this device or card
        return f"torch._int_mm does not run here ({type(problem).__name__})"
    return "" if torch.equal(made, int8.int32_product(left, right)) else "torch._int_mm is not exact here"


def _in_runs(
    multiply: Multiply,
    rows: int,
    finish: Finish,
    x: QuantizedActivations,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`Kernels.matmul`, so many rows at a time."""
    out = torch.empty(x.values.shape[0], values.shape[0], dtype=dtype, device=values.device)
    for left, row_scale, part in zip(*(each.split(rows) for each in (x.values, x.scale, out)), strict=True):
        sums = multiply(left, values)
        finish(sums, row_scale, scale, bias, dtype, part)
        del sums  # never beside those of the next rows
    return out


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    count = left.shape[0]
    padded = functional.pad(left, (0, 0, 0, PADDED_ROWS - count)) if count < LEAST_ROWS else left
    return torch._int_mm(padded, right.t())[:count]


IN_RUNS = replace(
    plain.PLAIN,
    norm=runs.norm,
    add_norm=runs.add_norm,
    add=runs.add,
    swiglu=runs.swiglu,
    quantize=runs.quantize,
    heads=runs.heads,
    matmul=exact_float,
    decode_int8=runs.decode_int8,
)
WITHOUT_TRITON = {"plain": IN_RUNS, "torch": replace(IN_RUNS, name="torch", matmul=int_mm)}
