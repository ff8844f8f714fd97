"""Where prepared checkpoints rest: status, verification, publishing by rename, listing, deletion.

    <root>/checkpoints/<model>/<recipe>/            published: manifest.json, config.json files and weights
    <root>/checkpoints/<model>/<recipe>.partial/    being prepared, or left by a run that ended early
    <root>/checkpoints/<model>/<recipe>.journal     what of the partial folder is done (quantization/writer.py)
    <root>/checkpoints/<model>/<recipe>.lock        held by the process that prepares, by the operating system's lock

A folder appears under its final name in one rename, after its files and manifest have reached the disk, so whatever has
that name was finished. `status` is cheap and compares sizes; `verify` reads everything and compares hashes.

Left out: fetching over the network, sharing files between recipes, other users' rights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ideogram_app.architecture import MODELS, find_model
from ideogram_app.checkpoints.manifest import (
    AGAIN,
    FORMAT,
    MANIFEST,
    Manifest,
    expect_hash,
    expect_size,
    read_manifest,
    source_files,
    source_rows,
    sync,
    verify_sums,
    write_text,
)
from ideogram_app.checkpoints.safetensors_file import SafetensorsFile
from ideogram_app.checkpoints.sources import BRANCHES, find_source, project_folder
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.recipes import RECIPES, find_recipe
from ideogram_app.wire import to_json

ROOT_VARIABLE = "IDEOGRAM_APP_DATA"


@dataclass(frozen=True)
class Status:
    """One recipe of one model on this disk.

    Attributes:
        state: ready, included (ships with the program), partial, damaged or missing.
        path: the folder to load from, or where it would be.
        bytes: taken on disk; for what is included, the size of its weights.
        detail: for people: what is wrong, or what would help.
    """

    model: str
    recipe: str
    state: str
    path: Path
    bytes: int = 0
    detail: str = ""

    @property
    def usable(self) -> bool:
        return self.state in ("ready", "included")


class Store:
    """The folder of prepared checkpoints."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def path(self, model: str, recipe: str) -> Path:
        """The folder a recipe is loaded from, whether it is there or not.

        Raises:
            RequestError: no such model or recipe.
        """
        included = find_source(model).included
        if find_recipe(recipe).storage == "dense" and included is not None:
            return included
        return self.root / "checkpoints" / find_model(model).name / recipe

    def is_included(self, model: str, recipe: str) -> bool:
        """Whether a recipe is used straight from what ships with the program."""
        return self.path(model, recipe) == find_source(model).included

    def staging(self, model: str, recipe: str) -> Path:
        """The folder in which a recipe is prepared."""
        return self._beside(model, recipe, ".partial")

    def journal(self, model: str, recipe: str) -> Path:
        """The file that says what of the staging folder is done."""
        return self._beside(model, recipe, ".journal")

    def status(self, model: str, recipe: str) -> Status:
        """What is there, by sizes alone.

        Raises:
            RequestError: no such model or recipe.
        """
        folder = self.path(model, recipe)
        if self.is_included(model, recipe):
            return self._included(model, recipe, folder)
        if folder.is_dir():
            taken = _taken(folder)
            try:
                self._check_sizes(model, recipe, folder)
            except CheckpointError as problem:
                return Status(model, recipe, "damaged", folder, taken, str(problem))
            return Status(model, recipe, "ready", folder, taken)
        staging = self.staging(model, recipe)
        if staging.is_dir():
            return Status(model, recipe, "partial", folder, _taken(staging), "Preparing it again continues there.")
        return Status(model, recipe, "missing", folder, 0, "It has not been prepared.")

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
        for row in read_manifest(folder).files:
            expect_hash(folder / row.path, row.sha256)

    def list(self) -> tuple[Status, ...]:
        """Everything that is there, in the order of the models and recipes."""
        found = [self.status(model, recipe) for model in MODELS for recipe in RECIPES]
        return tuple(status for status in found if status.state != "missing")

    def delete(self, model: str, recipe: str) -> int:
        """Remove a recipe, and what a preparation left of it; says how many bytes that freed.

        Raises:
            RequestError: it ships with the program, or is being prepared right now.
        """
        if self.is_included(model, recipe):
            raise RequestError(f"{recipe} of {model} ships with the program and cannot be deleted")
        with self.lock(model, recipe):
            folders = [self.path(model, recipe), self.staging(model, recipe), self._beside(model, recipe, ".old")]
            freed = sum(_taken(folder) for folder in folders if folder.is_dir())
            if folders[0].is_dir():  # leaves its name in one step, so that a half deleted folder never has it
                shutil.rmtree(folders[2], ignore_errors=True)
                folders[0].rename(folders[2])
            for folder in folders[1:]:
                shutil.rmtree(folder, ignore_errors=True)
            self.journal(model, recipe).unlink(missing_ok=True)
        return freed

    @property
    def disk_free(self) -> int:
        """Bytes free on the disk of the root, which need not exist yet."""
        folder = self.root.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    @contextmanager
    def lock(self, model: str, recipe: str) -> Iterator[None]:
        """Hold a recipe's files alone; the operating system lets go of it when the process ends, however it ends.

        Raises:
            RequestError: another process, or thread, holds it.
        """
        path = self._beside(model, recipe, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise RequestError(
                f"{recipe} of {model} is being prepared by another process",
                do="Wait until that has finished, or stop it",
            ) from problem
        try:
            yield
        finally:
            lock.release()

    def publish(self, manifest: Manifest) -> Path:
        """Give a finished staging folder its final name, in place of what has it."""
        final = self.path(manifest.model, manifest.recipe)
        staging = self.staging(manifest.model, manifest.recipe)
        old = self._beside(manifest.model, manifest.recipe, ".old")
        write_text(staging / MANIFEST, to_json(manifest))
        for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
            for path in folder.iterdir():
                if path.is_file():
                    sync(path)
            sync(folder)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        staging.rename(final)
        sync(final.parent)
        self.journal(manifest.model, manifest.recipe).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def _beside(self, model: str, recipe: str, suffix: str) -> Path:
        return self.root / "checkpoints" / find_model(model).name / (find_recipe(recipe).name + suffix)

    def _included(self, model: str, recipe: str, folder: Path) -> Status:
        try:
            files = [SafetensorsFile(path).path for path in source_files(folder)]
        except CheckpointError as problem:
            return Status(model, recipe, "damaged", folder, 0, str(problem))
        taken = sum(path.stat().st_size for path in files)
        return Status(model, recipe, "included", folder, taken, "Ships with the program.")

    def _check_sizes(self, model: str, recipe: str, folder: Path) -> None:
        """Whether a published folder is whole and of this version and source, without reading its weights."""
        manifest, row = read_manifest(folder), find_recipe(recipe)
        made = (manifest.format, manifest.model, manifest.recipe, manifest.protected)
        if made != (FORMAT, model, recipe, row.protected):
            raise CheckpointError(
                f"{folder} was made by another version of this program",
                expected=f"format {FORMAT}, {model} {recipe}, protecting {', '.join(row.protected) or 'nothing'}",
                got=f"format {made[0]}, {made[1]} {made[2]}, protecting {', '.join(made[3]) or 'nothing'}",
                do=AGAIN,
            )
        for entry in manifest.files:
            expect_size(folder / entry.path, entry.size)
        included = find_source(model).included
        if included is not None and manifest.source_files != source_rows(included):
            raise CheckpointError(f"{folder} was made from other weights than those in {included}", do=AGAIN)


def default_root() -> Path:
    """`data/` in the project's folder, unless the environment names another folder."""
    named = os.environ.get(ROOT_VARIABLE)
    return Path(named).expanduser() if named else project_folder() / "data"


def _taken(folder: Path) -> int:
    """Bytes that files in a folder take; a file being filled takes only what has been written."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(min(stat.st_size, getattr(stat, "st_blocks", 2**50) * 512) for stat in stats)
