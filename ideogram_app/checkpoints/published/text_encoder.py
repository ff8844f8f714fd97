"""The text encoder's weights from any published layout, tensor by tensor and row by row.

    safetensors  transformers' Qwen3-VL in shards, Ideogram's FP8 and NF4 folders (the config of the first says
                 `ideogram_fp8_weight_only`), ComfyUI's single files with scales of rows or of whole matrices
    GGUF         llama.cpp's conversion of Qwen3-VL, any types that gguf-py decodes: Q4_K_M mixes Q4_K and Q6_K

Files are recognised by their first bytes and headers, never by their names; how a tensor decodes is found for each by
itself (codecs.py). Every one is accounted for before the first is read: vision tower, final norm and head are known by
their names and never read. llama.cpp permutes the rows of q and k only of models whose rotary positions it runs in
neighbouring pairs (Llama); Qwen's, rotated by halves, lie in it as they do in transformers.

transformers' own loaders drop scales with a warning, and make a whole dense model of a GGUF. Left out: the VAE, which
AutoencoderKLFlux2 reads by itself from bfloat16 or float32 safetensors and which is never packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ideogram_app.catalog.text_encoder import EMBEDDING_TABLE, LAYER, TextEncoder
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.published.codecs import StoredEntry, StoredTensor
from ideogram_app.checkpoints.published.encoder_config import from_metadata, from_shapes
from ideogram_app.checkpoints.published.layouts import recognise
from ideogram_app.checkpoints.published.tensor_names import WEIGHT, parse
from ideogram_app.checkpoints.published.transformer import open_weights, read_config, weight_files
from ideogram_app.errors import CheckpointError

HOME = "language_model."  # what every name begins with inside the program
# In files: of transformers' whole model, of vLLM's, of its body (Ideogram), of ComfyUI, of the text side alone.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", HOME, "model.", "")
# What runs for pictures or writes text, after the prefix; `scaled_fp8` marks older files of ComfyUI.
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
PROJECTOR = "clip"  # `general.architecture` of the file in which llama.cpp keeps the vision tower


class SourceEncoder:
    """The text side of a text encoder, whatever its layout.

    Args:
        path: a folder or a single file.
        config: its config.json, where it is known; else the one in the folder, or one made from what the file says.

    Attributes:
        folder: where it comes from, for messages.
        files: what is read; each has a `path`.
        layout: a name of `layouts.LAYOUTS`.
        config: as transformers' config.json.
        encoder: its shape.
        dtypes: name to the type a tensor has when it is not packed; what was packed is held in bfloat16.

    Raises:
        CheckpointError: not the text side of a Qwen3-VL; the message names file, tensor, expected and got.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = path
        opened = [open_weights(file) for file in weight_files(path)]
        self.files = [file for file in opened if file.metadata.get("general.architecture") != PROJECTOR]
        self._stored = {name: StoredTensor(parts) for name, parts in self._gathered().items()}
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        self.config = dict(config) if config else self._said(shapes)
        self.encoder = TextEncoder.from_config(self.config)
        self._expect(self.encoder.shapes())
        self.layout = recognise(self._stored.values(), paired=False).name
        self.dtypes = {name: stored.dtype for name, stored in self._stored.items()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some of its rows: float32 for anything that was packed, else as it is stored.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        stored = self._stored[name]
        first, stop, _ = (rows or slice(None)).indices(stored.shape[0])
        return stored.read(slice(first, max(first, stop)))

    def _gathered(self) -> dict[str, dict[str, StoredEntry]]:
        """What is stored of every tensor in use, by its name here and by its role there."""
        found: dict[str, dict[str, StoredEntry]] = {}
        for file in self.files:
            translate = _from_gguf if isinstance(file, GgufFile) else _from_safetensors
            for stored in file.infos:
                name = translate(stored)
                if name is None:
                    continue
                part, entry = parse(name), StoredEntry(file, stored)
                other = found.setdefault(part.base, {}).setdefault(part.role, entry)
                if other is not entry:
                    raise CheckpointError(
                        f"Tensor {part.base} is there twice",
                        got=f"{other.name} in {other.file.path} and {stored} in {file.path}",
                    )
        for name, parts in found.items():
            if WEIGHT not in parts:
                entry = next(iter(parts.values()))
                raise CheckpointError(f"{entry.file.path} holds {entry.name} without its weight", expected=name)
        return found

    def _said(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """The config that comes with the weights: a GGUF's metadata, a folder's config.json, else what shapes tell."""
        if not self.files:
            raise CheckpointError(f"{self.folder} holds a vision tower alone", expected="the text side of a Qwen3-VL")
        first = self.files[0]
        if isinstance(first, GgufFile):
            return from_metadata(self.folder, first.metadata, shapes)
        return read_config(self.folder) if self.folder.is_dir() else from_shapes(self.folder, shapes)

    def _expect(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Exactly these tensors, of these shapes."""
        unknown = [stored.weight for name, stored in self._stored.items() if name not in shapes]
        if unknown:
            raise CheckpointError(
                f"{unknown[0].file.path} holds tensors that no text encoder of this shape has",
                expected=f"the text side of a Qwen3-VL of {self.encoder.num_hidden_layers} layers",
                got=f"{len(unknown)} others, first {unknown[0]}",
            )
        missing = [name for name in shapes if name not in self._stored]
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors",
                expected=f"{missing[0]} {shapes[missing[0]]}",
                got="nothing of that name",
            )
        for name, shape in shapes.items():
            stored = self._stored[name]
            if stored.shape != shape:
                raise CheckpointError(
                    f"Tensor {stored.weight.name} of {stored.weight.file.path} (here {name}) has the wrong shape",
                    expected=str(shape),
                    got=str(stored.shape),
                )


def _from_safetensors(stored: str) -> str | None:
    """The name here; None for what is never used."""
    rest = stored.removeprefix(next(prefix for prefix in TEXT_PREFIXES if stored.startswith(prefix)))
    for older, ending in OLDER.items():
        if rest.endswith(older):
            rest = rest.removesuffix(older) + ending
    return None if rest.startswith(UNUSED) else HOME + rest


def _from_gguf(stored: str) -> str | None:
    """The same of llama.cpp's names; one that is unknown stays as it is, and nobody expects it."""
    if stored.startswith(GGUF_UNUSED):
        return None
    if stored == GGUF_TABLE:
        return f"{EMBEDDING_TABLE}.weight"
    number, _, part = stored.removeprefix(GGUF_LAYER).partition(".")
    stem, _, leaf = part.rpartition(".")
    known = stored.startswith(GGUF_LAYER) and stem in GGUF_PARTS
    return f"{LAYER}{number}.{GGUF_PARTS[stem]}.{leaf}" if known else stored
