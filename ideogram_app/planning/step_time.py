"""Step time of a card with all weights resident: counted flops over the card's dense peak.

A step is both transformers once. Its time is counted work divided by the peak (machine/gpu_specs.py) and by the share
of the peak that published runs of this model reached. It is a planning number for people, and a plan says within which
range (assumptions.py); what a machine really does is measured, stored in its profile (profile.py) and counted with from
then on.

Left out: offloaded blocks, whose copies are planned in streaming.py.
"""

from __future__ import annotations

import functools

from ideogram_app.catalog.models import PIXELS_PER_TOKEN, Branch, Model
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.machine.gpu_specs import Flops, Rates

TYPICAL_TEXT_TOKENS = 300  # of a usual JSON caption

# Share of the ideal time that published runs reached on a 3090, 48 steps at 1024 x 1024 (arXiv 2606.14598): INT8 fused
# 156.5 s of 40 s ideal; FP8 172.9 s of 114 s; GGUF Q8_0 176 s; Q4_K 203 s. Ideal is counted work over the peaks below.
# INT8 has the largest room upwards: 80 % was reported from a 5090.
EFFICIENCY = {"dense": 0.68, "fp8": 0.66, "int8": 0.26, "gguf-q8_0": 0.65, "gguf-q4_k": 0.56}


def branch_flops(model: Model, size: tuple[int, int], text_tokens: int = TYPICAL_TEXT_TOKENS) -> tuple[Flops, Flops]:
    """Work of the conditional and of the unconditional transformer in one step, multiply and add counted apart.

    The conditional one sees text and image, the other the image alone. The text projection runs once for a prompt and
    the adaLN paths on one row, so both are left out.
    """
    width, height = size
    image_tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    return _work(model.conditional, image_tokens + text_tokens), _work(model.unconditional, image_tokens)


def step_flops(model: Model, width: int, height: int, text_tokens: int = TYPICAL_TEXT_TOKENS) -> Flops:
    """Work of one step: both transformers."""
    first, second = branch_flops(model, (width, height), text_tokens)
    return first + second


def step_work(model: Model, size: tuple[int, int], text_tokens: int = TYPICAL_TEXT_TOKENS) -> float:
    """Operations of one step, all counted alike: what pictures of two sizes are compared by."""
    work = step_flops(model, *size, text_tokens)
    return work.matrices + work.attention


def ideal_seconds(rates: Rates, work: Flops, arithmetic: str) -> float:
    """Seconds in which the peaks do this work; products run on INT8 units where activations have 8 bits."""
    products = rates.tops_int8 if arithmetic.endswith("a8") else rates.tflops_16bit
    return work.matrices / (products * 1e12) + work.attention / (rates.tflops_16bit * 1e12)


def published_share(recipe: Recipe, arithmetic: str) -> float:
    """Share of the ideal time that published runs reached. 4-bit weights decoded to INT8 (`w4a8`) count as INT8:
    decoding a weight is a few operations, multiplying it thousands."""
    if arithmetic.endswith("a8"):
        return EFFICIENCY["int8"]
    return EFFICIENCY.get(recipe.name, EFFICIENCY["dense"])


def _work(branch: Branch, tokens: int) -> Flops:
    return Flops(2.0 * _weights_per_token(branch) * tokens, 4.0 * branch.num_layers * branch.hidden_size * tokens**2)


@functools.cache  # a plan asks some twenty times, and summing 272 matrices takes 3 ms
def _weights_per_token(branch: Branch) -> int:
    inside = (linear for linear in branch.linears() if linear.in_block and "adaln" not in linear.name)
    return sum(linear.rows * linear.columns for linear in inside)
