"""Reading a prepared text encoder: which file it is in, and what its config says.

    <companions>/text_encoder/config.json
    <companions>/text_encoder/model.safetensors, or model-<type>.gguf

prepare/components.py writes these. Tokenizer, scheduler and VAE beside it are read by the libraries they are from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ideogram_app.catalog.text_encoder import TextEncoder, find_encoder_recipe
from ideogram_app.checkpoints.prepared.storage import PackedBranch
from ideogram_app.checkpoints.published.transformer import read_config

ENCODER = "text_encoder"  # the folder of a diffusers pipeline


def encoder_file(encoder: str) -> str:
    """Where the weights of an encoder recipe lie inside the companions' folder."""
    recipe = find_encoder_recipe(encoder)
    return f"{ENCODER}/model" + (f"-{recipe.gguf_type}.gguf" if recipe.storage == "gguf" else ".safetensors")


def open_encoder(folder: Path, encoder: str) -> tuple[PackedBranch, TextEncoder, dict[str, Any]]:
    """The prepared encoder of a companions' folder: its file, its shape and its config.

    Raises:
        RequestError: no such encoder recipe.
        CheckpointError: damaged.
    """
    config = read_config(folder / ENCODER)
    shape = TextEncoder.from_config(config)
    return PackedBranch(folder / encoder_file(encoder), find_encoder_recipe(encoder), shape), shape, config
