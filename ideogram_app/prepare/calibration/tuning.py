"""Tuning of a recipe by a calibration: smoothing, importance, protected layers; which calibration file is used.

    <root>/calibrations/<model>.safetensors     made by `calibrate`, or put there from another machine
    <included source>/calibration.safetensors   ships with the program, for a model that does

Most recipes use nothing of it. Left out: choosing between several calibrations; who has two names one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import Recipe, find_recipe
from ideogram_app.catalog.sources import BRANCHES, find_source
from ideogram_app.errors import RequestError
from ideogram_app.files import cached_hash
from ideogram_app.prepare.calibration.calibration import Calibration, read_calibration
from ideogram_app.prepare.calibration.smoothing import Scaling


@dataclass(frozen=True)
class Tuning:
    """What a recipe takes from a calibration, for each branch; nothing where there is none."""

    # what tensors are multiplied by before they are packed, by diffusers' names
    scaling: tuple[Scaling, Scaling] = ({}, {})
    # diffusers' name of a weight -> (columns,), for GGUF's search
    importance: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {})
    protected: tuple[str, ...] | None = None  # name fragments of all unpacked layers, in place of the recipe's choice
    calibration: str = ""  # hash of the statistics, which manifests record; found from the rest where it is left out

    @classmethod
    def of(cls, calibration: Calibration, recipe: Recipe, sha256: str) -> Tuning:
        """What of a calibration a recipe uses: nothing of it, for some. `sha256` is that of the calibration's file."""
        tuned = cls(
            scaling=(calibration.scaling(0), calibration.scaling(1)) if recipe.smoothed else ({}, {}),
            importance=(_moments(calibration, 0, recipe), _moments(calibration, 1, recipe)),
            protected=recipe.protecting(calibration.protected(recipe.packs)).protected if recipe.fragile else None,
        )
        return tuned if tuned == UNTUNED else replace(tuned, calibration=sha256)

    def effective(self, recipe: Recipe) -> Recipe:
        """The recipe with the protected list to use."""
        return recipe.protecting() if self.protected is None else replace(recipe, protected=self.protected)

    @property
    def identity(self) -> str:
        """Changes with anything that changes the files made; "" where nothing is tuned."""
        if self == UNTUNED:
            return ""
        digest = hashlib.sha256(f"{self.calibration} {self.protected}".encode())
        for name, tensor in self._tensors():
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that is a number, named, in one order."""
        for branch in range(len(BRANCHES)):
            for name, factors in sorted(self.scaling[branch].items()):
                for kind, tensor in (("rows", factors.rows), ("columns", factors.columns)):
                    if tensor is not None:
                        yield f"{branch} {name} {kind}", tensor
            for name, importance in sorted(self.importance[branch].items()):
                yield f"{branch} {name} importance", importance


UNTUNED = Tuning()


def _moments(calibration: Calibration, branch: int, recipe: Recipe) -> dict[str, Tensor]:
    """Importance of every column of the weights that a GGUF recipe packs; no other storage uses it."""
    if recipe.storage != "gguf":
        return {}
    linears = [linear.name for linear in calibration.branches[branch].branch.linears() if recipe.packs(linear.name)]
    return {f"{name}.weight": calibration.branches[branch].of(name).second_moment for name in linears}


def calibration_file(root: Path, model: str) -> Path:
    """The path of a model's calibration, for later preparations."""
    return root / "calibrations" / f"{find_model(model).name}.safetensors"


def calibration_at_hand(root: Path, model: str) -> Path | None:
    """The calibration made or put on this machine, else the one that ships, else None."""
    included = find_source(model).included
    candidates = [calibration_file(root, model), included and included / "calibration.safetensors"]
    return next((path for path in candidates if path and path.is_file()), None)


def tuning_for(model: str, recipe: str, calibration: Path | None) -> Tuning:
    """What a recipe takes from a calibration.

    Raises:
        RequestError: the recipe needs one.
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
