"""The README keeps its word: tables equal the code, the tree equals the package, and pictures exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tools"))

import readme  # noqa: E402


def test_every_table_is_the_one_that_the_code_makes() -> None:
    assert all(f"<!-- made: {name} -->" in TEXT for name in readme.TABLES)
    assert readme.filled(TEXT) == TEXT, "run python tools/readme.py"


def test_the_tree_names_every_module_and_no_other() -> None:
    tree = TEXT.split("ideogram_app/\n", 1)[1].split("```", 1)[0]
    folders: list[str] = []  # from the outermost in; two spaces of indent each
    named = set()
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2 - 1, line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            named.add("".join(folders) + name)
    there = {
        file.relative_to(ROOT / "ideogram_app").as_posix()
        for file in (ROOT / "ideogram_app").rglob("*.py")
        if file.name != "__init__.py"
    }
    assert named == there


def test_pictures_and_files_that_it_names_exist() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
    for path in ("LICENSE", "NOTICE", "CHANGELOG.md", "app.py", "launch.py", "benchmarks/LOG.md"):
        assert (ROOT / path).is_file(), path


def test_the_front_matter_of_the_space_agrees_with_the_requirements() -> None:
    pinned = dict(re.findall(r"^(\w+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    front = TEXT.split("---", 2)[1]
    assert f"sdk_version: {pinned['gradio']}" in front and "app_file: app.py" in front and "sdk: gradio" in front


def test_no_path_of_one_machine_stands_in_the_repository() -> None:
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")
    for name in files:
        file = ROOT / name
        if file.suffix in {".py", ".md", ".json", ".toml", ".txt"} and not name.startswith(("assets/", "tests/")):
            assert not pattern.search(file.read_text(encoding="utf-8")), name
