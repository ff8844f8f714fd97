"""Smoke test of packed weights: they compute what the source computes, before a file gets its final name.

    first and last block    random hidden states (1, 16, hidden) through diffusers' own block class, filled once from
                            the source and once from the file; |difference of the changes| / |change by the source|
    every other Linear      random inputs (4, columns) times both weights

The comparison run by run (packing.py) looks at numbers one by one; this looks at names, shapes and roles: whether q is
where a block looks for q, whether a block stays finite. Where weights were scaled, the block is filled a third time,
with scaled weights before any rounding: factors of two that do not cancel, exactly, are found there. One block of the
published model is 1.06 GB in float32 and one is held at a time.

Left out: rounding of activations, which the layer that runs does, and judging quality: the bounds find faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.models import Branch
from ideogram_app.checkpoints.prepared.journal import MismatchError
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.published.tensor_names import official_place
from ideogram_app.prepare.packing import Packing
from ideogram_app.quantization.rows import RowReader, row_runs

TOKENS, INPUTS, SEED = 16, 4, 4
SMOKE_CHUNK = 2**22  # weights read at once
# Largest relative error of what a block adds to its input, by storage or block type: a few times what random weights
# and the miniature give (0.06, 0.015, 0.015, 0.013 and 0.19 for fp8, int8, convrot, Q8_0 and Q4_K).
BLOCK = {"dense": 0.02, "fp8": 0.2, "int8": 0.2, "convrot": 0.2, "Q8_0": 0.1, "Q6_K": 0.2, "Q5_K": 0.3, "Q4_K": 0.5}
# Scaling suits inputs with outliers. On these inputs, which have none, it makes rounding worse (0.34 for INT8 under
# factors 2^-3 to 2^3 at random), and a block that reads q for v still gives 1.
SCALED_BLOCK = 0.7
CANCELLED = 0.01  # of a scaled block before rounding; it is 0 where every factor is a power of two and cancels


def smoke_test(packing: Packing) -> Iterator[tuple[str, float]]:
    """Compare a transformer's file with its source: yields what was compared, and its relative error.

    Raises:
        MismatchError: an error above the bound, or a result that is not finite.
    """
    recipe, branch, source = packing.recipe, packing.component, packing.source
    assert isinstance(branch, Branch)
    written = PackedFile(packing.path, recipe, branch).values
    bound = BLOCK[recipe.gguf_type or recipe.storage]
    scaled: list[RowReader] = [packing.scaled] if packing.scaling else []
    for index in sorted({0, branch.num_layers - 1}):
        *before, error = block_errors(branch, source.config, index, (source.tensor, *scaled, written))
        for change in before:
            check_error(f"block {index}, scaled but not yet rounded,", change, CANCELLED)
        yield f"block {index}", check_error(f"block {index}", error, max(bound, SCALED_BLOCK) if scaled else bound)
    for linear in branch.linears():
        if not linear.in_block:
            shape, name = (linear.rows, linear.columns), f"{linear.name}.weight"
            error = _product_error(shape, name, (*scaled, source.tensor)[0], written)
            yield linear.name, check_error(linear.name, error, bound)


def tries(branch: Branch) -> int:
    """How much `smoke_test` compares in one branch: its first and last block, and every Linear outside the blocks."""
    return len({0, branch.num_layers - 1}) + sum(not linear.in_block for linear in branch.linears())


def block_errors(branch: Branch, config: dict[str, Any], index: int, readers: Iterable[RowReader]) -> list[float]:
    """|change - first change| / |first change| of one block's hidden states, for all readers but the first."""
    from diffusers.models.transformers.transformer_ideogram4 import Ideogram4TransformerBlock

    with torch.device("meta"):
        block = Ideogram4TransformerBlock(
            hidden_size=branch.hidden_size,
            intermediate_size=branch.intermediate_size,
            num_heads=branch.num_attention_heads,
            norm_eps=config.get("norm_eps", 1e-5),
            adaln_dim=branch.adaln_dim,
        )
    block = block.to_empty(device="cpu").requires_grad_(False)
    inputs = _block_inputs(branch)
    changes = []
    for read in readers:
        fill(block, f"layers.{index}.", read)
        changes.append(block(**inputs) - inputs["hidden_states"])
    return [relative_error(change, changes[0]) for change in changes[1:]]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, infinite where anything is not finite."""
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error < float("inf") else float("inf")  # NaN compares false


def _block_inputs(branch: Branch) -> dict[str, Any]:
    """Inputs of a short sequence, all random and the same every time."""
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(1, TOKENS, branch.hidden_size, generator=generator)
    conditioning = torch.randn(1, 1, branch.adaln_dim, generator=generator)
    angles = 6.283 * torch.rand(1, TOKENS, branch.attention_head_dim // 2, generator=generator).repeat(1, 1, 2)
    return {
        "hidden_states": hidden,
        "attention_mask": torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "adaln_input": conditioning,
    }


def fill(block: nn.Module, prefix: str, read: RowReader) -> None:
    """Copy every parameter of a block from a reader, in float32; diffusers' block has q, k and v apart."""
    for name, parameter in block.named_parameters():
        official, part = official_place(prefix + name)
        first = part * parameter.shape[0]
        for rows in row_runs(tuple(parameter.shape), SMOKE_CHUNK):
            parameter[rows].copy_(read(official, slice(first + rows.start, first + rows.stop)))


def _product_error(shape: tuple[int, int], name: str, source: RowReader, written: RowReader) -> float:
    """The relative error of a Linear's output, bias apart."""
    x = torch.randn(INPUTS, shape[1], generator=torch.Generator().manual_seed(SEED))
    expected, got = (
        torch.cat([x @ read(name, run).cpu().float().t() for run in row_runs(shape, SMOKE_CHUNK)], -1)
        for read in (source, written)
    )
    return relative_error(got, expected)


def check_error(name: str, error: float, bound: float) -> float:
    """The error; MismatchError where it is above the bound or NaN."""
    if not error <= bound:
        raise MismatchError(
            f"The smoke test failed: {name} of the packed weights does not compute what the source computes",
            expected=f"a relative error up to {bound}",
            got=f"{error:.2g}",
            do="The unfinished files were removed; check the source and prepare it again",
        )
    return error
