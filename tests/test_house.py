"""The layering of the house, read from the imports themselves: nobody knows anybody above them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ideogram_app"

# Each line imports only from the lines above it; packages on one line do not know each other.
LINES = [
    "errors text",
    "files wire quantization",
    "catalog",
    "machine records",
    "planning kernels checkpoints",
    "hub model",
    "generation interop",
    "comparison prepare",
    "benchmark",
    "studio",
    "ui",
    "cli",
    "__main__ recipe_api",
]
LINE_OF = {name: number for number, line in enumerate(LINES) for name in line.split()}
# What answers before the page is up: none of it may import torch.
WITHOUT_TORCH = ("catalog", "errors", "files", "planning", "records", "text", "wire")
WITHOUT_TORCH_IN_MACHINE = ("machine.capabilities", "machine.gpu_specs", "machine.hardware", "machine.memory")
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imported_packages(tree: ast.AST) -> set[str]:
    """Packages of the program that a file imports from, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("ideogram_app.")} - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_from_the_lines_above_its_package(file: Path) -> None:
    own = name_of(file).split(".")[0]
    imported = imported_packages(ast.parse(file.read_text(encoding="utf-8")))
    below = LINE_OF.get(own, 0)  # the package's own `__init__` imports nothing
    assert imported <= {name for name, line in LINE_OF.items() if line < below} | {own}


def test_at_most_seven_modules_stand_beside_the_packages() -> None:
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= 7


def test_what_answers_before_the_page_is_up_imports_neither_torch_nor_gradio() -> None:
    names = [name_of(file).removesuffix(".__init__") for file in FILES if name_of(file).split(".")[0] in WITHOUT_TORCH]
    modules = ", ".join(f"ideogram_app.{name}" for name in (*names, *WITHOUT_TORCH_IN_MACHINE))
    code = f"import sys, ideogram_app, {modules}; print([m for m in ('torch', 'gradio') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_has_at_most_400_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_import_table_of_the_architecture_page_is_this_one() -> None:
    table = ARCHITECTURE.split("## Who may import whom", 1)[1].split("```", 2)[1]
    outside = {"app.py", "lab", "recipe_api", "training"}  # beside the package, still to come, or an old import path
    shown = [set(line.replace(",", " ").split()) - outside for line in table.strip().splitlines()]
    assert shown == [set(line.split()) - outside for line in LINES]


def test_every_module_that_the_architecture_page_names_is_there() -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*)`", ARCHITECTURE)) - {"lab/", "data/sources/"}
    bases = (PACKAGE, ROOT, PACKAGE / "checkpoints", PACKAGE / "model", PACKAGE / "prepare", ROOT / "benchmarks")
    gone = [
        name for name in named if not any((base / name).is_dir() or (base / f"{name}.py").exists() for base in bases)
    ]
    assert not gone
