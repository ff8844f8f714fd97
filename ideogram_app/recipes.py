"""Every precision the program knows, one frozen row each.

A recipe says how the weights of both transformers rest on disk (`storage`), which layers stay in the computing type
(`protected`), and what arithmetic runs (`compute`). Choices on the page, `--recipes`, the README's table and the
planner's sizes all derive from this table. Sizes of layers that a recipe packs are `bytes_per_weight`; the rest follow
the computing type, so a plan adds the two (`architecture.weight_bytes`).

Left out: mixed tables per layer and per step; a recipe is what a person can name. torchao and gguf name *formats*,
a recipe is a format together with its protected list.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.errors import choose

# Layers that see one row per image (the timestep and adaLN paths) or touch the latents directly. They cost no time,
# one row gives dynamic per-token INT8 nothing to average over, and `torch._int_mm` needs more than 16 rows.
ONE_ROW_LAYERS = ("t_embedding.", "adaln_proj", "adaln_modulation", "input_proj", "final_layer.")
# stable-diffusion.cpp's documented rule, the one most GGUF readers share: pack only the blocks' matrices.
OUTSIDE_BLOCKS = ("t_embedding.", "adaln_proj", "input_proj", "llm_cond_proj", "final_layer.")


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and computed with.

    Attributes:
        name: what `--recipe` takes and what files record.
        title: what the page shows.
        storage: dense, fp8, int8 or gguf.
        gguf_type: the GGML type of packed matrices, for storage gguf.
        bytes_per_weight: of a packed weight, scales of its block included (per-row scales are counted apart).
        row_scale_bytes: bytes of scale per output row.
        protected: name fragments of Linear layers that stay in the computing type.
        compute: the arithmetic of a packed layer.
        quantizes_activations: whether inputs are rounded too.
        summary: one line for people.
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

    def packs(self, layer: str) -> bool:
        """Whether the Linear of this (diffusers or official) name is packed by this recipe."""
        return self.storage != "dense" and not any(fragment in layer for fragment in self.protected)


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
        Recipe(
            "int8-w8a8",
            "INT8 W8A8",
            storage="int8",
            bytes_per_weight=1.0,
            row_scale_bytes=4,
            protected=ONE_ROW_LAYERS,
            compute="INT8 x INT8 -> INT32",
            quantizes_activations=True,
            summary="INT8 weights and activations: much closer to the reference than 4 bits, on INT8 matrix units.",
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
            compute="decoded at every use, then as the reference",
            summary="4.5 bits a weight in a GGUF file: half the memory of INT8.",
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        RequestError: no such recipe; lists those that exist.
    """
    return choose(RECIPES, name, "recipe")
