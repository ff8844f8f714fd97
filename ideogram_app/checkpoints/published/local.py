"""The published sources of weights, one frozen row each.

A row says what a repository holds, how large it is and under which terms; transformer.py reads it. The miniature ships
with the program, so its row names a folder instead. The first row of a model is the one to take where none is asked
for.

Rows other than pipelines hold transformers alone; text encoder and VAE then come from elsewhere. Left out: downloading
(download.py); mirrors, which change nothing in the licence; nvfp4 and SDNQ files, which are not read; distilled models
of one transformer; files whose names or scales nobody here has seen described (DeepBeepMeep).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ideogram_app.catalog.models import find_model
from ideogram_app.errors import AccessError, CheckpointError
from ideogram_app.files import project_folder

BRANCHES = ("transformer", "unconditional_transformer")  # folders of a diffusers pipeline, conditional first
LICENCE = "Ideogram Non-Commercial Model Agreement"
HUB = "https://huggingface.co"
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


def _ideogram(
    repository: str,
    layout: str,
    size: int,
    gated: bool = False,
    pair: tuple[str, str, str] | None = None,
    revision: str = "main",
) -> Source:
    """A row of Ideogram 4; `pair` is a file's name with a hole, and what fills it for either transformer."""
    files = (pair[0].format(pair[1]), pair[0].format(pair[2])) if pair else BRANCHES
    return Source(
        *("ideogram-4", repository, layout, size, gated, LICENCE, f"{HUB}/{repository}", revision, files),
        patterns=tuple(dict.fromkeys(files)) if pair else PIPELINE,
    )


# Sizes are of what `patterns` take. The first row of a model is where its weights come from unless another is named.
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
        licence=LICENCE,
        url=f"{HUB}/ideogram-ai/ideogram-4-fp8",
    ),
    _ideogram("ideogram-ai/ideogram-4-nf4", "nf4", 16_120_000_000, gated=True),
    _ideogram(
        *("ideogram-ai/ideogram-4-nf4-diffusers", "nf4", 16_120_000_000),
        gated=True,
        revision="1874bc70267ba2c823a7239e1d70dd308c8d64dc",
    ),
    _ideogram("CalamitousFelicitousness/Ideogram-4-bf16-Diffusers", "dense", 49_900_000_000),
    _ideogram(
        *("Comfy-Org/Ideogram-4", "comfy-fp8", 18_561_482_586),
        pair=("diffusion_models/ideogram4{}_fp8_scaled.safetensors", "", "_unconditional"),
    ),
    _ideogram(
        *("Comfy-Org/Ideogram-4", "comfy-int8", 19_166_931_424),
        pair=("diffusion_models/ideogram4{}_int8_convrot.safetensors", "", "_unconditional"),
        revision="bbee2ab2b14b2b5223448d12d6e31e5f9cec0546",
    ),
    _ideogram("leejet/ideogram-4-GGUF", "gguf", 11_300_000_000, pair=("ideogram4{}-Q4_0.gguf", "", "_uncond")),
    _ideogram(
        *("molbal/ideogram-4-gguf", "gguf", 11_280_000_000),
        pair=("ideogram4-{}transformer-q4_0.gguf", "", "unconditional_"),
    ),
    _ideogram(
        *("rectangleworm/ideogram-4-gguf", "gguf", 10_440_000_000),
        pair=("diffusion/{}-Q4_K.gguf", "cond/ideogram4", "uncond/ideogram4_unconditional"),
    ),
    _ideogram("stduhpf/ideogram-4-gguf", "gguf", 20_280_000_000, pair=("ideogram4{}-Q8_0.gguf", "", "_unconditional")),
    _ideogram(
        *("transformerlab/ideogram-4-int8-w8a8", "transformerlab-int8", 20_410_000_000),
        gated=True,
        pair=("ideogram4-int8-w8a8.safetensors", "", ""),
    ),
    _ideogram(
        *("transformerlab/ideogram-4-gguf-q4_k", "transformerlab-gguf", 10_440_000_000),
        gated=True,
        pair=("ideogram4-q4_k.gguf", "", ""),
    ),
    _ideogram(
        *("transformerlab/ideogram-4-gguf-q8_0", "transformerlab-gguf", 19_700_000_000),
        gated=True,
        pair=("ideogram4-q8_0.gguf", "", ""),
    ),
)


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
    """Where to read a model's weights from: the folder or file given, or the folder that ships with the program.

    A pipeline's folder, one with the files of a row of `SOURCES`, or a single file; `readers.open_source` opens it.

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
