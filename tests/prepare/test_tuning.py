"""What a calibration changes in the files made: which one is taken, what each recipe uses of it, and what without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.manifest import read_manifest
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.files import cached_hash
from ideogram_app.prepare.calibration.calibration import read_calibration
from ideogram_app.prepare.calibration.tuning import UNTUNED, calibration_at_hand, calibration_file, tuning_for
from ideogram_app.studio.local_backend import LocalBackend
from tests.conftest import MINIATURE

SHIPPED = MINIATURE / "calibration.safetensors"


def test_the_miniatures_calibration_ships_and_one_made_here_goes_before_it(tmp_path: Path) -> None:
    assert calibration_at_hand(tmp_path, "miniature") == SHIPPED
    assert calibration_at_hand(tmp_path, "ideogram-4") is None
    own = calibration_file(tmp_path, "miniature")
    own.parent.mkdir()
    shutil.copyfile(SHIPPED, own)
    assert calibration_at_hand(tmp_path, "miniature") == own


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_from_a_calibration_what_its_row_says(recipe: str) -> None:
    row, tuned = RECIPES[recipe], tuning_for("miniature", recipe, SHIPPED)
    assert bool(tuned.scaling[0]) == bool(tuned.scaling[1]) == row.smoothed
    assert bool(tuned.importance[0]) == bool(tuned.importance[1]) == (row.storage == "gguf")
    assert (tuned.protected is not None) == bool(row.fragile)
    uses_any = row.smoothed or bool(row.fragile) or row.storage == "gguf"
    assert (tuned.calibration == cached_hash(SHIPPED)) == uses_any and (tuned == UNTUNED) == (not uses_any)


def test_importance_is_the_mean_square_of_what_a_layer_reads_and_fits_its_columns() -> None:
    tuned = tuning_for("miniature", "gguf-q4_k", SHIPPED)
    for branch, importance in zip(MODELS["miniature"].branches, tuned.importance, strict=True):
        packed = {linear.name: linear for linear in branch.linears() if RECIPES["gguf-q4_k"].packs(linear.name)}
        assert set(importance) == {f"{name}.weight" for name in packed}
        for name, linear in packed.items():
            values = importance[f"{name}.weight"]
            assert (
                values.shape == (linear.columns,) and bool((values >= 0).all()) and bool(torch.isfinite(values).all())
            )


def test_a_calibrated_folder_records_it_protects_fewer_layers_and_loads(tmp_path: Path) -> None:
    backend, store = LocalBackend(tmp_path), Store(tmp_path)
    list(backend.prepare("miniature", "int8-w8a8"))
    manifest = read_manifest(store.path("miniature", "int8-w8a8"))
    found = read_calibration(SHIPPED, MODELS["miniature"]).protected(RECIPES["int8-w8a8"].packs)
    assert manifest.calibration == cached_hash(SHIPPED)
    assert manifest.protected == (*RECIPES["int8-w8a8"].protected, *found)
    assert store.status("miniature", "int8-w8a8").usable
    by_name = sum(RECIPES["int8-w8a8"].protecting().packs(linear.name) for linear in _linears())
    calibrated = sum(manifest.effective(RECIPES["int8-w8a8"]).packs(linear.name) for linear in _linears())
    assert calibrated > by_name


def test_what_is_ready_is_not_made_again_for_a_calibration_nobody_named(tmp_path: Path) -> None:
    backend, store = LocalBackend(tmp_path), Store(tmp_path)
    list(backend.prepare("miniature", "int8-w8a8"))
    path = store.path("miniature", "int8-w8a8") / "manifest.json"
    before = path.stat().st_mtime_ns
    own = calibration_file(tmp_path, "miniature")
    own.parent.mkdir()
    own.write_bytes(b"broken")
    list(backend.prepare("miniature", "int8-w8a8"))
    assert path.stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="cannot be read as a calibration"):
        list(LocalBackend(tmp_path, calibration=own).prepare("miniature", "int8-w8a8"))


def test_smoothing_that_is_ready_may_be_asked_for_again(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    for _ in range(2):
        *_, last = backend.prepare("miniature", "int8-w8a8-smooth")
        assert "ready" in last.message


def test_smoothing_alone_is_refused_where_nothing_was_calibrated() -> None:
    with pytest.raises(RequestError, match=r"needs a calibration.*calibrate --model ideogram-4"):
        tuning_for("ideogram-4", "int8-w8a8-smooth", None)
    assert tuning_for("ideogram-4", "int8-w8a8", None) == UNTUNED


def test_a_calibration_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="another"):
        tuning_for("ideogram-4", "int8-w8a8", SHIPPED)


def _linears() -> list:  # type: ignore[type-arg]
    return list(MODELS["miniature"].conditional.linears())
