"""FP8: float8_e4m3fn weights, one float32 scale a row: the form in which Ideogram publishes its transformers.

    weight = values * scale[:, None]        scale = largest magnitude of the row / 448

Weights only: at every use they are widened in float32, rounded to the computing type and multiplied there, so any
device can run this and none gains speed; how those do it that have no such type is in fp8_codes.py. Left out: FP8
matrix units and FP8 activations, which need recent GPUs (torchao's Float8Tensor has them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ideogram_app.quantization.fp8_codes import narrowed
from ideogram_app.quantization.rows import dequantize_rows

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # keeps 1 / scale finite for rows of zeros


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (rows, columns) to float8_e4m3fn (rows, columns) and float32 scales (rows,).

    A row of zeros gets a tiny scale and zeros. The weight must be finite.
    """
    weight = weight.float()
    scale = (weight.abs().amax(-1, keepdim=True) / LARGEST).clamp_(min=SMALLEST_SCALE)
    # Without the clamp a quotient rounded up past 448 would become NaN: this type has no infinity.
    values = narrowed((weight / scale).clamp_(-LARGEST, LARGEST))
    return values, scale.squeeze(-1)


def linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with weights widened to the type of x (..., columns): (..., rows)."""
    return torch.nn.functional.linear(x, dequantize_rows(values, scale, x.dtype), bias)
