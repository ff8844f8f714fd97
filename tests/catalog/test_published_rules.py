"""What other programs ask of a file, at the published model's size: headers are planned and compared, nothing written.

The names and shapes are those of Ideogram's own checkpoint, spelled out here a second time: 458 tensors, of which
stable-diffusion.cpp knows the model by one, ComfyUI's loaders by the fused attention.
"""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors import safe_open

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES, find_recipe
from ideogram_app.checkpoints.prepared.storage import branch_file, units
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.prepare.transformers import prepare

HIDDEN, FEED_FORWARD, ADALN, FEATURES, LATENT, HEAD = 4608, 12288, 512, 53248, 128, 256
BLOCK = {
    "attention.qkv.weight": (3 * HIDDEN, HIDDEN),
    "attention.o.weight": (HIDDEN, HIDDEN),
    "feed_forward.w1.weight": (FEED_FORWARD, HIDDEN),
    "feed_forward.w2.weight": (HIDDEN, FEED_FORWARD),
    "feed_forward.w3.weight": (FEED_FORWARD, HIDDEN),
    "adaln_modulation.weight": (4 * HIDDEN, ADALN),
    "adaln_modulation.bias": (4 * HIDDEN,),
    **dict.fromkeys(("attention.norm_q.weight", "attention.norm_k.weight"), (HEAD,)),
    **dict.fromkeys((f"attention_norm{number}.weight" for number in (1, 2)), (HIDDEN,)),
    **dict.fromkeys((f"ffn_norm{number}.weight" for number in (1, 2)), (HIDDEN,)),
}
OUTSIDE = {
    "input_proj": (HIDDEN, LATENT),
    "llm_cond_proj": (HIDDEN, FEATURES),
    "t_embedding.mlp_in": (HIDDEN, HIDDEN),
    "t_embedding.mlp_out": (HIDDEN, HIDDEN),
    "adaln_proj": (ADALN, HIDDEN),
    "final_layer.linear": (LATENT, HIDDEN),
    "final_layer.adaln_modulation": (HIDDEN, ADALN),
}
OFFICIAL: dict[str, tuple[int, ...]] = {
    "llm_cond_norm.weight": (FEATURES,),
    "embed_image_indicator.weight": (2, HIDDEN),
    **{f"{name}.weight": shape for name, shape in OUTSIDE.items()},
    **{f"{name}.bias": shape[:1] for name, shape in OUTSIDE.items()},
    **{f"layers.{index}.{name}": shape for index in range(34) for name, shape in BLOCK.items()},
}
GGUFS = [name for name, recipe in RECIPES.items() if recipe.storage == "gguf"]
PUBLISHED = MODELS["ideogram-4"].conditional


def planned(recipe: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored name -> type and shape of every tensor that a file of the published model will hold."""
    dtypes = dict.fromkeys(OFFICIAL, torch.bfloat16)
    parts = [part for unit in units(find_recipe(recipe), PUBLISHED, dtypes) for part in unit.parts]
    assert len({part.name for part in parts}) == len(parts)
    return {part.name: (part.dtype, part.shape) for part in parts}


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """stable-diffusion.cpp's rule: attention, feed_forward and adaln_modulation of the blocks."""
    return name.startswith("layers.") and len(shape) == 2


@pytest.mark.parametrize("recipe", GGUFS)
def test_a_gguf_of_the_published_model_is_what_its_readers_expect(recipe: str) -> None:
    file = planned(recipe)
    assert len(OFFICIAL) == 458
    assert {name: shape for name, (_, shape) in file.items()} == OFFICIAL
    assert "embed_image_indicator.weight" in file  # stable-diffusion.cpp knows the model by it
    assert max(len(name) for name in file) < 64  # GGML_MAX_NAME
    for name, (kind, shape) in file.items():
        assert kind == (RECIPES[recipe].gguf_type if is_packed(name, shape) else "F32"), name
        weights, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert shape[-1] % weights == 0, f"rows of {name} are no whole number of blocks"


@pytest.mark.parametrize("recipe", [name for name, row in RECIPES.items() if row.storage in ("gguf", "convrot")])
def test_only_the_second_files_name_says_uncond(recipe: str) -> None:
    """InvokeAI tells the transformers apart by it."""
    names = [branch_file("ideogram-4", RECIPES[recipe], part) for part in ("transformer", "unconditional_transformer")]
    assert ["uncond" in name for name in names] == [False, True]
    assert not any("/" in name for name in names)


def test_a_rotated_file_of_the_published_model_is_what_comfyui_reads() -> None:
    file = planned("int8-w8a8-rotated")
    assert {name: shape for name, (_, shape) in file.items() if name in OFFICIAL} == OFFICIAL
    packed = {name for name, (kind, _) in file.items() if kind == "I8"}
    blocks = {name for name, shape in OFFICIAL.items() if is_packed(name, shape)}
    assert packed and packed <= blocks
    beside = {f"{name}_scale": ("F32", (OFFICIAL[name][0], 1)) for name in packed}
    assert beside.items() <= file.items()
    marks = {name.removesuffix("weight") + "comfy_quant" for name in packed}
    assert {name for name, (kind, _) in file.items() if kind == "U8"} == marks
    assert set(file) == {*OFFICIAL, *beside, *marks}
    assert all(OFFICIAL[name][1] % 256 == 0 for name in packed)


def test_a_rotated_file_says_how_it_is_read_and_nothing_of_itself(tmp_path) -> None:
    store = Store(tmp_path)
    list(prepare(store, "miniature", "int8-w8a8-rotated"))
    paths = sorted(store.path("miniature", "int8-w8a8-rotated").glob("*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        with safe_open(path, "pt") as file:
            assert not file.metadata()
            marks = [name for name in file.keys() if name.endswith(".comfy_quant")]  # noqa: SIM118
            assert marks
            for name in marks:
                said = json.loads(bytes(file.get_tensor(name).tolist()))
                assert said == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
