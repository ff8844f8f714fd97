"""What has its final name was finished; what is wrong with a folder is said with the name of the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import NAME, shrink_published_model, write_source

from ideogram_app.catalog import sources
from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared import manifest
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.files import hash_file, project_folder
from ideogram_app.prepare.transformers import prepare
from ideogram_app.wire import from_json, to_json

RECIPE = "fp8"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in which FP8 of a small model is ready."""
    shrink_published_model(monkeypatch)
    store = Store(tmp_path / "data")
    for _ in prepare(store, NAME, RECIPE, write_source(tmp_path / "source")):
        pass
    return store


def some_weights(store: Store) -> Path:
    return store.path(NAME, RECIPE) / "transformer" / "diffusion_pytorch_model.safetensors"


def test_the_root_is_data_in_the_project_unless_the_environment_names_one(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("IDEOGRAM_APP_DATA", raising=False)
    assert Store().root == Path(__file__).resolve().parents[2] / "data"
    monkeypatch.setenv("IDEOGRAM_APP_DATA", str(tmp_path))
    assert Store().root == tmp_path


def test_a_prepared_recipe_is_ready_and_verifies(store) -> None:
    status = store.status(NAME, RECIPE)
    assert (status.state, status.usable, status.detail) == ("ready", True, "")
    assert status.path == store.path(NAME, RECIPE) and status.bytes > some_weights(store).stat().st_size
    store.verify(NAME, RECIPE)


def test_a_status_turns_into_json_and_back(store) -> None:
    status = store.status(NAME, RECIPE)
    assert from_json(type(status), to_json(status)) == status


def test_the_manifest_says_what_the_folder_is_and_what_it_was_made_from(store) -> None:
    made = manifest.read_manifest(store.path(NAME, RECIPE))
    assert (made.format, made.model, made.recipe, made.protected) == (manifest.MANIFEST_FORMAT, NAME, RECIPE, ())
    assert {row.path for row in made.source_files} == {
        f"{name}/diffusion_pytorch_model.safetensors" for name in sources.BRANCHES
    }
    folder = store.path(NAME, RECIPE)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {row.path for row in made.files} | {"manifest.json"}


def test_what_was_never_prepared_is_missing(store) -> None:
    status = store.status(NAME, "gguf-q8_0")
    assert (status.state, status.usable, status.bytes) == ("missing", False, 0)
    with pytest.raises(CheckpointError, match="no file"):
        store.verify(NAME, "gguf-q8_0")


def test_names_nobody_knows_are_refused(store) -> None:
    with pytest.raises(RequestError, match="Unknown recipe"):
        store.status(NAME, "int3")
    with pytest.raises(RequestError, match="Unknown model"):
        store.path("ideogram-9", RECIPE)


def test_the_reference_of_the_miniature_ships_with_the_program(store) -> None:
    status = store.status("miniature", "reference")
    assert status.state == "included" and status.usable and status.bytes > 1_000_000
    assert status.path == project_folder() / "assets" / "miniature"
    store.verify("miniature", "reference")
    with pytest.raises(RequestError, match="ships with the program"):
        store.delete("miniature", "reference")


def test_only_what_is_there_has_a_status_other_than_missing(store) -> None:
    found = {(model, recipe): store.status(model, recipe).state for model in MODELS for recipe in RECIPES}
    assert {key: state for key, state in found.items() if state != "missing"} == {
        (NAME, RECIPE): "ready",
        ("miniature", "reference"): "included",
    }


@pytest.mark.parametrize("path", ["transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"])
def test_a_missing_file_is_damage_that_names_it(store, path) -> None:
    (store.path(NAME, RECIPE) / path).unlink()
    status = store.status(NAME, RECIPE)
    assert status.state == "damaged" and path in status.detail
    with pytest.raises(CheckpointError, match=path):
        store.verify(NAME, RECIPE)


def test_a_truncated_file_is_damage_with_both_sizes(store) -> None:
    path = some_weights(store)
    size = path.stat().st_size
    os.truncate(path, size - 10)
    detail = store.status(NAME, RECIPE).detail
    assert str(path) in detail and f"{size:,}" in detail and f"{size - 10:,}" in detail


def test_a_flipped_bit_is_found_by_verification_with_both_hashes(store) -> None:
    path = some_weights(store)
    whole = bytearray(path.read_bytes())
    expected = hash_file(path)
    whole[-1000] ^= 4
    path.write_bytes(whole)
    assert store.status(NAME, RECIPE).state == "ready"  # sizes alone cannot tell
    with pytest.raises(CheckpointError) as caught:
        store.verify(NAME, RECIPE)
    message = str(caught.value)
    assert str(path) in message and expected in message and hash_file(path) in message


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '{"format": "one"}'])
def test_a_damaged_manifest_is_damage(store, text) -> None:
    (store.path(NAME, RECIPE) / "manifest.json").write_text(text)
    status = store.status(NAME, RECIPE)
    assert status.state == "damaged" and "manifest.json" in status.detail


@pytest.mark.parametrize(("key", "value"), [("format", 0), ("protected", ["adaln_proj"]), ("recipe", "int8-w8a8")])
def test_what_another_version_made_is_to_be_prepared_again(store, key, value) -> None:
    path = store.path(NAME, RECIPE) / "manifest.json"
    made = json.loads(path.read_text())
    made[key] = value
    path.write_text(json.dumps(made))
    status = store.status(NAME, RECIPE)
    assert status.state == "damaged" and "another version" in status.detail


def test_a_recipe_made_from_other_weights_than_those_that_ship_is_damaged(store, tmp_path, monkeypatch) -> None:
    shipped = sources.Source(NAME, "", "dense", size=0, folder=str(tmp_path / "source"))
    monkeypatch.setattr(sources, "SOURCES", (shipped,))
    assert store.status(NAME, RECIPE).state == "ready"
    write_source(tmp_path / "source", seed=7)
    assert "other weights" in store.status(NAME, RECIPE).detail


def test_deleting_frees_everything_of_a_recipe(store) -> None:
    taken = store.status(NAME, RECIPE).bytes
    store.prepared_folder(NAME, RECIPE).staging.mkdir()
    assert store.delete(NAME, RECIPE) >= taken
    assert store.status(NAME, RECIPE).state == "missing"
    assert store.delete(NAME, RECIPE) == 0
    left = {path.name for path in (store.root / "checkpoints" / NAME).iterdir()}
    assert left <= {f"{RECIPE}.lock"}


@pytest.mark.slow
def test_only_one_holds_the_lock_and_death_lets_go_of_it(store) -> None:
    code = (
        "import sys, time; from ideogram_app.checkpoints.prepared.store import Store; from pathlib import Path\n"
        f"with Store(Path(sys.argv[1])).prepared_folder({NAME!r}, {RECIPE!r}).lock():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=project_folder()) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RequestError, match="another process"):
            store.delete(NAME, RECIPE)
        holder.kill()
    assert store.delete(NAME, RECIPE) > 0


def test_recorded_hashes_of_a_shipped_folder_find_a_flipped_bit(tmp_path) -> None:
    folder = write_source(tmp_path)
    manifest.write_sums(folder)
    manifest.verify_sums(folder, sources.BRANCHES)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    manifest.verify_sums(folder, ("vae",))
    with pytest.raises(CheckpointError, match="was altered"):
        manifest.verify_sums(folder, sources.BRANCHES)
