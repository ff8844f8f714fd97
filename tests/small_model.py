"""A random Ideogram 4 small enough for tests, written in every layout that a source may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.quantization import fp8

SMALL = (Branch(2, 64, 4, 256, 256, 13 * 64), Branch(1, 64, 4, 256, 256, 13 * 64))
NAME = "ideogram-4"
# One recipe of each way to rest, the last of its row's family.
PACKED = list({(row.storage, row.gguf_type): name for name, row in RECIPES.items() if row.storage != "dense"}.values())
WEIGHTS = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, Tensor]


def shrink_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ideogram-4` mean the small one, so that a local folder of it can be prepared."""
    small = replace(MODELS[NAME], conditional=SMALL[0], unconditional=SMALL[1])
    monkeypatch.setitem(MODELS, NAME, small)


def random_tensors(branch: Branch, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Weights of a size that lets signals through, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in branch.shapes().items():
        noise = torch.randn(shape, generator=generator)
        values = noise / shape[1] ** 0.5 if len(shape) == 2 else 0.1 * noise + (1 if "norm" in name else 0)
        tensors[name] = values.to(dtype)
    return tensors


def packed_fp8(tensors: Tensors, branch: Branch) -> Tensors:
    """As Ideogram publishes: every Linear in float8 with one scale a row."""
    linears = {f"{linear.name}.weight" for linear in branch.linears()}
    result = {}
    for name, tensor in tensors.items():
        if name in linears:
            result[name], result[f"{name}_scale"] = fp8.quantize_rows(tensor)
        else:
            result[name] = tensor
    return result


def fused(tensors: Tensors) -> Tensors:
    """Attention as the official names have it."""
    result = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace(".to_q.", f".{part}.")] for part in ("to_q", "to_k", "to_v")]
            bits = torch.cat([part.view(torch.uint8) for part in parts]).view(tensor.dtype)
            result[name.replace(".to_q.", ".qkv.")] = bits
        elif ".to_k." not in name and ".to_v." not in name:
            result[name.replace(".to_out.0.", ".o.")] = tensor
    return result


def write_branch(folder: Path, branch: Branch, tensors: Tensors, shards: int = 1) -> Path:
    """config.json and weights, with an index where there are several files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**asdict(branch), "in_channels": 128, "mrope_section": [12, 10, 10], "rope_theta": 1000}
    config |= {"_class_name": "Ideogram4Transformer2DModel", "norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return folder
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file = f"part-{shard}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, folder / file)
        places |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_source(folder: Path, change: Callable[[Tensors, Branch], Tensors] | None = None, seed: int = 0) -> Path:
    """Both branches of a pipeline folder; `change` turns dense bfloat16 tensors into another layout."""
    for number, (name, branch) in enumerate(zip(BRANCHES, SMALL, strict=True)):
        tensors = random_tensors(branch, seed + number)
        write_branch(folder / name, branch, change(tensors, branch) if change else tensors)
    return folder


def velocity(transformer: torch.nn.Module, features: int = 13 * 64, text_tokens: int = 7, side: int = 6) -> Tensor:
    """The output of diffusers' transformer on image tokens for a fixed random input of 7 + 36 tokens."""
    generator = torch.Generator().manual_seed(3)
    length = text_tokens + side * side
    image = slice(text_tokens, length)
    positions = torch.zeros(1, length, 3, dtype=torch.long)
    positions[0, :text_tokens] = torch.arange(text_tokens)[:, None]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions[0, image] = 65536 + torch.stack([torch.zeros(side * side).long(), rows.flatten(), columns.flatten()], 1)
    indicator = torch.full((1, length), 2)
    indicator[0, :text_tokens] = 3
    with torch.no_grad():
        answer = transformer(
            hidden_states=torch.randn(1, length, 128, generator=generator),
            timestep=torch.tensor([0.5]),
            encoder_hidden_states=torch.randn(1, length, features, generator=generator),
            position_ids=positions,
            segment_ids=torch.ones(1, length, dtype=torch.long),
            indicator=indicator,
            return_dict=False,
        )
    return answer[0][:, image]


def backbone_velocity(backbone: Any, features: int = 13 * 64, text_tokens: int = 7, side: int = 6) -> Tensor:
    """The same output for the same input from this program's backbone; a branch without text gets no text tokens.

    diffusers' branches both see the text here. So does a backbone that was assembled with its text projection.
    """
    generator = torch.Generator().manual_seed(3)
    length = text_tokens + side * side
    latents = torch.randn(1, length, 128, generator=generator)[0, text_tokens:]
    text = torch.randn(1, length, features, generator=generator)[0, :text_tokens]
    with torch.inference_mode():
        prepared = backbone.prepare(text, torch.tensor([0.5]), side, side)
        answer: Tensor = backbone(latents, prepared, 0)
    return answer[None]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())
