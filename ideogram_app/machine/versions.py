"""Versions that a result was made with: of packages, from installed metadata alone, and of this program."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from ideogram_app import __version__
from ideogram_app.machine.hardware import answer_of

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


@cache
def driver_version() -> str:
    """NVIDIA's driver by NVML, or by nvidia-smi where pynvml is not installed; "" where neither answers."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except ImportError:
        pass
    except pynvml.NVMLError:
        return ""
    answer = answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return (answer.splitlines() or [""])[0].strip()


def commit() -> str:
    """The short hash of the commit that is checked out, or "" outside a checkout or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
