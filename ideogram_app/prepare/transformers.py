"""Quantize both transformers: any source, by a recipe, into a prepared folder of the store or anywhere.

    pack every tensor, comparing as it goes  |  hash the source, beside that, in a thread
    -> smoke test -> hash the files, tensor by tensor and as wholes -> rename

`prepare` fills a folder of the store, `quantize` any folder, from any source that the readers recognise. Both are
iterators: stopping is not asking for the next event. What is done is journaled tensor by tensor with hashes of its
bytes; a later run, after a cancel or a kill at any moment, checks these hashes and continues behind them, so the files
come out the same as from one undisturbed run. Nothing has a final name before all of it was verified.

Peak memory is that of the smoke test: one block in float32, 1.06 GB of the published model. Left out: choosing what to
protect (catalog/recipes.py, calibration/tuning.py), several processes.
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
from ideogram_app.checkpoints.prepared.store import PreparedFolder, Store
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.transformer import TransformerPair, open_source
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.prepare.calibration.tuning import UNTUNED, Tuning
from ideogram_app.prepare.packing import Packing
from ideogram_app.prepare.run import PrepareRun, PrepareTask, Report
from ideogram_app.prepare.smoke_test import smoke_test, tries
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
        tuning: files made with another one are made again.
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
    prepared = store.prepared_folder(model_name, recipe_name)
    if status.state == "included" or (status.state == "ready" and source is None and not tuning.identity):
        yield _ready(recipe_name, status.bytes)
        return
    folder = local_folder(model_name, source)
    _expect_device(device)
    with prepared.lock():
        opened = open_source(folder, expected=find_model(model_name))
        status = store.status(model_name, recipe_name)
        if status.state == "ready" and _same(read_manifest(prepared.final), opened, folder, tuning):
            yield _ready(recipe_name, status.bytes)
            return
        yield from PrepareRun(prepared, _task(prepared, model_name, recipe, opened, folder, tuning, device)).guarded()


def quantize(
    source: Path,
    recipe_name: str,
    out: Path,
    *,
    unconditional: Path | None = None,
    tuning: Tuning = UNTUNED,
    device: str = "cpu",
) -> Generator[Event, None, Report]:
    """Make a recipe's files in any folder, from any source; its shape is read from the source. Yields as `prepare`.

    A folder `out` that this program made is replaced; `unconditional` is the second transformer, where it lies apart.
    """
    recipe, opened = find_recipe(recipe_name), open_source(source, unconditional)
    _expect_device(device)
    model, prepared = model_of(opened), PreparedFolder(out.absolute(), str(out))
    with prepared.lock():
        if prepared.final.exists():
            made = _made_before(prepared)
            same = (made.model, made.recipe, made.format) == (model, recipe_name, MANIFEST_FORMAT)
            if same and made.protected == tuning.effective(recipe).protected and _same(made, opened, source, tuning):
                prepared.verify()
                yield _ready(recipe_name, sum(row.size for row in made.files))
                return Report(model, recipe_name, str(prepared.final), files=made.files)
        return (
            yield from PrepareRun(prepared, _task(prepared, model, recipe, opened, source, tuning, device)).guarded()
        )


def _task(
    prepared: PreparedFolder,
    model: str,
    recipe: Recipe,
    source: TransformerPair,
    named: Path,
    tuning: Tuning,
    device: str,
) -> PrepareTask:
    effective = tuning.effective(recipe)
    packings = tuple(
        Packing(
            name,
            reader,
            reader.branch,
            effective,
            path=prepared.staging / formats.branch_file(model, effective, name),
            device=torch.device(device),
            scaling=tuning.scaling[index],
            importance=tuning.importance[index],
        )
        for index, (name, reader) in enumerate(zip(BRANCHES, source.branches, strict=True))
    )
    return PrepareTask(
        model,
        effective,
        packings,
        sources=source.files,
        folder=source.folder,
        named=named,
        smoke=smoke_test,
        tries=sum(tries(reader.branch) for reader in source.branches),
        tuning=tuning,
    )


def _expect_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # the latter where torch was built without it
        raise RequestError(f"There is no device {device} to pack on", got=str(problem).partition("\n")[0]) from problem


def _same(made: Manifest, source: TransformerPair, folder: Path, tuning: Tuning) -> bool:
    """Whether files were made from this source and, where there is a calibration, with it."""
    calibration = tuning.calibration or tuning.identity
    return made.made_from(str(folder), source.folder, source.files) and calibration in ("", made.calibration)


def _made_before(prepared: PreparedFolder) -> Manifest:
    """The manifest of a folder that is there already; RequestError where this program did not make it."""
    try:
        return read_manifest(prepared.final)
    except CheckpointError as problem:
        said = f"{prepared.final} is there already and was not made by this program"
        raise RequestError(said, got=str(problem), do="Name another folder, or remove this one") from problem


def model_of(source: TransformerPair) -> str:
    """The model of this shape; a replica of fewer layers goes by the name of the published one."""
    shapes = tuple(reader.branch for reader in source.branches)
    return next((model.name for model in MODELS.values() if model.branches == shapes), UNNAMED)


def _ready(recipe: str, size: int) -> Event:
    return Event("prepare", recipe, size, size, message=f"{recipe} is ready")
