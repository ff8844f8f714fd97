"""The Chromium that browser tests, screenshots and the start-up benchmark drive: the system's own.

Its headless shell where that is installed: the same engine and the same pages, without a window around them, which
takes two thirds of the processor (20 loads of the page: 15 s of processor instead of 25, two cores, interleaved).
"""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")


def find_chromium() -> str | None:
    """The path that the environment variable CHROMIUM names, else of the first that is installed; None where none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
