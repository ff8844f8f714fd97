"""GGUF files: gguf-py reads what we write, and we read what gguf-py writes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ideogram_app.checkpoints.gguf import GGML_TYPES, KNOWN_TYPES, GgufFile, GgufTensor, gguf_header
from ideogram_app.checkpoints.prepared.file_plan import Unit, plan_gguf
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.quantization import k_quants

INFOS = (
    GgufTensor("layers.0.attention.qkv.weight", (24, 256), "Q4_K"),
    GgufTensor("layers.0.attention.norm_q.weight", (17,), "F32"),
    GgufTensor("layers.0.feed_forward.w1.weight", (3, 512), "Q6_K"),
    GgufTensor("layers.0.feed_forward.w2.weight", (5, 256), "Q5_K"),
    GgufTensor("layers.0.feed_forward.w3.weight", (7, 96), "Q8_0"),
    GgufTensor("input_proj.weight", (5, 3), "F16"),
    GgufTensor("input_proj.bias", (5,), "BF16"),
)


def source(info: GgufTensor) -> torch.Tensor:
    """The weights behind a tensor, the same at every call."""
    return torch.randn(info.shape, generator=torch.Generator().manual_seed(len(info.name)))


def held(info: GgufTensor) -> torch.Tensor:
    if info.dtype in k_quants.FORMATS:
        return k_quants.encode(source(info), info.dtype)
    return source(info).to(info.held_dtype)


def raw(info: GgufTensor) -> bytes:
    return held(info).flatten().view(torch.uint8).numpy().tobytes()


def write_all(path: Path) -> Path:
    """The file of all of INFOS, filled as a preparation fills it."""
    plan = plan_gguf([Unit(info.name, info.name, 0, (info,), False) for info in INFOS])
    data = bytearray(plan.header.ljust(plan.size, b"\0"))
    for info in INFOS:
        data[slice(*plan.spans[info.name])] = raw(info)
    path.write_bytes(data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_all(tmp_path / "model.gguf")


def test_gguf_py_finds_every_tensor_with_its_shape_type_and_values(path: Path) -> None:
    tensors = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in tensors] == [info.name for info in INFOS]
    for tensor, info in zip(tensors, INFOS, strict=True):
        assert tensor.tensor_type.name == info.dtype
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        assert tensor.n_bytes == info.byte_count
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        if info.dtype in k_quants.FORMATS:
            assert np.array_equal(theirs, k_quants.decode(held(info), info.dtype).numpy())
        else:
            assert np.array_equal(theirs, held(info).float().numpy())


def test_every_byte_is_that_of_gguf_pys_own_writer(path: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", arch="")  # adds `general.architecture` unless it is empty
    for info in INFOS:
        kind = gguf.GGMLQuantizationType[info.dtype]
        writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), info.byte_count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for info in INFOS:
        writer.write_tensor_data(np.frombuffer(raw(info), np.uint8))
    writer.close()
    assert path.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_types_have_the_numbers_of_gguf_py() -> None:
    assert {name: gguf.GGMLQuantizationType[name].value for name in KNOWN_TYPES} == GGML_TYPES


def test_no_metadata_is_written(path: Path) -> None:
    magic, version, tensors, keys = struct.unpack("<4sIQQ", path.read_bytes()[:24])
    assert (magic, version, tensors, keys) == (b"GGUF", 3, len(INFOS), 0)
    assert GgufFile(path).metadata == {}


def test_reading_gives_back_what_was_written(path: Path) -> None:
    file = GgufFile(path)
    assert tuple(file.infos.values()) == INFOS
    for name, info in file.infos.items():
        tensor = file.tensor(name)
        assert tensor.dtype == info.held_dtype
        assert torch.equal(tensor, held(info))


def test_files_of_gguf_py_are_read_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, arch="ideogram4")
    writer.add_array("orig_shape", [4, 64])
    writer.add_tensor("dense", weight)
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.metadata == {"general.architecture": "ideogram4", "orig_shape": [4, 64]}
    assert file.infos["packed"] == GgufTensor("packed", (4, 64), "Q8_0")
    assert np.array_equal(file.tensor("dense").numpy(), weight)
    assert np.array_equal(file.tensor("packed").numpy(), packed)


def test_tensors_outlive_the_file_and_writing_to_them_spares_it(path: Path) -> None:
    before = path.read_bytes()
    tensor = GgufFile(path).tensor("input_proj.bias")
    tensor.zero_()
    assert torch.equal(tensor, torch.zeros(5, dtype=torch.bfloat16))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 3, 20, 30, 200, 600, -1])
def test_truncated_files_are_refused_with_both_sizes(path: Path, kept: int) -> None:
    whole = path.read_bytes()
    last = INFOS[-1].byte_count
    short = whole[:kept] if kept >= 0 else whole[: len(whole) - 32 + last - 1]  # one byte of the last tensor is gone
    path.write_bytes(short)
    with pytest.raises(CheckpointError, match=r"model\.gguf") as problem:
        GgufFile(path)
    assert problem.value.expected and f"{len(short):,}" in problem.value.got


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\x80\x04" + data[2:],  # a pickle
        lambda data: data[:4] + struct.pack("<I", 99) + data[8:],  # a version of the future
        lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:],  # more tensors than atoms
        lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:],  # more keys than atoms
        lambda data: data[:24] + struct.pack("<Q", 2**63) + data[32:],  # an endless name
        lambda data: data.replace(b"layers.0.feed_forward.w3", b"layers.0.feed_forward.w1"),  # one name twice
        lambda data: b"PK" * 500,
    ],
)
def test_malformed_files_are_refused_by_name(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        GgufFile(path)


def test_some_rows_are_those_of_the_whole_in_memory_of_their_own(path: Path) -> None:
    file = GgufFile(path)
    for info in INFOS:
        whole = file.tensor(info.name)
        for rows in (slice(0, 1), slice(1, 4), slice(2, None), slice(None), slice(1, 1)):
            part = file.tensor(info.name, rows)
            assert torch.equal(part, whole[rows]) and part.dtype == whole.dtype
            assert part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_a_file_that_shrank_since_it_was_opened_is_named(path: Path) -> None:
    file = GgufFile(path)
    whole = path.read_bytes()
    path.unlink()  # another file under the name: the mapping of the first stays whole
    path.write_bytes(whole[:-200])
    with pytest.raises(CheckpointError, match=r"model\.gguf ended inside"):
        for info in INFOS:
            file.tensor(info.name, slice(None))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf"):
        GgufFile(tmp_path / "nowhere.gguf")


def test_types_this_program_cannot_read_are_named_beside_those_it_can(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_tensor("w", np.ones((2, 32), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"Expected F32 or .* Q4_K .* IQ4_XS .* Got I32"):
        GgufFile(path)


def test_an_unknown_tensor_lists_those_there_are(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor w9.*input_proj|no tensor w9.*layers\.0"):
        GgufFile(path).tensor("w9")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (GgufTensor("w", (2, 256), "Q3_K"), "Q4_K"),
        (GgufTensor("w" * 64, (2, 256), "F32"), "63 bytes"),
        (GgufTensor("w", (2, 100), "Q4_K"), "block size, 256"),
        (GgufTensor("w", (), "F32"), "dimensions"),
    ],
)
def test_what_no_reader_would_take_is_not_written(info: GgufTensor, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gguf_header([info])
