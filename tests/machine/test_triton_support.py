"""Triton where it cannot start: words and a command, never an exception; on processors nothing is touched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ideogram_app.machine import devices, triton_support
from ideogram_app.machine.hardware import detect
from ideogram_app.machine.triton_support import CACHE_VARIABLE, HOME_VARIABLE, usable_triton

PROBLEMS = [
    RuntimeError("Failed to find C compiler."),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"),
    AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
    AssertionError(),
    PermissionError(13, "Permission denied", "/root/.triton"),
    ImportError("DLL load failed"),
    OSError("[WinError 126]"),
    KeyError("sm_75"),
]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Debian machine with Triton, a compiler and headers, on which nobody has asked yet."""
    for variable in (CACHE_VARIABLE, HOME_VARIABLE, "CC"):
        monkeypatch.setenv(variable, "")  # so that what a test sets is taken back
        monkeypatch.delenv(variable)
    programs = {"gcc": "/usr/bin/gcc", "apt": "/usr/bin/apt"}
    monkeypatch.setattr(triton_support.shutil, "which", lambda name: programs.get(name))
    monkeypatch.setattr(triton_support, "find_spec", lambda name: name)
    monkeypatch.setattr(triton_support, "_has_headers", lambda: True)
    monkeypatch.setattr(triton_support.platform, "system", lambda: "Linux")
    monkeypatch.setattr(triton_support, "_is_distributions_python", lambda: True)
    triton_support._asked.cache_clear()
    yield
    triton_support._asked.cache_clear()


def failing(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def touch() -> None:
        raise problem

    monkeypatch.setattr(triton_support, "touch_driver", touch)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
def test_whatever_the_first_launch_raises_becomes_words(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    failing(monkeypatch, problem)
    said = usable_triton("cuda", Path("data"))
    assert said.startswith("Triton cannot start") and "\n" not in said


@pytest.mark.parametrize(
    ("compiler", "headers", "command"),
    [
        (False, True, "sudo apt install gcc"),
        (True, False, "sudo apt install python3-dev"),
        (False, False, "sudo apt install gcc python3-dev"),
    ],
)
def test_what_is_missing_is_told_with_the_one_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, compiler: bool, headers: bool, command: str
) -> None:
    monkeypatch.setattr(triton_support.shutil, "which", lambda name: name if compiler or name == "apt" else None)
    monkeypatch.setattr(triton_support, "_has_headers", lambda: headers)
    failing(monkeypatch, subprocess.CalledProcessError(1, ["gcc"]))
    assert usable_triton("cuda").endswith(command)


@pytest.mark.parametrize(
    ("program", "command"),
    [("dnf", "sudo dnf install gcc python3-devel"), ("pacman", "sudo pacman -S gcc python")],
)
def test_other_distributions_have_their_own_command(
    monkeypatch: pytest.MonkeyPatch, program: str, command: str
) -> None:
    monkeypatch.setattr(triton_support.shutil, "which", lambda name: name if name == program else None)
    assert triton_support.install_command(("compiler", "headers")) == command


def test_a_second_python_has_headers_in_a_package_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_is_distributions_python", lambda: False)
    assert triton_support.install_command(("headers",)) == f"sudo apt install python{triton_support._version()}-dev"


def test_a_compiler_that_cc_names_counts_and_one_that_is_not_there_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -O2")
    assert triton_support.missing() == ()
    monkeypatch.setenv("CC", "/opt/cc")
    assert triton_support.missing() == ("compiler",)


def test_without_triton_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    monkeypatch.setattr(triton_support.platform, "system", lambda: "Windows")
    said = usable_triton("cuda")
    assert said.startswith("Triton is not installed") and "triton-windows" in said


def test_where_it_starts_nothing_is_wrong_and_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(triton_support, "touch_driver", lambda: asked.append(1))
    assert [usable_triton("cuda"), usable_triton("rocm"), usable_triton("cuda")] == ["", "", ""]
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_devices_without_its_kernels_touch_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    failing(monkeypatch, AssertionError("touched"))
    assert usable_triton(kind, Path("data")) == ""
    assert CACHE_VARIABLE not in os.environ


def test_its_cache_lies_below_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_support, "touch_driver", lambda: None)
    usable_triton("cuda", tmp_path)
    assert Path(os.environ[CACHE_VARIABLE]) == tmp_path / "triton"


@pytest.mark.parametrize("variable", [CACHE_VARIABLE, HOME_VARIABLE])
def test_a_cache_that_the_user_named_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    monkeypatch.setattr(triton_support, "touch_driver", lambda: None)
    monkeypatch.setenv(variable, "/named")
    usable_triton("cuda", tmp_path)
    assert {CACHE_VARIABLE: os.environ.get(CACHE_VARIABLE)} != {CACHE_VARIABLE: str(tmp_path / "triton")}
    assert os.environ[variable] == "/named"


def test_the_hardware_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device: dict[str, Any] = {"kind": "cuda", "name": "RTX 3060", "compute_capability": (8, 6)}
    monkeypatch.setattr(devices, "device_fields", lambda: dict(device))
    failing(monkeypatch, RuntimeError("Failed to find C compiler."))
    assert detect(tmp_path).triton_problem.startswith("Triton cannot start")


@pytest.mark.slow
def test_tritons_own_build_fails_as_was_foreseen_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its real build step, on a PATH without a compiler: the exception, and what is made of it."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.undo()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as raised:
        build.compile_module_from_src("int x;", "nothing")
    assert "C compiler" in triton_support.explained(raised.value)
    assert triton_support.HELPS in triton_support.explained(raised.value)
