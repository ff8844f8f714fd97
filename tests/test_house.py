"""The layering of the house, read from the imports themselves: nobody knows anybody above them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ideogram_app"

# Each line imports only from the lines above it; the first line, which knows no torch, also from itself. A folder
# stands for everything in it that no other line names, and its files may know each other.
LINES: list[list[str]] = [
    [
        "errors",
        "recipes",
        "captions",
        "wire",
        "presets",
        "architecture",
        "flow",
        "rates",
        "travel",
        "remembered",
        "activations",
        "footprint",
        "versions",
        "checks",
        "folders",
        "text_encoder",
        "savings",
        "encoders",
    ],
    ["hardware", "measure", "metrics", "quantization"],
    ["verdicts", "memory", "probe"],
    ["job"],
    ["option"],
    ["placement", "phases", "shortage"],
    ["preference"],
    ["planner", "checkpoints", "kernels"],
    [
        "model",
        "quantization.calibration",
        "quantization.companions",
        "quantization.hashing",
        "quantization.packing",
        "quantization.run",
        "quantization.smoke",
        "quantization.tuning",
        "quantization.writer",
        "comparison",
        "ladder",
    ],
    ["velocity"],
    ["pipeline", "history", "sheet"],
    ["attempts", "learning"],
    ["reading"],
    ["compare", "calibrate", "miniature", "interop", "recipe_api", "benchmark"],
    ["backend"],
    ["jobs"],
    ["outlook"],
    ["guide"],
    ["board"],
    ["work"],
    ["studio"],
    ["ui", "console"],
    ["prepare_command"],
    ["__main__"],
]
WITHOUT_TORCH = [*LINES[0], "hardware", "verdicts", "job", "option", "placement", "phases", "preference", "planner"]


def line_of(module: str) -> int:
    """The line a module stands on, by its own name or the folder it is in; -1 for the package's own `__init__`."""
    parts = module.split(".")
    while parts:
        for number, names in enumerate(LINES):
            if ".".join(parts) in names:
                return number
        parts.pop()
    if module:
        pytest.fail(f"ideogram_app.{module} stands on no line: give it one in tests/test_house.py and in the design")
    return -1


def name_of(file: Path) -> str:
    parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports_of(tree: ast.AST) -> list[str]:
    """Every module of the package that a file imports, inside functions too, without the leading `ideogram_app.`."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                inside = whole.removeprefix("ideogram_app.")
                found.append(whole if module.startswith("ideogram_app") and is_module(inside) else module)
    return [name.removeprefix("ideogram_app.") for name in found if name.startswith("ideogram_app.")]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_imports_only_from_the_lines_above_it(file: Path) -> None:
    module = name_of(file)
    own = line_of(module)
    folder = module.split(".")[0]
    for imported in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
        line = line_of(imported)
        same_folder = imported.split(".")[0] == folder and line <= own
        base = own == line == 0
        assert line < own or same_folder or base, f"{module} must not know {imported}"


def test_the_package_itself_imports_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_package_and_its_planning_import_neither_torch_nor_gradio() -> None:
    names = ", ".join(f"ideogram_app.{name}" for name in WITHOUT_TORCH if is_module(name))
    code = f"import sys, ideogram_app, {names}; print([m for m in ('torch', 'gradio') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_has_at_most_400_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
