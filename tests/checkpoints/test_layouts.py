"""Every published layout reads as an independent decoder reads it, whole and by rows, recognised by its header."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import load_file
from small_model import relative_error, write_source

from ideogram_app.catalog.sources import BRANCHES, SOURCES
from ideogram_app.checkpoints.gguf import OTHER_BLOCKS, READABLE_TYPES, GgufFile
from ideogram_app.checkpoints.published.codecs import EncodedTensor, TensorEntry
from ideogram_app.checkpoints.published.layouts import LAYOUTS
from ideogram_app.checkpoints.published.tensor_names import official_place, official_shapes
from ideogram_app.checkpoints.published.transformer import TransformerCheckpoint, open_source
from ideogram_app.quantization import k_quants
from tools.make_replica import TINY, make
from tools.replica_layouts import REPLICAS

pytestmark = pytest.mark.slow

# Relative error that a packing may leave on Gaussian weights; what is dense comes back bit for bit.
BOUNDS = {"dense": 0.0, "fp8": 0.03, "comfy-fp8": 0.05, "nf4": 0.1, "comfy-int8": 0.01, "transformerlab-int8": 0.02}
GGUF_BOUNDS = {"Q4_0": 0.12, "Q4_K": 0.09, "Q8_0": 0.01}
ROTATION = np.eye(1)
for _ in range(4):  # the regular Hadamard matrix of 256, by its definition
    ROTATION = np.kron(ROTATION, np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense pipeline with random weights; what surrounds the transformers is the miniature's."""
    folder = write_source(tmp_path_factory.mktemp("dense"))
    miniature = Path(__file__).resolve().parents[2] / "assets" / "miniature"
    for part in ("model_index.json", "scheduler", "tokenizer", "text_encoder", "vae"):
        (folder / part).symlink_to(miniature / part)
    return folder


@pytest.fixture(scope="module", params=REPLICAS)
def replica(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make(request.param, tmp_path_factory.mktemp("replica") / "it", source=dense)


def raw_tensors(folder: Path, name: str, number: int) -> dict[str, np.ndarray]:
    """One transformer's tensors in float32 by official or diffusers names, decoded without this program."""
    row = REPLICAS[name]
    place = folder / row.files[number]
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    prefix, found = row.prefixes[number], {}
    if row.is_gguf:
        for tensor in gguf.GGUFReader(place).tensors:
            if tensor.name.startswith(prefix):
                shape = tuple(reversed(tensor.shape.tolist()))
                found[tensor.name[len(prefix) :]] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        return found
    stored = {key: value for file in files for key, value in load_file(file).items() if key.startswith(prefix)}
    stored = {key[len(prefix) :]: value for key, value in stored.items()}
    for key, value in stored.items():
        module = key.rsplit(".", 1)[0]
        if key.endswith(".wq"):
            scale, smooth = stored[f"{module}.ws"].numpy(), stored[f"{module}.smooth"].numpy()
            found[f"{module}.weight"] = value.float().numpy() * scale[:, None] / smooth
        elif f"{key}.absmax" in stored:
            found[key] = numpy_nf4(key, stored)
        elif f"{key}_scale" in stored:
            weight = value.float().numpy() * stored[f"{key}_scale"].numpy().reshape(-1, 1)
            found[key] = numpy_unrotated(weight) if name == "comfy-int8" else weight
        elif key.endswith((".weight", ".bias")):
            found[key] = value.float().numpy()
    return found


def numpy_nf4(key: str, stored: dict[str, torch.Tensor]) -> np.ndarray:
    state = json.loads(bytes(stored[f"{key}.quant_state.bitsandbytes__nf4"].numpy()))
    packed = stored[key].numpy().reshape(-1)
    codes = np.stack([packed // 16, packed % 16], 1).reshape(-1)
    absmax = stored[f"{key}.absmax"].numpy()
    if "nested_offset" in state:
        runs = np.repeat(stored[f"{key}.nested_absmax"].numpy(), state["nested_blocksize"])[: len(absmax)]
        absmax = stored[f"{key}.nested_quant_map"].numpy()[absmax] * runs + np.float32(state["nested_offset"])
    scales = np.repeat(absmax, state["blocksize"])[: len(codes)]
    return (stored[f"{key}.quant_map"].numpy()[codes] * scales).reshape(state["shape"])


def numpy_unrotated(weight: np.ndarray) -> np.ndarray:
    blocks = weight.astype(np.float64).reshape(weight.shape[0], -1, 256)
    return (blocks @ ROTATION).reshape(weight.shape).astype(np.float32)


def joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' names to the official ones."""
    result = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            result[name.replace("to_q", "qkv")] = np.concatenate(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            result[name.replace(".attention.to_out.0.", ".attention.o.")] = tensor
    return result


def test_it_is_recognised_and_reads_as_an_independent_decoder_does(replica) -> None:
    name, folder = replica
    source = open_source(folder)
    assert source.layout == REPLICAS[name].layout
    for number, branch in enumerate(source.branches):
        expected, read = joined(raw_tensors(folder, name, number)), {key: branch.tensor(key) for key in branch.dtypes}
        assert branch.branch == TINY[number] and list(read) == list(official_shapes(TINY[number].shapes()))
        assert set(read) == set(expected)
        for key, tensor in read.items():
            if name == "comfy-int8":  # the order of 256 sums is nobody's
                np.testing.assert_allclose(tensor.float().numpy(), expected[key], atol=2e-6, err_msg=key)
            else:
                assert np.array_equal(tensor.float().numpy(), expected[key]), key


def test_it_stays_close_to_the_dense_weights_it_was_made_from(replica, dense) -> None:
    name, folder = replica
    kind = next((kind for kind in GGUF_BOUNDS if kind.lower() in "".join(REPLICAS[name].files).lower()), "")
    bound = GGUF_BOUNDS[kind] if REPLICAS[name].is_gguf else BOUNDS[REPLICAS[name].layout]
    for truth, branch in zip(open_source(dense).branches, open_source(folder).branches, strict=True):
        linears = {f"{official_place(linear.name)[0]}.weight" for linear in truth.branch.linears()}
        for key in branch.dtypes:
            tensor, expected = branch.tensor(key), truth.tensor(key)
            assert relative_error(tensor, expected) <= (bound if key in linears else 0.001), key
            if bound == 0:
                assert torch.equal(tensor, expected)


def test_rows_are_read_as_the_whole_has_them(replica) -> None:
    for branch in open_source(replica[1]).branches:
        for key in branch.dtypes:
            whole = branch.tensor(key)
            rows = whole.shape[0]
            third, last = slice(rows // 3, rows // 3 + 7), slice(rows - 1, rows)
            across = slice(rows // 3 - 1, rows - rows // 4)  # of q, k and v, where they lie apart
            for part in (slice(0, 1), third, across, last, slice(2, 2), slice(5)):
                assert torch.equal(branch.tensor(key, part), whole[part]), (key, part)


def test_what_is_not_packed_keeps_its_type(replica) -> None:
    name, folder = replica
    branch = open_source(folder).branches[0]
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[REPLICAS[name].dense]
    for key, dtype in branch.dtypes.items():
        packed = REPLICAS[name].pack is not None and branch.tensor(key).dtype != dtype
        assert dtype == (torch.bfloat16 if packed else stored) or dtype == torch.float16, key
        assert branch.tensor(key, slice(1)).dtype == (torch.float32 if packed else dtype)
    assert branch.dtypes["layers.0.attention.norm_q.weight"] == stored


def test_the_config_builds_the_class_that_has_these_tensors(replica) -> None:
    for branch in open_source(replica[1]).branches:
        with torch.device("meta"):
            module = Ideogram4Transformer2DModel.from_config(branch.config)
        assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == branch.branch.shapes()
        assert module.config.rope_theta == 1000 and list(module.config.mrope_section) == [12, 10, 10]


@pytest.mark.parametrize("kind", [*k_quants.FORMATS, *OTHER_BLOCKS])
def test_every_ggml_type_is_decoded_as_gguf_py_does(tmp_path, kind) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[quantization]
    packed = np.random.default_rng(0).integers(0, 256, (9, 2 * size), dtype=np.uint8)
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_tensor("x.weight", packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):  # random bytes hold NaN and infinite scales
        stored = EncodedTensor({"weight": TensorEntry(GgufFile(path), "x.weight")})
        assert stored.shape == (9, 2 * weights)
        got, expected = stored.read(slice(2, 7)).numpy(), gguf.dequantize(packed, quantization)[2:7]
    assert np.array_equal(got, expected, equal_nan=True)


def test_every_type_that_gguf_py_decodes_is_readable() -> None:
    decodable = set()
    for kind in gguf.GGMLQuantizationType:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8 if size > 4 else np.float32), kind)
        except (NotImplementedError, ValueError):
            continue
        decodable.add(kind.name)
    assert decodable <= set(READABLE_TYPES)


def test_layouts_replicas_and_sources_share_one_list_of_names() -> None:
    assert {row.layout for row in REPLICAS.values()} == set(LAYOUTS)
    assert {source.layout for source in SOURCES} <= set(LAYOUTS)


def test_a_config_beside_the_weights_is_believed_and_one_is_made_where_there_is_none(dense) -> None:
    folder = dense / BRANCHES[0]
    with_config = TransformerCheckpoint(folder)
    alone = TransformerCheckpoint(folder / "diffusion_pytorch_model.safetensors")
    assert with_config.branch == alone.branch == TINY[0]
    assert with_config.config == json.loads((folder / "config.json").read_text())
    assert alone.config == with_config.config
