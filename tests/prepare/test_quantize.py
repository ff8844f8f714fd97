"""Weights of any size and layout become a folder: in little memory, checked, licensed, the same as in the store."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_model import (
    NAME,
    PACKED,
    SMALL,
    WEIGHTS,
    fused,
    packed_fp8,
    random_tensors,
    relative_error,
    shrink_published_model,
    write_branch,
    write_source,
)
from typer.testing import CliRunner

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.manifest import read_manifest
from ideogram_app.checkpoints.prepared.packed_file import PackedFile, PackedWeight
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.cli.app import app
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.files import hash_file, project_folder
from ideogram_app.model.loader import load_transformers
from ideogram_app.model.reference_model import load_reference_model
from ideogram_app.prepare import packing
from ideogram_app.prepare.calibration import smoothing
from ideogram_app.prepare.calibration.tuning import Tuning
from ideogram_app.prepare.transformers import prepare, quantize
from ideogram_app.quantization import k_quants

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shrink_published_model(monkeypatch)
    return Store(tmp_path / "data")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the notice, which names the day."""
    return {row.path: row.sha256 for row in read_manifest(folder).files if row.path != "NOTICE"}


def prepared(store: Store, recipe: str) -> PackedFile:
    effective = store.effective(NAME, recipe)
    path = store.path(NAME, recipe) / formats.branch_file(NAME, effective, BRANCHES[0])
    return PackedFile(path, effective, SMALL[0])


@pytest.mark.parametrize("recipe", PACKED)
def test_runs_of_a_few_rows_give_the_bytes_of_whole_matrices(store, source, tmp_path, monkeypatch, recipe) -> None:
    list(prepare(store, NAME, recipe, source))
    monkeypatch.setattr(packing, "RUN_ON_CPU", 100 * 256 + 5)  # 100 rows of most matrices, 30 of llm_cond_proj
    list(quantize(source, recipe, tmp_path / "runs"))
    assert hashes(tmp_path / "runs") == hashes(store.path(NAME, recipe))


@pytest.mark.parametrize("recipe", ["int8-w8a8-naive", "gguf-q4_k"])
@pytest.mark.parametrize("layout", ["dense", "fp8"])
def test_the_command_makes_the_files_of_the_store(store, tmp_path, recipe, layout) -> None:
    change = {"dense": None, "fp8": lambda tensors, branch: fused(packed_fp8(tensors, branch))}[layout]
    folder, out = write_source(tmp_path / layout, change), tmp_path / "out"
    list(prepare(store, NAME, recipe, folder))
    done = CliRunner().invoke(app, ["quantize", str(folder), "--recipe", recipe, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert hashes(out) == hashes(store.path(NAME, recipe))
    assert {row["path"]: row["sha256"] for row in report["files"]} == {
        row.path: row.sha256 for row in read_manifest(out).files
    }
    linears = [linear for branch in SMALL for linear in branch.linears() if RECIPES[recipe].packs(linear.name)]
    assert report["weights"] == sum(linear.rows * linear.columns for linear in linears)
    assert report["peak_resident_bytes"] > 10**8 and report["seconds"] >= report["passes"]["pack"] > 0


def test_two_folders_are_a_source_too_and_the_last_line_says_what_it_took(source, tmp_path) -> None:
    """Without config or name of a model the shape alone decides; these two layers are no published model's."""
    parts = [str(source / name) for name in BRANCHES]
    command = ["quantize", parts[0], "--unconditional", parts[1], "--recipe", "fp8", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    line = done.stdout.strip().splitlines()[-1]
    assert " s, " in line and "M weights/s packed, peak resident memory" in line
    assert read_manifest(tmp_path / "out").model == "ideogram-4"


def test_what_is_ready_is_not_made_again_and_what_is_not_ours_is_not_touched(source, tmp_path) -> None:
    out = tmp_path / "out"
    list(quantize(source, "fp8", out))
    (event,) = quantize(source, "fp8", out)
    assert event.message == "fp8 is ready"
    list(quantize(source, "gguf-q8_0", out))  # another recipe takes the place of what this program made
    assert read_manifest(out).recipe == "gguf-q8_0" and not (out / BRANCHES[0] / WEIGHTS).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "out.lock"}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(RequestError, match="not made by this program"):
        list(quantize(source, "fp8", tmp_path / "photos"))
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path, source) -> None:
    with pytest.raises(RequestError, match="no device xla"):
        list(quantize(source, "fp8", tmp_path / "out", device="xla"))


def powers(branch, seed: int) -> dict[str, torch.Tensor]:
    """Smoothing exponents -3..3 for every input that can be smoothed."""
    generator = torch.Generator().manual_seed(seed)
    widths = {linear.name: linear.columns for linear in branch.linears()}
    return {
        group.name: torch.randint(-3, 4, (widths[group.name],), generator=generator, dtype=torch.int8)
        for group in smoothing.groups(branch)
    }


@pytest.mark.parametrize("recipe", ["reference", "int8-w8a8-smooth"])
def test_scaled_tensors_are_the_source_s_times_the_factors(store, source, recipe) -> None:
    scaling = tuple(smoothing.folded(branch, powers(branch, 1)) for branch in SMALL)
    list(prepare(store, NAME, recipe, source, tuning=Tuning(scaling=scaling)))
    packed = prepared(store, recipe)
    assert len(scaling[0]) > 15
    scaled = {
        name: scaling[0].get(name, smoothing.Factors()).applied(tensor.float())
        for name, tensor in random_tensors(SMALL[0], 0).items()
    }
    for name, expected in fused(scaled).items():
        got = packed.values(name).float()
        if recipe != "reference" and RECIPES[recipe].packs(name) and len(expected.shape) == 2:
            assert relative_error(got, expected) < 0.02
        else:
            assert torch.equal(got, expected), name


def test_the_smoke_test_catches_a_scale_that_nothing_takes_back(store, source) -> None:
    """Every tensor is near its scaled source, so only a block that computes can see it."""
    lonely = {"layers.1.ffn_norm1.weight": smoothing.Factors(rows=torch.full((256,), 2.0))}
    with pytest.raises(CheckpointError, match=r"smoke test failed: block 1, scaled .* up to 0\.01\. Got 0\.0[5-9]"):
        list(prepare(store, NAME, "int8-w8a8-smooth", source, tuning=Tuning(scaling=(lonely, {}))))
    assert store.status(NAME, "int8-w8a8-smooth").state == "missing"


def test_the_smoke_test_catches_a_file_that_is_read_in_another_order(store, source, monkeypatch) -> None:
    """v where a block looks for q: sizes and types are right, and so is every tensor where it was put."""
    dense = PackedFile.values

    def swapped(self, name, rows=None, device="cpu"):
        if ".qkv." not in name:
            return dense(self, name, rows, device)
        queries, keys, values = dense(self, name, None, device).chunk(3)
        return torch.cat([values, keys, queries])[rows or slice(None)]

    with monkeypatch.context() as patch:
        patch.setattr(PackedFile, "values", swapped)
        with pytest.raises(CheckpointError, match="does not match its source"):  # found at once, as it is written
            list(prepare(store, NAME, "gguf-q8_0", source))
    events = prepare(store, NAME, "gguf-q8_0", source)
    while not next(events).message.startswith("tried"):
        pass
    monkeypatch.setattr(PackedFile, "values", swapped)
    with pytest.raises(CheckpointError, match="smoke test failed: block"):
        list(events)
    assert store.status(NAME, "gguf-q8_0").state == "missing"


def test_a_byte_that_changes_between_writing_and_publishing_is_found(store, source) -> None:
    events = prepare(store, NAME, "fp8", source)
    while not next(events).message.startswith("tried"):
        pass
    path = store.prepared_folder(NAME, "fp8").staging / BRANCHES[1] / WEIGHTS
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="is not what was written"):
        list(events)
    assert store.status(NAME, "fp8").state == "missing"


def test_a_source_that_changes_on_the_way_is_refused(store, source) -> None:
    events = prepare(store, NAME, "fp8", source)
    for _ in range(20):
        next(events)
    os.utime(source / BRANCHES[0] / WEIGHTS, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        list(events)


def test_the_manifest_has_the_hashes_of_the_source_also_after_a_stop(store, source) -> None:
    events = prepare(store, NAME, "fp8", source)
    for _ in range(30):
        next(events)
    events.close()
    list(prepare(store, NAME, "fp8", source))
    rows = {row.path: row.sha256 for row in read_manifest(store.path(NAME, "fp8")).source_files}
    assert rows == {
        f"{name}/{WEIGHTS}": hashlib.sha256((source / name / WEIGHTS).read_bytes()).hexdigest() for name in BRANCHES
    }


def test_what_a_calibration_protects_is_recorded_and_read_back(store, source) -> None:
    recipe = "int8-w8a8"
    list(prepare(store, NAME, recipe, source))
    by_name = set(prepared(store, recipe).packed)
    assert not any("feed_forward.w2" in name for name in by_name)
    chosen = (*RECIPES[recipe].protected, "layers.0.feed_forward.w2", "layers.1.attention.to_k")
    tuning = Tuning(protected=chosen, calibration="a" * 64)
    list(prepare(store, NAME, recipe, source, tuning=tuning))
    made = read_manifest(store.path(NAME, recipe))
    assert (made.protected, made.calibration) == (chosen, "a" * 64)
    assert store.status(NAME, recipe).state == "ready" and store.effective(NAME, recipe).protected == chosen
    packed = prepared(store, recipe)
    assert "layers.1.feed_forward.w2" in packed.packed and "layers.0.feed_forward.w2" not in packed.packed
    config = json.loads((store.path(NAME, recipe) / BRANCHES[0] / "config.json").read_text())
    assert "layers.1.attention.to_k" in config["quantization_config"]["modules_to_not_convert"]
    (event,) = prepare(store, NAME, recipe, source)  # without another calibration this one stays
    assert "ready" in event.message
    other = list(prepare(store, NAME, recipe, source, tuning=replace(tuning, calibration="b" * 64)))
    assert len(other) > 50 and read_manifest(store.path(NAME, recipe)).calibration == "b" * 64


@pytest.mark.parametrize("recipe", ["gguf-q4_k", "int8-w8a8-rotated"])
def test_one_protected_part_of_a_fused_tensor_protects_all_three(store, source, recipe) -> None:
    tuning = Tuning(protected=(*RECIPES[recipe].protected, "layers.1.attention.to_k"), calibration="c")
    list(prepare(store, NAME, recipe, source, tuning=tuning))
    packed, dense = prepared(store, recipe), fused(random_tensors(SMALL[0], 0))
    name = "layers.1.attention.qkv"
    assert name not in packed.packed and "layers.0.attention.qkv" in packed.packed
    assert torch.equal(packed.tensor(f"{name}.weight").float(), dense[f"{name}.weight"].float())


def test_one_protected_part_of_three_that_lie_apart_stands_beside_the_others(store, source) -> None:
    recipe = "int8-w8a8-naive"
    row, part = RECIPES[recipe], "layers.1.attention.to_k"
    list(prepare(store, NAME, recipe, source, tuning=Tuning(protected=(*row.protected, part), calibration="c")))
    packed, dense = prepared(store, recipe), random_tensors(SMALL[0], 0)
    queries, keys, values = packed.stored("layers.1.attention.qkv")
    assert isinstance(queries, PackedWeight) and isinstance(values, PackedWeight)
    assert torch.equal(keys, dense[f"{part}.weight"])
    assert torch.equal(packed.values("layers.1.attention.qkv.weight", slice(256, 512)), dense[f"{part}.weight"])
    across = packed.values("layers.1.attention.qkv.weight", slice(250, 520))
    assert torch.equal(across, torch.cat([queries.decoded()[250:], keys.float(), values.decoded()[:8]]))
    backbone = load_transformers(store, NAME, recipe, "cpu", torch.float32, kernels="plain").conditional
    layer: Any = backbone.trunk.blocks[1].qkv
    assert [type(part).__name__ for part in layer.layers] == ["Int8Linear", "DenseLinear", "Int8Linear"]
    apart: Any = load_reference_model(store, NAME, recipe, "cpu", torch.float32).conditional.get_submodule(
        "layers.1.attention"
    )
    x = torch.randn(5, 256)
    assert torch.equal(layer(x), torch.cat([apart.to_q(x), apart.to_k(x), apart.to_v(x)], -1))


def test_importance_reaches_the_encoder_of_the_weight_it_names(store, source) -> None:
    """Importance changes the bytes of that weight to those of the encoder, run after run, and no others."""
    generator = torch.Generator().manual_seed(2)
    name, importance = "layers.1.adaln_modulation", torch.rand(256, generator=generator) ** 4
    list(prepare(store, NAME, "gguf-q4_k", source))
    plain = {
        linear: prepared(store, "gguf-q4_k").weight(linear).values for linear in prepared(store, "gguf-q4_k").packed
    }
    list(prepare(store, NAME, "gguf-q4_k", source, tuning=Tuning(importance=({f"{name}.weight": importance}, {}))))
    packed = prepared(store, "gguf-q4_k")
    changed = [linear for linear in packed.packed if not torch.equal(packed.weight(linear).values, plain[linear])]
    assert changed == [name]
    dense = random_tensors(SMALL[0], 0)[f"{name}.weight"]
    assert torch.equal(packed.weight(name).values, k_quants.encode(dense, "Q4_K", importance))


def test_a_rotated_file_has_the_names_of_comfyui_and_the_weights_come_back(store, source) -> None:
    recipe = "int8-w8a8-rotated"
    list(prepare(store, NAME, recipe, source))
    names = sorted(path.name for path in store.path(NAME, recipe).glob("*.safetensors"))
    assert names == [f"{NAME}-int8_convrot.safetensors", f"{NAME}_uncond-int8_convrot.safetensors"]
    held = load_file(store.path(NAME, recipe) / names[0])
    with safe_open(store.path(NAME, recipe) / names[0], "pt") as file:
        assert file.metadata() is None
    base = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    hadamard = np.kron(np.kron(base, base), np.kron(base, base))
    dense = fused(random_tensors(SMALL[0], 0))
    for name, expected in dense.items():
        if f"{name}_scale" not in held:
            assert torch.equal(held.pop(name), expected), name
            continue
        mark = json.loads(bytes(held.pop(name.removesuffix("weight") + "comfy_quant")))
        assert mark == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
        values, scale = held.pop(name), held.pop(f"{name}_scale")
        assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (expected.shape[0], 1))
        rotated = (values.double() * scale.double()).numpy().reshape(-1, expected.shape[1] // 256, 256)
        got = torch.from_numpy((rotated @ hadamard).reshape(expected.shape))
        assert relative_error(got, expected) < 0.012, name
    assert not held
    assert "layers.0.attention.qkv" in {name.removesuffix(".weight") for name in dense}


def test_a_copy_of_the_published_model_carries_its_notice_and_the_source_s_licence(store, source) -> None:
    (source / "LICENSE.md").write_text("the agreement")
    (source / "NOTICE").write_text("the publisher's notice")
    list(prepare(store, NAME, "fp8", source))
    folder = store.path(NAME, "fp8")
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    assert (
        "Ideogram 4 is provided under and subject to the Ideogram Non-Commercial Model Agreement available at "
        "https://github.com/ideogram-oss/ideogram4/model_licenses/LICENSE-IDEOGRAM-4-NON-COMMERCIAL. "
        "All rights reserved. Copyright © Ideogram, Inc."
    ) in notice
    assert "MODIFIED" in notice and "recipe fp8" in notice
    assert datetime.now(timezone.utc).strftime("%Y-%m") in notice
    assert (folder / "LICENSE.md").read_text() == "the agreement"
    assert (folder / "NOTICE-SOURCE").read_text() == "the publisher's notice"
    assert {"NOTICE", "NOTICE-SOURCE", "LICENSE.md"} <= {row.path for row in read_manifest(folder).files}
    store.verify(NAME, "fp8")


def test_the_miniature_carries_no_notice(tmp_path) -> None:
    list(quantize(project_folder() / "assets" / "miniature", "gguf-q8_0", tmp_path / "out"))
    assert read_manifest(tmp_path / "out").model == "miniature"
    assert not list((tmp_path / "out").glob("NOTICE*"))
    for row in read_manifest(tmp_path / "out").files:
        assert hash_file(tmp_path / "out" / row.path) == row.sha256


WIDE = """
import sys
from pathlib import Path
import diffusers.models.transformers.transformer_ideogram4
from ideogram_app.machine.meter import HostPeak
from ideogram_app.prepare.transformers import quantize
with HostPeak() as memory:
    list(quantize(Path(sys.argv[1]), "fp8", Path(sys.argv[2])))
print(memory.above_start)
"""


def test_memory_does_not_grow_with_the_widest_matrix(tmp_path) -> None:
    """llm_cond_proj here is 109 MB in float32, and packing it whole would hold four such copies at a time."""
    wide = tuple(replace(branch, llm_features_dim=13 * 8192) for branch in SMALL)
    for name, branch in zip(BRANCHES, wide, strict=True):
        tensors = {tensor: torch.ones(shape, dtype=torch.bfloat16) for tensor, shape in branch.shapes().items()}
        tensors["llm_cond_proj.weight"][:, ::3] = -0.5
        save_file(tensors, write_branch(tmp_path / "wide" / name, branch, {}) / WEIGHTS)
    command = [sys.executable, "-c", WIDE, str(tmp_path / "wide"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=project_folder(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000_000
