"""The pins of requirements.txt, held against what the pinned packages ask for themselves.

The truth is the metadata of the installed packages: a package that is installed in the pinned version says which
versions of others it takes, and every pin must be one of those. Of gradio all extras count: a Hugging Face Space
installs `gradio[oauth,mcp]` beside this file. What packages need beyond the pins is left to pip's resolver.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FILE = Path(__file__).resolve().parents[1] / "requirements.txt"
EXTRAS = {"gradio": metadata("gradio").get_all("Provides-Extra") or []}  # of other packages none is installed
PYTHONS, SYSTEMS = ("3.10", "3.11", "3.12", "3.13"), ("linux", "darwin", "win32")


def asked(requirement: Requirement, python: str, system: str, extras: list[str]) -> bool:
    """Whether a requirement counts for a Python on a system, where these extras are wanted."""
    here = {key: str(value) for key, value in default_environment().items()}
    there = here | {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system}
    marker = requirement.marker
    return marker is None or any(marker.evaluate(there | {"extra": extra}) for extra in ("", *extras))


def pins(python: str, system: str) -> dict[str, str]:
    """Package and version of the lines that count for a Python on a system."""
    lines = (line.split("#")[0].strip() for line in FILE.read_text(encoding="utf-8").splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(line.name): str(line.specifier).removeprefix("==")
        for line in requirements
        if asked(line, python, system, [])
    }


def asks(package: str, pinned: str) -> list[Requirement]:
    """What a package asks for in its metadata; nothing where it is installed in another version, or not at all."""
    try:
        known = Version(version(package)).public == pinned
    except PackageNotFoundError:  # what only another system needs
        known = False
    return [Requirement(line) for line in requires(package) or []] if known else []


def refused(pinned: dict[str, str], python: str, system: str) -> list[str]:
    """A sentence for each pin that another pinned package does not take."""
    return [
        f"{package} asks for {wanted}; pinned is {found}"
        for package, chosen in pinned.items()
        for wanted in asks(package, chosen)
        if asked(wanted, python, system, EXTRAS.get(package, []))
        and (found := pinned.get(canonicalize_name(wanted.name)))
        and not wanted.specifier.contains(found, prereleases=True)
    ]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_is_taken_by_every_pinned_package_and_by_all_extras_of_gradio(python: str, system: str) -> None:
    pinned = pins(python, system)
    assert pinned["gradio"] == version("gradio"), "its metadata is the truth here"
    assert refused(pinned, python, system) == []


@pytest.mark.parametrize(
    ("package", "pinned", "asker"), [("pydantic", "2.14.3", "gradio"), ("safetensors", "0.1.0", "transformers")]
)
def test_a_pin_that_a_package_or_one_of_its_extras_does_not_take_is_named(
    package: str, pinned: str, asker: str
) -> None:
    here = (f"3.{sys.version_info.minor}", sys.platform)
    sentences = refused({**pins(*here), package: pinned}, *here)
    assert any(line.startswith(f"{asker} asks for {package}") for line in sentences)
