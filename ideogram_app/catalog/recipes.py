"""Recipes: every precision of the transformers' weights, one frozen row each.

A recipe says how the weights of both transformers rest on disk (`storage`), which layers stay in the computing type
(`protected`), and what arithmetic runs (`compute`). Choices on the page, `--recipes`, the README's table and the
planner's sizes all derive from this table.

INT8 W8A8 is a family of five, so that what each idea is worth can be measured apart: nothing added (`naive`), outlier
channels evened out between inputs and weights (`smooth`), the layers that break kept (`protected`), both of these, as
published (`int8-w8a8`), and a rotation that needs neither calibration nor protection (`rotated`).

What is fragile is found by calibration, which names 17 of a transformer's 279 Linears. Where none is at hand, the names
in `fragile` are kept, and they are not cheap: one `feed_forward.w2` of the published model is 56.6 M weights, so all 34
of both branches take 7.70 GB in bf16 where INT8 takes 3.85, and 19.3 GB become 23.2. Seventeen of each branch, a
calibration's budget if it names nothing else, make it 21.2 GB.

Left out: mixed tables per layer and per step; a recipe is what a person can name. torchao and gguf name *formats*, a
recipe is a format together with its protected list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ideogram_app.errors import choose

# Layers that see one row per image (the timestep and adaLN paths) or touch the latents directly. They cost no time,
# one row gives dynamic per-token INT8 nothing to average over, and `torch._int_mm` needs more than 16 rows.
ONE_ROW_LAYERS = ("t_embedding.", "adaln_proj", "adaln_modulation", "input_proj", "final_layer.")
# stable-diffusion.cpp's documented rule, the one most GGUF readers share: pack only the blocks' matrices.
OUTSIDE_BLOCKS = ("t_embedding.", "adaln_proj", "input_proj", "llm_cond_proj", "final_layer.")
# ComfyUI's int8_convrot files pack the blocks alone too, and there every row is a whole number of rotated groups of 256
# in both models; the miniature's `llm_cond_proj`, 832 wide, is not.
OUTSIDE_ROTATION = (*OUTSIDE_BLOCKS, "adaln_modulation")
# The published scan (arXiv 2606.12280) found SwiGLU's outputs and the time embedding's the hardest to round to INT8.
FRAGILE = ("feed_forward.w2", "t_embedding.mlp_out")


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and computed with.

    Attributes:
        storage: dense, fp8, int8, convrot (INT8 as ComfyUI stores it, rotated) or gguf.
        gguf_type: the GGML type of packed matrices, for storage gguf.
        bytes_per_weight: of a packed weight, scales of its block included (per-row scales are counted apart).
        row_scale_bytes: bytes of scale per output row.
        protected: name fragments of Linear layers that stay in the computing type.
        compute: the arithmetic of a packed layer.
        quantizes_activations: whether inputs are rounded too.
        rotated: whether weights, once, and inputs, at every use, are multiplied by `quantization.rotation`.
        smoothed: whether a calibration's factors are folded into the weights (prepare/calibration/smoothing.py).
        fragile: name fragments protected in addition where no calibration names the fragile layers.
        everyday: whether it is offered first; the others are there to be measured.
    """

    name: str
    title: str
    storage: str
    bytes_per_weight: float
    compute: str
    summary: str
    gguf_type: str | None = None
    row_scale_bytes: int = 0
    protected: tuple[str, ...] = ()
    quantizes_activations: bool = False
    rotated: bool = False
    smoothed: bool = False
    fragile: tuple[str, ...] = ()
    everyday: bool = True

    @property
    def arithmetic(self) -> str:
        """Bits of weights and activations: w8a8, w4a16, ...; 16 stands for the computing type."""
        bits = {"dense": 16, "fp8": 8, "int8": 8, "convrot": 8, "gguf": round(self.bytes_per_weight * 8)}[self.storage]
        return f"w{bits}a{8 if self.quantizes_activations else 16}"

    def packs(self, layer: str) -> bool:
        """Whether the Linear of this (diffusers or official) name is packed by this recipe."""
        return self.storage != "dense" and not any(fragment in layer for fragment in self.protected)

    def protecting(self, calibrated: tuple[str, ...] | None = None) -> Recipe:
        """This recipe with its fragile layers protected: those a calibration names, or those known by name."""
        if not self.fragile:
            return self
        found = self.fragile if calibrated is None else calibrated
        return replace(self, protected=(*self.protected, *(name for name in found if self.packs(name))))


def _int8(name: str, title: str, summary: str, **differs: Any) -> Recipe:
    """A row of the INT8 family: what all of them share, and what makes this one differ."""
    shared: dict[str, Any] = {
        "storage": "int8",
        "bytes_per_weight": 1.0,
        "row_scale_bytes": 4,
        "protected": ONE_ROW_LAYERS,
        "compute": "INT8 x INT8 -> INT32",
        "quantizes_activations": True,
    }
    return Recipe(name, title, summary=summary, **(shared | differs))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "reference",
            "Reference",
            storage="dense",
            bytes_per_weight=2.0,
            compute="bf16, or float32 on a CPU",
            summary="The checkpoint's own precision: what the others are measured against.",
        ),
        Recipe(
            "fp8",
            "FP8",
            storage="fp8",
            bytes_per_weight=1.0,
            row_scale_bytes=4,
            compute="widened at every use, then as the reference",
            summary="float8_e4m3fn weights with one scale a row: the form in which Ideogram publishes.",
        ),
        _int8(
            "int8-w8a8-naive",
            "INT8 naive",
            "INT8 weights and activations with nothing against outlier channels.",
            everyday=False,
        ),
        _int8(
            "int8-w8a8-smooth",
            "INT8 smoothed",
            "INT8 with outlier channels evened out between inputs and weights, folded in ahead of time.",
            smoothed=True,
            everyday=False,
        ),
        _int8(
            "int8-w8a8-protected",
            "INT8 protected",
            "INT8 with the layers that rounding hurts most left in bf16.",
            fragile=FRAGILE,
            everyday=False,
        ),
        _int8(
            "int8-w8a8",
            "INT8 W8A8",
            "INT8 weights and activations: much closer to the reference than 4 bits, on INT8 matrix units.",
            smoothed=True,
            fragile=FRAGILE,
        ),
        _int8(
            "int8-w8a8-rotated",
            "INT8 W8A8 rotated",
            "INT8 with outlier channels spread over blocks of 256 by a rotation: needs no calibration.",
            storage="convrot",
            rotated=True,
            protected=OUTSIDE_ROTATION,
        ),
        Recipe(
            "gguf-q8_0",
            "GGUF Q8_0",
            storage="gguf",
            gguf_type="Q8_0",
            bytes_per_weight=34 / 32,
            protected=OUTSIDE_BLOCKS,
            compute="decoded at every use, then as the reference",
            summary="8.5 bits a weight in a GGUF file: nearly lossless, read by other programs.",
        ),
        Recipe(
            "gguf-q4_k",
            "GGUF Q4_K",
            storage="gguf",
            gguf_type="Q4_K",
            bytes_per_weight=144 / 256,
            protected=OUTSIDE_BLOCKS,
            compute="decoded at every use: to INT8 on NVIDIA's INT8 units, else as the reference",
            summary="4.5 bits a weight in a GGUF file: half the memory of INT8.",
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; RequestError lists those that exist."""
    return choose(RECIPES, name, "recipe")
