"""Read by others: gguf-py and stock diffusers open what this program prepares, and draw the same picture."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, Ideogram4Transformer2DModel
from diffusers.loaders import single_file_model
from safetensors.torch import load_file
from small_model import fused, relative_error, velocity
from torch import Tensor

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import AccessError, CheckpointError, RequestError
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import denoise, make_noise, schedule, times
from ideogram_app.interop.pipeline import MODEL_CLASS, load_pipeline, register_gguf
from ideogram_app.model.components import load_components
from ideogram_app.model.loader import load_transformers
from ideogram_app.model.reference_model import ReferenceGuidance, load_reference_model
from ideogram_app.model.text_encoder.features import encode
from ideogram_app.prepare.transformers import quantize
from tests.conftest import MINIATURE, ROOT
from tools.make_replica import make

pytestmark = pytest.mark.slow

PRESET, GUIDANCE = PRESETS["turbo-12"], 1.5
PROMPT = "a red circle on a yellow background"
# recipe -> largest relative difference of the latents from this program's own after 12 steps, in float32; about three
# times what was measured, 3.4e-4 and 1.3e-3. diffusers decodes GGUF blocks in half precision, this program in float32.
# INT8 is the same to the last bit through diffusers' modules (`ReferenceGuidance`), where the text is not padded. Noise
# changed by 1e-6, or sums in another order as in this program's backbone, flip roundings of activations, and twelve
# steps carry that to 0.009.
LARGEST_DIFFERENCE = {"int8-w8a8": 0.02, "gguf-q8_0": 1e-3, "gguf-q4_k": 4e-3}
PROMPT_TOKENS = 15  # `max_sequence_length` without padding
LARGEST_FP8_ERROR = 0.1  # of latents drawn from weights that were FP8; measured 0.056
GGUFS = {"gguf-q8_0": "Q8_0", "gguf-q4_k": "Q4_K"}
MINE = MODELS["miniature"].branches


@pytest.fixture(scope="module")
def store(prepared_miniature: Store) -> Store:
    """The miniature in every recipe."""
    return prepared_miniature


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers as it comes."""
    monkeypatch.delitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, MODEL_CLASS, raising=False)


def ours(store: Store, recipe: str, noise: Tensor) -> Tensor:
    """Latents by this program's loader and loop."""
    parts = load_components("miniature", "cpu", torch.float32)
    loaded = load_transformers(store, "miniature", recipe, "cpu", torch.float32)
    sigmas = schedule(PRESET, 128, 128, parts.shift)
    steps = GuidedModel(loaded, encode(parts.tokenizer, parts.text_encoder, PROMPT), 8, 8, times(sigmas))
    return list(denoise(steps, noise, sigmas, (GUIDANCE,) * PRESET.steps))[-1].latents


def theirs(pipeline: Any, noise: Tensor) -> Tensor:
    """Latents by stock diffusers' pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    drawn: Tensor = pipeline(
        PROMPT,
        height=128,
        width=128,
        num_inference_steps=PRESET.steps,
        guidance_scale=GUIDANCE,
        guidance_schedule=None,
        mu=PRESET.mu,
        std=PRESET.std,
        max_sequence_length=PROMPT_TOKENS,
        latents=noise,
        output_type="latent",
    ).images
    return drawn


@pytest.mark.parametrize("recipe", LARGEST_DIFFERENCE)
def test_stock_diffusers_draws_the_same_picture(store: Store, recipe: str) -> None:
    noise = make_noise(3, 128, 128)
    pipeline = load_pipeline(store.path("miniature", recipe), dtype=torch.float32)
    assert relative_error(theirs(pipeline, noise), ours(store, recipe, noise)) <= LARGEST_DIFFERENCE[recipe]
    for name, branch in zip(BRANCHES, MINE, strict=True):
        module = getattr(pipeline, name)
        assert type(module) is Ideogram4Transformer2DModel and len(module.layers) == branch.num_layers
        packed = "Int8Tensor" if recipe == "int8-w8a8" else "GGUFParameter"
        assert type(module.layers[0].feed_forward.w1.weight).__name__ == packed
        assert type(module.layers[0].attention_norm1.weight) is torch.nn.Parameter
        assert type(module.final_layer.linear.weight) is torch.nn.Parameter


def test_stock_diffusers_multiplies_int8_to_the_same_last_bit(store: Store) -> None:
    noise, sigmas = make_noise(3, 128, 128), schedule(PRESET, 128, 128, 18.0)
    parts = load_components("miniature", "cpu", torch.float32)
    assert parts.shift == 18.0
    features = encode(parts.tokenizer, parts.text_encoder, PROMPT)
    loaded = load_reference_model(store, "miniature", "int8-w8a8", "cpu", torch.float32)
    mine = ReferenceGuidance(loaded, features, 8, 8, times(sigmas))
    drawn = list(denoise(mine, noise, sigmas, (GUIDANCE,) * PRESET.steps))[-1].latents
    assert torch.equal(drawn, theirs(load_pipeline(store.path("miniature", "int8-w8a8"), dtype=torch.float32), noise))


def test_a_pipeline_computes_in_bfloat16_and_keeps_the_rotary_frequencies_wide(store: Store) -> None:
    pipeline = load_pipeline(store.path("miniature", "gguf-q8_0"))
    assert {part.dtype for part in (pipeline.vae, pipeline.text_encoder)} == {torch.bfloat16}
    assert pipeline.transformer.input_proj.weight.dtype == torch.bfloat16
    assert pipeline.transformer.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(theirs(pipeline, make_noise(3, 128, 128))).all()


def test_weights_from_ideograms_own_layout_bring_its_packed_text_encoder(stock: Any, tmp_path: Path) -> None:
    """FP8 and fused, as published: stock diffusers by itself reads neither its transformers nor its text encoder."""
    source, noise = make("fp8-fused", tmp_path / "published", source=MINIATURE), make_noise(3, 128, 128)
    list(quantize(source, "gguf-q8_0", tmp_path / "prepared"))
    drawn = theirs(load_pipeline(tmp_path / "prepared", dtype=torch.float32), noise)
    assert 0 < relative_error(drawn, theirs(stock, noise)) < LARGEST_FP8_ERROR


def test_a_recipe_that_only_this_program_reads_is_refused_with_those_that_others_read(store: Store) -> None:
    with pytest.raises(RequestError, match=r"does not read fp8\. Expected .*int8-w8a8.* or gguf-q4_k"):
        load_pipeline(store.path("miniature", "fp8"))


def test_a_truncated_file_is_named_before_anything_is_loaded(store: Store, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(store.path("miniature", "gguf-q4_k"), tmp_path / "copy"))
    path = folder / "miniature_uncond-Q4_K.gguf"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{path} is truncated"):
        load_pipeline(folder)


def test_a_folder_whose_source_is_gone_asks_for_one(store: Store, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(store.path("miniature", "gguf-q4_k"), tmp_path / "copy"))
    manifest = folder / "manifest.json"
    text = manifest.read_text().replace('"model": "miniature"', '"model": "ideogram-4"')
    manifest.write_text(text.replace(str(MINIATURE), str(tmp_path / "gone")))
    for branch in ("", "_uncond"):
        (folder / f"miniature{branch}-Q4_K.gguf").rename(folder / f"ideogram-4{branch}-Q4_K.gguf")
    manifest.write_text(manifest.read_text().replace("miniature-", "ideogram-4-").replace("miniature_", "ideogram-4_"))
    with pytest.raises(AccessError, match="do not ship with this program"):
        load_pipeline(folder)
    assert load_pipeline(folder, MINIATURE).vae is not None


# The files themselves, as gguf-py sees them.


@pytest.mark.parametrize("recipe", GGUFS)
@pytest.mark.parametrize("number", [0, 1])
def test_gguf_files_follow_the_rules_that_most_readers_share(store: Store, recipe: str, number: int) -> None:
    folder = store.path("miniature", recipe)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    assert [("uncond" in name) for name in files] == [False, True]
    reader = gguf.GGUFReader(folder / files[number])
    assert set(reader.fields) == {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}

    dense = fused(load_file(MINIATURE / BRANCHES[number] / "diffusion_pytorch_model.safetensors"))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == set(dense) and "embed_image_indicator.weight" in found
    matrices = {f"{linear.name}.weight" for linear in MINE[number].linears() if linear.in_block}
    matrices = set(fused({name: torch.empty(1) for name in matrices}))
    for name, tensor in found.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        assert shape == dense[name].shape
        assert tensor.tensor_type.name == (GGUFS[recipe] if name in matrices else "F32"), name
        if name in matrices:
            assert name.startswith("layers.") and shape[1] % 256 == 0
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert relative_error(values, dense[name]) < (0.01 if recipe == "gguf-q8_0" else 0.1)
        else:
            assert torch.equal(torch.from_numpy(np.array(tensor.data)).reshape(shape), dense[name].float())


# Files as others publish them, written by gguf-py from the miniature's own weights.

Kind = Callable[[str, Tensor], gguf.GGMLQuantizationType]
TYPES = gguf.GGMLQuantizationType


def of_the_blocks(packed: gguf.GGMLQuantizationType, rest: gguf.GGMLQuantizationType) -> Kind:
    return lambda name, tensor: packed if name.startswith("layers.") and tensor.ndim == 2 else rest


def everything(name: str, tensor: Tensor) -> gguf.GGMLQuantizationType:
    """Every matrix, the embedding too."""
    return TYPES.Q5_0 if tensor.ndim == 2 else TYPES.F16


PUBLISHED: dict[str, tuple[str, Kind]] = {
    "leejet": ("", of_the_blocks(TYPES.Q4_0, TYPES.BF16)),
    "molbal": ("", of_the_blocks(TYPES.Q4_1, TYPES.F16)),
    "ComfyUI": ("model.diffusion_model.", of_the_blocks(TYPES.Q8_0, TYPES.F32)),
    "rectangleworm": ("", everything),
    "bfloat16": ("", of_the_blocks(TYPES.BF16, TYPES.BF16)),
    "Transformer Lab": ("uncond.", of_the_blocks(TYPES.Q8_0, TYPES.F16)),
}


def dense_weights(number: int) -> dict[str, Tensor]:
    return load_file(MINIATURE / BRANCHES[number] / "diffusion_pytorch_model.safetensors")


def write_gguf(path: Path, tensors: Mapping[str, Tensor], kind_of: Kind, prefix: str = "") -> dict[str, Tensor]:
    """A file without metadata; what its readers should find in it."""
    writer, truth = gguf.GGUFWriter(path, arch=""), {}
    for name, tensor in tensors.items():
        kind, values = kind_of(name, tensor), tensor.float().numpy()
        packed = gguf.quantize(values, kind)
        writer.add_tensor(f"{prefix}{name}", packed, raw_dtype=kind)
        truth[f"{prefix}{name}"] = torch.from_numpy(np.array(gguf.dequantize(packed, kind))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def from_single_file(path: Path, number: int, **settings: Any) -> Ideogram4Transformer2DModel:
    register_gguf()
    module = Ideogram4Transformer2DModel.from_single_file(
        str(path),
        config=str(MINIATURE / BRANCHES[number]),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        local_files_only=True,
        **settings,
    )
    assert isinstance(module, Ideogram4Transformer2DModel)
    return module


def with_weights(number: int, tensors: Mapping[str, Tensor]) -> Ideogram4Transformer2DModel:
    """Stock diffusers with values given under the official names."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            parts = zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True)
            split |= {name.replace("qkv", part): rows for part, rows in parts}
        else:
            split[name.replace("attention.o.", "attention.to_out.0.")] = tensor
    module = Ideogram4Transformer2DModel.from_config(
        Ideogram4Transformer2DModel.load_config(MINIATURE / BRANCHES[number])
    )
    module.load_state_dict(split, strict=True)
    return module.eval()


@pytest.mark.parametrize("publisher", PUBLISHED)
def test_files_as_others_publish_them_load_in_stock_diffusers(tmp_path: Path, publisher: str) -> None:
    prefix, kind_of = PUBLISHED[publisher]
    number = 1 if prefix == "uncond." else 0
    truth = write_gguf(tmp_path / "weights.gguf", fused(dense_weights(number)), kind_of, prefix)
    expected = with_weights(number, {name.removeprefix(prefix): tensor for name, tensor in truth.items()})
    got = from_single_file(tmp_path / "weights.gguf", number)
    assert relative_error(velocity(got), velocity(expected)) < 1e-3  # half precision in diffusers' decoders
    assert type(got.layers[0].attention.norm_q.weight) is torch.nn.Parameter
    assert got.embed_image_indicator.weight.dtype == torch.float32


def test_one_file_of_both_transformers_asks_which(tmp_path: Path) -> None:
    path, kind_of = tmp_path / "both.gguf", of_the_blocks(TYPES.Q8_0, TYPES.F16)
    both = {f"{prefix}{name}": tensor for number, prefix in enumerate(("cond.", "uncond."))
            for name, tensor in fused(dense_weights(number)).items()}  # fmt: skip
    truth = write_gguf(path, both, lambda name, tensor: kind_of(name.partition(".")[2], tensor))
    with pytest.raises(RequestError, match="branch=transformer or unconditional_transformer"):
        from_single_file(path, 0)
    for number, prefix in enumerate(("cond.", "uncond.")):
        mine = {name.removeprefix(prefix): tensor for name, tensor in truth.items() if name.startswith(prefix)}
        got = from_single_file(path, number, branch=BRANCHES[number])
        assert relative_error(velocity(got), velocity(with_weights(number, mine))) < 1e-3


def refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], number: int = 0) -> str:
    tensors = fused(dense_weights(0))
    change(tensors)
    write_gguf(tmp_path / "wrong.gguf", tensors, of_the_blocks(TYPES.Q8_0, TYPES.F32))
    with pytest.raises(CheckpointError) as caught:
        from_single_file(tmp_path / "wrong.gguf", number)
    return str(caught.value)


def test_what_diffusers_would_load_half_is_refused(tmp_path: Path) -> None:
    """Left alone it leaves what is missing on the meta device, and drops what it does not know with a warning."""
    assert "no layers.2.attention.to_q.weight" in refused(tmp_path, lambda t: t.pop("layers.2.attention.qkv.weight"))
    scale = "layers.0.attention.o.weight_scale"
    assert f"{scale} is the scale of" in refused(tmp_path, lambda t: t.update({scale: torch.ones(256)}))
    assert "extra is no tensor of" in refused(tmp_path, lambda t: t.update({"extra": torch.ones(3)}))
    twice = "model.diffusion_model.input_proj.bias"
    assert f"{twice} is there twice" in refused(tmp_path, lambda t: t.update({twice: t["input_proj.bias"]}))
    narrow = refused(tmp_path, lambda t: t.update({"adaln_proj.weight": torch.ones(256, 128)}))
    assert "adaln_proj.weight does not fit" in narrow and "(256, 256)" in narrow and "(256, 128)" in narrow
    assert "layers.3." in refused(tmp_path, lambda _: None, number=1)  # the config of the shorter transformer


@pytest.mark.usefixtures("unregistered")
def test_registering_is_one_entry_and_may_be_repeated(store: Store) -> None:
    table, before = single_file_model.SINGLE_FILE_LOADABLE_CLASSES, dict(single_file_model.SINGLE_FILE_LOADABLE_CLASSES)
    with pytest.raises(ValueError, match="only compatible with"):
        Ideogram4Transformer2DModel.from_single_file("any.gguf")
    first = register_gguf()
    assert register_gguf() is first is table[MODEL_CLASS]
    assert {name: row for name, row in table.items() if name != MODEL_CLASS} == before
    assert first["default_subfolder"] == "transformer"


def test_a_diffusers_that_knows_the_model_keeps_its_own_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"checkpoint_mapping_fn": lambda checkpoint, **_: checkpoint}
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, MODEL_CLASS, own)
    assert register_gguf() is own


def test_the_examples_of_the_page_run_as_they_stand(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/diffusers.md, with the miniature in place of what a reader would have."""
    page = ROOT / "docs" / "diffusers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(ROOT)
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block.replace("data/checkpoints", str(store.root / "checkpoints")), page.name, "exec"), names)
        assert names["picture"].size == (128, 128)
