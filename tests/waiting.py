"""Waiting in tests: for a condition, never for a time, so that a busy machine only takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

Value = TypeVar("Value")
LIMIT = 300.0  # seconds after which something is broken and not slow


def wait_until(condition: Callable[[], Value], limit: float = LIMIT, what: str = "") -> Value:
    """The first true value of a condition; fails where none came within the limit, in seconds."""
    end = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"{what or 'what was waited for'} did not come within {limit:.0f} seconds")
        time.sleep(0.01)
    return value
