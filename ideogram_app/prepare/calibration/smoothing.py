"""SmoothQuant, folded into the weights: outlier channels are evened out between an input and what reads it.

    (x / lambda) (W * lambda)^T = x W^T        lambda_j = max|x_j|^(1/2) / max_i|W_ij|^(1/2)

The published INT8 recipe divides activations by lambda at run time, one more pass over every input. Here the division
happens in what makes the channel, ahead of time, and costs nothing:

    input of         read by                       made by, and divided there
    attention        to_q, to_k, to_v              attention_norm1.weight       adaLN's scale, elementwise, commutes
    output           to_out.0                      rows of to_v                 softmax mixes tokens, never channels
    feed-forward     w1, w3                        ffn_norm1.weight
    its output       w2                            rows of w3                   silu acts on w1 alone
    text             llm_cond_proj                 llm_cond_norm.weight

Every lambda is rounded to a power of two, so folding changes exponents and no mantissa: the folded model gives the same
bits as long as no value leaves its type's normal range. The rounding costs little: with 0.3 % of 4608 channels 30 times
as loud, INT8's error of 7.3 % becomes 2.4 %, and 2.0 % with lambdas as they are (`benchmarks/int8_family.py`).

What it cannot do: SwiGLU's long tails stand in other channels in every token. On synthetic ones w2's 2.8 % becomes
3.1 %, and the miniature's guided velocity goes from 3.4 to 3.8 %, all of it through w2. A rotation handles both kinds.

Left out: other values of alpha, and layers whose input nothing linear makes (`t_embedding`, adaLN, `final_layer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ideogram_app.catalog.models import Branch
from ideogram_app.checkpoints.published.tensor_names import diffusers_names, official_place
from ideogram_app.errors import CheckpointError
from ideogram_app.quantization.rows import RowReader, row_runs

# 2^-8 to 2^8 around the middle of a group: outliers are tens to hundreds of times the rest, and a norm weight near 1
# divided by 256 is still normal in float16 (from 6.1e-5).
LARGEST_EXPONENT = 8
ROWS_AT_ONCE = 512  # of a weight: 109 MB in float32 of the widest, llm_cond_proj's 53 248 columns


@dataclass(frozen=True)
class Group:
    """Linears that read one input, and the tensor whose entries (a norm) or rows (a Linear) scale its channels.

    Statistics of the input are held under `name`, that of the first consumer.
    """

    name: str
    consumers: tuple[str, ...]
    producer: str


@dataclass(frozen=True)
class Factors:
    """What a tensor is multiplied by. rows: (rows,) or (entries,) of a vector; columns: (columns,); powers of two."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def applied(self, tensor: Tensor, rows: slice | None = None) -> Tensor:
        """The tensor, or those of its rows, multiplied; in its own type."""
        if self.rows is not None:
            factors = (self.rows if rows is None else self.rows[rows]).to(tensor)
            tensor = tensor * (factors if tensor.ndim == 1 else factors[:, None])
        return tensor if self.columns is None else tensor * self.columns.to(tensor)


Scaling = Mapping[str, Factors]


def groups(branch: Branch) -> Iterator[Group]:
    """Every input that can be smoothed, in the order of the forward pass."""
    yield Group("llm_cond_proj", ("llm_cond_proj",), "llm_cond_norm.weight")
    for index in range(branch.num_layers):
        block = f"layers.{index}."
        attention, feed_forward = f"{block}attention.", f"{block}feed_forward."
        queries, output = diffusers_names(f"{attention}qkv"), diffusers_names(f"{attention}o")
        yield Group(queries[0], queries, f"{block}attention_norm1.weight")
        yield Group(output[0], output, f"{queries[-1]}.weight")
        yield Group(f"{feed_forward}w1", (f"{feed_forward}w1", f"{feed_forward}w3"), f"{block}ffn_norm1.weight")
        yield Group(f"{feed_forward}w2", (f"{feed_forward}w2",), f"{feed_forward}w3.weight")


def input_of(linear: str) -> str:
    """The Linear under whose name the statistics of this one's input are held: itself, or the first that shares it."""
    if linear.endswith(".w3"):
        return linear.removesuffix("w3") + "w1"
    return diffusers_names(official_place(linear)[0])[0]


def column_maxima(group: Group, branch: Branch, read: RowReader) -> Tensor:
    """Largest magnitude in every column over all weights that read a group's input: float32 (columns,)."""
    shapes = branch.shapes()
    largest = torch.zeros(shapes[f"{group.name}.weight"][1])
    for consumer in group.consumers:
        name = f"{consumer}.weight"
        for run in row_runs(shapes[name], ROWS_AT_ONCE * shapes[name][1]):
            largest = torch.maximum(largest, read(name, run).float().abs().amax(0).cpu())
    return largest


def exponents(input_maxima: Tensor, weight_maxima: Tensor) -> Tensor:
    """log2 of lambda for every channel, rounded: int8 (channels,), within +-LARGEST_EXPONENT, 0 in the middle.

    A factor that all channels share changes nothing that per-token and per-row scales do not undo, so the median is
    taken out and magnitudes stay where they were. Channels that are always 0, or that no weight reads, keep 1.
    """
    alive = (input_maxima > 0) & (weight_maxima > 0)
    if not bool(alive.any()):
        return torch.zeros_like(input_maxima, dtype=torch.int8)
    logarithms = 0.5 * (input_maxima.double().log2() - weight_maxima.double().log2())
    centred = (logarithms - logarithms[alive].median()).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where(alive, centred, 0.0).round().to(torch.int8)


def folded(branch: Branch, powers: Mapping[str, Tensor]) -> dict[str, Factors]:
    """What every tensor of a branch has to be multiplied by, from `powers`: name of a group -> `exponents`.

    Groups that are not named stay as they are. CheckpointError: a vector of another length than its group's input.
    """
    shapes, rows, columns = branch.shapes(), dict[str, Tensor](), dict[str, Tensor]()
    for group in groups(branch):
        if group.name not in powers:
            continue
        lambdas = torch.exp2(powers[group.name].float())
        expected = shapes[f"{group.name}.weight"][1]
        if lambdas.shape != (expected,):
            raise CheckpointError(
                f"The smoothing of {group.name} is for another model",
                expected=f"{expected} channels",
                got=str(tuple(lambdas.shape)),
            )
        rows[group.producer] = 1 / lambdas
        columns |= dict.fromkeys((f"{consumer}.weight" for consumer in group.consumers), lambdas)
    return {name: Factors(rows.get(name), columns.get(name)) for name in shapes if name in rows or name in columns}
