"""The text side, built and packed: against transformers' own model, and each recipe within its bound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoder import CONFIG, IDS, TEXT, as_ideogram, stock_model, text_side, whole, write_folder, write_gguf
from transformers import Qwen3VLConfig, Qwen3VLModel

from benchmarks.encoder import encoder_error
from ideogram_app.catalog.models import MODELS, Linear
from ideogram_app.catalog.text_encoder import (
    EMBEDDING_TABLE,
    ENCODER_RECIPES,
    ENCODERS,
    PUBLISHED_ENCODER,
    TextEncoder,
    block_type,
    encoder_bytes,
    find_encoder_recipe,
)
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.packed_file import PackedFile, PackedWeight
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.text_encoder import TextEncoderCheckpoint
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.model.components import load_components
from ideogram_app.model.text_encoder import encoder as encoder_module
from ideogram_app.model.text_encoder.encoder import (
    Int8WeightLinear,
    PackedEmbedding,
    encoder_from_file,
    encoder_from_source,
)
from ideogram_app.model.text_encoder.features import TAPPED_LAYERS, encode, features
from ideogram_app.model.text_encoder.qwen import Projection
from ideogram_app.model.transformer.layers import GgufLinear, weight_bytes
from ideogram_app.quantization import int8, k_quants

pytestmark = pytest.mark.slow

DENSE = ENCODER_RECIPES["encoder-dense"]
PACKING = [name for name, recipe in ENCODER_RECIPES.items() if recipe.storage != "dense"]
LAYERS = {"dense": Projection, "int8": Int8WeightLinear, "gguf": GgufLinear}
# Largest relative error of the features at any tap, on random weights (measured: 0.023, 0.020, 0.245) and on the
# miniature's (0.006, 0.005, 0.005: its rows are too short for Q4_K); about twice that.
LARGEST_ERROR = {"encoder-int8": (0.05, 0.012), "encoder-q8_0": (0.04, 0.01), "encoder-q4_k": (0.5, 0.01)}
CAPTION = "a red circle at the top left and the word HELLO on a yellow background"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderCheckpoint:
    return TextEncoderCheckpoint(write_folder(tmp_path_factory.mktemp("dense"), whole(stock_model())))


def built(
    source: TextEncoderCheckpoint, name: str, dtype: torch.dtype = torch.float32
) -> encoder_module.CaptionEncoder:
    return encoder_from_source(source, find_encoder_recipe(name), "cpu", dtype)


def test_the_shapes_are_those_of_transformers_text_side() -> None:
    model = stock_model()
    expected = {name: tuple(tensor.shape) for name, tensor in text_side(model).items()}
    assert TextEncoder.from_config(CONFIG).shapes() == expected
    assert TextEncoder.from_config(TEXT).parameters() == sum(value.numel() for value in text_side(model).values())


def test_the_published_encoder_has_the_size_that_plans_count_with() -> None:
    text = {**vars(PUBLISHED_ENCODER), "rope_parameters": TEXT["rope_parameters"]}
    with torch.device("meta"):
        model = Qwen3VLModel._from_config(Qwen3VLConfig(text_config=text, vision_config=CONFIG["vision_config"]))
    assert {name: tuple(tensor.shape) for name, tensor in text_side(model).items()} == PUBLISHED_ENCODER.shapes()
    assert ENCODERS[MODELS["ideogram-4"].text_encoder] == PUBLISHED_ENCODER
    sizes = {name: encoder_bytes(PUBLISHED_ENCODER, recipe) / 1e9 for name, recipe in ENCODER_RECIPES.items()}
    rounded = {name: round(size, 2) for name, size in sizes.items()}
    assert rounded == {"encoder-dense": 15.14, "encoder-int8": 7.57, "encoder-q8_0": 8.04, "encoder-q4_k": 4.57}


def test_a_config_without_a_size_is_refused_by_its_name() -> None:
    with pytest.raises(CheckpointError, match="head_dim"):
        TextEncoder.from_config({"text_config": {**TEXT, "head_dim": None}})
    with pytest.raises(RequestError, match="encoder-int8"):
        find_encoder_recipe("int9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_encoder_equals_stock_transformers_to_the_last_bit(source, dtype) -> None:
    stock, ours = stock_model(dtype), built(source, "encoder-dense", dtype)
    got = features(ours, IDS)
    assert torch.equal(got, features(stock, IDS))
    with torch.no_grad():
        states = stock.language_model(IDS, output_hidden_states=True).hidden_states  # the table's rows, then layers'
    taps = [index for index in TAPPED_LAYERS if index < 3]  # the last state of transformers is normed
    by_tap = got.unflatten(-1, (-1, 2))
    for position, index in enumerate(taps):
        assert torch.equal(by_tap[..., position], states[index + 1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_miniatures_features_equal_stock_transformers_to_the_last_bit(dtype) -> None:
    folder = local_folder("miniature")
    parts = load_components("miniature", "cpu", dtype)
    stock = Qwen3VLModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    expected = encode(parts.tokenizer, stock, CAPTION)
    assert expected.shape[-1] == 13 * 64
    assert torch.equal(encode(parts.tokenizer, parts.text_encoder, CAPTION), expected)


def test_ideograms_fp8_runs_as_stock_transformers_with_widened_weights(tmp_path) -> None:
    packed = as_ideogram(whole(stock_model()))
    ours = built(TextEncoderCheckpoint(write_folder(tmp_path, packed)), "encoder-dense", torch.bfloat16)
    stock = stock_model(torch.bfloat16)
    with torch.no_grad():
        for name, value in stock.named_parameters():
            if f"{name}_scale" in packed:
                value.copy_(packed[name].float() * packed[f"{name}_scale"][:, None])
    assert torch.equal(features(ours, IDS), features(stock, IDS))


def test_a_gguf_runs_as_stock_transformers_with_decoded_weights(tmp_path) -> None:
    decoded = write_gguf(tmp_path / "model.gguf", stock_model(), lambda name: "Q4_K")
    stock = stock_model()
    with torch.no_grad():
        for name, value in decoded.items():
            stock.get_parameter(name).copy_(value)
    ours = built(TextEncoderCheckpoint(tmp_path / "model.gguf"), "encoder-dense")
    assert torch.equal(features(ours, IDS), features(stock, IDS))


def test_every_recipe_stays_within_its_bound_at_every_tap(source) -> None:
    reference = features(built(source, "encoder-dense"), IDS)
    worst = {name: max(encoder_error(reference, features(built(source, name), IDS), 2)) for name in PACKING}
    assert all(error <= LARGEST_ERROR[name][0] for name, error in worst.items()), worst
    assert worst["encoder-q8_0"] < worst["encoder-int8"] < worst["encoder-q4_k"]


def test_every_recipe_stays_within_its_bound_on_the_miniature() -> None:
    parts = load_components("miniature", "cpu", torch.float32)
    miniature = TextEncoderCheckpoint(local_folder("miniature") / "text_encoder")
    reference = encode(parts.tokenizer, parts.text_encoder, CAPTION)
    for name in PACKING:
        errors = encoder_error(reference, encode(parts.tokenizer, built(miniature, name), CAPTION))
        assert len(errors) == 13 and 0 < max(errors) <= LARGEST_ERROR[name][1], (name, errors)


@pytest.mark.parametrize("name", ENCODER_RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_rests_in_its_storage_and_the_bytes_are_those_planned(source, name, dtype) -> None:
    module, recipe = built(source, name, dtype), ENCODER_RECIPES[name]
    for linear in source.encoder.linears():
        if linear.name == EMBEDDING_TABLE:
            continue
        assert type(module.get_submodule(linear.name)) is LAYERS[recipe.storage], linear.name
    is_packed = type(module.get_submodule(EMBEDDING_TABLE)) is PackedEmbedding
    assert is_packed == (recipe.storage != "dense")
    frequencies = sum(buffer.nbytes for key, buffer in module.named_buffers() if "inv_freq" in key)
    assert weight_bytes(module) - frequencies == encoder_bytes(source.encoder, recipe, dtype.itemsize)
    assert not [key for key, value in module.named_parameters() if value.requires_grad or value.dtype != dtype]
    assert not [key for key, _ in module.named_parameters() if "visual" in key or key == "language_model.norm.weight"]
    narrow = module.to(torch.bfloat16)
    assert weight_bytes(narrow) - frequencies <= encoder_bytes(source.encoder, recipe, dtype.itemsize)
    assert narrow.get_submodule(EMBEDDING_TABLE)(IDS).dtype == (dtype if is_packed else torch.bfloat16)


def test_blocks_that_do_not_fit_and_the_table_fall_back_to_q8_0() -> None:
    q4, q8 = ENCODER_RECIPES["encoder-q4_k"], ENCODER_RECIPES["encoder-q8_0"]
    assert block_type(q4, "language_model.layers.0.mlp.up_proj", 4096) == "Q4_K"
    assert block_type(q4, "language_model.layers.0.mlp.up_proj", 160) == "Q8_0"
    assert block_type(q4, EMBEDDING_TABLE, 4096) == "Q8_0" == block_type(q8, EMBEDDING_TABLE, 4096)


@pytest.mark.parametrize("storage", ["int8", "Q8_0", "Q4_K"])
def test_a_lookup_decodes_only_the_rows_it_asks_for(storage, monkeypatch) -> None:
    table = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    if storage == "int8":
        packed = PackedWeight("int8", *int8.quantize_rows(table))
    else:
        packed = PackedWeight("gguf", k_quants.encode(table, storage), gguf_type=storage)
    ids = torch.tensor([[3, 49, 3], [0, 7, 7]])
    decoded: list[tuple[int, ...]] = []
    original = PackedWeight.decoded

    def counted(self: PackedWeight) -> torch.Tensor:
        decoded.append(tuple(self.values.shape))
        return original(self)

    expected = packed.decoded()[ids]
    monkeypatch.setattr(PackedWeight, "decoded", counted)
    got = PackedEmbedding(packed, 256, torch.bfloat16)(ids)
    assert torch.equal(got, expected.bfloat16()) and got.shape == (2, 3, 256)
    assert [rows for rows, _ in decoded] == [6]


def test_int8_weights_leave_inputs_unrounded() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(2, 5, 64, generator=generator)
    values, scale = int8.quantize_rows(weight)
    expected = x.double() @ (values.double() * scale.double()[:, None]).T
    assert torch.allclose(Int8WeightLinear(values, scale)(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", PACKING)
def test_reading_in_runs_of_rows_changes_nothing(source, name, monkeypatch) -> None:
    whole_rows = features(built(source, name), IDS)
    monkeypatch.setattr(encoder_module, "PACKING_CHUNK", 150 * 256)
    assert torch.equal(features(built(source, name), IDS), whole_rows)


@pytest.mark.parametrize("name", ENCODER_RECIPES)
def test_a_prepared_file_runs_as_the_source_packed_while_it_is_read(source, tmp_path, name) -> None:
    recipe, component = ENCODER_RECIPES[name], source.encoder
    made = formats.units(recipe, component, source.dtypes)
    plan = formats.plan_file(recipe, made, torch.bfloat16)
    path = tmp_path / "encoder"
    with path.open("w+b") as file:
        file.write(plan.header)
        file.truncate(plan.size)
        for unit in made:
            for part, packed in zip(unit.parts, formats.pack(recipe, unit, source.tensor(unit.source)), strict=True):
                file.seek(plan.spans[part.name][0])
                file.write(packed.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    prepared = PackedFile(path, recipe, component)
    assert len(prepared.packed) == (0 if name == "encoder-dense" else 4 * 7 + 1)
    ours = encoder_from_file(prepared, component, source.config, "cpu", torch.float32)
    assert torch.equal(features(ours, IDS), features(built(source, name), IDS))


def test_the_miniatures_encoder_has_the_shape_that_plans_count_with() -> None:
    config = json.loads((local_folder("miniature") / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert TextEncoder.from_config(config) == ENCODERS[MODELS["miniature"].text_encoder]


def test_the_error_is_told_tap_by_tap() -> None:
    reference = torch.ones(1, 3, 4 * 2)  # hidden 4, taps 2
    changed = reference.clone()
    changed[..., 1::2] *= 1.1  # the second tap
    assert encoder_error(reference, reference, 2) == (0.0, 0.0)
    assert encoder_error(reference, changed, 2) == pytest.approx((0.0, 0.1), rel=1e-5)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path) -> None:
    tensors = whole(stock_model())
    tensors["language_model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    damaged = TextEncoderCheckpoint(write_folder(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj"):
        built(damaged, "encoder-int8")


def test_a_pipeline_with_ideograms_fp8_encoder_loads(tmp_path) -> None:
    folder = Path(shutil.copytree(local_folder("miniature"), tmp_path / "pipeline"))
    path = folder / "text_encoder" / "model.safetensors"
    save_file(as_ideogram(load_file(path)), path, metadata={"format": "pt"})
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ideogram_fp8_weight_only": True}))
    parts = load_components("miniature", "cpu", torch.float32, folder)
    reference = load_components("miniature", "cpu", torch.float32)
    expected = encode(reference.tokenizer, reference.text_encoder, CAPTION)
    assert 0 < max(encoder_error(expected, encode(parts.tokenizer, parts.text_encoder, CAPTION))) < 0.06


def test_a_linear_of_the_table_is_looked_up_and_the_first() -> None:
    assert next(PUBLISHED_ENCODER.linears()) == Linear(EMBEDDING_TABLE, 151936, 4096, False)
