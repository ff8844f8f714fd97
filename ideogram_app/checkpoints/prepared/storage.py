"""Storage formats of prepared files by recipe: names, shapes, types of their tensors; packing of rows.

    storage  file of a transformer                                   a packed Linear x
    dense    <branch>/diffusion_pytorch_model.safetensors            x.weight
    fp8      the same                                                x.weight (float8), x.weight_scale (rows,)
    int8     the same, as torchao and diffusers save it              x._weight_qdata (int8), x._weight_scale (rows, 1)
    convrot  <model>[_uncond]-int8_convrot.safetensors               x.weight (int8, rotated), x.weight_scale (rows, 1),
                                                                     x.comfy_quant (JSON), as ComfyUI reads it
    gguf     <model>[_uncond]-<type>.gguf                            x.weight

The last two have the official names, in which q, k and v are one matrix `attention.qkv`; the others have diffusers', in
which they are three (tensor_names.py). Everything that is not packed keeps the source's type; GGUF holds it as F32,
where bfloat16 loses nothing. Beside a transformer's weights stands its config.json; the one of int8 lets an unmodified
`from_pretrained` load the folder. A text encoder lies in text_encoder/model.safetensors, or model-<type>.gguf.

Packing works row by row, so a matrix may be packed, written and read in runs of rows: the bytes are those of the whole.
`recipe` is always the effective one, whose protected list is the one the files were made with (`Manifest.effective`).
Where the bytes lie is decided in file_plan.py; the reading half is packed_file.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import Component
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.catalog.text_encoder import block_type, find_encoder_recipe
from ideogram_app.checkpoints.gguf import GgufTensor
from ideogram_app.checkpoints.prepared.file_plan import FilePlan, Unit, plan_gguf, plan_safetensors, torchao_metadata
from ideogram_app.checkpoints.published.tensor_names import diffusers_names, official_place, official_shapes
from ideogram_app.checkpoints.safetensors import DTYPE_NAMES, DTYPES, SafetensorsTensor
from ideogram_app.quantization import fp8, int8, k_quants, rotation

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # the name diffusers looks for
ENCODER = "text_encoder"  # its folder, as in a diffusers pipeline
FUSING = ("gguf", "convrot")  # storages with the official names
# How ComfyUI and stable-diffusion.cpp recognise a rotated INT8 Linear.
COMFY_QUANT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": rotation.GROUP}
COMFY_BYTES = json.dumps(COMFY_QUANT, separators=(",", ":")).encode()
FileTensor = SafetensorsTensor | GgufTensor  # a row of a header


def branch_file(model: str, recipe: Recipe, branch_name: str) -> str:
    if recipe.storage not in FUSING:
        return f"{branch_name}/{WEIGHTS_FILE}"
    stem = f"{model}{'' if branch_name == BRANCHES[0] else '_uncond'}"
    return f"{stem}-{recipe.gguf_type}.gguf" if recipe.storage == "gguf" else f"{stem}-int8_convrot.safetensors"


def encoder_file(encoder: str) -> str:
    """Where the weights of an encoder recipe lie inside the components' folder."""
    recipe = find_encoder_recipe(encoder)
    return f"{ENCODER}/model" + (f"-{recipe.gguf_type}.gguf" if recipe.storage == "gguf" else ".safetensors")


def packed_layers(recipe: Recipe, component: Component) -> set[str]:
    """The Linears whose weights are packed, by diffusers' names: where q, k and v are one matrix, all three or none."""
    packed = {linear.name for linear in component.linears() if recipe.packs(linear.name)}
    if recipe.storage in FUSING:
        packed = {name for name in packed if packed.issuperset(diffusers_names(official_place(name)[0]))}
    return packed


def held_as(recipe: Recipe, official: str) -> tuple[str, ...]:
    """Under which names a recipe's files hold a tensor or Linear: one, or those of its rows, the first on top."""
    return (official,) if recipe.storage in FUSING else diffusers_names(official)


def held_shapes(recipe: Recipe, component: Component) -> dict[str, tuple[int, ...]]:
    """Every tensor by the name under which a recipe's files hold it, in their order."""
    return official_shapes(component.shapes()) if recipe.storage in FUSING else component.shapes()


def held_packed(recipe: Recipe, component: Component) -> set[str]:
    """The Linears whose weights are packed, by the names under which a recipe's files hold them."""
    packed = packed_layers(recipe, component)
    return {official_place(name)[0] for name in packed} if recipe.storage in FUSING else packed


def units(recipe: Recipe, component: Component, dtypes: Mapping[str, torch.dtype]) -> list[Unit]:
    """Everything a file will hold; `dtypes`: official name to the type of a tensor that is not packed."""
    packed = held_packed(recipe, component)
    made = []
    for name, shape in held_shapes(recipe, component).items():
        source, part = official_place(name)
        is_packed = name.removesuffix(".weight") in packed
        parts: tuple[FileTensor, ...]
        if is_packed:
            parts = packed_parts(recipe, name, shape)
        elif recipe.storage == "gguf":
            parts = (GgufTensor(name, shape, "F32"),)
        else:
            parts = (SafetensorsTensor(name, DTYPE_NAMES[dtypes[source]], shape),)
        made.append(Unit(name, source, part * shape[0], parts, is_packed, by_rows=min(2, len(parts))))
    return made


def pack(recipe: Recipe, unit: Unit, weight: Tensor, importance: Tensor | None = None) -> list[Tensor]:
    """Rows of a unit, packed: rows of each of its first `by_rows` parts.

    Args:
        weight: (rows, columns), or (rows,) for what is not packed.
        importance: (columns,), for GGUF's search, where statistics of the inputs are known.
    """
    if not unit.packed:
        part = unit.parts[0]
        return [weight.float() if isinstance(part, GgufTensor) else weight.to(DTYPES[part.dtype])]
    if recipe.rotated:
        weight = rotation.rotate(weight)
    if recipe.storage == "gguf":
        return [k_quants.encode(weight, unit.parts[0].dtype, importance)]
    if recipe.storage == "fp8":
        return list(fp8.quantize_rows(weight))
    values, scale = int8.quantize_rows(weight)
    return [values, scale.unsqueeze(-1)]


def constants(unit: Unit) -> dict[str, Tensor]:
    return {part.name: torch.tensor(list(COMFY_BYTES), dtype=torch.uint8) for part in unit.parts[unit.by_rows :]}


def plan_file(recipe: Recipe, made: Sequence[Unit], dtype: torch.dtype) -> FilePlan:
    """The plan of a file of these units; `dtype` is that of dense layers, which torchao's metadata records."""
    if recipe.storage == "gguf":
        return plan_gguf(made)
    if recipe.storage == "int8" and recipe.quantizes_activations:
        return plan_safetensors(made, torchao_metadata(made, dtype))
    # ComfyUI's int8_convrot files say nothing of themselves.
    return plan_safetensors(made, {} if recipe.storage == "convrot" else {"format": "pt"})


def branch_config(recipe: Recipe, component: Component, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a prepared branch: the source's, and for int8 how diffusers has to read the weights."""
    made = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
    if recipe.storage == "int8" and recipe.quantizes_activations:
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        protected = [linear.name for linear in component.linears() if not recipe.packs(linear.name)]
        settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=protected)
        made["quantization_config"] = settings.to_dict()
    return made


def packed_parts(recipe: Recipe, name: str, shape: tuple[int, ...]) -> tuple[FileTensor, ...]:
    """The tensors of a packed weight: values, then scales where they lie apart, then ComfyUI's note."""
    column = (shape[0], 1)
    if recipe.storage == "gguf":
        return (GgufTensor(name, shape, block_type(recipe, name.removesuffix(".weight"), shape[1])),)
    if recipe.storage == "fp8":
        return SafetensorsTensor(name, "F8_E4M3", shape), SafetensorsTensor(f"{name}_scale", "F32", shape[:1])
    if recipe.storage == "convrot":
        mark = SafetensorsTensor(f"{name.removesuffix('weight')}comfy_quant", "U8", (len(COMFY_BYTES),))
        return SafetensorsTensor(name, "I8", shape), SafetensorsTensor(f"{name}_scale", "F32", column), mark
    stem = name.removesuffix("weight") + "_weight"
    return SafetensorsTensor(f"{stem}_qdata", "I8", shape), SafetensorsTensor(f"{stem}_scale", "F32", column)
