"""A text encoder's config where none lies beside its weights: from a GGUF's metadata, or from shapes alone.

Shapes tell every size. They do not tell how positions are encoded nor the norms' epsilon: a GGUF says both, and for a
single safetensors file they are those of the only encoder of this kind that exists, Qwen3-VL with heads of 128. All
else keeps transformers' defaults. Left out: the vision side, which is never built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ideogram_app.catalog.text_encoder import EMBEDDING_TABLE, LAYER
from ideogram_app.errors import CheckpointError

ARCHITECTURE = "qwen3vl"  # `general.architecture` of llama.cpp's conversion; "qwen3" has the same shapes, other weights
# Of Qwen/Qwen3-VL-8B-Instruct: head size, rope_theta, frequencies for time, height and width, epsilon.
HEAD, THETA, SECTION, EPSILON = 128, 5_000_000.0, (24, 20, 20), 1e-6

Shapes = Mapping[str, tuple[int, ...]]


def from_shapes(path: Path, shapes: Shapes) -> dict[str, Any]:
    """The config of a published encoder from its tensors' shapes.

    Raises:
        CheckpointError: a tensor is missing that tells a size, or heads of another size.
    """
    sizes = _sizes(path, shapes)
    if sizes["head_dim"] != HEAD:
        raise CheckpointError(
            f"How {path} encodes positions is not known",
            expected=f"heads of {HEAD}",
            got=str(sizes["head_dim"]),
            do="Put it into a folder with its config.json",
        )
    return _config(sizes, THETA, SECTION, EPSILON)


def from_metadata(path: Path, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The config of a GGUF file from its own metadata.

    Raises:
        CheckpointError: another architecture, or a key is missing; names it.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path} holds another model", expected=f"general.architecture {ARCHITECTURE}", got=str(architecture)
        )
    keys = ("rope.freq_base", "rope.dimension_sections", "attention.layer_norm_rms_epsilon")
    missing = [key for key in keys if f"{ARCHITECTURE}.{key}" not in metadata]
    if missing:
        raise CheckpointError(
            f"{path} does not say {ARCHITECTURE}.{missing[0]}", do="Convert it again with a newer llama.cpp"
        )
    theta, section, epsilon = (metadata[f"{ARCHITECTURE}.{key}"] for key in keys)
    return _config(_sizes(path, shapes), float(theta), tuple(int(part) for part in section[:3]), _round(epsilon))


def _round(value: float) -> float:
    """GGUF holds float32: 1e-6 comes back as 9.99999997e-07, which would not be the number of the config."""
    return float(f"{value:.6g}")


def _sizes(path: Path, shapes: Shapes) -> dict[str, int]:
    """The fields of `TextEncoder`, by their names in a config."""
    first = f"{LAYER}0."
    asked = (f"{EMBEDDING_TABLE}.weight", *(f"{first}{part}.weight" for part in ("mlp.gate_proj", "self_attn.q_norm")))
    asked += tuple(f"{first}self_attn.{part}_proj.weight" for part in "qk")
    missing = [name for name in asked if not shapes.get(name)]
    if missing:
        raise CheckpointError(f"{path} is no text encoder of a Qwen3-VL", expected=missing[0], got="not there")
    table, gate, norm, queries, keys = (shapes[name] for name in asked)
    numbers = [name[len(LAYER) :].split(".")[0] for name in shapes if name.startswith(LAYER)]
    return {
        "num_hidden_layers": max(int(number) for number in numbers if number.isdecimal()) + 1,
        "hidden_size": table[-1],
        "intermediate_size": gate[0],
        "num_attention_heads": queries[0] // norm[0],
        "num_key_value_heads": keys[0] // norm[0],
        "head_dim": norm[0],
        "vocab_size": table[0],
    }


def _config(sizes: dict[str, int], theta: float, section: tuple[int, ...], epsilon: float) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), "mrope_interleaved": True}
    text = {"model_type": "qwen3_vl_text", **sizes, "rms_norm_eps": epsilon, "rope_parameters": rope}
    return {"model_type": "qwen3_vl", "text_config": text}
