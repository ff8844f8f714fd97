"""Cases of the self-check that need the model: a whole block per storage, a copy through the offload ring.

A block's truth is the same block by plain torch, whose kernels are checked one by one against float64: what is asked
here is whether layers, kernels and attention fit together. A ring's truth is the bytes themselves. Left out: blocks at
other widths, and reading from disk, which has hashes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.kernels import self_check_truths as truths
from ideogram_app.kernels.attention import Attention
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.kernels.self_check_cases import Trial
from ideogram_app.model.offload.offload import OffloadHooks
from ideogram_app.model.transformer.backbone import BLOCK_NORM_EPSILON, Block
from ideogram_app.model.transformer.conditioner import READ_ATTENTION, Conditioning
from ideogram_app.model.transformer.layers import W4A8, merged
from ideogram_app.quantization import fp8, int8, k_quants
from ideogram_app.quantization.rotation import rotate

RING, BLOCK = "offload ring", "block"
# Storage as a person names it, arithmetic of Q4_K -> a block of it.
STORAGES = ("dense", "fp8", "int8", "rotated", "Q8_0", "Q4_K", f"Q4_K {W4A8}")
ROWS_AT_ONCE = 2048  # of a matrix, while it is made: three float32 copies of them are 300 MB at most
# d, and dmin where there is one, of blocks of random bits with variance 1: q is 0..15 under scales of 0..63 and m is
# 0..63, so that dmin = 7.5 d makes the mean zero; q of Q8_0 is -128..127.
STEPS = {"Q4_K": (0.0034, 0.0255), "Q8_0": (0.0135,)}
BLOCK_ROWS = 77
SMALL = Branch(1, 256, 4, 2048, 256, 256)  # a block for a processor
RING_BYTES, RING_BLOCKS = 2**23, 3
# Of a row's length. Where inputs are rounded, a number next to a tie that falls to the other side shifts the next
# matrix's inputs, and of these some fall to the other side, until the difference is as large as rounding itself: 3 to
# 4 % of a row behind one block, plain torch in float32 against itself without rounding.
ROUNDS_INPUTS = ("int8", "rotated", f"Q4_K {W4A8}")
ROUNDED_SHARE = 0.2
DENSE_SHARE = {torch.float32: 2.0**-12, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}


class _Bytes(nn.Module):
    """A block of the ring: what it computes is a copy of its bytes."""

    content: Tensor

    def __init__(self, content: Tensor) -> None:
        super().__init__()
        self.register_buffer("content", content)

    def forward(self) -> Tensor:
        return self.content.clone()


def ring_trials(device: torch.device) -> Iterator[Trial]:
    """More blocks than slots, twice around, so that every slot is filled again while others are in use."""
    size = RING_BYTES if device.type != "cpu" else RING_BYTES // 16
    generator = torch.Generator().manual_seed(50)
    sizes = [size + 16 * number for number in range(RING_BLOCKS)]
    contents = [torch.randint(0, 256, (each,), dtype=torch.uint8, generator=generator) for each in sizes]

    def prepare(make: Any) -> Any:
        return lambda: _around(contents, OffloadHooks(device, 2, make(device)))

    def judge(got: list[Tensor]) -> truths.Verdict:
        wrong = [turn for turn, made in enumerate(got) if not torch.equal(made.cpu(), contents[turn % RING_BLOCKS])]
        return truths.Verdict(f"{len(wrong)} of {len(got)} copies differ" if wrong else "", float(bool(wrong)))

    yield Trial(prepare, judge, timed=False)


def _around(contents: Sequence[Tensor], hooks: OffloadHooks) -> list[Tensor]:
    with torch.inference_mode(False):
        blocks = [_Bytes(content.clone()) for content in contents]
        try:
            for block in blocks:
                hooks.add(block)
            hooks.start()
            return [block() for _ in range(2) for block in blocks]
        finally:
            hooks.close()


def block_trials(storage: str, device: torch.device, dtype: torch.dtype, excluded: tuple[str, ...]) -> Iterator[Trial]:
    """One block of a storage by a set of kernels, against the same block by plain torch."""
    branch = SMALL if device.type == "cpu" else MODELS["ideogram-4"].conditional
    truth = cache(lambda: _run_block(_block(storage, branch, device, dtype, PLAIN), branch, dtype, PLAIN, ()))

    def prepare(kernels: Kernels) -> Any:
        block = _block(storage, branch, device, dtype, kernels)
        return lambda: _run_block(block, branch, dtype, kernels, excluded)

    share = ROUNDED_SHARE if storage in ROUNDS_INPUTS else DENSE_SHARE[dtype]
    yield Trial(prepare, lambda got: truths.judge_close(got, truth(), share), timed=False)


def _block(storage: str, branch: Branch, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> Block:
    hidden, inner = branch.hidden_size, branch.intermediate_size
    kind, _, arithmetic = storage.partition(" ")
    generator = torch.Generator(device).manual_seed(60)

    def layer(rows: int, columns: int) -> Any:
        counts = [min(ROWS_AT_ONCE, rows - start) for start in range(0, rows, ROWS_AT_ONCE)]
        parts = [_stored(kind, count, columns, generator) for count in counts]
        return merged(parts, dtype, kernels, arithmetic)

    ones = torch.ones(branch.attention_head_dim, device=device)
    qkv, o = layer(3 * hidden, hidden), layer(hidden, hidden)
    return Block(qkv, ones, ones, o, layer(2 * inner, hidden), layer(hidden, inner))


def _stored(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor | PackedWeight:
    """Weights of variance 1 / columns in a storage, (rows, columns), on the generator's device."""
    if kind in k_quants.FORMATS:
        return PackedWeight("gguf", _random_blocks(kind, rows, columns, generator), gguf_type=kind)
    noise = torch.randn(rows, columns, generator=generator, device=generator.device) / columns**0.5
    if kind == "dense":
        return noise.bfloat16()
    turned = rotate(noise) if kind == "rotated" else noise
    values, scale = fp8.quantize_rows(turned) if kind == "fp8" else int8.quantize_rows(turned)
    stored = {"fp8": "fp8", "int8": "int8", "rotated": "convrot"}[kind]
    return PackedWeight(stored, values, scale, rotated=kind == "rotated")


def _random_blocks(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """uint8 (rows, bytes): any bits are numbers, under steps that make their sum zero and their size right."""
    form, device = k_quants.find_format(kind), generator.device
    shape = rows, columns // form.weights, form.size
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    steps = torch.tensor(STEPS[kind], device=device) / columns**0.5
    blocks[..., : 2 * len(steps)] = steps.half().view(torch.uint8)
    return blocks.flatten(1)


def _run_block(block: Block, branch: Branch, dtype: torch.dtype, kernels: Kernels, excluded: tuple[str, ...]) -> Tensor:
    """The residual behind a block, (BLOCK_ROWS, hidden), for fixed inputs."""
    device, generator = block.norm_q.device, torch.Generator().manual_seed(64)
    hidden = torch.randn(BLOCK_ROWS, branch.hidden_size, generator=generator).to(device, dtype)
    vectors = torch.randn(5, branch.hidden_size, generator=generator).to(device)
    angles = torch.randn(BLOCK_ROWS, branch.attention_head_dim // 2, generator=generator).to(device)
    prepared = Conditioning(hidden[:0], vectors[None, None], vectors[:1], angles.cos(), angles.sin())
    x = kernels.norm(hidden, vectors[READ_ATTENTION], BLOCK_NORM_EPSILON, block.qkv.input_format)
    made, _ = block(
        hidden, x, vectors[:4], vectors[4], block.qkv.input_format, prepared, kernels, Attention(excluded=excluded)
    )
    return made
