"""Conditioning: text projection, time embedding, adaLN modulation, rotary angles, once per picture.

    text features (n, 53248) -> norm, projection -> (n, 4608)              once a prompt, text tokens alone
    times (steps,) -> embedding -> adaLN of every block                    once a schedule, all steps in one product
    grid and text length -> rotary angles                                  once a size

diffusers' transformer computes the first in every step and over image tokens too, where zeros come out, and the second
block by block; here none of it is left to a step. Its weights, 1.2 GB of the published conditional transformer in bf16,
therefore live in host memory and are staged on the device once a picture, one layer after another, so that it holds the
largest (0.5 GB, the projection of text) and not all. The unconditional transformer sees no text, so its
projection is never loaded.

Every norm of a block is followed by a product with a vector that does not depend on tokens (its weight, and adaLN's
scale or gate), so these are multiplied here, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE_OFFSET = 65536  # diffusers' IMAGE_POSITION_OFFSET
TIME_SCALE = 1e4  # times in 0..1 become 0..10000, which is also the longest wavelength of their sinusoids
TEXT_NORM_EPSILON = 1e-6  # diffusers' `llm_cond_norm`
# The four vectors of a block, in the order in which its norms use them.
READ_ATTENTION, GATE_ATTENTION, READ_FEED_FORWARD, GATE_FEED_FORWARD = range(4)


@dataclass(frozen=True)
class Conditioning:
    """Everything of a picture that no step changes, on the device that draws it; all but `text` in float32."""

    text: Tensor  # (n, hidden), projected, indicator added; n is 0 where the branch sees no text
    vectors: Tensor  # (steps, blocks, 4, hidden): what the norms of a block are multiplied by
    final: Tensor  # (steps, hidden): what the last norm is multiplied by
    cos: Tensor  # (n + image tokens, head size / 2)
    sin: Tensor  # the same


class Conditioner(nn.Module):
    """The layers that see one row a prompt token or a step.

    Args:
        embed_in, embed_out, project: the time embedding's two layers and `adaln_proj`.
        modulations: one layer a block, (adaln) -> 4 hidden.
        norms: (blocks, 4, hidden): attention_norm1, attention_norm2, ffn_norm1, ffn_norm2.
        final: the last layer's modulation, (adaln) -> hidden.
        text_norm, text_project: None where the branch sees no text.
        text_indicator: (hidden,), added to every text token.
    """

    norms: Tensor
    text_norm: Tensor | None
    text_indicator: Tensor

    def __init__(
        self,
        embed_in: nn.Module,
        embed_out: nn.Module,
        project: nn.Module,
        modulations: Sequence[nn.Module],
        norms: Tensor,
        final: nn.Module,
        text_norm: Tensor | None,
        text_project: nn.Module | None,
        text_indicator: Tensor,
    ) -> None:
        super().__init__()
        self.embed_in, self.embed_out, self.project, self.final = embed_in, embed_out, project, final
        self.modulations = nn.ModuleList(modulations)
        self.text_project = text_project
        for name, tensor in (("norms", norms), ("text_norm", text_norm), ("text_indicator", text_indicator)):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def project_text(self, features: Tensor, device: torch.device) -> Tensor:
        """Text features (n, taps x encoder) -> (n, hidden), in the computing type; (0, hidden) in a branch without."""
        indicator = self.text_indicator.to(device)
        if self.text_project is None:
            return indicator.new_zeros(0, indicator.shape[0])
        return _staged(self.text_project, self._normed(features.to(indicator))) + indicator

    def vectors(self, times: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Times (steps,), 0 is noise and 1 is data -> the `vectors` and `final` of `Conditioning`.

        Times are rounded to the computing type first, as diffusers' pipeline does.
        """
        norms = self.norms.to(device)  # (blocks, 4, hidden)
        waves = sinusoids(times.to(device, norms.dtype), norms.shape[-1]).to(norms.dtype)
        embedded = _staged(self.embed_out, functional.silu(_staged(self.embed_in, waves)))
        condition = functional.silu(_staged(self.project, embedded))  # (steps, adaln)
        made = torch.empty(len(times), *norms.shape, dtype=torch.float32, device=device)
        for index, layer in enumerate(self.modulations):
            vectors = _staged(layer, condition).float().unflatten(-1, (4, -1))  # (steps, 4, hidden)
            for scale in (READ_ATTENTION, READ_FEED_FORWARD):
                vectors[:, scale] += 1.0
            for gate in (GATE_ATTENTION, GATE_FEED_FORWARD):
                vectors[:, gate] = vectors[:, gate].tanh()
            made[:, index] = vectors * norms[index].float()
        return made, 1.0 + _staged(self.final, functional.silu(condition)).float()

    def _normed(self, features: Tensor) -> Tensor:
        """(n, taps x encoder) -> the same, before the projection comes: features need not be there beside it."""
        weight = None if self.text_norm is None else self.text_norm.to(features.device)
        return functional.rms_norm(features, features.shape[-1:], weight, TEXT_NORM_EPSILON)


def _staged(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer makes of x (m, columns), on the device of x; the layer is back on its own afterwards."""
    own = next(tensor.device for tensor in (*layer.buffers(), *layer.parameters()))
    layer.to(x.device)
    try:
        made: Tensor = layer(x)
        return made
    finally:
        layer.to(own)


def sinusoids(times: Tensor, size: int) -> Tensor:
    """Sines and cosines (steps, size) of times (steps,), in float32; diffusers' `_sinusoidal_embedding`."""
    half = size // 2
    rates = torch.exp(torch.arange(half, device=times.device) * -(math.log(TIME_SCALE) / (half - 1)))
    angles = (TIME_SCALE * times.float())[:, None] * rates
    return functional.pad(torch.cat((angles.sin(), angles.cos()), -1), (0, size % 2))


def positions(text_tokens: int, rows: int, columns: int) -> Tensor:
    """Of `[text][image]` on the axes time, row and column: (text + rows x columns, 3) whole numbers."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack((torch.zeros_like(row), row, column), -1).flatten(0, 1) + IMAGE_OFFSET
    return torch.cat((torch.arange(text_tokens)[:, None].expand(-1, 3), image))


def rotary(
    text_tokens: int, rows: int, columns: int, head: int, theta: float, sections: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (text + rows x columns, head / 2) of `[text][image]`, in float32.

    Frequencies 1, 4, 7, ... turn with the row, 2, 5, 8, ... with the column, as far as their sections reach, and all
    others with time, where text tokens count from 0 and every image token stands at 65536. float32 holds such positions
    exactly; a product with a frequency is off by at most 65536 x 2^-24, 0.004 of a radian, as it is in diffusers.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head, 2, dtype=torch.float32) / head))
    axis = torch.zeros(head // 2, dtype=torch.long)
    axis[1 : 3 * sections[1] : 3] = 1
    axis[2 : 3 * sections[2] : 3] = 2
    angles = positions(text_tokens, rows, columns).float()[:, axis] * frequencies
    return angles.cos(), angles.sin()
