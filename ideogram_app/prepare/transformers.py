"""Source -> recipe -> files: packs both transformers, in runs of rows, and publishes them.

    pack every tensor into its place, comparing as it goes  |  hash the source, beside that, in a thread
    -> smoke test -> hash the files, part by part and as wholes -> rename

`prepare` fills a place in the store, `quantize` any folder, from any source that the readers recognise. Both are
iterators: stopping is not asking for the next event. What is done is journaled tensor by tensor with hashes of its
bytes; a later run, after a cancel or a kill at any moment, checks these hashes and continues behind them, so the files
come out the same as from one undisturbed run. Nothing has a final name before all of it was verified.

Peak memory is that of the smoke test: one block in float32, 1.06 GB of the published model. Left out: choosing what to
protect (catalog/recipes.py, calibration.py), several processes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from ideogram_app.catalog.models import MODELS, find_model
from ideogram_app.catalog.recipes import Recipe, find_recipe
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.manifest import MANIFEST_FORMAT, Manifest, read_manifest
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.prepared.store import PreparedFolder, Store
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.transformer import TransformerPair, open_source
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.prepare.packing import UNTUNED, Packing, Tuning
from ideogram_app.prepare.run import PrepareRun, PrepareTask, Report
from ideogram_app.prepare.smoke_test import Subject, smoke_test, tries
from ideogram_app.records import Event

UNNAMED = "ideogram-4"  # what a model of no known size is called in its files


def prepare(
    store: Store,
    model_name: str,
    recipe_name: str,
    source: Path | None = None,
    *,
    tuning: Tuning = UNTUNED,
    device: str = "cpu",
) -> Iterator[Event]:
    """Make a recipe's files in the store, or do nothing where they are ready.

    Args:
        source: a pipeline folder, or whatever else the readers know; what ships with the program where None.
        tuning: what a calibration found; files made with another one are made again.
        device: where rows are packed.

    Yields:
        Events of phase `prepare`, then `smoke`, then `verify`. `done` and `total` count bytes of the finished files,
        nine tenths of each when it is packed and the last when it is hashed; in phase `smoke`, what was compared.
        `message` is what was just done; the last event, of phase `prepare` again, says that it is ready.

    Raises:
        RequestError: no such model or recipe, or another process prepares it.
        AccessError: the weights do not ship with the program and no folder was named.
        DiskError: too little room; says how much is needed.
        CheckpointError: the source is not what it should be, or what was written does not match it.
    """
    recipe, status = find_recipe(recipe_name), store.status(model_name, recipe_name)
    place = store.prepared_folder(model_name, recipe_name)
    if status.state == "included" or (status.state == "ready" and source is None and not tuning.identity):
        yield _ready(recipe_name, status.bytes)
        return
    folder = local_folder(model_name, source)
    _expect_device(device)
    with place.lock():
        opened = open_source(folder, expected=find_model(model_name))
        status = store.status(model_name, recipe_name)
        if status.state == "ready" and _same(read_manifest(place.final), opened, folder, tuning):
            yield _ready(recipe_name, status.bytes)
            return
        yield from PrepareRun(place, _work(place, model_name, recipe, opened, folder, tuning, device)).guarded()


def quantize(
    source: Path,
    recipe_name: str,
    out: Path,
    *,
    unconditional: Path | None = None,
    tuning: Tuning = UNTUNED,
    device: str = "cpu",
) -> Generator[Event, None, Report]:
    """Make a recipe's files in any folder, from any source; its shape is read from the source.

    Args:
        source: a folder or a file.
        out: the folder to make; one that this program made is replaced.
        unconditional: the second transformer, where it lies apart.

    Yields, Raises: as `prepare`.

    Returns:
        What was done, for who drives the generator to its end.
    """
    recipe, opened = find_recipe(recipe_name), open_source(source, unconditional)
    _expect_device(device)
    model, place = model_of(opened), PreparedFolder(out.absolute(), str(out))
    with place.lock():
        if place.final.exists():
            made = _made_before(place)
            same = (made.model, made.recipe, made.format) == (model, recipe_name, MANIFEST_FORMAT)
            if same and made.protected == tuning.effective(recipe).protected and _same(made, opened, source, tuning):
                place.verify()
                yield _ready(recipe_name, sum(row.size for row in made.files))
                return Report(model, recipe_name, str(place.final), files=made.files)
        run = PrepareRun(place, _work(place, model, recipe, opened, source, tuning, device))
        yield from run.guarded()
        return run.report()


def _work(
    place: PreparedFolder, model: str, recipe: Recipe, source: TransformerPair, named: Path, tuning: Tuning, device: str
) -> PrepareTask:
    """Both transformers of a source as a recipe packs them; which layers it protects is the tuning's to say."""
    effective = tuning.effective(recipe)
    kind = recipe.gguf_type or recipe.storage
    packings = tuple(
        Packing(
            name,
            reader,
            reader.branch,
            effective,
            place.staging / formats.branch_file(model, effective, name),
            torch.device(device),
            tuning.scaling[index],
            tuning.importance[index],
        )
        for index, (name, reader) in enumerate(zip(BRANCHES, source.branches, strict=True))
    )
    branches = {name: reader.branch for name, reader in zip(BRANCHES, source.branches, strict=True)}

    def smoke(packing: Packing) -> Iterator[tuple[str, float]]:
        branch, reader = branches[packing.name], packing.reader
        written = PackedFile(packing.path, effective, branch)
        scaled = packing.scaled if packing.scaling else None
        return smoke_test(Subject(branch, reader.config, kind, reader.tensor, scaled, written.values))

    count = sum(tries(branch) for branch in branches.values())
    return PrepareTask(model, effective, packings, source.files, source.folder, named, smoke, count, tuning)


def _expect_device(device: str) -> None:
    """Refuse a device that torch cannot use here, before anything is read."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # the latter where torch was built without it
        raise RequestError(f"There is no device {device} to pack on", got=str(problem).partition("\n")[0]) from problem


def _same(made: Manifest, source: TransformerPair, folder: Path, tuning: Tuning) -> bool:
    """Whether files were made from this source and, where there is a calibration, with it."""
    calibration = tuning.calibration or tuning.identity
    return made.made_from(str(folder), source.folder, source.files) and calibration in ("", made.calibration)


def _made_before(place: PreparedFolder) -> Manifest:
    """What a folder that is there already says of itself.

    Raises:
        RequestError: this program did not make it, so it is not this program's to replace.
    """
    try:
        return read_manifest(place.final)
    except CheckpointError as problem:
        raise RequestError(
            f"{place.final} is there already and was not made by this program",
            got=str(problem),
            do="Name another folder, or remove this one",
        ) from problem


def model_of(source: TransformerPair) -> str:
    """The model of this shape; a replica of fewer layers goes by the name of the published one."""
    shapes = tuple(reader.branch for reader in source.branches)
    return next((model.name for model in MODELS.values() if model.branches == shapes), UNNAMED)


def _ready(recipe: str, size: int) -> Event:
    return Event("prepare", recipe, size, size, message=f"{recipe} is ready")
