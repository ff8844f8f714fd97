"""Published sources of weights: repository, layout, size, licence and gate of each, one frozen row.

checkpoints/published/ reads what a row names. The miniature ships with the program, so its row names a folder instead.
The first row of a model is the one to take where none is asked for.

Rows other than pipelines hold transformers alone; text encoder and VAE then come from elsewhere. Left out: downloading
(hub/download.py); mirrors, which change nothing in the licence; nvfp4 and SDNQ files, which are not read; distilled
models of one transformer; files whose names or scales nobody here has seen described (DeepBeepMeep).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ideogram_app.catalog.models import find_model
from ideogram_app.errors import CheckpointError
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
        model: the model it holds, a key of `models.MODELS`.
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
    gated: bool = False
    licence: str = LICENCE
    revision: str = "main"
    branches: tuple[str, str] = BRANCHES
    patterns: tuple[str, ...] = PIPELINE
    folder: str = ""

    @property
    def url(self) -> str:
        """The page of the repository; "" where it ships with the program."""
        return f"{HUB}/{self.repository}" if self.repository else ""

    @property
    def included(self) -> Path | None:
        """The folder of a source that ships with the program."""
        return project_folder() / self.folder if self.folder else None


def _ideogram(repository: str, layout: str, size: int, *files: str, gated: bool = False, rev: str = "main") -> Source:
    """A row of Ideogram 4: a diffusers pipeline, or the file of each transformer, or one file that holds both."""
    branches = (files[0], files[-1]) if files else BRANCHES
    return Source(
        model="ideogram-4",
        repository=repository,
        layout=layout,
        size=size,
        gated=gated,
        revision=rev,
        branches=branches,
        patterns=files or PIPELINE,
    )


# Sizes are of what `patterns` take. The first row of a model is where its weights come from unless another is named.
SOURCES: tuple[Source, ...] = (
    Source("miniature", "", "dense", size=0, licence="that of this program", folder="assets/miniature"),
    _ideogram("ideogram-ai/ideogram-4-fp8", "fp8", 27_500_000_000, gated=True),
    _ideogram("ideogram-ai/ideogram-4-nf4", "nf4", 16_120_000_000, gated=True),
    _ideogram(
        "ideogram-ai/ideogram-4-nf4-diffusers",
        "nf4",
        16_120_000_000,
        gated=True,
        rev="1874bc70267ba2c823a7239e1d70dd308c8d64dc",
    ),
    _ideogram("CalamitousFelicitousness/Ideogram-4-bf16-Diffusers", "dense", 49_900_000_000),
    _ideogram(
        "Comfy-Org/Ideogram-4",
        "comfy-fp8",
        18_561_482_586,
        "diffusion_models/ideogram4_fp8_scaled.safetensors",
        "diffusion_models/ideogram4_unconditional_fp8_scaled.safetensors",
    ),
    _ideogram(
        "Comfy-Org/Ideogram-4",
        "comfy-int8",
        19_166_931_424,
        "diffusion_models/ideogram4_int8_convrot.safetensors",
        "diffusion_models/ideogram4_unconditional_int8_convrot.safetensors",
        rev="bbee2ab2b14b2b5223448d12d6e31e5f9cec0546",
    ),
    _ideogram("leejet/ideogram-4-GGUF", "gguf", 11_300_000_000, "ideogram4-Q4_0.gguf", "ideogram4_uncond-Q4_0.gguf"),
    _ideogram(
        "molbal/ideogram-4-gguf",
        "gguf",
        11_280_000_000,
        "ideogram4-transformer-q4_0.gguf",
        "ideogram4-unconditional_transformer-q4_0.gguf",
    ),
    _ideogram(
        "rectangleworm/ideogram-4-gguf",
        "gguf",
        10_440_000_000,
        "diffusion/cond/ideogram4-Q4_K.gguf",
        "diffusion/uncond/ideogram4_unconditional-Q4_K.gguf",
    ),
    _ideogram(
        "stduhpf/ideogram-4-gguf",
        "gguf",
        20_280_000_000,
        "ideogram4-Q8_0.gguf",
        "ideogram4_unconditional-Q8_0.gguf",
    ),
    _ideogram(
        "transformerlab/ideogram-4-int8-w8a8",
        "transformerlab-int8",
        20_410_000_000,
        "ideogram4-int8-w8a8.safetensors",
        gated=True,
    ),
    _ideogram(
        "transformerlab/ideogram-4-gguf-q4_k", "transformerlab-gguf", 10_440_000_000, "ideogram4-q4_k.gguf", gated=True
    ),
    _ideogram(
        "transformerlab/ideogram-4-gguf-q8_0", "transformerlab-gguf", 19_700_000_000, "ideogram4-q8_0.gguf", gated=True
    ),
)


def find_source(model: str) -> Source:
    """The row a model comes from. RequestError: no such model; CheckpointError: a model without a source."""
    find_model(model)
    found = next((source for source in SOURCES if source.model == model), None)
    if found is None:
        raise CheckpointError(f"No source of {model} is known")
    return found
