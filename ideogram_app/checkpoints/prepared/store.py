"""Store of prepared checkpoints: a folder per recipe, its status, lock, publishing, verification, deletion.

    <root>/checkpoints/<model>/companions/         text encoder, tokenizer, scheduler and VAE, for all recipes
    <root>/checkpoints/<model>/<recipe>/           published: manifest.json, config.json files, weights, licence
    <root>/checkpoints/<model>/<recipe>.partial/   being prepared, or left by a run that ended early
    <root>/checkpoints/<model>/<recipe>.journal    what of the partial folder is done (journal.py)
    <root>/checkpoints/<model>/<recipe>.lock       the operating system's lock, held by the process that prepares
    <root>/checkpoints/<model>/<recipe>.old/       the folder that was replaced, for the moment of replacing

A folder appears under its final name in one rename, after its files and manifest have reached the disk, so whatever has
that name was finished. `status` is cheap and compares sizes; `verify` reads everything and compares hashes. A folder
whose protected layers are not those of the recipe's row was made by another version, unless a calibration chose them.

Left out: fetching over the network (hub/download.py), sharing files between recipes, other users' rights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import Recipe, find_recipe
from ideogram_app.catalog.sources import BRANCHES, find_source
from ideogram_app.catalog.text_encoder import DENSE
from ideogram_app.checkpoints.prepared.manifest import (
    AGAIN,
    MANIFEST,
    MANIFEST_FORMAT,
    Manifest,
    expect_hash,
    expect_size,
    file_row,
    read_manifest,
    verify_sums,
)
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.checkpoints.weight_files import weight_files
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.files import (
    bytes_taken,
    data_folder,
    delete_folder,
    full_disk_reported,
    identity,
    locked,
    sync,
    write_text,
)
from ideogram_app.wire import to_json

COMPONENTS_FOLDER = "companions"


@dataclass(frozen=True)
class PreparedFolder:
    """A folder of prepared weights, and what lies beside it while it is made.

    `final` is the folder once it is published, `title` its name in messages. Its parents need not exist.
    """

    final: Path
    title: str

    @property
    def staging(self) -> Path:
        return self._beside(".partial")

    @property
    def journal(self) -> Path:
        return self._beside(".journal")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder exclusively; the operating system releases it when the process ends, however it ends.

        Raises:
            RequestError: another process, or thread, holds it.
            DiskError: the disk is full.
        """
        parent = self.final.parent
        with ExitStack() as held:
            with full_disk_reported(f"There is no room left in {parent}", parent, "Make room and try again"):
                held.enter_context(locked(self.final, f"{self.title} is being prepared"))
            yield

    def publish(self, manifest: Manifest) -> Path:
        """Give the finished staging folder its final name, replacing the folder that has it."""
        old = self._beside(".old")
        write_text(self.staging / MANIFEST, to_json(manifest))
        for folder in (self.staging, *(path for path in self.staging.rglob("*") if path.is_dir())):
            for path in folder.iterdir():
                if path.is_file():
                    sync(path)
            sync(folder)
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.staging.rename(self.final)
        sync(self.final.parent)
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        return self.final

    def verify(self) -> None:
        """Read every byte and compare hashes.

        Raises:
            CheckpointError: names the first file that differs, the expected hash and the one it has.
        """
        for row in read_manifest(self.final).files:
            expect_hash(self.final / row.path, row.sha256)

    def delete(self) -> int:
        """Remove the folder, and what a preparation left of it; returns how many bytes that freed. Hold the lock."""
        freed = sum(bytes_taken(folder) for folder in (self.final, self.staging, self._beside(".old")))
        delete_folder(self.final)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        return freed

    def _beside(self, suffix: str) -> Path:
        return self.final.with_name(self.final.name + suffix)


@dataclass(frozen=True)
class Status:
    """One recipe of one model on this disk.

    Attributes:
        state: ready, included (ships with the program), partial, damaged or missing.
        path: the folder to load from, or where it would be.
        bytes: taken on disk; for what is included, the size of its weights.
        detail: for people: what is wrong, or what would help.
        smoke: relative error of everything that its smoke test compared, where it is ready.
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
    """The folder of prepared checkpoints; methods raise RequestError where there is no such model or recipe."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_folder()

    def path(self, model: str, recipe: str) -> Path:
        """The folder a recipe is loaded from, whether it is there or not."""
        included = find_source(model).included
        if find_recipe(recipe).storage == "dense" and included is not None:
            return included
        return self.prepared_folder(model, recipe).final

    def prepared_folder(self, model: str, recipe: str) -> PreparedFolder:
        name = find_model(model).name
        return PreparedFolder(self.root / "checkpoints" / name / find_recipe(recipe).name, f"{recipe} of {model}")

    def components_folder(self, model: str) -> PreparedFolder:
        name = find_model(model).name
        return PreparedFolder(self.root / "checkpoints" / name / COMPONENTS_FOLDER, f"{COMPONENTS_FOLDER} of {model}")

    def components_status(self, model: str) -> Status:
        """The components' state, by sizes alone; `recipe` is that of the text encoder."""
        source, prepared = find_source(model), self.components_folder(model)
        folder, staging = prepared.final, prepared.staging
        if source.included:
            return Status(model, DENSE, "included", source.included)
        if not folder.is_dir():
            if not staging.is_dir():
                return Status(model, "", "missing", folder, 0, "They have not been prepared.")
            again = "Preparing a recipe again continues there."
            return Status(model, "", "partial", folder, bytes_taken(staging), again)
        try:
            manifest = _whole(folder)
        except CheckpointError as problem:
            return Status(model, "", "damaged", folder, bytes_taken(folder), str(problem))
        return Status(model, manifest.recipe, "ready", folder, bytes_taken(folder))

    def is_included(self, model: str, recipe: str) -> bool:
        """Whether a recipe is used straight from what ships with the program."""
        return self.path(model, recipe) == find_source(model).included

    def effective(self, model: str, recipe: str) -> Recipe:
        """A recipe with the protected list that its prepared folder was made with; without a folder, with its row's.

        Raises:
            CheckpointError: the folder's manifest is damaged.
        """
        folder, row = self.path(model, recipe), find_recipe(recipe)
        if self.is_included(model, recipe) or not folder.is_dir():
            return row.protecting()
        return read_manifest(folder).effective(row)

    def status(self, model: str, recipe: str) -> Status:
        """The state of a recipe's folder, by sizes alone."""
        folder, taken = self.path(model, recipe), 0
        try:
            if self.is_included(model, recipe):
                taken = sum(SafetensorsFile(path).path.stat().st_size for path in _source_files(folder))
                return Status(model, recipe, "included", folder, taken, "Ships with the program.")
            if folder.is_dir():
                taken = bytes_taken(folder)
                return Status(model, recipe, "ready", folder, taken, smoke=_checked(model, recipe, folder).smoke)
        except CheckpointError as problem:
            return Status(model, recipe, "damaged", folder, taken, str(problem))
        staging = self.prepared_folder(model, recipe).staging
        if staging.is_dir():
            return Status(model, recipe, "partial", folder, bytes_taken(staging), "Preparing it again continues there.")
        return Status(model, recipe, "missing", folder, 0, "It has not been prepared.")

    def version(self, model: str, recipe: str) -> str:
        """The identity of the files that a recipe is loaded from: another one once they were made anew."""
        return identity(self.path(model, recipe), BRANCHES if self.is_included(model, recipe) else ("",))

    def verify(self, model: str, recipe: str) -> None:
        """Read every byte and compare hashes.

        Raises:
            CheckpointError: names the first file that differs, the expected hash and the one it has.
        """
        folder = self.path(model, recipe)
        if self.is_included(model, recipe):
            verify_sums(folder, BRANCHES)
            return
        _checked(model, recipe, folder)
        self.prepared_folder(model, recipe).verify()

    def delete(self, model: str, recipe: str) -> int:
        """Remove a recipe, and what a preparation left of it; returns how many bytes that freed.

        Raises:
            RequestError: it ships with the program, or is being prepared right now.
        """
        if self.is_included(model, recipe):
            raise RequestError(f"{recipe} of {model} ships with the program and cannot be deleted")
        with (prepared := self.prepared_folder(model, recipe)).lock():
            return prepared.delete()


def _whole(folder: Path) -> Manifest:
    """The manifest of a published folder, all of whose files are there with their sizes."""
    manifest = read_manifest(folder)
    for row in manifest.files:
        expect_size(folder / row.path, row.size)
    return manifest


def _checked(model: str, recipe: str, folder: Path) -> Manifest:
    """The manifest of a published folder that is whole and of this version and source; reads no weights."""
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
    _whole(folder)
    included = find_source(model).included
    if included and manifest.source_files != tuple(file_row(path, included) for path in _source_files(included)):
        raise CheckpointError(f"{folder} was made from other weights than those in {included}", do=AGAIN)
    return manifest


def _source_files(folder: Path) -> list[Path]:
    return [path for name in BRANCHES for path in weight_files(folder / name)]
