"""Ideogram 4's diffusion transformer (DiT): block, trunk and backbone, for one picture at a time.

    latents (tokens, 128) -> velocity (tokens, 128)

The function of diffusers' `Ideogram4Transformer2DModel`, with all that no step changes taken out (conditioner.py) and
all that stands between two matrices handed to one kernel (`kernels.contract`). A block is four matrices and five
of those:

    x -> qkv -> heads -> attention -> quantize -> o -> add_norm -> gate_up -> swiglu -> down -> add_norm -> next x

q, k and v are one matrix, gate and up (w1, w3) are one, down is w2; so every input is rounded once. There is no batch
axis, no padding and no mask: text stands at its true length before the image. Left out: training, LoRA, gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ideogram_app.kernels.attention import Attention
from ideogram_app.kernels.contract import InputFormat, Kernels, Operand
from ideogram_app.model.transformer.conditioner import (
    GATE_ATTENTION,
    GATE_FEED_FORWARD,
    READ_ATTENTION,
    READ_FEED_FORWARD,
    Conditioner,
    Conditioning,
    rotary,
)
from ideogram_app.model.transformer.layers import Layer

BLOCK_NORM_EPSILON = 1e-5  # of every norm inside a block; diffusers' `norm_eps`
FINAL_EPSILON = 1e-6  # of the last one, a LayerNorm without parameters


class Block(nn.Module):
    """One block. norm_q, norm_k: (D,) float32.

    Args:
        qkv: (hidden) -> 3 hidden; o: (hidden) -> hidden; gate_up: w1 over w3, (hidden) -> 2 F; down: w2, (F) -> hidden.
    """

    qkv: Layer
    o: Layer
    gate_up: Layer
    down: Layer
    norm_q: Tensor
    norm_k: Tensor

    def __init__(self, qkv: Layer, norm_q: Tensor, norm_k: Tensor, o: Layer, gate_up: Layer, down: Layer) -> None:
        super().__init__()
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down
        self.register_buffer("norm_q", norm_q.float())
        self.register_buffer("norm_k", norm_k.float())

    def forward(
        self,
        hidden: Tensor,
        x: Operand,
        vectors: Tensor,
        following: Tensor | None,
        input_format: InputFormat,
        prepared: Conditioning,
        kernels: Kernels,
        attention: Attention,
    ) -> tuple[Tensor, Operand]:
        """Everything between two norms that read the residual.

        What no later line reads has no name here: of a large picture each is a tenth of a gigabyte and more.

        Args:
            hidden: (M, hidden), the residual; x: what `qkv` reads of it.
            vectors: (4, hidden) of this block.
            following: (hidden,) for the norm in front of the next block; None behind the last.
            input_format: of the next block.

        Returns:
            The residual after this block, and what the next block reads of it (the residual itself behind the last).
        """
        update = self._attended(x, prepared, kernels, attention)
        hidden, x = kernels.add_norm(
            hidden,
            update,
            vectors[GATE_ATTENTION],
            vectors[READ_FEED_FORWARD],
            BLOCK_NORM_EPSILON,
            self.gate_up.input_format,
        )
        del update
        gate_up = self.gate_up(x)
        del x
        inner = kernels.swiglu(gate_up, self.down.input_format)
        del gate_up
        update = self.down(inner)
        del inner
        gate = vectors[GATE_FEED_FORWARD]
        if following is None:
            hidden = kernels.add(hidden, update, gate, BLOCK_NORM_EPSILON)
            return hidden, hidden
        return kernels.add_norm(hidden, update, gate, following, BLOCK_NORM_EPSILON, input_format)

    def _attended(self, x: Operand, prepared: Conditioning, kernels: Kernels, attention: Attention) -> Tensor:
        """What attention adds to the residual, (M, hidden), neither normed nor gated yet."""
        heads = kernels.heads(self.qkv(x), self.norm_q, self.norm_k, prepared.cos, prepared.sin, BLOCK_NORM_EPSILON)
        mixed = attention(*heads)
        del heads
        return self.o(kernels.quantize(mixed, self.o.input_format))


class Trunk(nn.Module):
    """What runs in every step, and is offloaded where it does not fit.

    Args:
        entry: `input_proj`, (128) -> hidden; image_indicator: (hidden,), added to every image token.
        last: the last layer, (hidden) -> 128.
    """

    blocks: Any  # an nn.ModuleList of `Block`, whose items PyTorch types as bare modules

    def __init__(
        self, entry: nn.Module, image_indicator: Tensor, blocks: Sequence[Block], last: nn.Module, kernels: Kernels
    ) -> None:
        super().__init__()
        self.entry, self.last = entry, last
        self.image_indicator = nn.Parameter(image_indicator, requires_grad=False)
        self.blocks = nn.ModuleList(blocks)
        self.kernels = kernels
        self.attention = Attention()

    def forward(self, latents: Tensor, prepared: Conditioning, step: int) -> Tensor:
        """latents: (tokens, 128) in the computing type -> velocity (tokens, 128)."""
        hidden = self.enter(latents, prepared)
        x = self.read(hidden, prepared, step)
        for index in range(len(self.blocks)):
            hidden, x = self.block(index, hidden, x, prepared, step)
        return self.leave(hidden, prepared, step)

    def enter(self, latents: Tensor, prepared: Conditioning) -> Tensor:
        """The residual stream before the first block: (text + image tokens, hidden)."""
        return torch.cat((prepared.text, self.entry(latents) + self.image_indicator))

    def read(self, hidden: Tensor, prepared: Conditioning, step: int) -> Operand:
        """What the first block reads."""
        vector = prepared.vectors[step, 0, READ_ATTENTION]
        return self.kernels.norm(hidden, vector, BLOCK_NORM_EPSILON, self.blocks[0].qkv.input_format)

    def block(
        self, index: int, hidden: Tensor, x: Operand, prepared: Conditioning, step: int
    ) -> tuple[Tensor, Operand]:
        """One block: the residual after it, and what the next one reads."""
        vectors, last = prepared.vectors[step], index + 1 == len(self.blocks)
        following = None if last else vectors[index + 1, READ_ATTENTION]
        input_format: InputFormat = "dense" if last else self.blocks[index + 1].qkv.input_format
        return self.blocks[index](
            hidden, x, vectors[index], following, input_format, prepared, self.kernels, self.attention
        )

    def leave(self, hidden: Tensor, prepared: Conditioning, step: int) -> Tensor:
        """Velocity (tokens, 128) from the residual behind the last block; text tokens have none."""
        image = hidden[prepared.text.shape[0] :]
        normed = functional.layer_norm(image, image.shape[-1:], eps=FINAL_EPSILON)
        return self.last((normed * prepared.final[step]).to(image.dtype))


class Backbone(nn.Module):
    """One transformer: `prepare` once a picture, then call it once a step.

    Args:
        head, theta, sections: of the rotary embedding, as in diffusers' config (`rope_theta`, `mrope_section`).
    """

    def __init__(
        self, conditioner: Conditioner, trunk: Trunk, head: int, theta: float, sections: Sequence[int]
    ) -> None:
        super().__init__()
        self.conditioner, self.trunk = conditioner, trunk
        self.head, self.theta, self.sections = head, theta, tuple(sections)

    @property
    def dtype(self) -> torch.dtype:
        """The computing type."""
        return self.trunk.image_indicator.dtype

    @torch.inference_mode()
    def prepare(
        self, features: Tensor, times: Tensor, rows: int, columns: int, device: torch.device | None = None
    ) -> Conditioning:
        """Everything of a picture that no step changes.

        Args:
            features: text features (n, taps x encoder), on any device; the branch that sees no text ignores them.
            times: (steps,), 0 is noise and 1 is data.
            rows, columns: of image tokens.
            device: which computes, and holds the result; that of the conditioner if None.
        """
        self.trunk.attention.begin()
        device = device or self.conditioner.norms.device
        text = self.conditioner.project_text(features, device)
        angles = rotary(text.shape[0], rows, columns, self.head, self.theta, self.sections)
        return Conditioning(text, *self.conditioner.vectors(times, device), *(angle.to(device) for angle in angles))

    def forward(self, latents: Tensor, prepared: Conditioning, step: int) -> Tensor:
        """latents: (tokens, 128) -> velocity (tokens, 128), in the computing type."""
        return self.trunk(latents.to(self.dtype), prepared, step)
