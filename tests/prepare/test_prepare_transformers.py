"""Preparing: what comes out is right, whole or not there, and the same however often it was interrupted."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
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
    write_source,
)

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prepared import journal
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.manifest import read_manifest
from ideogram_app.checkpoints.prepared.packed_file import PackedFile, PackedWeight
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import AccessError, CheckpointError, DiskError, RequestError
from ideogram_app.files import project_folder
from ideogram_app.prepare.transformers import prepare
from ideogram_app.quantization import fp8, k_quants
from ideogram_app.quantization.rows import dequantize_rows

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    shrink_published_model(monkeypatch)
    return Store(tmp_path / "data")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def hashes(store: Store, model: str, recipe: str) -> dict[str, str]:
    """Of every file but the notice, which names the day."""
    files = read_manifest(store.path(model, recipe)).files
    return {row.path: row.sha256 for row in files if row.path != "NOTICE"}


def prepared(store: Store, recipe: str, number: int = 0) -> PackedFile:
    """One branch of a prepared recipe, as the loader opens it."""
    effective = store.effective(NAME, recipe)
    path = store.path(NAME, recipe) / formats.branch_file(NAME, effective, BRANCHES[number])
    return PackedFile(path, effective, SMALL[number])


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_is_prepared_from_a_local_folder(store, source, recipe) -> None:
    events = list(prepare(store, NAME, recipe, source))
    assert store.status(NAME, recipe).state == "ready"
    store.verify(NAME, recipe)
    assert all(event.recipe == recipe and event.message for event in events)
    assert list(dict.fromkeys(event.phase for event in events)) == ["prepare", "smoke", "verify"]
    in_bytes = [event for event in events if event.phase != "smoke"]
    done = [event.done for event in in_bytes]
    assert done == sorted(done) and done[-1] == events[-1].total and len({event.total for event in in_bytes}) == 1
    tried = [(event.done, event.total) for event in events if event.phase == "smoke"]
    assert tried == [(number, len(tried) - 1) for number in range(len(tried))]  # before the first, and after each
    assert len(read_manifest(store.path(NAME, recipe)).smoke) == len(tried) - 1
    assert store.status(NAME, recipe).smoke == read_manifest(store.path(NAME, recipe)).smoke
    assert events[-2].rate and events[-2].seconds_left is not None
    left = {path.name for path in store.path(NAME, recipe).parent.iterdir()}
    assert left <= {recipe, f"{recipe}.lock"}


def test_fp8_files_have_the_official_names_and_bits(store, source) -> None:
    list(prepare(store, NAME, "fp8", source))
    for number, (name, branch) in enumerate(zip(BRANCHES, SMALL, strict=True)):
        expected = packed_fp8(random_tensors(branch, number), branch)
        got = load_file(store.path(NAME, "fp8") / name / WEIGHTS)
        assert set(got) == set(expected)
        for tensor, held in expected.items():
            assert got[tensor].dtype == held.dtype
            assert torch.equal(got[tensor].view(torch.uint8), held.view(torch.uint8)), tensor


@pytest.mark.parametrize("is_fused", [False, True], ids=["split", "fused"])
def test_the_official_fp8_layout_is_a_source_for_every_recipe(store, tmp_path, is_fused) -> None:
    def change(tensors, branch):
        packed = packed_fp8(tensors, branch)
        return fused(packed) if is_fused else packed

    folder = write_source(tmp_path / "official", change)
    dense = random_tensors(SMALL[0], 0)
    for recipe in RECIPES:
        list(prepare(store, NAME, recipe, folder))
        packed = prepared(store, recipe)
        for name, tensor in fused(dense).items():
            stored = packed.stored(name.removesuffix(".weight")) if tensor.ndim == 2 else (tensor,)
            is_packed = any(isinstance(part, PackedWeight) for part in stored)
            assert relative_error(packed.values(name), tensor) < (0.12 if is_packed else 0.04)


def test_fp8_from_fp8_keeps_the_values(store, tmp_path) -> None:
    folder = write_source(tmp_path / "official", packed_fp8)
    list(prepare(store, NAME, "fp8", folder))
    before, after = (
        load_file(folder / BRANCHES[0] / WEIGHTS),
        load_file(store.path(NAME, "fp8") / BRANCHES[0] / WEIGHTS),
    )
    for name in (name for name in before if f"{name}_scale" in before):
        widened = [dequantize_rows(held[name], held[f"{name}_scale"]) for held in (before, after)]
        assert relative_error(widened[1], widened[0]) < 1e-6


@pytest.mark.parametrize("recipe", ["gguf-q8_0", "gguf-q4_k"])
def test_gguf_files_have_the_names_and_types_that_other_readers_expect(store, source, recipe) -> None:
    list(prepare(store, NAME, recipe, source))
    files = sorted(store.path(NAME, recipe).glob("*.gguf"))
    assert [("uncond" in path.name) for path in files] == [False, True]
    for number, (path, branch) in enumerate(zip(files, SMALL, strict=True)):
        dense = random_tensors(branch, number)
        reader = gguf.GGUFReader(path)
        assert not [key for key in reader.fields if not key.startswith("GGUF.")]  # no metadata at all
        held = {tensor.name: tensor for tensor in reader.tensors}
        assert set(held) == set(fused(dense))
        for name, tensor in held.items():
            kind = RECIPES[recipe].gguf_type if name.startswith("layers.") and tensor.data.ndim == 2 else "F32"
            assert tensor.tensor_type.name == kind, name
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            error = relative_error(values, fused(dense)[name])
            assert error == 0 if kind == "F32" else error < 0.1


def test_a_fused_gguf_tensor_holds_the_bytes_of_its_three_parts(store, source) -> None:
    list(prepare(store, NAME, "gguf-q4_k", source))
    packed = prepared(store, "gguf-q4_k")
    dense = random_tensors(SMALL[0], 0)
    parts = [k_quants.encode(dense[f"layers.1.attention.{part}.weight"], "Q4_K") for part in ("to_q", "to_k", "to_v")]
    assert torch.equal(packed.weight("layers.1.attention.qkv").values, torch.cat(parts))
    output = k_quants.encode(dense["layers.1.attention.to_out.0.weight"], "Q4_K")
    assert torch.equal(packed.weight("layers.1.attention.o").values, output)


@pytest.mark.parametrize("recipe", PACKED)
def test_stopping_early_leaves_something_that_the_next_run_continues(store, source, recipe) -> None:
    list(prepare(store, NAME, recipe, source))
    undisturbed = hashes(store, NAME, recipe)
    store.delete(NAME, recipe)
    for share in (0.05, 0.25, 0.5, 0.97):
        events = prepare(store, NAME, recipe, source)
        while (event := next(events)).done < share * event.total:
            pass
        events.close()
        assert store.status(NAME, recipe).state == "partial"
    messages = [event.message for event in prepare(store, NAME, recipe, source)]
    units = [name for name in SMALL[0].shapes() if "attention.to_" not in name]
    assert sum(message.startswith("kept ") for message in messages) > len(units)
    assert hashes(store, NAME, recipe) == undisturbed


def test_a_partial_of_another_source_is_not_continued(store, source, tmp_path) -> None:
    events = prepare(store, NAME, "fp8", source)
    for _ in range(20):
        next(events)
    events.close()
    other = write_source(tmp_path / "other", seed=5)
    assert not [event for event in prepare(store, NAME, "fp8", other) if event.message.startswith("kept ")]
    fresh = Store(tmp_path / "fresh")
    list(prepare(fresh, NAME, "fp8", other))
    assert hashes(store, NAME, "fp8") == hashes(fresh, NAME, "fp8")


def test_bytes_that_were_lost_after_they_were_journaled_are_written_again(store, source, tmp_path) -> None:
    events = prepare(store, NAME, "fp8", source)
    for _ in range(50):
        next(events)
    events.close()
    path = store.prepared_folder(NAME, "fp8").staging / BRANCHES[0] / WEIGHTS
    size = path.stat().st_size
    with path.open("r+b") as file:  # a power cut may lose what was never synchronized
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    list(prepare(store, NAME, "fp8", source))
    fresh = Store(tmp_path / "fresh")
    list(prepare(fresh, NAME, "fp8", source))
    assert hashes(store, NAME, "fp8") == hashes(fresh, NAME, "fp8")


def test_a_torn_journal_and_stray_drafts_do_no_harm(store, source) -> None:
    events = prepare(store, NAME, "fp8", source)
    for _ in range(30):
        next(events)
    events.close()
    path = store.prepared_folder(NAME, "fp8").journal
    path.write_bytes(path.read_bytes()[:-20])
    (store.prepared_folder(NAME, "fp8").staging / "manifest.json").write_text("{")
    (store.prepared_folder(NAME, "fp8").staging / "config.json.draft").write_text("{")
    list(prepare(store, NAME, "fp8", source))
    store.verify(NAME, "fp8")
    assert not list(store.path(NAME, "fp8").rglob("*.draft"))


@pytest.mark.parametrize("moment", range(4))
def test_dying_while_publishing_leaves_nothing_that_looks_finished(store, source, monkeypatch, moment) -> None:
    """Each rename and removal of a republication in turn is the moment of death."""
    list(prepare(store, NAME, "fp8", source))
    (store.path(NAME, "fp8") / BRANCHES[0] / "config.json").unlink()
    assert store.status(NAME, "fp8").state == "damaged"
    calls = iter(range(100))
    rename = Path.rename

    class Death(BaseException):
        pass

    def dying(path: Path, target: Path) -> Path:
        if next(calls) == moment % 2:
            if moment >= 2:
                rename(path, target)
            raise Death
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(Death):
            list(prepare(store, NAME, "fp8", source))
    state = store.status(NAME, "fp8").state
    if state == "ready":
        store.verify(NAME, "fp8")
        assert moment == 3
    list(prepare(store, NAME, "fp8", source))
    store.verify(NAME, "fp8")
    left = {path.name for path in store.path(NAME, "fp8").parent.iterdir()}
    assert left <= {"fp8", "fp8.lock"} or moment == 3


def test_what_is_ready_is_not_made_again(store, source) -> None:
    list(prepare(store, NAME, "fp8", source))
    created = (store.path(NAME, "fp8") / "manifest.json").stat().st_mtime_ns
    for folder in (None, source):
        (event,) = prepare(store, NAME, "fp8", folder)
        assert event.done == event.total > 0 and "ready" in event.message
    assert (store.path(NAME, "fp8") / "manifest.json").stat().st_mtime_ns == created


def test_the_reference_of_the_miniature_needs_no_preparation(store) -> None:
    (event,) = prepare(store, "miniature", "reference")
    assert "ready" in event.message and not store.root.exists()


def test_too_little_disk_is_said_before_anything_is_written(store, source, monkeypatch) -> None:
    usage = shutil.disk_usage(store.root.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DiskError, match=r"Expected .* MB free, a margin of 10% included\. Got 0\.0 MB"):
        list(prepare(store, NAME, "fp8", source))
    assert store.status(NAME, "fp8").state == "missing"


def test_a_disk_that_fills_up_on_the_way_is_an_error_and_what_is_done_is_kept(store, source, monkeypatch) -> None:
    calls = iter(range(1000))
    append = journal.UnitWriter.append

    def failing(*args) -> None:
        if next(calls) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(*args)

    with monkeypatch.context() as patch:
        patch.setattr(journal.UnitWriter, "append", failing)
        with pytest.raises(DiskError, match="filled up"):
            list(prepare(store, NAME, "fp8", source))
    assert store.status(NAME, "fp8").state == "partial"
    assert [event for event in prepare(store, NAME, "fp8", source) if event.message.startswith("kept ")]


def test_the_published_model_without_a_folder_needs_access(store) -> None:
    with pytest.raises(AccessError, match="gated"):
        list(prepare(store, NAME, "fp8"))


def test_a_source_of_another_model_is_refused_and_leaves_nothing(store) -> None:
    with pytest.raises(CheckpointError, match="describes another model"):
        list(prepare(store, NAME, "fp8", project_folder() / "assets" / "miniature"))
    assert store.status(NAME, "fp8").state == "missing"


def test_weights_that_do_not_match_their_source_are_never_published(store, source, monkeypatch) -> None:
    """Rows in a wrong order: every size and type is right, only the check against the source can see it."""
    quantize = fp8.quantize_rows
    monkeypatch.setattr(fp8, "quantize_rows", lambda weight: quantize(weight.flip(0)))
    with pytest.raises(CheckpointError, match=r"relative error up to 0\.07\. Got 1\.4"):
        list(prepare(store, NAME, "fp8", source))
    assert store.status(NAME, "fp8").state == "missing"


def test_a_weight_that_is_not_finite_is_refused(store, tmp_path) -> None:
    def change(tensors, branch):
        tensors["layers.0.feed_forward.w1.weight"][3, 4] = float("nan")
        return tensors

    folder = write_source(tmp_path / "damaged", change)
    for recipe in PACKED:
        with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward\.w1\.weight in .* not finite"):
            list(prepare(store, NAME, recipe, folder))
        assert not store.status(NAME, recipe).usable


def test_only_one_prepares_at_a_time(store, source) -> None:
    first = prepare(store, NAME, "fp8", source)
    next(first)
    with pytest.raises(RequestError, match="being prepared by another process"):
        list(prepare(store, NAME, "fp8", source))
    list(first)
    store.verify(NAME, "fp8")


PREPARE = """
import sys
from pathlib import Path
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.prepare.transformers import prepare
for event in prepare(Store(Path(sys.argv[1])), "miniature", "gguf-q4_k"):
    print(event.done / event.total, event.message, flush=True)
    sys.stdin.readline()
"""


def test_killing_it_at_any_moment_costs_one_tensor_of_work_and_changes_nothing(tmp_path) -> None:
    recipe, chance = "gguf-q4_k", random.Random(4)
    undisturbed, store = Store(tmp_path / "undisturbed"), Store(tmp_path / "killed")
    list(prepare(undisturbed, "miniature", recipe))
    command = [sys.executable, "-c", PREPARE, str(store.root)]
    done: set[str] = set()
    for share in (0.05, 0.5, 0.8):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
        with subprocess.Popen(command, **pipes, text=True, cwd=project_folder()) as run:
            assert run.stdin is not None and run.stdout is not None
            messages = []
            for line in run.stdout:
                run.stdin.write("\n")  # it may go on with the next tensor, and no further
                messages.append(line.split(" ", 1)[1].strip())
                if float(line.split(" ", 1)[0]) > share:
                    break
            time.sleep(chance.random() * 0.01)
            run.kill()
        assert store.status("miniature", recipe).state == "partial"
        assert done <= {message.removeprefix("kept ") for message in messages if message.startswith("kept ")}
        done = {message.removeprefix("kept ") for message in messages[:-1]} - {messages[-1]}
    messages = [event.message for event in prepare(store, "miniature", recipe)]
    assert done <= {message.removeprefix("kept ") for message in messages if message.startswith("kept ")}
    assert len(done) > 60
    assert hashes(store, "miniature", recipe) == hashes(undisturbed, "miniature", recipe)
    store.verify("miniature", recipe)
