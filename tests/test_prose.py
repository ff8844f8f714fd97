"""What docstrings and comments cite exists: paths, and names of files."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ideogram_app", "tests", "tools", "benchmarks", "training")
FILES = sorted([*ROOT.glob("*.py"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))])
CITED = re.compile(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|md|json|css|js|toml)\b")
ELSEWHERE = {
    "manifest.json",  # written by the program, as the next three are
    "comparison.json",
    "machine.json",
    "benchmark-nvidia-h100-ideogram-4-1024.json",
    "model_management.py",  # of ComfyUI
    "gguf-py/gguf/constants.py",  # of llama.cpp
    "a6000_int8_cfg_table.json",  # of comfy-kitchen
}


def prose(file: Path) -> Iterator[str]:
    """Docstrings and comments."""
    text = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@pytest.fixture(scope="module")
def paths() -> str:
    """Every file of the project, one a line, each behind a slash."""
    kept = [file for name in (*FOLDERS, "assets", "docs") for file in (ROOT / name).rglob("*")]
    return "".join(f"/{file.relative_to(ROOT).as_posix()}\n" for file in (*kept, *ROOT.glob("*")))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_that_prose_cites_exists(file: Path, paths: str) -> None:
    cited = {found[0] for text in prose(file) for found in CITED.finditer(text)} - ELSEWHERE
    assert not [name for name in sorted(cited) if f"/{name}\n" not in paths]
