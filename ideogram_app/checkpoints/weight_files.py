"""Weight files of a folder: found by index or pattern, opened by their first bytes; config.json read.

Pickles are refused, because opening one runs whatever it says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.errors import CheckpointError

WEIGHT_PATTERNS = ("*.safetensors", "*.gguf")
PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
WeightFile = SafetensorsFile | GgufFile


def open_weights(path: Path) -> WeightFile:
    """A file of weights by what it begins with.

    Raises:
        CheckpointError: missing, a pickle, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}", do="Fetch or prepare it again")
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] == b"GGUF":
        return GgufFile(path)
    # torch.save writes a zip or a bare pickle. Safetensors begin with the length of their header, which fits the file.
    if start.startswith(PICKLES) and int.from_bytes(start, "little") > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a pickle, which may run any program when it is opened",
            expected="safetensors or GGUF",
            do="Take another publication of these weights",
        )
    return SafetensorsFile(path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index lists, else all; a file is its own.

    Raises:
        CheckpointError: none, or an index that cannot be read.
    """
    if folder.is_file():
        return [folder]
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CheckpointError(f"{indexes[0]} is no index of weights", got=str(problem)) from problem
        return sorted(folder / Path(name).name for name in names)
    files = next((found for pattern in WEIGHT_PATTERNS if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} holds no weights",
            expected="at least one .safetensors or .gguf file; pickles (.bin, .pt, .ckpt) are never opened",
            got=", ".join(others)[:200] or "nothing",
        )
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}")
    return json_object(path.read_bytes(), f"{path} is damaged")


def json_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that says `what` is wrong otherwise."""
    try:
        value = json.loads(text)
    except ValueError as problem:
        raise CheckpointError(what, expected="JSON", got=str(problem)) from problem
    if not isinstance(value, dict):
        raise CheckpointError(what, expected="a JSON object", got=type(value).__name__)
    return value
