"""A random Qwen3-VL small enough for tests, in transformers' own module and in every layout a source may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from ideogram_app.quantization import fp8, k_quants

ROPE = {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": ROPE,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 256}
VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
CONFIG: dict[str, Any] = {"model_type": "qwen3_vl", "text_config": TEXT, "vision_config": VISION}
IDS = torch.arange(11)[None] * 7 % 96
Tensors = dict[str, Tensor]


def stock_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen3VLModel:
    """transformers' module with weights that bfloat16 holds exactly and that let signals through."""
    generator = torch.Generator().manual_seed(seed)
    model = Qwen3VLModel._from_config(Qwen3VLConfig(**{key: CONFIG[key] for key in ("text_config", "vision_config")}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise / value.shape[-1] ** 0.5 if value.dim() > 1 else 0.1 * noise + ("norm" in name))
            value.data = value.bfloat16().to(dtype)  # not `model.to`, which would round the rotary frequencies too
    return model.eval()


def text_side(model: Qwen3VLModel) -> Tensors:
    """What a caption needs, by transformers' names."""
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    return {
        name: value for name, value in tensors.items() if "visual." not in name and name != "language_model.norm.weight"
    }


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name


def write_folder(folder: Path, tensors: Tensors, shards: int = 1, **settings: Any) -> Path:
    """config.json and weights, with an index where there are several files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file)
        places |= dict.fromkeys(mine, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def whole(model: Qwen3VLModel, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Everything transformers would save, the head included."""
    tensors = {name: value.detach().to(dtype) for name, value in model.state_dict().items()}
    return tensors | {"lm_head.weight": tensors["language_model.embed_tokens.weight"].clone()}


def prefixed(tensors: Tensors, language: str, visual: str) -> Tensors:
    """As another program names them."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in (("language_model.", language), ("visual.", visual)):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        found[name] = tensor
    return found


def as_ideogram(tensors: Tensors) -> Tensors:
    """Every Linear, those of the vision tower too, in float8 with a scale a row; no head."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if is_matrix(name, tensor) and not name.startswith("lm_head"):
            found[name], found[f"{name}_scale"] = fp8.quantize_rows(tensor)
        elif not name.startswith("lm_head"):
            found[name] = tensor
    return found


def as_comfy(tensors: Tensors, older: bool = False) -> Tensors:
    """The text side's Linears in float8 with a scale a matrix, a note beside each, or as it was before notes."""
    found: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if older else {}
    note = torch.tensor(list(b'{"format":"float8_e4m3fn"}'), dtype=torch.uint8)
    for name, tensor in tensors.items():
        found[name] = tensor
        if is_matrix(name, tensor) and name.startswith("language_model."):
            stem, scale = name.removesuffix(".weight"), tensor.float().abs().max() / 448
            found[name] = (tensor.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            found[f"{stem}.{'scale_weight' if older else 'weight_scale'}"] = scale
            if older:
                found[f"{stem}.scale_input"] = torch.ones(1)
            else:
                found[f"{stem}.comfy_quant"] = note.clone()
    return prefixed(found, "model.", "visual.")


def write_gguf(
    path: Path, model: Qwen3VLModel, kind: Callable[[str], str], architecture: str = "qwen3vl", **keys: Any
) -> Tensors:
    """A file as llama.cpp's converter makes it, through gguf-py; returns what it decodes to, by transformers' names.

    Args:
        kind: llama.cpp's name of a matrix -> its GGML type.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3VL, TEXT["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(TEXT["num_hidden_layers"])
    writer.add_rope_freq_base(ROPE["rope_theta"])
    writer.add_rope_dimension_sections([*ROPE["mrope_section"], 0])
    writer.add_layer_norm_rms_eps(TEXT["rms_norm_eps"])
    for key, value in keys.items():
        writer.add_string(key, value)
    decoded: Tensors = {}
    tensors = text_side(model) | {"language_model.norm.weight": model.language_model.norm.weight.detach()}
    for name, tensor in tensors.items():
        stored = names.get_name(name.replace("language_model.", "model."), try_suffixes=(".weight",))
        values, chosen = tensor.float().contiguous(), kind(stored) if tensor.dim() == 2 else "F32"
        as_type = gguf.GGMLQuantizationType[chosen]
        if chosen in k_quants.FORMATS:
            raw = k_quants.encode(values, chosen).numpy()
        else:
            raw = gguf.quantize(values.numpy(), as_type)
        writer.add_tensor(stored, raw, raw_dtype=as_type)
        decoded[name] = torch.from_numpy(numpy.array(gguf.dequantize(raw, as_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del decoded["language_model.norm.weight"]
    return decoded
