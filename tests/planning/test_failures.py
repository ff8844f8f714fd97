"""Exceptions of every library in words: what they are called is kept, and something that helps is said."""

from __future__ import annotations

import errno
import subprocess

import pytest

from ideogram_app.errors import CheckpointError
from ideogram_app.planning.failures import LONGEST, ROWS, UNFORESEEN, forget, in_words, named
from ideogram_app.planning.oom import HAPPENED, PHASE_WORDS

KERNEL, LACKING, PACKAGE, FILE = (happened for _, happened, _ in ROWS)


class TritonError(Exception):
    """The base of Triton's own errors, which derive from nothing else."""


class OutOfResources(TritonError):
    pass


class CompilationError(TritonError):
    pass


@pytest.mark.parametrize(
    ("problem", "happened"),
    [
        (OutOfResources("out of resource: shared memory, Required: 98304, Hardware limit: 65536."), KERNEL),
        (CompilationError("at 1:0:\ndef kernel(x):\n^\nAssertionError()"), KERNEL),
        (subprocess.CalledProcessError(1, ["gcc", "main.c", "-O3"]), KERNEL),
        (subprocess.TimeoutExpired(["ptxas"], 60), KERNEL),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), KERNEL),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), KERNEL),
        (TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support"), LACKING),
        (NotImplementedError("The operator 'aten::_int_mm' is not currently implemented for the MPS device"), LACKING),
        (AssertionError("Torch not compiled with CUDA enabled"), LACKING),
        (ModuleNotFoundError("No module named 'skimage'"), PACKAGE),
        (PermissionError(errno.EACCES, "Permission denied", "reference.png"), FILE),
        (TypeError("'<' not supported between instances of 'str' and 'int'"), UNFORESEEN[0]),
        (ZeroDivisionError("by nought"), UNFORESEEN[0]),
        (AssertionError(), UNFORESEEN[0]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_exception_is_named_and_something_helps(problem: Exception, happened: str) -> None:
    text = in_words(problem, "denoise")
    assert text.startswith(f"{happened}, {PHASE_WORDS['denoise']}: {type(problem).__name__}")
    assert named(problem) in text and text.endswith(".") and "\n" not in text
    assert in_words(problem).startswith(f"{happened}: {type(problem).__name__}")


def test_what_is_known_by_other_names_says_it_itself() -> None:
    assert in_words(CheckpointError("a.safetensors is truncated"), "load") == "a.safetensors is truncated."
    assert "disk filled up" in in_words(OSError(errno.ENOSPC, "No space left on device"), "decode")
    assert in_words(MemoryError(), "prepare").startswith(f"{HAPPENED['host']} {PHASE_WORDS['prepare']}")
    assert "restart the program" in in_words(RuntimeError("CUDA error: unspecified launch failure"))


def test_a_compiler_that_prints_its_source_is_cut_in_the_middle() -> None:
    text = named(CompilationError("at 12:4:\n" + "    x = y\n" * 500 + "incompatible types"))
    assert len(text) < LONGEST + 50 and "at 12:4:" in text and text.endswith("incompatible types")


def test_what_the_frames_of_an_error_hold_is_let_go_of() -> None:
    class Weights:
        pass

    held: list[object] = []

    def fail() -> None:
        weights = Weights()
        try:
            raise RuntimeError(str(id(weights)))
        finally:
            raise TypeError("while closing")

    try:
        fail()
    except TypeError as problem:
        held.append(problem)
        forget(problem)
        trace = problem.__traceback__
        while trace:
            assert not any(isinstance(value, Weights) for value in trace.tb_frame.f_locals.values())
            trace = trace.tb_next
    assert held
