"""Local weights: the folder or file that a model is read from, given by the user or shipped with the program.

Left out: which repositories publish weights (catalog/sources.py), and reading (transformer.py, text_encoder.py).
"""

from __future__ import annotations

from pathlib import Path

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.sources import BRANCHES, SOURCES, find_source
from ideogram_app.errors import AccessError, CheckpointError


def local_folder(model: str, folder: Path | None = None) -> Path:
    """Where to read a model's weights from: the folder or file given, or the folder that ships with the program.

    A pipeline's folder, one with the files of a row of `SOURCES`, or a single file; `transformer.open_source` opens it.

    Raises:
        AccessError: the weights are published elsewhere and no local copy was named.
        CheckpointError: it is not there, or a folder that holds none of these.
    """
    source = find_source(model)
    folder = folder or source.included
    if folder is None:
        terms = f"gated: accept the {source.licence} at {source.url}" if source.gated else f"see {source.url}"
        raise AccessError(
            f"The weights of {find_model(model).title} do not ship with this program",
            expected=f"a local copy of {source.repository} ({source.size / 1e9:.1f} GB, {terms})",
            got="no folder",
            do="Fetch them from the page or the command line, or name the folder or file where they are",
        )
    rows = [row.branches for row in SOURCES if row.model == model]
    if folder.is_file() or any(all((folder / name).is_file() for name in names) for names in rows):
        return folder
    missing = [name for name in BRANCHES if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a folder of this model",
            expected=f"a diffusers pipeline with the folders {' and '.join(BRANCHES)}",
            got=f"no {' and no '.join(missing)}" if folder.is_dir() else "no such folder",
        )
    return folder
