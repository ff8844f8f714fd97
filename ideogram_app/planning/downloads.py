"""Download time: expected seconds and their 90 % range, from an example rate or from what the line has shown.

Left out: what a server or a disk can take, and progress while bytes come, whose own rate is shown (hub/download.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ideogram_app.planning.intervals import DOWNLOAD, Factors, Outcome, interval, scores_of
from ideogram_app.records import Interval

EXAMPLE_RATE = 12_500_000  # bytes a second: 100 Mbit/s, shown as an example until bytes come
OF_EXAMPLE: Factors = (0.1, 5.0)  # 1 Gbit/s to 20 Mbit/s: lines that homes have
OF_SEEN: Factors = (0.5, 2.5)  # a line that was seen before, at another hour, from another server; an assumption
GIGABYTE = 1e9


def download(size: float, rates: Sequence[float], outcomes: Sequence[Outcome]) -> tuple[float, Interval]:
    """Seconds that so many bytes take, and the range round them; rates: bytes a second of earlier downloads."""
    basis, assumed = ("measured", OF_SEEN) if rates else ("assumed", OF_EXAMPLE)
    seconds = size / (statistics.median(rates) if rates else EXAMPLE_RATE)
    return seconds, interval(DOWNLOAD, seconds, assumed, basis, scores_of(outcomes, DOWNLOAD, basis))


def downloaded(rate: float, rates: Sequence[float], outcomes: Sequence[Outcome]) -> Outcome:
    """What was expected of a gigabyte before it came at this rate, and what it took."""
    expected, said = download(GIGABYTE, rates, outcomes)
    return Outcome.of(DOWNLOAD, expected, said, GIGABYTE / rate)
