"""Which prepared folder belongs to which model and recipe: status, verification, listing, deletion.

    <root>/checkpoints/<model>/<recipe>/       published; beside it stands what folder.py needs while it is made
    <root>/checkpoints/<model>/companions/     text encoder, tokenizer, scheduler and VAE, for all recipes

`status` is cheap and compares sizes; `verify` reads everything and compares hashes. A folder whose protected layers
are not those of the recipe's row is another version's work, unless a calibration chose them: then they are its own.

Left out: fetching over the network (download.py), sharing files between recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import Recipe, find_recipe
from ideogram_app.catalog.sources import BRANCHES, find_source
from ideogram_app.catalog.text_encoder import DENSE
from ideogram_app.checkpoints.prepared.folder import PreparedFolder
from ideogram_app.checkpoints.prepared.manifest import (
    AGAIN,
    MANIFEST_FORMAT,
    Manifest,
    expect_size,
    read_manifest,
    source_files,
    source_rows,
    verify_sums,
)
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.files import bytes_taken, data_folder, identity

COMPONENTS_FOLDER = "companions"


@dataclass(frozen=True)
class Status:
    """One recipe of one model on this disk.

    Attributes:
        state: ready, included (ships with the program), partial, damaged or missing.
        path: the folder to load from, or where it would be.
        bytes: taken on disk; for what is included, the size of its weights.
        detail: for people: what is wrong, or what would help.
        smoke: of what is ready, what its smoke test compared and the relative error of each; empty where none is known.
    """

    model: str
    recipe: str
    state: str
    path: Path
    bytes: int = 0
    detail: str = ""
    smoke: Mapping[str, float] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.state in ("ready", "included")


class Store:
    """The folder of prepared checkpoints."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_folder()

    def path(self, model: str, recipe: str) -> Path:
        """The folder a recipe is loaded from, whether it is there or not.

        Raises:
            RequestError: no such model or recipe.
        """
        included = find_source(model).included
        if find_recipe(recipe).storage == "dense" and included is not None:
            return included
        return self.place(model, recipe).final

    def place(self, model: str, recipe: str) -> PreparedFolder:
        """Where a recipe is prepared and published.

        Raises:
            RequestError: no such model or recipe.
        """
        name = find_model(model).name
        return PreparedFolder(self.root / "checkpoints" / name / find_recipe(recipe).name, f"{recipe} of {model}")

    def companions(self, model: str) -> PreparedFolder:
        """Where what stands around a model's transformers is prepared and published.

        Raises:
            RequestError: no such model.
        """
        name = find_model(model).name
        return PreparedFolder(self.root / "checkpoints" / name / COMPONENTS_FOLDER, f"{COMPONENTS_FOLDER} of {model}")

    def components_status(self, model: str) -> Status:
        """What of them is there, by sizes alone; `recipe` is that of the text encoder."""
        source, place = find_source(model), self.companions(model)
        folder = place.final
        if source.included:
            return Status(model, DENSE, "included", source.included)
        if not folder.is_dir() and place.staging.is_dir():
            taken = bytes_taken(place.staging)
            return Status(model, "", "partial", folder, taken, "Preparing a recipe again continues there.")
        if not folder.is_dir():
            return Status(model, "", "missing", folder, 0, "They have not been prepared.")
        try:
            manifest = read_manifest(folder)
            for entry in manifest.files:
                expect_size(folder / entry.path, entry.size)
        except CheckpointError as problem:
            return Status(model, "", "damaged", folder, bytes_taken(folder), str(problem))
        return Status(model, manifest.recipe, "ready", folder, bytes_taken(folder))

    def is_included(self, model: str, recipe: str) -> bool:
        """Whether a recipe is used straight from what ships with the program."""
        return self.path(model, recipe) == find_source(model).included

    def effective(self, model: str, recipe: str) -> Recipe:
        """A recipe with the protected list that its prepared folder was made with; as its row has it before.

        Raises:
            RequestError: no such model or recipe.
            CheckpointError: the folder's manifest is damaged.
        """
        folder, row = self.path(model, recipe), find_recipe(recipe)
        if self.is_included(model, recipe) or not folder.is_dir():
            return row.protecting()
        return read_manifest(folder).effective(row)

    def status(self, model: str, recipe: str) -> Status:
        """What is there, by sizes alone.

        Raises:
            RequestError: no such model or recipe.
        """
        folder = self.path(model, recipe)
        if self.is_included(model, recipe):
            return self._included(model, recipe, folder)
        if folder.is_dir():
            taken = bytes_taken(folder)
            try:
                manifest = self._check_sizes(model, recipe, folder)
            except CheckpointError as problem:
                return Status(model, recipe, "damaged", folder, taken, str(problem))
            return Status(model, recipe, "ready", folder, taken, smoke=manifest.smoke)
        staging = self.place(model, recipe).staging
        if staging.is_dir():
            return Status(model, recipe, "partial", folder, bytes_taken(staging), "Preparing it again continues there.")
        return Status(model, recipe, "missing", folder, 0, "It has not been prepared.")

    def version(self, model: str, recipe: str) -> str:
        """Which files a recipe is loaded from; another once it was made anew."""
        included = self.is_included(model, recipe)
        return identity(self.path(model, recipe), BRANCHES if included else ("",))

    def verify(self, model: str, recipe: str) -> None:
        """Read every byte and compare hashes.

        Raises:
            CheckpointError: names the first file that differs, the expected hash and the one it has.
        """
        folder = self.path(model, recipe)
        if self.is_included(model, recipe):
            verify_sums(folder, BRANCHES)
            return
        self._check_sizes(model, recipe, folder)
        self.place(model, recipe).verify()

    def delete(self, model: str, recipe: str) -> int:
        """Remove a recipe, and what a preparation left of it; says how many bytes that freed.

        Raises:
            RequestError: it ships with the program, or is being prepared right now.
        """
        if self.is_included(model, recipe):
            raise RequestError(f"{recipe} of {model} ships with the program and cannot be deleted")
        place = self.place(model, recipe)
        with place.lock():
            return place.delete()

    def _included(self, model: str, recipe: str, folder: Path) -> Status:
        try:
            files = [SafetensorsFile(path).path for path in source_files(folder)]
        except CheckpointError as problem:
            return Status(model, recipe, "damaged", folder, 0, str(problem))
        taken = sum(path.stat().st_size for path in files)
        return Status(model, recipe, "included", folder, taken, "Ships with the program.")

    def _check_sizes(self, model: str, recipe: str, folder: Path) -> Manifest:
        """What a published folder says of itself, if it is whole and of this version and source; reads no weights."""
        manifest = read_manifest(folder)
        protected = manifest.protected if manifest.calibration else find_recipe(recipe).protecting().protected
        made = (manifest.format, manifest.model, manifest.recipe, manifest.protected)
        if made != (MANIFEST_FORMAT, model, recipe, protected):
            raise CheckpointError(
                f"{folder} was made by another version of this program",
                expected=f"format {MANIFEST_FORMAT}, {model} {recipe}, protecting {', '.join(protected) or 'nothing'}",
                got=f"format {made[0]}, {made[1]} {made[2]}, protecting {', '.join(made[3]) or 'nothing'}",
                do=AGAIN,
            )
        for entry in manifest.files:
            expect_size(folder / entry.path, entry.size)
        included = find_source(model).included
        if included is not None and manifest.source_files != source_rows(included):
            raise CheckpointError(f"{folder} was made from other weights than those in {included}", do=AGAIN)
        return manifest
