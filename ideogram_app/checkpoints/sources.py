"""The published sources of weights, one frozen row each.

A row says what a repository holds, how large it is and under which terms; readers.py reads it. The miniature ships with
the program, so its row names a folder instead. The first row of a model is the one to take where none is asked for.

Left out: downloading. This version reads what is in the project's folder, or a folder that the user already has;
mirrors and repackaged files (ComfyUI, GGUF of others, NF4) have no row yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ideogram_app.architecture import find_model
from ideogram_app.errors import AccessError, CheckpointError

BRANCHES = ("transformer", "unconditional_transformer")  # folders of a diffusers pipeline, conditional first
# What a diffusers pipeline is made of; no pickles, no code.
PIPELINE = ("model_index.json", "*/*.json", "*/*.safetensors", "tokenizer/*")


@dataclass(frozen=True)
class Source:
    """One published repository.

    Attributes:
        model: the model it holds, a name of `architecture.MODELS`.
        repository: owner and name on the Hugging Face Hub; "" where it ships with the program.
        layout: a name of `layouts.LAYOUTS`, which the reader finds in the headers and compares.
        size: bytes of a complete download.
        gated: whether the licence must be accepted with an account before files can be fetched.
        revision: the commit or branch that is fetched; what was fetched is recorded as a commit.
        branches: the folder, or the file, of each transformer inside the repository; the same twice where one file
            holds both.
        patterns: what is fetched, as fnmatch patterns of paths in the repository.
        folder: where it lies inside the project's folder, for what ships with the program.
    """

    model: str
    repository: str
    layout: str
    size: int
    gated: bool
    licence: str
    url: str
    revision: str = "main"
    branches: tuple[str, str] = BRANCHES
    patterns: tuple[str, ...] = PIPELINE
    folder: str = ""

    @property
    def included(self) -> Path | None:
        """The folder of a source that ships with the program."""
        return project_folder() / self.folder if self.folder else None


SOURCES: tuple[Source, ...] = (
    Source(
        model="miniature",
        repository="",
        layout="dense",
        size=0,
        gated=False,
        licence="that of this program",
        url="",
        folder="assets/miniature",
    ),
    Source(
        model="ideogram-4",
        repository="ideogram-ai/ideogram-4-fp8",
        layout="fp8",
        size=27_500_000_000,
        gated=True,
        licence="Ideogram Non-Commercial Model Agreement",
        url="https://huggingface.co/ideogram-ai/ideogram-4-fp8",
    ),
)


def project_folder() -> Path:
    """The folder that holds `ideogram_app/` and `assets/`."""
    return Path(__file__).resolve().parents[2]


def find_source(model: str) -> Source:
    """The row a model comes from.

    Raises:
        RequestError: no such model.
        CheckpointError: a model without a source.
    """
    find_model(model)
    for source in SOURCES:
        if source.model == model:
            return source
    raise CheckpointError(f"No source of {model} is known")


def local_folder(model: str, folder: Path | None = None) -> Path:
    """The pipeline folder to read a model's weights from: the one given, or the one that ships with the program.

    Raises:
        AccessError: the weights are published elsewhere and no local copy was named.
        CheckpointError: the folder is not there, or holds no pipeline.
    """
    source = find_source(model)
    folder = folder or source.included
    if folder is None:
        terms = f"gated: accept the {source.licence} at {source.url}" if source.gated else f"see {source.url}"
        raise AccessError(
            f"The weights of {find_model(model).title} do not ship with this program",
            expected=f"a local copy of {source.repository} ({source.size / 1e9:.1f} GB, {terms})",
            got="no folder",
            do="This version does not download. Fetch the repository yourself, then `prepare RECIPE --source FOLDER`",
        )
    missing = [name for name in BRANCHES if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a folder of this model",
            expected=f"a diffusers pipeline with the folders {' and '.join(BRANCHES)}",
            got=f"no {' and no '.join(missing)}" if folder.is_dir() else "no such folder",
        )
    return folder
