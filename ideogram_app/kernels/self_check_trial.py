"""One trial of the self-check: a piece of work in a thread of its own, with a limit, and what went wrong with it.

A kernel that does not compile or launch raises; one that hangs is left behind in its thread. Both are reasons to take
the next one. Not so when the device itself no longer answers, as after an illegal memory access: nothing more can be
learned, or drawn, in this process. Left out: a process for each trial, which would survive that too, for five seconds
of imports and a second context on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ideogram_app.errors import DeviceError
from ideogram_app.machine.meter import synchronize

T = TypeVar("T")
LIMIT_SECONDS = 90.0  # of a first launch, compilation included: Q4_K's took 15 s and more on an H100's machine
ANSWER_SECONDS = 20.0  # for one addition, behind whatever the device was given before
NO_ROOM = ("out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "hipErrorOutOfMemory")
LONGEST_REASON = 160  # characters of somebody else's message


class TrialFailed(Exception):
    """The work raised or hung; the message is the reason, without a subject: "does not launch: ..."."""


class NoRoom(Exception):
    """There was no memory for it, which says nothing about a kernel."""


@dataclass
class _Outcome:
    value: Any = None
    problem: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


def attempt(work: Callable[[], T], device: torch.device, limit: float = LIMIT_SECONDS) -> T:
    """What the work gives, the device's part of it done.

    Raises:
        TrialFailed: it raised, or was not done within `limit` seconds.
        NoRoom: it ran out of memory.
        DeviceError: the device no longer answers; the program must be started again.
    """
    outcome = _run(work, device, limit)
    if outcome is None:
        if not _answers(device):
            raise DeviceError(f"{device} hangs in a kernel of the self-check", do="Restart the program")
        raise TrialFailed(f"is not done after {limit:g} s")
    if outcome.problem is None:
        value: T = outcome.value
        return value
    if isinstance(outcome.problem, torch.OutOfMemoryError | MemoryError) or _tells_of_room(outcome.problem):
        raise NoRoom from outcome.problem
    if not _answers(device):
        said = told(outcome.problem)
        raise DeviceError(f"{device} stopped in the self-check", got=said, do="Restart the program")
    raise TrialFailed(f"fails: {told(outcome.problem)}") from outcome.problem


def _tells_of_room(problem: Exception) -> bool:
    """Whether a library below torch found no memory: its errors are any RuntimeError's."""
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in NO_ROOM)


def told(problem: BaseException) -> str:
    """The kind and the first line of an exception."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"[:LONGEST_REASON].rstrip(": ")


def _run(work: Callable[[], Any], device: torch.device, limit: float) -> _Outcome | None:
    """None where it is not done in time."""
    outcome = _Outcome()

    def run() -> None:
        try:
            with _current(device), torch.inference_mode():
                outcome.value = work()
                synchronize(device)
        except Exception as problem:  # noqa: BLE001 (compilers and drivers raise anything: AssertionError, KeyError)
            outcome.problem = problem
        outcome.done.set()

    threading.Thread(target=run, name="self-check", daemon=True).start()  # daemon: a hanging one ends with the program
    return outcome if outcome.done.wait(limit) else None


def _answers(device: torch.device) -> bool:
    """Whether the device still adds two numbers."""
    if device.type == "cpu":
        return True
    outcome = _run(lambda: torch.zeros(1, device=device).add_(1).item(), device, ANSWER_SECONDS)
    return outcome is not None and outcome.problem is None


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Of this thread: kernels are launched on the current device, whatever their tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
