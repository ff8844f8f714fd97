"""Everything in the pages that is made from the code: tables, references, the tree, and the packages' own maps.

    python tools/docs.py            says which pages are not what this tool makes; exit code 1 where any is not
    python tools/docs.py --write    makes them: README.md, ARCHITECTURE.md, CONTRIBUTING.md, docs/, packages' maps
    python tools/docs.py --maps     the same, and gives a map to every package that has none

In a page, what is made stands between `<!-- made: name -->` and `<!-- end -->`. In the docstring of a package's
`__init__.py` it is the indented part below the line `MAP_LINE`: a line for every module, with the first line of its
docstring. Maps and tree take whatever modules there are, so a module is described in one place, itself.

Left out: judgement of prose; tests/test_docs.py holds links, coverage and commands.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import reference, tables  # noqa: E402

PACKAGE = ROOT / "ideogram_app"
MAP_LINE = "Its modules (this list is made by tools/docs.py):"
WIDTH = 120  # of a line, as ruff's setting in pyproject.toml
MARK = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold something made."""
    top = [root / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    return [page for page in (*top, *sorted((root / "docs").glob("*.md"))) if page.exists()]


def filled(text: str) -> str:
    """A page with everything between its marks made anew.

    Raises:
        KeyError: a mark asks for something that nobody makes.
    """
    return MARK.sub(lambda found: f"{found[1]}{MAKERS[found[2]]()}\n{found[3]}", text)


def summary(path: Path) -> str:
    """What a module or package says of itself first: its docstring's first paragraph, in one line; "" without one."""
    file = path / "__init__.py" if path.is_dir() else path
    documented = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else None
    return " ".join((documented or "").split("\n\n")[0].split())


def members(package: Path) -> list[Path]:
    """The modules of a package, then its sub-packages, each by name; the package's own `__init__` is left out."""
    modules = [path for path in package.glob("*.py") if path.name != "__init__.py"]
    return sorted(modules) + [path for path in sorted(package.iterdir()) if path.is_dir() and any(path.glob("*.py"))]


def packages(package: Path = PACKAGE) -> Iterator[Path]:
    """A package and all packages inside it."""
    yield package
    for path in members(package):
        if path.is_dir():
            yield from packages(path)


def listed(paths: list[Path], indent: int) -> list[str]:
    """A line for each: its name, then what it says of itself."""
    names = [f"{path.name}/" if path.is_dir() else path.name for path in paths]
    column = max(map(len, names), default=0) + 2
    return [
        f"{' ' * indent}{name.ljust(column)}{summary(path)}".rstrip() for path, name in zip(paths, names, strict=True)
    ]


def wrapped(lines: list[str]) -> list[str]:
    """Lines of `listed`, those too long for a source file broken under the beginning of their text."""
    broken = []
    for line in lines:
        start = re.match(r" *\S+ *", line)
        further = " " * (start.end() if start else 0)
        broken += textwrap.wrap(line, WIDTH, subsequent_indent=further, drop_whitespace=True) or [line]
    return broken


def tree(package: Path = PACKAGE) -> str:
    """Every module of the program with what it says of itself, package by package."""
    return "\n".join(["```", f"{package.name}/", *_branches(package, 1), "```"])


def _branches(package: Path, depth: int) -> Iterator[str]:
    inside = members(package)
    modules = [path for path in inside if path.is_file()]
    yield from listed(modules, 2 * depth)
    for path in inside[len(modules) :]:
        yield from listed([path], 2 * depth)
        yield from _branches(path, depth + 1)


def mapped(text: str, package: Path) -> str:
    """The source of a package's `__init__.py` with its map made anew; unchanged where it has none."""
    head, found, rest = text.partition(f"{MAP_LINE}\n")
    if not found:
        return text
    after = re.search(r'^(?=\S)|(?=""")', rest, re.MULTILINE)
    below = rest[after.start() :] if after else ""
    gap = "" if below.startswith('"""') else "\n"
    return "\n".join([head + MAP_LINE, "", *wrapped(listed(members(package), 4)), gap + below])


def with_map(text: str) -> str:
    """The source of a package's `__init__.py` with a place for a map at the end of its docstring, where it has one."""
    documented = re.match(r'"""(.*?)"""', text, re.DOTALL)
    if MAP_LINE in text or not documented:
        return text
    return f'"""{documented[1].rstrip()}\n\n{MAP_LINE}\n"""{text[documented.end() :]}'


def changes(root: Path = ROOT, *, maps: bool = False) -> dict[Path, str]:
    """Every file that is not what this tool makes, with what it makes; `maps` also begins maps where there are none."""
    made = {page: filled(page.read_text(encoding="utf-8")) for page in pages(root)}
    for package in packages(root / PACKAGE.name):
        file = package / "__init__.py"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        made[file] = mapped(with_map(text) if maps else text, package)
    return {file: text for file, text in made.items() if text and text != _text(file)}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


MAKERS: dict[str, Callable[[], str]] = {
    "home": tables.home_table,
    "recipes": tables.recipe_table,
    "presets": tables.preset_table,
    "cards": tables.card_table,
    "measured": tables.measured_table,
    "scores": tables.score_table,
    "sources": tables.source_table,
    "family": tables.family_table,
    "encoder": tables.encoder_table,
    "search": tables.search_table,
    "quantize": tables.quantize_table,
    "speed": tables.speed_table,
    "receipts": tables.receipt_table,
    "kernels": tables.kernel_table,
    "savings": tables.saving_table,
    "choices": tables.choice_table,
    "memory": tables.memory_table,
    "commands": reference.command_tables,
    "page-flags": reference.page_flag_table,
    "endpoints": reference.endpoint_table,
    "wire": reference.wire_table,
    "precisions": reference.precision_table,
    "errors": reference.error_table,
    "out-of-memory": reference.out_of_memory_table,
    "gates": reference.gate_table,
    "tree": tree,
}


def main(arguments: list[str]) -> int:
    """Compare or write, as the module's docstring says."""
    write = bool({"--write", "--maps"} & set(arguments))
    found = changes(maps="--maps" in arguments)
    for file, text in found.items():
        print(f"{file.relative_to(ROOT)} {'written' if write else 'is not what python tools/docs.py --write makes'}")
        if write:
            file.write_text(text, encoding="utf-8")
    return 1 if found and not write else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
