"""Text encoder from published weights of any layout: names translated, shape and config found, tensors by rows.

    safetensors  transformers' Qwen3-VL in shards, Ideogram's FP8 and NF4 folders (the config of the first says
                 `ideogram_fp8_weight_only`), ComfyUI's single files with scales of rows or of whole matrices
    GGUF         llama.cpp's conversion of Qwen3-VL, any types that gguf-py decodes: Q4_K_M mixes Q4_K and Q6_K

Files are recognised by their first bytes and headers, never by their names; tensors are checked and read in
component.py. Vision tower, final norm and head are skipped by name. llama.cpp permutes the rows of q and k only of
models that rotate neighbouring pairs (Llama); Qwen's, rotated by halves, lie in it as they do in transformers.

Without a config beside the weights, it is made of a GGUF's metadata, or of shapes alone. Rotary settings and the norms'
epsilon are in no shape: a GGUF says both, and for a single safetensors file they are those of the only encoder of this
kind that exists, Qwen3-VL with heads of 128. All else keeps transformers' defaults.

transformers' own loaders drop scales with a warning, and make a whole dense model of a GGUF. Left out: the VAE, which
AutoencoderKLFlux2 reads by itself from bfloat16 or float32 safetensors and which is never packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ideogram_app.catalog.text_encoder import EMBEDDING_TABLE, LAYER, TextEncoder
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.published.codecs import EncodedTensor, Shapes
from ideogram_app.checkpoints.published.component import Checkpoint, Groups, group_tensors
from ideogram_app.checkpoints.published.tensor_names import WEIGHT, Name, parse
from ideogram_app.checkpoints.weight_files import WeightFile, open_weights, read_config, weight_files
from ideogram_app.errors import CheckpointError

HOME = "language_model."  # what every name begins with inside the program
# In files: of transformers' whole model, of vLLM's, of its body (Ideogram), of ComfyUI, of the text side alone.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", HOME, "model.", "")
# Vision tower, final norm and head, after the prefix; `scaled_fp8` marks older files of ComfyUI.
UNUSED = ("visual.", "norm.", "lm_head.", "scaled_fp8")
OLDER = {".scale_weight": ".weight_scale", ".scale_input": ".input_scale"}  # of ComfyUI, before its notes
# llama.cpp's names: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py, MODEL_ARCH.QWEN3VL
GGUF_TABLE, GGUF_LAYER = "token_embd.weight", "blk."
GGUF_UNUSED = ("output.", "output_norm.", "rope_freqs.")
GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ARCHITECTURE = "qwen3vl"  # `general.architecture` of llama.cpp's conversion; "qwen3" has the same shapes, other weights
PROJECTOR = "clip"  # `general.architecture` of the file in which llama.cpp keeps the vision tower
# Of Qwen/Qwen3-VL-8B-Instruct: head size, rope_theta, frequencies for time, height and width, epsilon.
HEAD, THETA, SECTION, EPSILON = 128, 5_000_000.0, (24, 20, 20), 1e-6


class TextEncoderCheckpoint(Checkpoint):
    """The text side of a text encoder, whatever its layout.

    Args:
        path: a folder or a single file.
        config: as transformers' config.json; else the one in the folder, or one made from the weights.

    Raises:
        CheckpointError: not the text side of a Qwen3-VL; the message names file, tensor, expected and got.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        opened = [open_weights(file) for file in weight_files(path)]
        files = [file for file in opened if file.metadata.get("general.architecture") != PROJECTOR]
        groups = group_tensors(files, _translate)
        self.config = dict(config) if config else _described(path, files, groups)
        self.encoder = TextEncoder.from_config(self.config)
        what = f"the text side of a Qwen3-VL of {self.encoder.num_hidden_layers} layers"
        super().__init__(path, files, groups, self.encoder.shapes(), what)


def from_shapes(path: Path, shapes: Shapes) -> dict[str, Any]:
    """The config of a published encoder from its tensors' shapes.

    Raises:
        CheckpointError: a tensor is missing whose shape is needed, or heads of another size.
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


def _from_metadata(path: Path, metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The config of a GGUF file from its own metadata, refused if of another architecture or without a key."""
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
    # GGUF holds float32: 1e-6 comes back as 9.99999997e-07, which would not be the number of the config.
    section, epsilon = tuple(int(part) for part in section[:3]), float(f"{epsilon:.6g}")
    return _config(_sizes(path, shapes), float(theta), section, epsilon)


def _described(path: Path, files: list[WeightFile], groups: Groups) -> dict[str, Any]:
    """The config that comes with the weights: from a GGUF's metadata, a folder's config.json, else from shapes."""
    if not files:
        raise CheckpointError(f"{path} holds a vision tower alone", expected="the text side of a Qwen3-VL")
    shapes = {name: EncodedTensor(parts).shape for name, parts in groups.items() if WEIGHT in parts}
    if isinstance(files[0], GgufFile):
        return _from_metadata(path, files[0].metadata, shapes)
    return read_config(path) if path.is_dir() else from_shapes(path, shapes)


def _translate(file: WeightFile, stored: str) -> Name | None:
    name = _from_gguf(stored) if isinstance(file, GgufFile) else _from_safetensors(stored)
    return None if name is None else parse(name)


def _from_safetensors(stored: str) -> str | None:
    """The program's name; None for a tensor that is never used."""
    rest = stored.removeprefix(next(prefix for prefix in TEXT_PREFIXES if stored.startswith(prefix)))
    for older, ending in OLDER.items():
        if rest.endswith(older):
            rest = rest.removesuffix(older) + ending
    return None if rest.startswith(UNUSED) else HOME + rest


def _from_gguf(stored: str) -> str | None:
    """The same of llama.cpp's names; an unknown one stays as it is, and is refused later."""
    if stored.startswith(GGUF_UNUSED):
        return None
    if stored == GGUF_TABLE:
        return f"{EMBEDDING_TABLE}.weight"
    number, _, part = stored.removeprefix(GGUF_LAYER).partition(".")
    stem, _, leaf = part.rpartition(".")
    known = stored.startswith(GGUF_LAYER) and stem in GGUF_PARTS
    return f"{LAYER}{number}.{GGUF_PARTS[stem]}.{leaf}" if known else stored


def _sizes(path: Path, shapes: Shapes) -> dict[str, int]:
    parts = ("mlp.gate_proj", "self_attn.q_norm", "self_attn.q_proj", "self_attn.k_proj")
    asked = (f"{EMBEDDING_TABLE}.weight", *(f"{LAYER}0.{part}.weight" for part in parts))
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
