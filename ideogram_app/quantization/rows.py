"""Rows of a matrix: runs of bounded size, and dequantization with one scale a row; imported without torch.

What runs hold for a moment is planned for (planning counts bytes by shape alone), so their lengths stand here, beside
the code that works in such runs, and both import them. Left out: runs of other lengths, which nobody plans with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RowReader = Callable[[str, slice], "Tensor"]  # (name of a tensor, rows) -> those rows of it

WIDENED_AT_ONCE = 2**24  # weights: 64 MB in float32, where the largest matrix would take 450
DECODED_AT_ONCE = 2**22  # weights of Q4_K that become INT8 without Triton: a few float32 copies of 16 MB
# A sum of so many products of int8 stays within 2^24 = 1024 * 128 * 128, where float32 still holds every whole number.
EXACT_RUN = 1024
INT32_ROWS = 2048  # of a product by torch._int_mm at a time: INT32 sums of the widest matrix (24576 rows) take 201 MB


def row_runs(shape: tuple[int, ...], weights: int) -> Iterator[slice]:
    """Slices that cover a tensor's rows, each of at most so many weights or one row; what has one axis comes whole."""
    step = max(1, weights // shape[1]) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """INT8 or FP8 values (rows, columns) times float32 scales (rows,): the inverse of their `quantize_rows`.

    Computed in float32 and rounded to `dtype` once, run by run; None leaves float32.
    """
    from ideogram_app.quantization.fp8_codes import widened

    made = scale.new_empty(values.shape, dtype=dtype or scale.dtype)
    for rows in row_runs(values.shape, WIDENED_AT_ONCE):
        made[rows] = widened(values[rows]).mul_(scale[rows].unsqueeze(-1))
    return made
