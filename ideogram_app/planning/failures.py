"""Failures in words: what any exception of one recipe is called, and what helps; one table.

    in_words(problem, phase="denoise")     "A kernel could not be built for this device ...: OutOfResources: ..."

Errors of the program's own family say it themselves. For all others, of whatever library, the name of their type and
their text are kept, because that is what can be searched for, with a sentence around them. Most programs show the
traceback, or "CUDA error". torch is not imported: exceptions are known by the names of their types and by their words.

Left out: what is done about it (generation/retry.py), and the traceback, which goes to the log.
"""

from __future__ import annotations

import re
from traceback import clear_frames

from ideogram_app.errors import AppError, DiskError, is_disk_full
from ideogram_app.planning.lost_device import chain, lost_device, one_line
from ideogram_app.planning.oom import PHASE_WORDS, classify

LONGEST = 400  # characters of a library's words: a compiler prints its whole source

# What says so, in the names of an exception's types and its text; what happened; what to do. The first row that is
# found counts.
ROWS: tuple[tuple[str, str, str], ...] = (
    (
        r"tritonerror|triton error|subprocesserror|c compiler|inductorerror|backendcompilerfailed|nvrtc|hiprtc|ptxas"
        r"|no kernel image|invalid device function|out of resource|too many resources requested",
        "A kernel could not be built for this device, or does not start on it",
        "Draw with another recipe, whose kernels are others; `python -m ideogram_app doctor` says what this device has",
    ),
    (
        r"notimplementederror|does not (have )?support|not implemented for|not (currently )?supported(?! between)"
        r"|unsupported dtype|torch not compiled with",
        "The device, or the torch that is installed, cannot do what this recipe needs",
        "Draw with another recipe",
    ),
    (
        r"importerror|modulenotfounderror|cannot open shared object|dll load failed|image not found",
        "A package is missing or damaged",
        "Install the program's packages again: delete the folder .venv and start with `python launch.py`",
    ),
    (
        r"\boserror\b",
        "A file could not be read or written",
        "See that the disk is there, and that its folder may be read and written; then draw it again",
    ),
)
UNFORESEEN = ("This is a bug in the program", "The terminal shows where; another recipe may still work")


def in_words(problem: BaseException, phase: str = "") -> str:
    """What happened and what to do, in full sentences; never empty.

    Args:
        phase: of the picture or of the job, as in `records.Event`; "" where it is not known.
    """
    if isinstance(problem, AppError):
        return str(problem)
    if is_disk_full(problem):
        return str(DiskError("The disk filled up, so the picture could not be kept", do="Make room and draw it again"))
    known = lost_device(problem, phase) or classify(problem, phase)
    if known:
        return known.sentence()
    happened, help_with_it = _row(problem)
    when = f", {PHASE_WORDS[phase]}" if phase in PHASE_WORDS else ""
    return f"{happened}{when}: {named(problem)}. {help_with_it}."


def named(problem: BaseException) -> str:
    """The exception in the words that can be searched for: its type, and its text on one line, without a full stop."""
    text = one_line(str(problem), LONGEST).rstrip(".")
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def forget(problem: BaseException) -> None:
    """Let go of what the frames of an error hold, for as long as somebody holds the error: what was loaded, above all.

    Frames that still run are left as they are.
    """
    for cause in chain(problem):
        clear_frames(cause.__traceback__)


def _row(problem: BaseException) -> tuple[str, str]:
    types = " ".join(kind.__name__ for kind in type(problem).__mro__)
    text = f"{types} {problem}".lower()
    return next(((happened, do) for sign, happened, do in ROWS if re.search(sign, text)), UNFORESEEN)
