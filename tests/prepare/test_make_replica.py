"""Replicas have what the publications have: counts, sizes, quirks; and stock diffusers reads the dense one."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from small_model import fused

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.transformer import open_source
from ideogram_app.checkpoints.safetensors import SafetensorsFile, SafetensorsTensor, layout
from ideogram_app.errors import RequestError
from tools import make_replica, replica_parts
from tools.make_replica import TINY, make
from tools.replica_layouts import REPLICAS

pytestmark = pytest.mark.slow

PUBLISHED = MODELS["ideogram-4"].branches


def full_size(name: str) -> tuple[int, int]:
    """Tensors and bytes of one transformer's file at the published size, from its header alone."""
    row = REPLICAS[name]

    def one_row(_: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape if len(shape) == 1 else (1, shape[1]))

    contents = make_replica.Contents(PUBLISHED, ({}, {}), (one_row, one_row))
    parts = list(make_replica.packed_parts(row, contents, 0))
    _, placed = layout([SafetensorsTensor(part.name, part.kind, part.shape) for part in parts], row.metadata[0])
    return len(parts), max(info.stop for info in placed.values())


def test_the_names_are_as_many_as_published() -> None:
    """model-and-checkpoints: 458 fused, 526 split, 669 with the scales of FP8."""
    assert full_size("dense-fused")[0] == 458
    assert full_size("dense-split")[0] == 526
    assert full_size("fp8-fused")[0] == 669


@pytest.mark.parametrize(("name", "size"), [("comfy-fp8", 9_280_741_293), ("comfy-int8", 9_583_465_712)])
def test_single_files_have_the_published_size_up_to_a_few_bytes_of_header(name, size) -> None:
    assert abs(full_size(name)[1] - size) < 100


@pytest.mark.parametrize(("name", "size"), [("nf4-fused", 5.22e9), ("fp8-fused", 17_718 * 2**20 / 2)])
def test_folders_have_the_published_size_to_a_thousandth(name, size) -> None:
    assert full_size(name)[1] == pytest.approx(size, rel=1e-3)


def test_the_fp8_publication_has_its_quirks(tmp_path) -> None:
    folder = make("fp8-fused", tmp_path / "it")
    index = json.loads((folder / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"diffusion_pytorch_model.safetensors"}
    file = SafetensorsFile(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert set(index["weight_map"]) == set(file.infos)
    assert index["metadata"]["total_size"] == sum(info.size for info in file.infos.values())
    assert json.loads((folder / "model_index.json").read_text())["tokenizer"] == ["transformers", "Qwen2Tokenizer"]
    assert not (folder / "tokenizer" / "vocab.json").exists()
    encoder = json.loads((folder / "text_encoder/config.json").read_text())
    assert encoder["ideogram_fp8_weight_only"] is True and "rope_parameters" in encoder["text_config"]
    infos = SafetensorsFile(folder / "text_encoder/model.safetensors").infos
    packed = "language_model.layers.3.mlp.up_proj.weight"
    assert (infos[packed].dtype, infos[f"{packed}_scale"].dtype) == ("F8_E4M3", "F32")
    assert infos["language_model.embed_tokens.weight"].dtype == "BF16"
    assert "quantization_config" not in json.loads((folder / "transformer/config.json").read_text())


def test_random_weights_are_finite_and_repeat_only_after_61_rows(tmp_path) -> None:
    branch = open_source(make("fp8-fused", tmp_path / "it", parts="transformers")).branches[0]
    for name in branch.dtypes:
        tensor = branch.tensor(name)
        assert torch.isfinite(tensor).all() and 0.005 < float(tensor.float().std()) < 2, name
    for name in ("layers.0.attention.qkv.weight", "layers.1.feed_forward.w2.weight"):
        weight = branch.tensor(name)
        assert torch.equal(weight[61:122], weight[:61])
        assert len(weight[:61].unique(dim=0)) == 61
    queries, keys, _ = branch.tensor("layers.0.attention.qkv.weight").chunk(3)
    assert not torch.equal(queries, keys)
    assert not (tmp_path / "it" / "vae").exists()


def test_a_seed_fixes_every_byte_and_another_changes_them(tmp_path) -> None:
    def digest(folder: Path) -> str:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    first, again, other = (
        digest(make("nf4-split", tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_given_weights_come_back_bit_for_bit(tmp_path) -> None:
    miniature = local_folder("miniature")
    made = open_source(make("dense-fused", tmp_path / "it", source=miniature), expected=MODELS["miniature"])
    for truth, branch in zip(open_source(miniature).branches, made.branches, strict=True):
        assert all(torch.equal(branch.tensor(name), truth.tensor(name)) for name in truth.dtypes)
    assert (tmp_path / "it/scheduler/scheduler_config.json").read_bytes().strip() == (
        miniature / "scheduler/scheduler_config.json"
    ).read_bytes().strip()


def test_stock_diffusers_reads_the_dense_replica_from_its_shards(tmp_path) -> None:
    folder = make("dense-split", tmp_path / "it")
    for name, branch in zip(BRANCHES, open_source(folder).branches, strict=True):
        module = Ideogram4Transformer2DModel.from_pretrained(
            folder / name, torch_dtype=torch.bfloat16, local_files_only=True
        )
        held = fused(module.state_dict())
        assert held.keys() == branch.dtypes.keys()
        assert all(torch.equal(tensor, branch.tensor(key)) for key, tensor in held.items())


def test_a_short_period_fills_its_shape_in_both_kinds_of_file(tmp_path) -> None:
    period = torch.arange(6, dtype=torch.float32).view(3, 2)
    part = replica_parts.Part("x.weight", "F32", (8, 2), period)
    replica_parts.write_safetensors(tmp_path / "x.safetensors", [part], {})
    replica_parts.write_gguf(tmp_path / "x.gguf", [part])
    expected = period.repeat(3, 1)[:8]
    assert torch.equal(SafetensorsFile(tmp_path / "x.safetensors").tensor("x.weight"), expected)
    assert torch.equal(make_gguf(tmp_path / "x.gguf"), expected)


def make_gguf(path: Path) -> torch.Tensor:
    import gguf

    return torch.from_numpy(gguf.GGUFReader(path).tensors[0].data.copy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "fp9"}, "fp8-fused"),
        ({"layout": "fp8-fused", "size": "large"}, "layers=N"),
        ({"layout": "fp8-fused", "size": "layers=0"}, "layers=N"),
        ({"layout": "fp8-fused", "parts": "vae"}, "transformers or all"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(tmp_path, settings, message) -> None:
    with pytest.raises(RequestError, match=message):
        make(out=tmp_path / "it", **settings)
    assert not (tmp_path / "it").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        make("fp8-fused", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_line_writes_and_refuses(tmp_path, capfd) -> None:
    import subprocess

    tool = Path(make_replica.__file__)
    done = subprocess.run(
        [sys.executable, tool, "--layout", "gguf-leejet", "--out", tmp_path / "it"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "GB" in done.stdout and open_source(tmp_path / "it").branches[1].branch == TINY[1]
    refused = subprocess.run(
        [sys.executable, tool, "--layout", "gguf-leejet", "--out", tmp_path / "it"], capture_output=True, text=True
    )
    assert refused.returncode == 1 and "not empty" in refused.stderr and "Traceback" not in refused.stderr


def test_nested_levels_are_256_and_span_seven_decades() -> None:
    levels = replica_parts.nested_levels()
    assert levels.numel() == 256 == levels.unique().numel()
    assert torch.equal(levels, levels.sort().values)
    assert float(levels[-1]) == 1.0 and float(levels.abs()[levels != 0].min()) == pytest.approx(5.5e-7)
    assert (levels > 0).sum() == 128 and (levels == 0).sum() == 1
    decades = torch.floor(torch.log10(levels[(levels > 0) & (levels < 1)].double())).int()
    assert [int((decades == power).sum()) for power in range(-7, 0)] == [1, 2, 4, 8, 16, 32, 64]
