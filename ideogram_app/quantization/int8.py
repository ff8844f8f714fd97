"""INT8 (W8A8) in plain torch: weights with one scale a row times activations with one scale a token.

    weight = values * scale[:, None]        values int8 (rows, columns), scale float32 (rows,)
    y = (x_values @ values.T) * x_scale * scale + bias      the product accumulated exactly in int32

Weights divide a row by its largest magnitude / 127, so values stay within -127..127 and a row negates exactly: the
convention of the INT8 files other programs read. Activations divide a token by its largest magnitude / 127.5, as
torchao's symmetric mapping does at run time: `linear` is the truth of what a model built from `Int8Tensor` computes,
to the last bit for float32 input. (For bfloat16 input torchao also rounds the token's scale to bfloat16, this file
does not.) torchao's `Int8DynamicActivationInt8WeightConfig` divides weights by 127.5 too and clips the largest one.

Left out: asymmetric and static activations, per-group scales, speed on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ideogram_app.quantization.rows import EXACT_RUN

WEIGHT_LEVELS = 127.0
ACTIVATION_LEVELS = 127.5  # (127 + 128) / 2: torchao's MappingType.SYMMETRIC for int8
# Floors under the scales keep 1 / scale finite for rows of zeros. Weights: the smallest normal float32. Activations:
# torchao's floor for int8, a token below 1.5e-5 counts as nearly silent.
SMALLEST_WEIGHT_SCALE = torch.finfo(torch.float32).tiny
SMALLEST_ACTIVATION_SCALE = torch.finfo(torch.float32).eps


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (rows, columns) to int8 (rows, columns) and float32 scales (rows,).

    A row of zeros gets a tiny scale and zeros. The weight must be finite.
    """
    weight = weight.float()
    scale = (weight.abs().amax(-1, keepdim=True) / WEIGHT_LEVELS).clamp_(min=SMALLEST_WEIGHT_SCALE)
    values = (weight * (1.0 / scale)).round_().clamp_(-127, 127).to(torch.int8)
    return values, scale.squeeze(-1)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations (..., columns) to int8 of that shape and float32 scales (..., 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / ACTIVATION_LEVELS).clamp_(min=SMALLEST_ACTIVATION_SCALE)
    values = (x * (1.0 / scale)).round_().clamp_(-128, 127).to(torch.int8)
    return values, scale


def linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with both sides in int8: x (..., columns) of any floating type to (..., rows)."""
    x_values, x_scale = quantize_tokens(x)
    product = int32_product(x_values.reshape(-1, x.shape[-1]), values)  # (tokens, rows)
    y = product.float() * x_scale.reshape(-1, 1) * scale
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], scale.shape[0])


def int32_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of int8 matrices (m, k) and (n, k), exact in int32 (m, n).

    Sums runs of columns that float32 holds exactly. `torch._int_mm` is faster, but it wants m > 16 on CUDA and
    saturates on CPUs without VNNI; this has the same answer on every device.
    """
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for left_run, right_run in zip(left.split(EXACT_RUN, -1), right.split(EXACT_RUN, -1), strict=True):
        total += (left_run.float() @ right_run.float().t()).to(torch.int32)
    return total
