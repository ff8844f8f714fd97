"""Tensors by their names -> a backbone: which layer is made of which, in the order in which they are used.

    conditioner    the text projection, the time embedding, adaLN of every block          host memory
    trunk          input_proj, blocks of four merged matrices, the last layer             the device that draws

Nothing that is needless is read: a branch without text loads neither `llm_cond_norm` nor `llm_cond_proj`. Left out:
where names come from (checkpoints/) and which recipe is which (loader.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ideogram_app.architecture import Branch
from ideogram_app.checkpoints.formats import PackedWeight
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.model.backbone import Backbone, Block, Trunk
from ideogram_app.model.conditioner import Conditioner
from ideogram_app.model.layers import Layer, Stored, linear, merged

CPU = torch.device("cpu")
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")  # in the order of `Prepared.vectors`
ATTENTION, ARMS = ("to_q", "to_k", "to_v"), ("w1", "w3")  # what is merged


class BranchWeights(Protocol):
    """What a transformer can be made of: `PackedBranch`, `SourceBranch`, or random numbers of a benchmark."""

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that is not packed, or some of its rows, in any floating type."""

    def stored(self, linear: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """The weight of a Linear as it rests, or some of its rows."""


@dataclass(frozen=True)
class Placement:
    """How a backbone is built.

    Attributes:
        dtype: the computing type, of everything that is not packed.
        trunk: where the blocks rest while it is built.
        conditioner: where what runs once a picture rests.
        kernels: of the device that computes.
        arithmetic: of Q4_K, see `layers.linear`.
    """

    dtype: torch.dtype
    trunk: torch.device = CPU
    conditioner: torch.device = CPU
    kernels: Kernels = PLAIN
    arithmetic: str = ""


def assemble(
    weights: BranchWeights, branch: Branch, config: Mapping[str, Any], placement: Placement, sees_text: bool
) -> Backbone:
    """One transformer with every weight in its place.

    Args:
        config: diffusers' config.json of the branch.

    Raises:
        CheckpointError: a tensor is missing or of another shape; the message names file and tensor.
    """
    once = _Maker(weights, placement, placement.conditioner)
    always = _Maker(weights, placement, placement.trunk)
    indicator = once.tensor("embed_image_indicator.weight")  # (2, hidden): text, image
    conditioner = Conditioner(
        once.linear("t_embedding.mlp_in", True),
        once.linear("t_embedding.mlp_out", True),
        once.linear("adaln_proj", True),
        [once.linear(f"layers.{index}.adaln_modulation", True) for index in range(branch.num_layers)],
        torch.stack([once.norms(f"layers.{index}.") for index in range(branch.num_layers)]),
        once.linear("final_layer.adaln_modulation", True),
        once.tensor("llm_cond_norm.weight") if sees_text else None,
        once.linear("llm_cond_proj", True) if sees_text else None,
        indicator[0],
    )
    entry = always.linear("input_proj", True)
    blocks = [always.block(f"layers.{index}.") for index in range(branch.num_layers)]
    last = always.linear("final_layer.linear", True)
    trunk = Trunk(entry, indicator[1].to(placement.trunk), blocks, last, placement.kernels)
    backbone = Backbone(conditioner, trunk, branch.attention_head_dim, config["rope_theta"], config["mrope_section"])
    return backbone.eval().requires_grad_(False)


def in_every_step(branch: Branch) -> Iterator[str]:
    """Names of tensors and Linears that the trunk is made of, in the order in which `assemble` asks for them."""
    yield from ("input_proj.bias", "input_proj")
    for index in range(branch.num_layers):
        attention, feed_forward = f"layers.{index}.attention.", f"layers.{index}.feed_forward."
        yield from (f"{attention}{name}" for name in ATTENTION)
        yield from (f"{attention}norm_q.weight", f"{attention}norm_k.weight", f"{attention}to_out.0")
        yield from (f"{feed_forward}{name}" for name in (*ARMS, "w2"))
    yield from ("final_layer.linear.bias", "final_layer.linear")


class _Maker:
    """Makes layers on one device."""

    def __init__(self, weights: BranchWeights, placement: Placement, device: torch.device) -> None:
        self._weights, self._placement, self._device = weights, placement, device

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name).to(self._device, self._placement.dtype)

    def linear(self, name: str, has_bias: bool) -> Layer:
        bias = self.tensor(f"{name}.bias") if has_bias else None
        return linear(self._stored(name), bias, *self._manner)

    def norms(self, block: str) -> Tensor:
        """(4, hidden)."""
        return torch.stack([self.tensor(f"{block}{norm}.weight") for norm in NORMS])

    def block(self, block: str) -> Block:
        attention, feed_forward = f"{block}attention.", f"{block}feed_forward."
        return Block(
            merged([self._stored(f"{attention}{name}") for name in ATTENTION], *self._manner),
            self.tensor(f"{attention}norm_q.weight"),
            self.tensor(f"{attention}norm_k.weight"),
            self.linear(f"{attention}to_out.0", False),
            merged([self._stored(f"{feed_forward}{name}") for name in ARMS], *self._manner),
            self.linear(f"{feed_forward}w2", False),
        )

    @property
    def _manner(self) -> tuple[torch.dtype, Kernels, str]:
        return self._placement.dtype, self._placement.kernels, self._placement.arithmetic

    def _stored(self, name: str) -> Stored:
        stored = self._weights.stored(name)
        if isinstance(stored, Tensor):
            return stored.to(self._device, self._placement.dtype)
        return stored.to(self._device)
