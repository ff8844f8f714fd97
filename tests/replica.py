"""A small repository at a Hub on this machine, and the client turned towards it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from ideogram_app.catalog.sources import find_source
from ideogram_app.hub import download as fetching
from ideogram_app.hub import resume as transferring
from tools.hub import Faults, Hub

PATTERNS = ("model_index.json", "*/*.json", "*/*.safetensors", "tokenizer/*")
SOURCE = replace(find_source("ideogram-4"), revision="main", patterns=PATTERNS)
TOKEN = "hf_" + "s3cr3t" * 6
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
OTHERS = "unconditional_transformer/diffusion_pytorch_model.safetensors"
SIZES = {
    "model_index.json": 300,
    "transformer/config.json": 700,
    WEIGHTS: 3_000_000,
    OTHERS: 2_000_000,
    "tokenizer/tokenizer.json": 40_000,
    "tokenizer/empty.txt": 0,
}
UNWANTED = ("README.md", "vae/pickled.bin", "tokenizer/tokenization.py")
TOTAL = sum(SIZES.values())


def write_repository(folder: Path) -> Path:
    """Random files under the names of a pipeline, with some that must stay where they are."""
    chance = random.Random(0)
    for path, size in {**SIZES, **dict.fromkeys(UNWANTED, 50)}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(chance.randbytes(size))
    return folder


def turn_to(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """Have the client in this process ask that endpoint, with nobody logged in.

    huggingface_hub reads its environment once, when it is imported.
    """
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_TOKEN_PATH", "no-such-file")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)


@contextmanager
def serving(repository: Path, patch: pytest.MonkeyPatch, faults: Faults | None = None) -> Iterator[Hub]:
    """A running hub that the client in this process asks, and waits that a test can afford."""
    with Hub(repository, SOURCE.repository, faults=faults or Faults()).running() as hub:
        turn_to(hub.endpoint, patch)
        patch.setattr(transferring, "WAITS", (0.01,) * 6)
        patch.setattr(fetching, "WAITS", (0.01,) * 6)
        yield hub
        huggingface_hub.close_session()


def holds(folder: Path, repository: Path) -> bool:
    """Whether every wanted file is there, byte for byte."""
    return all((folder / path).read_bytes() == (repository / path).read_bytes() for path in SIZES)
