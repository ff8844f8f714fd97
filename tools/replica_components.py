"""What stands around a replica's transformers in a diffusers pipeline: text encoder, VAE, tokenizer, scheduler, index.

Small ones are the miniature's, the encoder packed as the transformers are; large ones have the published shapes, taken
from the libraries' own classes, and random weights. Two quirks of the FP8 publication are kept: its encoder's config
carries `ideogram_fp8_weight_only`, and its model_index.json asks for the slow `Qwen2Tokenizer` while only the fast
tokenizer's file is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.checkpoints.safetensors import DTYPE_NAMES, SafetensorsFile
from ideogram_app.checkpoints.weight_files import read_config
from ideogram_app.files import project_folder
from tools import replica_parts
from tools.replica_parts import PERIOD, Pack, Part, dense, write_safetensors

ENCODER, VAE = "text_encoder", "vae"
FILES = {ENCODER: "model.safetensors", VAE: "diffusion_pytorch_model.safetensors"}
# Qwen3-VL-8B-Instruct, where it differs from the defaults of transformers' configuration.
TEXT = {"hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "vocab_size": 151936}
TEXT |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
VISION = {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_size": 1152}
VISION |= {"intermediate_size": 4304, "num_heads": 16}
ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_theta": 5_000_000, "rope_type": "default"}


def write_components(
    out: Path, pack: Pack | None, source: Path | None, weights: bool, tiny: bool, seed: int = 0
) -> None:
    """Write them into a pipeline folder.

    Args:
        pack: how the encoder's Linears are packed; None leaves them dense.
        source: the pipeline folder whose components to take; the miniature's where None.
        weights: encoder, VAE and tokenizer too, not only the index and the scheduler.
        tiny: take the encoder and VAE that are there rather than make large ones.
    """
    given = source or project_folder() / "assets" / "miniature"
    index = json.loads((given / "model_index.json").read_text(encoding="utf-8"))
    index["tokenizer"] = ["transformers", "Qwen2Tokenizer"]
    scheduler = json.loads((given / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if source is None:
        scheduler["shift"] = 1.0  # as published; the miniature's own weights were trained for another
    _write_json(out / "model_index.json", index)
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    if not weights:
        return
    shutil.copytree(given / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    for name in (ENCODER, VAE):
        config, tensors = _copied(given / name, FILES[name]) if tiny else _published(name, seed)
        chosen = pack if name == ENCODER else None
        if chosen is replica_parts.fp8:
            config["ideogram_fp8_weight_only"] = True
        _write_json(out / name / "config.json", config)
        write_safetensors(out / name / FILES[name], list(_packed(tensors, chosen)), {"format": "pt"})


def _copied(folder: Path, file: str) -> tuple[dict[str, Any], Iterator[tuple[str, tuple[int, ...], Tensor]]]:
    weights = SafetensorsFile(folder / file)
    return read_config(folder), ((name, info.shape, weights.tensor(name)) for name, info in weights.infos.items())


def _published(name: str, seed: int) -> tuple[dict[str, Any], Iterator[tuple[str, tuple[int, ...], Tensor]]]:
    """Config and random first rows of the component that the published model has."""
    with torch.device("meta"):
        if name == ENCODER:
            from transformers import Qwen3VLConfig, Qwen3VLModel

            settings = Qwen3VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=VISION)
            module, config = Qwen3VLModel(settings), settings.to_dict()
            config["architectures"] = ["Qwen3VLModel"]
        else:
            from diffusers import AutoencoderKLFlux2

            module = AutoencoderKLFlux2()
            config = {"_class_name": "AutoencoderKLFlux2", **dict(module.config)}
    generator = torch.Generator().manual_seed(seed)

    def tensors() -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        for key, tensor in module.state_dict().items():
            shape = tuple(tensor.shape)
            first = (min(shape[0], PERIOD), *shape[1:]) if shape else shape
            fan = max(1, tensor.numel() // shape[0]) if shape else 1
            noise = torch.randn(first, generator=generator) / fan**0.5
            if not tensor.is_floating_point():
                noise = torch.zeros(first, dtype=tensor.dtype)  # counters of batch norms
            yield key, shape, noise.abs() if "running_var" in key else noise

    return config, tensors()


def _packed(tensors: Iterator[tuple[str, tuple[int, ...], Tensor]], pack: Pack | None) -> Iterator[Part]:
    """Every Linear packed, which are the matrices that are no embedding; the rest bfloat16."""
    for name, shape, values in tensors:
        if pack and len(shape) == 2 and name.endswith(".weight") and "embed" not in name:
            module = name.removesuffix(".weight")
            yield from (part.named(module) for part in pack(values.float(), shape[0]))
        elif values.is_floating_point():
            yield dense(name, values, shape, "BF16")
        else:
            yield Part(name, DTYPE_NAMES[values.dtype], shape, values)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
