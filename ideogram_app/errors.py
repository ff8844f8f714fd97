"""Errors that a user may see: `AppError` and its seven kinds, because callers tell exactly these seven apart.

Every message says what happened, what was expected and what was got, and what to do next. The page turns an
`AppError` into a red note in one place, the command line into one line on standard error and exit code 1. Anything
else that escapes is a bug and keeps its traceback. Left out: error codes and translations.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # the disk, or this user's share of it


class AppError(Exception):
    """Something the user can act upon.

    Args:
        what: what happened, in one sentence.
        expected, got: the two sides of a mismatch, where there is one.
        do: the next action that helps.
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", do: str = "") -> None:
        self.what, self.expected, self.got, self.do = what, expected, got, do
        super().__init__(str(self))

    def __str__(self) -> str:
        expected = f"Expected {self.expected}" if self.expected else ""
        got = f"Got {self.got}" if self.got else ""
        return " ".join(_sentence(text) for text in (self.what, expected, got, self.do) if text)


class CaptionError(AppError):
    """The prompt or caption cannot be used."""


class RequestError(AppError):
    """A size, seed, preset, recipe or flag is outside what the program knows."""


class CheckpointError(AppError):
    """A weight file is missing, truncated, altered or of an unknown layout."""


class DiskError(AppError):
    """There is not enough room to do what was asked."""


class AccessError(AppError):
    """The weights are gated and this user, token or network cannot reach them."""


class DeviceError(AppError):
    """The device cannot run this, or ran out of memory doing it."""


class Cancelled(AppError):
    """The user stopped it. Not a failure, but the asked-for work was not done."""


def is_disk_full(problem: BaseException) -> bool:
    """Whether something could not be written because there is no room left for it."""
    return isinstance(problem, OSError) and problem.errno in FULL


def choose(rows: Mapping[str, Row], name: str, kind: str) -> Row:
    """The row of that name in a table of recipes, presets or models.

    Raises:
        RequestError: there is none; lists those that exist.
    """
    if name not in rows:
        raise RequestError(f"Unknown {kind} {name!r:.60}", expected=" or ".join(rows))
    return rows[name]


def _sentence(text: str) -> str:
    """Close a sentence with a full stop unless it already ends in punctuation."""
    text = text.strip()
    return text if text.endswith((".", "?", "!", ":")) else f"{text}."
