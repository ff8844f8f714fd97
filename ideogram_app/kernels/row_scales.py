"""The scale with which each row of a Q4_K weight is best rounded to INT8, found once when the weight is loaded.

Plain torch on any device: a few passes over a weight that is used for years. Left out: scales that clip a row's
largest weights for the sake of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rotation import rotate

# Weights decoded at once. With up to five float32 copies of them alive, 40 MB, whatever the matrix.
ROW_SCALES_CHUNK = 2**21


def row_scales(packed: Tensor, rotated: bool) -> Tensor:
    """packed Q4_K (N, bytes) -> float32 (N,): the largest magnitude of each decoded row, rotated if asked for, / 127.

    Raises:
        CheckpointError: these are not packed rows.
    """
    columns = k_quants.unpacked_columns(packed.shape[1], "Q4_K")
    scales = []
    for part in packed.split(max(1, ROW_SCALES_CHUNK // columns)):
        values = k_quants.decode(part, "Q4_K")
        values = rotate(values) if rotated else values
        scales.append(values.abs().amax(-1) / int8.WEIGHT_LEVELS)
    return torch.cat(scales).clamp_(min=int8.SMALLEST_WEIGHT_SCALE)
