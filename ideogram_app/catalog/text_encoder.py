"""Text encoder: its shape and the recipes in which its weights may rest, without torch.

What counts is the text side of Qwen3-VL, the part that turns a caption into features: an embedding table and 36
layers, 7.57 billion parameters of the published 8.77. The vision tower, the final norm and the head never run, so they
have no name here and are never read. Names are those of transformers' `Qwen3VLModel`.

The embedding table is a row of `linears()` like any other matrix: packed row by row, though its rows are looked up and
not multiplied, so that a caption decodes at most 2048 of 151936.

Recipes pack every matrix and nothing else, and round weights only: a caption is encoded once for a whole picture, so
speed is worth little here and memory a lot (15.1 GB in bf16, 7.6 in INT8, 4.6 in Q4_K). The VAE has no recipes: its
84 million parameters, mostly convolutions, stay in their published precision, bf16 or float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ideogram_app.catalog.models import Linear
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.errors import CheckpointError, choose

EMBEDDING_TABLE = "language_model.embed_tokens"
LAYER = "language_model.layers."
# GGML type -> weights and bytes of one block (k_quants.FORMATS has the bytes drawn).
BLOCKS = {"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "Q8_0": (32, 34)}
# What the table is packed as where layers are Q4_K, and rows that are no whole number of blocks. The table is 8 % of
# the weights: for 0.3 GB more of 4.6, errors of the features fall from 0.065 to 0.056 on the miniature and from 0.316
# to 0.262 behind random layers of full width (benchmarks/encoder.py).
FALLBACK = "Q8_0"


@dataclass(frozen=True)
class TextEncoder:
    """The text side of a Qwen3-VL. Field names follow transformers' `text_config`."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextEncoder:
        """Of a config.json of the whole model, or its `text_config`; CheckpointError names a size that is missing."""
        text = config.get("text_config", config)
        missing = [field.name for field in fields(cls) if not isinstance(text.get(field.name), int)]
        if missing:
            raise CheckpointError(
                "This is no config of a Qwen3-VL text encoder",
                expected=", ".join(missing),
                got=f"{', '.join(text):.200}",
            )
        return cls(**{field.name: text[field.name] for field in fields(cls)})

    def linears(self) -> Iterator[Linear]:
        """Every matrix, in the order of the forward pass: the embedding table, then seven for each layer."""
        hidden, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        yield Linear(EMBEDDING_TABLE, self.vocab_size, hidden, False)
        for index in range(self.num_hidden_layers):
            attention, mlp = f"{LAYER}{index}.self_attn.", f"{LAYER}{index}.mlp."
            yield Linear(f"{attention}q_proj", queries, hidden, False, True)
            yield Linear(f"{attention}k_proj", keys, hidden, False, True)
            yield Linear(f"{attention}v_proj", keys, hidden, False, True)
            yield Linear(f"{attention}o_proj", hidden, queries, False, True)
            yield Linear(f"{mlp}gate_proj", self.intermediate_size, hidden, False, True)
            yield Linear(f"{mlp}up_proj", self.intermediate_size, hidden, False, True)
            yield Linear(f"{mlp}down_proj", hidden, self.intermediate_size, False, True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its name: the matrices, and four norms a layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears():
            shapes[f"{linear.name}.weight"] = (linear.rows, linear.columns)
            if linear.name.endswith("self_attn.q_proj"):  # the first of its layer
                layer = linear.name.removesuffix("self_attn.q_proj")
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    shapes[f"{layer}{norm}.weight"] = (self.hidden_size,)
                for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                    shapes[f"{layer}{norm}.weight"] = (self.head_dim,)
        return shapes

    def norm_parameters(self) -> int:
        """Parameters that are in no matrix."""
        return self.num_hidden_layers * 2 * (self.hidden_size + self.head_dim)

    def parameters(self) -> int:
        return sum(linear.rows * linear.columns for linear in self.linears()) + self.norm_parameters()


# Layers, hidden, feed-forward, heads, key and value heads, size of a head, vocabulary.
PUBLISHED_ENCODER = TextEncoder(36, 4096, 12288, 32, 8, 128, 151936)
# What `Model.text_encoder` names: Qwen3-VL-8B-Instruct's text side, and the miniature's, which ships with the program.
ENCODERS = {"qwen3-vl-8b": PUBLISHED_ENCODER, "miniature": TextEncoder(36, 64, 160, 4, 2, 16, 397)}

ENCODER_RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "encoder-dense",
            "Encoder bf16",
            storage="dense",
            bytes_per_weight=2.0,
            compute="bf16, or float32 on a CPU",
            summary="The text encoder as published; FP8 files are widened.",
        ),
        Recipe(
            "encoder-int8",
            "Encoder INT8",
            storage="int8",
            bytes_per_weight=1.0,
            row_scale_bytes=4,
            compute="widened at every use, then as the dense encoder",
            summary="INT8 weights with one scale a row; activations are not rounded.",
        ),
        Recipe(
            "encoder-q8_0",
            "Encoder Q8_0",
            storage="gguf",
            gguf_type="Q8_0",
            bytes_per_weight=34 / 32,
            compute="decoded at every use, then as the dense encoder",
            summary="8.5 bits a weight, a scale for every 32: nearly lossless.",
        ),
        Recipe(
            "encoder-q4_k",
            "Encoder Q4_K",
            storage="gguf",
            gguf_type="Q4_K",
            bytes_per_weight=144 / 256,
            compute="decoded at every use, then as the dense encoder",
            summary="4.5 bits a weight, the embedding table in 8.5: the smallest.",
        ),
    )
}


DENSE = "encoder-dense"  # what a pipeline folder is read as
DEFAULT = "encoder-q8_0"  # what is stored beside packed transformers; why stands in prepare/components.py


def find_encoder_recipe(name: str) -> Recipe:
    """The encoder recipe of that name; RequestError lists those that exist."""
    return choose(ENCODER_RECIPES, name, "encoder recipe")


def block_type(recipe: Recipe, layer: str, columns: int) -> str:
    """The GGML type of one packed matrix of a GGUF recipe: the recipe's own, or `FALLBACK` for the table and for rows
    that are no whole number of blocks, as the miniature's are (64 and 160 wide). llama.cpp mixes types likewise."""
    own = str(recipe.gguf_type)
    return own if layer != EMBEDDING_TABLE and columns % BLOCKS[own][0] == 0 else FALLBACK


def encoder_bytes(encoder: TextEncoder, recipe: Recipe, dense_bytes: int = 2) -> int:
    """Bytes of an encoder's parameters under a recipe, as files and memory hold them; `dense_bytes` of the computing
    type: 2 for bf16, 4 for float32."""
    total = encoder.norm_parameters() * dense_bytes
    for linear in encoder.linears():
        count = linear.rows * linear.columns
        if not recipe.packs(linear.name):
            total += count * dense_bytes
        elif recipe.storage == "gguf":
            weights, size = BLOCKS[block_type(recipe, linear.name, linear.columns)]
            total += count // weights * size
        else:
            total += round(count * recipe.bytes_per_weight) + linear.rows * recipe.row_scale_bytes
    return total
