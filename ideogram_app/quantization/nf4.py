"""NF4, the 4-bit format of bitsandbytes, in plain torch: sixteen fixed levels, one scale for every 64 weights.

    weight = levels[code] * absmax[block]      blocks of 64 along the flattened matrix, so one may span two rows

    packed   uint8 (weights / 2,)     ccccdddd: the first of two codes stands in the high half
    absmax   float32 (blocks,)        or, quantized once more ("nested", "double quantization"):
    absmax = nested_levels[byte] * nested_absmax[block of 256 of them] + offset

The sixteen levels are quantiles of a normal distribution; the 256 of the nested scales grow by a power of ten every
doubling of their number. Both tables are stored in every file, so `decode` takes them from there. bitsandbytes decodes
on a GPU inside its matrix product; this file is the truth for files that carry the format. Left out: FP4, computing
with packed weights, and making nested scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ideogram_app.errors import RequestError

BLOCK, NESTED_BLOCK = 64, 256
# Dettmers et al., QLoRA, appendix E.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix, widened when they are asked for."""

    absmax: Tensor  # float32 (blocks,), or uint8 (blocks,) where they are nested
    nested_absmax: Tensor | None = None  # float32 (ceil(blocks / nested_block),)
    nested_levels: Tensor | None = None  # float32 (256,)
    nested_block: int = NESTED_BLOCK
    offset: float = 0.0
    first: int = 0  # which block of the matrix absmax[0] belongs to

    def widened(self) -> Tensor:
        """float32 (blocks,)."""
        if self.nested_absmax is None or self.nested_levels is None:
            return self.absmax.float()
        blocks = torch.arange(self.first, self.first + self.absmax.numel()) // self.nested_block
        return self.nested_levels[self.absmax.int()] * self.nested_absmax[blocks] + self.offset


def decode(packed: Tensor, scales: Scales, levels: Tensor, block: int = BLOCK) -> Tensor:
    """Whole blocks to weights: uint8 (weights / 2,) -> float32 (weights,); the last block may be short."""
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()
    absmax = scales.widened().repeat_interleave(block)[: codes.numel()]
    return levels.float()[codes.int()].mul_(absmax)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a matrix: the nearest level for every weight, uint8 (weights / 2,), and absmax, float32 (blocks,)."""
    if weight.numel() % 2:
        raise RequestError("NF4 packs two weights a byte", expected="an even number", got=str(weight.numel()))
    flat = weight.detach().float().flatten()
    blocks = ceil(flat.numel() / BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * BLOCK - flat.numel())).view(blocks, BLOCK)
    absmax = padded.abs().amax(-1)
    unit = padded / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    levels = torch.tensor(NF4_LEVELS)
    codes = torch.bucketize(unit.flatten()[: flat.numel()], (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax
