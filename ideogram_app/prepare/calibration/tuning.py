"""Which calibration a recipe is made with: one named, one made on this machine, one that ships, or none.

    <root>/calibrations/<model>.safetensors     made by `calibrate`, or put there from another machine
    <included source>/calibration.safetensors   ships with the program, for a model that does

Most recipes use nothing of it. Left out: choosing between several calibrations; who has two names one.
"""

from __future__ import annotations

from pathlib import Path

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.catalog.sources import find_source
from ideogram_app.errors import RequestError
from ideogram_app.files import cached_hash
from ideogram_app.prepare.calibration.calibration import read_calibration
from ideogram_app.prepare.packing import UNTUNED, Tuning


def calibration_file(root: Path, model: str) -> Path:
    """Where a model's calibration is left for later preparations."""
    return root / "calibrations" / f"{find_model(model).name}.safetensors"


def calibration_at_hand(root: Path, model: str) -> Path | None:
    """The calibration made or put on this machine, else the one that ships, else None."""
    included = find_source(model).included
    candidates = [calibration_file(root, model), *([included / "calibration.safetensors"] if included else [])]
    return next((path for path in candidates if path.is_file()), None)


def tuning_for(model: str, recipe: str, calibration: Path | None) -> Tuning:
    """What a recipe takes from a calibration.

    Raises:
        RequestError: the recipe is nothing without one.
        CheckpointError: the file is missing, damaged or of another model.
    """
    row = find_recipe(recipe)
    if calibration is None:
        if row.smoothed and not row.fragile:
            raise RequestError(
                f"{row.title} needs a calibration, and there is none of {find_model(model).title}",
                expected="statistics of what its layers read",
                do=f"Run `python -m ideogram_app calibrate --model {model}`, or choose another recipe",
            )
        return UNTUNED
    return Tuning.of(read_calibration(calibration, find_model(model)), row, cached_hash(calibration))
