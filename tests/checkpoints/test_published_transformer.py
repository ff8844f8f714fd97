"""Layouts are found in the headers, every tensor is accounted for, and errors name file and tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import save_file
from small_model import SMALL, Tensors, fused, packed_fp8, random_tensors, relative_error, write_branch

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.sources import SOURCES, find_source
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.tensor_names import (
    diffusers_names,
    official_place,
    official_shapes,
    rows_of_parts,
)
from ideogram_app.checkpoints.published.transformer import TransformerCheckpoint
from ideogram_app.checkpoints.safetensors import SafetensorsFile, SafetensorsTensor, layout
from ideogram_app.errors import AccessError, CheckpointError

BRANCH = SMALL[1]


@pytest.fixture
def tensors() -> Tensors:
    return random_tensors(BRANCH, seed=0)


def weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("branch", [*SMALL, *MODELS["miniature"].branches], ids=str)
def test_the_expected_tensors_are_those_of_the_diffusers_class(branch) -> None:
    config = {**vars(branch), "in_channels": 128, "mrope_section": [12, 10, 10]}
    with torch.device("meta"):
        module = Ideogram4Transformer2DModel.from_config(config)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == branch.shapes()


def test_official_names_are_those_of_the_fused_tensors_and_lead_back_to_diffusers_ones() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in fused(random_tensors(BRANCH, 0)).items()}
    assert official_shapes(BRANCH.shapes()) == expected
    for name in (*BRANCH.shapes(), *(linear.name for linear in BRANCH.linears())):
        official, part = official_place(name)
        assert diffusers_names(official)[part] == name
    back = [name for official in expected for name in diffusers_names(official)]
    assert sorted(back) == sorted(BRANCH.shapes())
    assert diffusers_names("language_model.layers.0.self_attn.o_proj") == ("language_model.layers.0.self_attn.o_proj",)


def test_rows_of_a_matrix_are_found_in_the_parts_that_hold_it() -> None:
    matrix = torch.arange(21).view(21, 1)
    parts = matrix.split(7)
    for start in range(22):
        for stop in range(start, 22):
            cuts = rows_of_parts(slice(start, stop), 7, 3)
            assert torch.equal(torch.cat([parts[index][rows] for index, rows in cuts]), matrix[start:stop])
            assert len(cuts) == 1 or all(rows.start < rows.stop for _, rows in cuts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_dense_branch_is_read_bit_for_bit(tmp_path, dtype, is_fused, shards) -> None:
    tensors = random_tensors(BRANCH, 0, dtype)
    reader = TransformerCheckpoint(
        write_branch(tmp_path, BRANCH, fused(tensors) if is_fused else tensors, shards), BRANCH
    )
    assert reader.layout == "dense"
    read, expected = {name: reader.tensor(name) for name in reader.dtypes}, fused(tensors)
    assert list(read) == list(expected)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in expected.items())


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_an_fp8_branch_is_widened_with_its_own_scales(tmp_path, tensors, is_fused) -> None:
    packed = packed_fp8(tensors, BRANCH)
    reader = TransformerCheckpoint(write_branch(tmp_path, BRANCH, fused(packed) if is_fused else packed), BRANCH)
    assert reader.layout == "fp8"
    whole, dense = fused(packed), fused(tensors)
    for name in reader.dtypes:
        tensor = reader.tensor(name)
        scale = whole.get(f"{name}_scale")
        expected = dense[name] if scale is None else whole[name].float() * scale[:, None]
        assert torch.equal(tensor, expected), name
        assert relative_error(tensor, dense[name]) < 0.04
    assert set(reader.dtypes.values()) == {torch.bfloat16}


def test_a_branch_may_be_read_tensor_by_tensor_in_any_order(tmp_path, tensors) -> None:
    reader = TransformerCheckpoint(write_branch(tmp_path, BRANCH, fused(tensors)), BRANCH)
    for name, tensor in reversed(fused(tensors).items()):
        assert torch.equal(reader.tensor(name), tensor)
    with pytest.raises(CheckpointError, match="holds no tensor nothing"):
        reader.tensor("nothing")


def broken(tmp_path: Path, tensors: Tensors) -> str:
    write_branch(tmp_path, BRANCH, tensors)
    with pytest.raises(CheckpointError) as caught:
        TransformerCheckpoint(tmp_path, BRANCH)
    assert str(tmp_path) in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named_with_its_shape(tmp_path, tensors) -> None:
    del tensors["layers.0.attention_norm2.weight"]
    assert "layers.0.attention_norm2.weight (256,)" in broken(tmp_path, tensors)


def test_an_unknown_tensor_is_named(tmp_path, tensors) -> None:
    tensors["layers.0.attention.to_q.weight.absmax"] = torch.zeros(4)
    assert "layers.0.attention.to_q.weight.absmax" in broken(tmp_path, tensors)


def test_a_doubled_tensor_is_named_with_both_places(tmp_path, tensors) -> None:
    tensors["layers.0.attention.qkv.weight"] = torch.zeros(768, 256)
    message = broken(tmp_path, tensors)
    assert "twice" in message
    assert "layers.0.attention.qkv.weight in" in message and "layers.0.attention.to_" in message


def test_a_tensor_in_two_files_is_named(tmp_path, tensors) -> None:
    write_branch(tmp_path, BRANCH, tensors)
    save_file({"adaln_proj.bias": torch.zeros(256)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"adaln_proj\.bias is there twice.*more\.safetensors"):
        TransformerCheckpoint(tmp_path, BRANCH)


def test_a_wrong_shape_is_named_with_expected_and_got(tmp_path, tensors) -> None:
    tensors["adaln_proj.weight"] = torch.zeros(255, 256)
    message = broken(tmp_path, tensors)
    assert "adaln_proj.weight" in message and "(256, 256)" in message and "(255, 256)" in message


def test_a_fused_tensor_whose_rows_are_no_thirds_is_refused(tmp_path, tensors) -> None:
    whole = fused(tensors)
    whole["layers.0.attention.qkv.weight"] = torch.zeros(770, 256)
    message = broken(tmp_path, whole)
    assert "(768, 256)" in message and "(770, 256)" in message


def test_fp8_without_scales_is_refused(tmp_path, tensors) -> None:
    packed = packed_fp8(tensors, BRANCH)
    del packed["adaln_proj.weight_scale"]
    message = broken(tmp_path, packed)
    assert "F8_E4M3 with .weight_scale" in message and "Got adaln_proj.weight, F8_E4M3 (256, 256)" in message


def test_scales_of_a_dense_weight_are_refused(tmp_path, tensors) -> None:
    tensors["adaln_proj.weight_scale"] = torch.ones(256)
    assert "adaln_proj.weight_scale" in broken(tmp_path, tensors)


def test_other_types_are_refused(tmp_path, tensors) -> None:
    tensors["adaln_proj.weight"] = torch.zeros(256, 256, dtype=torch.int8)
    assert "I8" in broken(tmp_path, tensors)


def test_a_folder_of_another_model_is_refused(tmp_path, tensors) -> None:
    write_branch(tmp_path, BRANCH, tensors)
    with pytest.raises(CheckpointError, match=r"num_layers 2\. Got 1"):
        TransformerCheckpoint(tmp_path, SMALL[0])


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named_with_its_sizes(tmp_path, tensors, kept) -> None:
    path = weights(write_branch(tmp_path, BRANCH, tensors))
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(CheckpointError) as caught:
        TransformerCheckpoint(tmp_path, BRANCH)
    assert str(path) in str(caught.value)
    assert f"{len(whole[:kept]):,} bytes" in str(caught.value)


def test_a_file_that_is_too_long_is_named(tmp_path, tensors) -> None:
    path = weights(write_branch(tmp_path, BRANCH, tensors))
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        TransformerCheckpoint(tmp_path, BRANCH)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"x": {}}', b'{"x": 1}', b"\xff\xfe"])
def test_a_header_that_is_not_readable_is_an_error_that_names_the_file(tmp_path, text) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        SafetensorsFile(path)


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path) -> None:
    row = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"a":{row},"a":{row}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(CheckpointError, match="names a twice"):
        SafetensorsFile(path)


def test_a_shard_that_the_index_lists_but_nobody_has_is_named(tmp_path, tensors) -> None:
    write_branch(tmp_path, BRANCH, tensors, shards=3)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors"):
        TransformerCheckpoint(tmp_path, BRANCH)


def test_a_header_written_first_is_one_that_the_safetensors_package_reads(tmp_path) -> None:
    from safetensors.torch import load_file

    held = {"a": torch.arange(3, dtype=torch.int8), "b": torch.randn(2, 5), "c": torch.randn(7).bfloat16()}
    names = {torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16"}
    infos = [SafetensorsTensor(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in held.items()]
    header, placed = layout(infos, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(header)
        for name in ("a", "b", "c"):
            file.seek(placed[name].start)
            file.write(held[name].view(torch.uint8).numpy().tobytes())
    for read in (load_file(path), {name: SafetensorsFile(path).tensor(name) for name in held}):
        assert all(torch.equal(read[name], tensor) for name, tensor in held.items())


def test_the_miniature_is_read_from_its_folder() -> None:
    folder = local_folder("miniature")
    for name, branch in zip(("transformer", "unconditional_transformer"), MODELS["miniature"].branches, strict=True):
        assert TransformerCheckpoint(folder / name, branch).layout == find_source("miniature").layout


def test_the_published_model_without_a_local_copy_says_what_it_needs() -> None:
    with pytest.raises(AccessError) as caught:
        local_folder("ideogram-4")
    for fragment in ("ideogram-ai/ideogram-4-fp8", "27.5 GB", "gated", "Non-Commercial", "huggingface.co"):
        assert fragment in str(caught.value)


def test_a_folder_without_both_transformers_is_refused(tmp_path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(CheckpointError, match="no unconditional_transformer"):
        local_folder("ideogram-4", tmp_path)


def test_every_model_has_a_source() -> None:
    assert {source.model for source in SOURCES} == set(MODELS)
