"""The versions that a result was made with, from installed metadata: importing nothing, so asking costs nothing."""

from __future__ import annotations

import platform
from importlib import metadata

from ideogram_app import __version__

PACKAGES = ("torch", "diffusers", "transformers", "torchao", "gguf", "triton")


def versions() -> dict[str, str]:
    """Package name -> version; packages that are not installed are left out."""
    found = {"ideogram_app": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
