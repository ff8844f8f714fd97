"""The pages keep their word: they equal what the code makes, name everything there is, and link to what exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import launch
from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.catalog.text_encoder import ENCODER_RECIPES
from ideogram_app.cli import serve
from ideogram_app.interop.quant_config import PRECISIONS
from tools import docs, reference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST_README = 150
OTHER_PROGRAMS = ("hf", "sudo")  # whose commands a page may show
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, those too that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in answer.stdout.splitlines() if (ROOT / name).is_file()]


MARKDOWN = tracked("*.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # those for users
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def prose(text: str) -> str:
    """A page without its fenced blocks, in which nothing is a link or a heading."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings as GitHub makes them: lower case, hyphens, a number where one is there twice."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command in a fenced block of the users' pages: where it is shown, and its words."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in ("", "sh", "bash", "console"):
                for line in block.replace("\\\n", " ").splitlines():
                    words = shlex.split(line, comments=True)
                    if words:
                        yield f"{page.name}: {line.strip()}", words


# Pages and what makes them ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_page_is_what_the_tool_makes() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("IDEOGRAM_APP_", "GRADIO_"))}
    answer = subprocess.run(
        [sys.executable, "tools/docs.py"], cwd=ROOT, env=plain, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, f"run python tools/docs.py --write\n{answer.stdout}{answer.stderr}"


def test_everything_that_can_be_made_stands_on_a_page() -> None:
    asked = {name for page in docs.pages() for _, name, _ in docs.MARK.findall(page.read_text(encoding="utf-8"))}
    assert asked == set(docs.MAKERS)


def test_an_unknown_mark_is_an_error_and_not_an_empty_table() -> None:
    with pytest.raises(KeyError, match="nothing-like-it"):
        docs.filled("<!-- made: nothing-like-it -->\n<!-- end -->")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= LONGEST_README


def test_the_front_matter_of_the_space_agrees_with_the_requirements() -> None:
    pinned = dict(re.findall(r"^(\w+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M))
    front = README.split("---", 2)[1]
    assert README.startswith("---\n")
    assert f"sdk_version: {pinned['gradio']}" in front and "app_file: app.py" in front and "sdk: gradio" in front


def test_no_path_of_one_machine_stands_in_the_repository() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")
    for file in tracked():
        name = file.relative_to(ROOT).as_posix()
        if file.suffix in {".py", ".md", ".json", ".toml", ".txt"} and not name.startswith(("assets/", "tests/")):
            assert not pattern.search(file.read_text(encoding="utf-8")), name


# Maps of packages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of two modules and a package inside, as small as the tool can meet."""
    folder = tmp_path / "ideogram_app"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""The whole.\n\nMore of it.\n"""\n\n__version__ = "1"\n', encoding="utf-8")
    (folder / "second.py").write_text('"""Comes second:\nover two lines.\n\nMore.\n"""\n', encoding="utf-8")
    (folder / "first.py").write_text(f'"""{"Comes first, at length " * 7}."""\n', encoding="utf-8")
    (folder / "inner" / "__init__.py").write_text('"""What is inside."""\n', encoding="utf-8")
    (folder / "inner" / "deep.py").write_text('"""Deep down."""\n', encoding="utf-8")
    return folder


def test_a_map_has_a_line_for_every_module_with_the_first_line_of_its_docstring(package: Path) -> None:
    found = docs.changes(package.parent, maps=True)
    assert set(found) == {package / "__init__.py", package / "inner" / "__init__.py"}
    whole = found[package / "__init__.py"]
    assert f"More of it.\n\n{docs.MAP_LINE}\n\n    first.py   Comes first" in whole
    assert '\n    second.py  Comes second: over two lines.\n    inner/     What is inside.\n"""\n\n__version__' in whole
    assert max(map(len, whole.splitlines())) <= docs.WIDTH
    assert "    deep.py  Deep down.\n" in found[package / "inner" / "__init__.py"]


def test_a_map_follows_its_modules_and_keeps_what_is_written_around_it(package: Path) -> None:
    file = package / "__init__.py"
    text = f'"""The whole.\n\n{docs.MAP_LINE}\n\n    gone.py  No more.\n\nMore of it.\n"""\n\n__version__ = "1"\n'
    file.write_text(text, encoding="utf-8")
    (made,) = docs.changes(package.parent).values()
    assert "gone.py" not in made and "    inner/     What is inside.\n\nMore of it.\n" in made
    file.write_text(made, encoding="utf-8")
    assert docs.changes(package.parent) == {}
    (package / "third.py").write_text('"""Comes third."""\n', encoding="utf-8")
    assert "    third.py   Comes third.\n" in docs.changes(package.parent)[file]


def test_a_package_that_has_no_map_is_left_alone_unless_maps_are_asked_for(package: Path) -> None:
    assert docs.changes(package.parent) == {}
    for file, text in docs.changes(package.parent, maps=True).items():
        file.write_text(text, encoding="utf-8")
    assert docs.changes(package.parent, maps=True) == {}


def test_a_package_that_says_nothing_of_itself_gets_no_map(package: Path) -> None:
    (package / "inner" / "__init__.py").unlink()
    assert set(docs.changes(package.parent, maps=True)) == {package / "__init__.py"}


def test_where_one_package_has_a_map_all_have() -> None:
    files = [folder / "__init__.py" for folder in docs.packages()]
    mapped = [file.exists() and docs.MAP_LINE in file.read_text(encoding="utf-8") for file in files]
    assert all(mapped) or not any(mapped), "run python tools/docs.py --maps"


def test_the_tree_names_every_module(package: Path) -> None:
    assert docs.tree(package).splitlines() == [
        "```",
        "ideogram_app/",
        f"  first.py   {'Comes first, at length ' * 7}.",
        "  second.py  Comes second: over two lines.",
        "  inner/  What is inside.",
        "    deep.py  Deep down.",
        "```",
    ]


# Links --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_and_picture_leads_to_something(page: Path) -> None:
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_every_page_for_users_can_be_reached_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(README)}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= linked
    assert {"ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "NOTICE"} <= linked


def test_anchors_are_those_that_github_makes() -> None:
    text = "# What *cards* get?\n## A `flag`, twice\n```\n# no heading\n```\n## A flag twice\n## [Link](x.md) here\n"
    assert anchors(text) == {"what-cards-get", "a-flag-twice", "a-flag-twice-1", "link-here"}


def test_files_that_prose_names_exist() -> None:
    """Paths of scripts, results and assets; modules of the package are named by the generated parts."""
    for page in MARKDOWN:
        for path in re.findall(
            r"`((?:benchmarks|tools|tests|assets|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


# Everything there is has a page -------------------------------------------------------------------------------------


def of_the_command_line() -> Iterator[str]:
    for name, command in reference.commands().items():
        yield f"python -m ideogram_app {name}"
        for parameter in command.params:
            yield from (option for option in parameter.opts if option.startswith("-") and option != "--help")
            yield from [parameter.envvar] if parameter.envvar else []


def of_the_page() -> Iterator[str]:
    for flag in reference.page_flags():
        yield from (*flag.opts, reference.page_variable(flag))


NAMED = {
    "the command line": list(of_the_command_line()),
    "the page's flags": list(of_the_page()),
    "endpoints": [f"/{endpoint.name}" for endpoint in reference.endpoints()],
    "models": list(MODELS),
    "recipes": list(RECIPES),
    "presets": list(PRESETS),
    "savings": list(SPEEDUPS),
    "encoder recipes": list(ENCODER_RECIPES),
    "precisions for diffusers": list(PRECISIONS),
    "errors": [kind.__name__ for kind in reference.error_kinds()],
}


@pytest.mark.parametrize("kind", NAMED)
def test_everything_that_a_user_can_name_has_a_page_that_names_it(kind: str) -> None:
    text = "\n".join(TEXTS.values())
    assert NAMED[kind]
    for name in NAMED[kind]:
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), f"{name} is on no page of README.md and docs/"


def test_every_kind_of_error_comes_with_something_to_do() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", TEXTS[ROOT / "docs" / "errors.md"], re.MULTILINE)
    advised = {name for name, advice in rows if advice.strip()}
    assert {kind.__name__ for kind in reference.error_kinds()[1:]} <= advised


@pytest.mark.parametrize("flag", reference.page_flags(), ids=lambda flag: flag.opts[0])
def test_the_environment_variable_named_for_a_flag_sets_it(flag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reference.page_variable(flag), "1")
    value = get_command(serve.page).make_context("app.py", []).params[flag.name]
    assert value in (True, "1", Path("1"), 1.0) and value != flag.default


# Commands and examples ----------------------------------------------------------------------------------------------


def refuse_unknown(words: list[str]) -> None:
    """Parse a command as the program would, without running it."""
    if words[:3] == ["python", "-m", "ideogram_app"]:
        reference.commands()[words[3]].make_context(words[3], words[4:])
        known = {*RECIPES, *ENCODER_RECIPES}
        for flag, value in pairwise(words):
            if flag in ("--recipe", "--recipes", "--encoder"):
                assert {name.partition("@")[0] for name in value.split(",")} <= known, value
            assert flag != "--model" or value in MODELS
            assert flag != "--preset" or value in PRESETS
            assert flag != "--saving" or value in SPEEDUPS
        if words[3] == "prepare" and len(words) > 4 and not words[4].startswith("-"):
            assert set(words[4].split(",")) <= known
    elif words[:3] == ["python", "launch.py", "test"]:
        assert callable(launch.test)
    elif words[:2] in (["python", "launch.py"], ["python", "app.py"]):
        taken = launch.take_torch(words[2:])[1] if words[1] == "launch.py" else words[2:]
        get_command(serve.page).make_context("app.py", taken)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in OTHER_PROGRAMS


@pytest.mark.parametrize(("shown", "words"), [pytest.param(*pair, id=pair[0]) for pair in shown_commands()])
def test_every_command_that_a_page_shows_is_one_the_program_takes(shown: str, words: list[str]) -> None:
    refuse_unknown(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m ideogram_app paint",
        "python -m ideogram_app doctor --jsonn",
        "python -m ideogram_app generate --prompt a",  # without --out
        "python -m ideogram_app compare --prompt a --recipes int4",
        "python -m ideogram_app prepare int4",
        "python launch.py --prot 1",
        "python tools/none.py",
        "pip install everything",
    ],
)
def test_a_command_that_the_program_does_not_take_would_be_noticed(wrong: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        refuse_unknown(shlex.split(wrong))
