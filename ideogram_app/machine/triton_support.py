"""Whether Triton works on this machine, asked once: why not, in words, and the one command that helps.

Triton compiles a small C file when it first meets a driver: with gcc or clang, against Python.h, linked with libcuda,
into its cache. A desktop without any of these has Triton and cannot launch a kernel. So `usable_triton` has that file
compiled (a second, once on a machine) before anybody counts on it. Its cache is put below the data folder, for nothing
outside of it is written to; who set TRITON_CACHE_DIR or TRITON_HOME has chosen another place.

Unlike torch's `has_triton`, which asks for an import and a capability, this has done what the first launch does. Left
out: whether kernels are right or fast, and processors, where nothing is imported and no compiler runs.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ideogram_app.files import data_folder

CACHE_VARIABLE, HOME_VARIABLE = "TRITON_CACHE_DIR", "TRITON_HOME"
COMPILERS = ("gcc", "clang")  # that Triton looks for where CC names none (its `_build`)
HELPS = "This helps:"


@dataclass(frozen=True)
class Installer:
    """A package manager: how it is called, and what a C compiler and Python's headers are named there."""

    program: str
    command: str
    compiler: str
    headers: str


INSTALLERS = (
    Installer("apt", "sudo apt install", "gcc", "python3-dev"),
    Installer("dnf", "sudo dnf install", "gcc", "python3-devel"),
    Installer("zypper", "sudo zypper install", "gcc", "python3-devel"),
    Installer("pacman", "sudo pacman -S", "gcc", "python"),
    Installer("apk", "sudo apk add", "build-base", "python3-dev"),
)


def usable_triton(kind: str, data: Path | None = None) -> str:
    """Why Triton cannot be used here, a sentence or two; "" where it can, and where no kernels of it would run.

    Never raises. The first answer stands for this process; after an installation the program starts anew.

    Args:
        kind: of `Hardware`. Only cuda and rocm take Triton.
        data: the data folder, for its cache; the usual one if None.
    """
    if kind not in ("cuda", "rocm"):
        return ""
    if HOME_VARIABLE not in os.environ:
        os.environ.setdefault(CACHE_VARIABLE, str((data or data_folder()).expanduser().absolute() / "triton"))
    return _asked()


@cache
def _asked() -> str:
    if find_spec("triton") is None:
        return f"Triton is not installed. {HELPS} {_triton_command()}"
    try:
        touch_driver()
    except Exception as problem:  # noqa: BLE001 (compilers, linkers, drivers and disks raise what they like)
        return explained(problem)
    return ""


def touch_driver() -> None:
    """What a first launch does before its kernel: compile and load the driver's C file."""
    _ = importlib.import_module("triton.runtime.driver").driver.active.utils


def explained(problem: Exception) -> str:
    """What keeps Triton from working, and what helps.

    The machine is looked at before the exception: without Python.h and without a libcuda to link with, the compiler
    fails with one and the same exit code.
    """
    lacks = missing()
    if lacks:
        said = " and ".join({"compiler": "a C compiler", "headers": "Python's C headers"}[each] for each in lacks)
        return f"Triton cannot start: it needs {said}. {HELPS} {install_command(lacks)}"
    if isinstance(problem, PermissionError):
        folder = os.environ.get(CACHE_VARIABLE) or os.environ.get(HOME_VARIABLE, "")
        return f"Triton cannot start: it may not write to its cache, {folder}. {HELPS} set {CACHE_VARIABLE} to a folder"
    if isinstance(problem, FileNotFoundError) and "ldconfig" in str(problem):
        return f"Triton cannot start: it looks for libcuda with /sbin/ldconfig. {HELPS} set TRITON_LIBCUDA_PATH"
    if isinstance(problem, AssertionError) and "libcuda" in str(problem):
        return f"Triton cannot start: the linker does not know libcuda. {HELPS} sudo ldconfig"
    first = (str(problem).strip().splitlines() or [""])[0][:200]
    return f"Triton cannot start: {type(problem).__name__}: {first}".rstrip(": ") + "."


def missing() -> tuple[str, ...]:
    """What of "compiler" and "headers" is not there; nothing on Windows, whose Triton brings its own compiler."""
    if platform.system() == "Windows":
        return ()
    named = os.environ.get("CC")
    has_compiler = any(map(shutil.which, (named.split()[0],) if named and named.strip() else COMPILERS))
    return (*(() if has_compiler else ("compiler",)), *(() if _has_headers() else ("headers",)))


def install_command(lacks: tuple[str, ...]) -> str:
    """One line that installs what is missing, in the words of this machine's package manager."""
    found = next((row for row in INSTALLERS if shutil.which(row.program)), INSTALLERS[0])
    headers = found.headers
    if found.program == "apt" and not _is_distributions_python():
        headers = f"python{_version()}-dev"  # a second Python beside the distribution's own has a package of its own
    return " ".join((found.command, *({"compiler": found.compiler, "headers": headers}[each] for each in lacks)))


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _is_distributions_python() -> bool:
    return Path("/usr/bin/python3").resolve().name == f"python{_version()}"


def _has_headers() -> bool:
    """Whether Python.h is where Triton looks for it: Debian's own scheme has it in another place than it says."""
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return (Path(folder) / "Python.h").is_file()


def _triton_command() -> str:
    package = "triton-windows<3.8" if platform.system() == "Windows" else "triton"
    return f'"{sys.executable}" -m pip install "{package}"'
