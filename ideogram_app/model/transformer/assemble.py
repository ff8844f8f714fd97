"""Assembling a transformer from named tensors: which layer is made of which, in the order of use.

    conditioner    the text projection, the time embedding, adaLN of every block          host memory
    trunk          input_proj, blocks of four merged matrices, the last layer             the device that draws

Blocks are yielded one by one, so that the caller may offload one before the next is made. A branch without text loads
neither `llm_cond_norm` nor `llm_cond_proj`. Left out: where names come from (checkpoints/).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ideogram_app.catalog.models import Branch
from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.model.transformer.backbone import Backbone, Block, Trunk
from ideogram_app.model.transformer.conditioner import Conditioner
from ideogram_app.model.transformer.layers import Layer, Stored, linear, merged

CPU = torch.device("cpu")
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")  # in the order of `Conditioning.vectors`


class BranchWeights(Protocol):
    """What a transformer can be made of: `PackedFile`, `TransformerCheckpoint`, or random numbers of a benchmark.

    Names are the official ones, in which q, k and v are one matrix `attention.qkv`.
    """

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that is not packed, or some of its rows, in any floating type."""

    def stored(self, linear: str) -> Sequence[Tensor | PackedWeight]:
        """The weight of a Linear as stored: one, or its rows from top to bottom where a file holds them apart."""


@dataclass(frozen=True)
class Placement:
    """How a backbone is built.

    Weights of `offloaded` blocks stay as they come: the processor's own order (`Kernels.weight`) cannot be packed. They
    are built on the device too, where merging and Q4_K's row scales (5 minutes of one core for the published pair) take
    no time.
    """

    dtype: torch.dtype  # the computing type, of everything that is not packed
    trunk: torch.device = CPU  # the device of the blocks while it is built
    conditioner: torch.device = CPU  # the device of what runs once a picture
    kernels: Kernels = PLAIN  # of the device that computes
    arithmetic: str = ""  # of Q4_K, see `layers.linear`
    offloaded: frozenset[int] = frozenset()


def assemble(
    weights: BranchWeights,
    branch: Branch,
    config: Mapping[str, Any],
    placement: Placement,
    sees_text: bool,
    blocks: Iterable[Block] | None = None,
) -> Backbone:
    """One transformer, filled.

    Args:
        config: diffusers' config.json of the branch.
        blocks: what `blocks_of` yields, which the caller may have offloaded; where None, they stay as made.

    Raises:
        CheckpointError: a tensor is missing or of another shape; the message names file and tensor.
    """
    once = _Maker(weights, placement, placement.conditioner)
    always = _Maker(weights, placement, placement.trunk)
    indicator = once.tensor("embed_image_indicator.weight")  # (2, hidden): text, image
    conditioner = Conditioner(
        once.linear("t_embedding.mlp_in"),
        once.linear("t_embedding.mlp_out"),
        once.linear("adaln_proj"),
        [once.linear(f"layers.{index}.adaln_modulation") for index in range(branch.num_layers)],
        torch.stack([once.norms(f"layers.{index}.") for index in range(branch.num_layers)]),
        once.linear("final_layer.adaln_modulation"),
        once.tensor("llm_cond_norm.weight") if sees_text else None,
        once.linear("llm_cond_proj") if sees_text else None,
        indicator[0],
    )
    entry = always.linear("input_proj")
    made = list(blocks_of(weights, branch, placement) if blocks is None else blocks)
    last = always.linear("final_layer.linear")
    trunk = Trunk(entry, indicator[1].to(placement.trunk), made, last, placement.kernels)
    backbone = Backbone(conditioner, trunk, branch.attention_head_dim, config["rope_theta"], config["mrope_section"])
    return backbone.eval().requires_grad_(False)


def blocks_of(weights: BranchWeights, branch: Branch, placement: Placement) -> Iterator[Block]:
    """The blocks of a transformer in the order of use, each made when it is asked for."""
    as_it_comes = replace(placement, kernels=replace(placement.kernels, weight=PLAIN.weight))
    for index in range(branch.num_layers):
        chosen = as_it_comes if index in placement.offloaded else placement
        yield _Maker(weights, chosen, placement.trunk).block(index)


def in_every_step(branch: Branch) -> Iterator[str]:
    """Names of tensors and Linears that the trunk is made of, in the order in which `assemble` asks for them."""
    yield from ("input_proj.bias", "input_proj")
    for index in range(branch.num_layers):
        names, attention = linears_of(index), f"layers.{index}.attention."
        yield from names["qkv"]
        yield from (f"{attention}norm_q.weight", f"{attention}norm_k.weight")
        yield from (*names["o"], *names["gate_up"], *names["down"])
    yield from ("final_layer.linear.bias", "final_layer.linear")


def linears_of(index: int) -> dict[str, tuple[str, ...]]:
    """The Linears of a block by the name of the layer that they are merged into."""
    attention, feed_forward = f"layers.{index}.attention.", f"layers.{index}.feed_forward."
    return {
        "qkv": (f"{attention}qkv",),
        "o": (f"{attention}o",),
        "gate_up": (f"{feed_forward}w1", f"{feed_forward}w3"),
        "down": (f"{feed_forward}w2",),
    }


class _Maker:
    """Makes layers on one device."""

    def __init__(self, weights: BranchWeights, placement: Placement, device: torch.device) -> None:
        self._weights, self._placement, self._device = weights, placement, device

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name).to(self._device, self._placement.dtype)

    def linear(self, name: str) -> Layer:
        bias = self.tensor(f"{name}.bias")
        (weight,) = self._stored(name)
        return linear(weight, bias, self._placement.dtype, self._placement.kernels, self._placement.arithmetic)

    def norms(self, block: str) -> Tensor:
        """(4, hidden)."""
        return torch.stack([self.tensor(f"{block}{norm}.weight") for norm in NORMS])

    def block(self, index: int) -> Block:
        names, attention = linears_of(index), f"layers.{index}.attention."
        return Block(
            self._merged(names["qkv"]),
            self.tensor(f"{attention}norm_q.weight"),
            self.tensor(f"{attention}norm_k.weight"),
            self._merged(names["o"]),
            self._merged(names["gate_up"]),
            self._merged(names["down"]),
        )

    def _merged(self, names: Sequence[str]) -> Layer:
        weights = [part for name in names for part in self._stored(name)]
        return merged(weights, self._placement.dtype, self._placement.kernels, self._placement.arithmetic)

    def _stored(self, name: str) -> list[Stored]:
        device, dtype, parts = self._device, self._placement.dtype, self._weights.stored(name)
        return [part.to(device, dtype) if isinstance(part, Tensor) else part.to(device) for part in parts]
