"""The text encoder in every published layout gives the same tensors, and what is never used is never read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_encoder import (
    CONFIG,
    TEXT,
    Tensors,
    as_comfy,
    as_ideogram,
    prefixed,
    stock_model,
    text_side,
    whole,
    write_folder,
    write_gguf,
)

from ideogram_app.catalog.text_encoder import TextEncoder
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.published.text_encoder import TextEncoderCheckpoint
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.errors import CheckpointError

pytestmark = pytest.mark.slow

MODEL = stock_model()
GATE = "language_model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def tensors() -> Tensors:
    return whole(MODEL)


def widened(packed: Tensors) -> Tensors:
    """Ideogram's files as they are meant: values times the scale of their row, in float32."""
    found = {}
    for name in text_side(MODEL):
        scale = packed.get(f"{name}_scale")
        found[name] = packed[name] if scale is None else packed[name].float() * scale[:, None]
    return found


def expect(source: TextEncoderCheckpoint, tensors: Tensors) -> None:
    read = {name: source.tensor(name) for name in source.encoder.shapes()}
    assert read.keys() == tensors.keys() == source.dtypes.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name].float(), tensor.float()), name
        rows = slice(1, max(2, len(tensor) // 3))
        assert torch.equal(source.tensor(name, rows).float(), tensor[rows].float()), name


@pytest.mark.parametrize(
    ("language", "visual"),
    [
        ("language_model.", "visual."),
        ("model.language_model.", "model.visual."),
        ("model.", "visual."),
        ("language_model.model.", "visual."),
        ("", "visual."),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_dense_encoder_is_read_bit_for_bit_whatever_its_prefix(tmp_path, tensors, language, visual, shards) -> None:
    source = TextEncoderCheckpoint(write_folder(tmp_path, prefixed(tensors, language, visual), shards))
    assert source.layout == "dense" and len(source.files) == shards
    expect(source, {name: tensor.bfloat16() for name, tensor in text_side(MODEL).items()})
    assert set(source.dtypes.values()) == {torch.bfloat16}
    assert source.encoder == TextEncoder.from_config(TEXT)


@pytest.mark.parametrize("shards", [1, 4])  # shards may part a weight from its scales
def test_ideograms_fp8_is_widened_row_by_row(tmp_path, tensors, shards) -> None:
    packed = as_ideogram(tensors)
    assert packed["visual.blocks.0.attn.qkv.weight"].dtype == torch.float8_e4m3fn
    source = TextEncoderCheckpoint(write_folder(tmp_path, packed, shards, ideogram_fp8_weight_only=True))
    assert source.layout == "fp8"
    expect(source, widened(packed))
    assert source.tensor(GATE).dtype == torch.float32 and source.dtypes[GATE] == torch.bfloat16


@pytest.mark.parametrize("older", [False, True], ids=["notes", "older"])
def test_a_single_file_of_comfyui_is_widened_with_one_scale_a_matrix(tmp_path, tensors, older) -> None:
    packed = as_comfy(tensors, older)
    path = tmp_path / "encoder.safetensors"
    save_file(packed, path)
    expected = {}
    for name, tensor in text_side(MODEL).items():
        stored = name.replace("language_model.", "model.")
        scale = packed.get(stored.removesuffix("weight") + ("scale_weight" if older else "weight_scale"))
        expected[name] = tensor if scale is None else packed[stored].float() * scale
    expect(TextEncoderCheckpoint(path, CONFIG), expected)
    with pytest.raises(CheckpointError, match="heads of 128"):  # the only ones whose positions are known
        TextEncoderCheckpoint(path)


def medium(name: str) -> str:
    """Q4_K_M: some of the matrices in Q6_K."""
    return "Q6_K" if "ffn_down" in name or "attn_v" in name else "Q4_K"


@pytest.mark.parametrize("kind", [medium, lambda name: "Q8_0", lambda name: "Q5_0", lambda name: "F16"])
def test_a_gguf_of_llama_cpp_reads_as_gguf_py_decodes_it(tmp_path, kind) -> None:
    decoded = write_gguf(tmp_path / "model.gguf", MODEL, kind)
    for path in (tmp_path, tmp_path / "model.gguf"):
        source = TextEncoderCheckpoint(path)
        assert source.layout == "gguf"
        expect(source, decoded)
        assert source.encoder == TextEncoder.from_config(TEXT)
        said = source.config["text_config"]
        assert said["rope_parameters"] == TEXT["rope_parameters"] and said["rms_norm_eps"] == TEXT["rms_norm_eps"]


def test_the_vision_tower_in_a_file_of_its_own_is_passed_over(tmp_path) -> None:
    import gguf

    decoded = write_gguf(tmp_path / "model.gguf", MODEL, medium)
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.blk.0.attn_qkv.weight", torch.zeros(96, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expect(TextEncoderCheckpoint(tmp_path), decoded)
    with pytest.raises(CheckpointError, match="vision tower alone"):
        TextEncoderCheckpoint(tmp_path / "mmproj.gguf")


@pytest.mark.parametrize("layout", ["dense", "fp8", "gguf"])
def test_nothing_but_the_text_side_is_read(tmp_path, tensors, layout, monkeypatch) -> None:
    read: list[tuple[str, int]] = []
    for kind in (SafetensorsFile, GgufFile):

        def counted(self, name, rows=None, original=kind.tensor):
            tensor = original(self, name, rows)
            read.append((name, tensor.nbytes))
            return tensor

        monkeypatch.setattr(kind, "tensor", counted)
    if layout == "gguf":
        write_gguf(tmp_path / "model.gguf", MODEL, lambda name: "F32")
    else:
        write_folder(tmp_path, as_ideogram(tensors) if layout == "fp8" else tensors)
    source = TextEncoderCheckpoint(tmp_path)
    assert not read, "opening reads headers alone"
    for name in source.encoder.shapes():
        source.tensor(name)
    assert not [name for name, _ in read if "visual" in name or "head" in name or name.startswith("output")]
    assert not [name for name, _ in read if name in ("language_model.norm.weight", "output_norm.weight")]
    scales = sum(4 * shape[0] for shape in source.encoder.shapes().values() if len(shape) == 2) - 4 * 96
    each = {"dense": 2, "fp8": 1, "gguf": 4}[layout]
    norms, table = source.encoder.norm_parameters(), 96 * 256
    layers = source.encoder.parameters() - norms - table
    wide = 4 if layout == "gguf" else 2
    total = layers * each + (norms + table) * wide + (scales if layout == "fp8" else 0)
    assert sum(size for _, size in read) == total


def test_only_the_rows_asked_for_are_read(tmp_path, tensors, monkeypatch) -> None:
    source = TextEncoderCheckpoint(write_folder(tmp_path, tensors))
    sizes: list[int] = []
    original = SafetensorsFile.tensor

    def counted(self, name, rows=None):
        tensor = original(self, name, rows)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(SafetensorsFile, "tensor", counted)
    source.tensor("language_model.embed_tokens.weight", slice(3, 5))
    assert sizes == [2 * 256 * 2]


def broken(folder: Path, tensors: Tensors, **settings: str) -> str:
    write_folder(folder, tensors, **settings)
    with pytest.raises(CheckpointError) as caught:
        TextEncoderCheckpoint(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named_with_its_shape(tmp_path, tensors) -> None:
    del tensors[GATE]
    assert f"{GATE} (512, 256)" in broken(tmp_path, tensors)


def test_an_unknown_tensor_is_named(tmp_path, tensors) -> None:
    tensors["language_model.layers.4.mlp.gate_proj.weight"] = torch.zeros(512, 256)
    assert "layers.4.mlp.gate_proj.weight" in broken(tmp_path, tensors)


def test_a_doubled_tensor_is_named_with_both_places(tmp_path, tensors) -> None:
    tensors[f"model.{GATE}"] = tensors[GATE].clone()
    message = broken(tmp_path, tensors)
    assert "twice" in message and f"{GATE} in" in message and f"model.{GATE} in" in message


def test_a_wrong_shape_is_named_with_expected_and_got(tmp_path, tensors) -> None:
    tensors[GATE] = torch.zeros(511, 256)
    message = broken(tmp_path, tensors)
    assert GATE in message and "(512, 256)" in message and "(511, 256)" in message


def test_fp8_without_scales_is_refused(tmp_path, tensors) -> None:
    packed = as_ideogram(tensors)
    del packed[f"{GATE}_scale"]
    message = broken(tmp_path, packed)
    assert GATE in message and "F8_E4M3" in message


def test_scales_without_a_weight_are_refused(tmp_path, tensors) -> None:
    packed = as_ideogram(tensors)
    del packed[GATE]
    assert f"{GATE}_scale without its weight" in broken(tmp_path, packed)


def test_a_gguf_of_another_architecture_is_refused(tmp_path) -> None:
    write_gguf(tmp_path / "model.gguf", MODEL, medium, architecture="qwen3")
    with pytest.raises(CheckpointError, match=r"general\.architecture qwen3vl\. Got qwen3\."):
        TextEncoderCheckpoint(tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path, tensors) -> None:
    write_folder(tmp_path, tensors, text_config={"hidden_size": 256})
    with pytest.raises(CheckpointError, match="no config of a Qwen3-VL"):
        TextEncoderCheckpoint(tmp_path)


def test_a_published_encoder_needs_no_config(monkeypatch, tmp_path) -> None:
    from ideogram_app.catalog.text_encoder import PUBLISHED_ENCODER
    from ideogram_app.checkpoints.published.text_encoder import from_shapes

    config = from_shapes(tmp_path, PUBLISHED_ENCODER.shapes())
    assert TextEncoder.from_config(config) == PUBLISHED_ENCODER
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [24, 20, 20]
