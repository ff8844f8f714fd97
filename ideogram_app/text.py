"""Sizes, durations, moments, PSNR and lists formatted as text for people.

Sizes are in powers of ten, as disks and downloads are sold. Left out: translations, and the numbers of tables that are
set in columns, which fix their own width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

UNKNOWN = "–"
SHORTEST = 0.0005  # seconds; less would be rounded to 0 ms
MINUTES_BEFORE_HOURS = 100  # an estimate reads better as 95 min than as 1 h 35 min
# Two pictures that are the same to the bit have no finite PSNR and JSON has no infinity. A single value off by one in a
# 2048 x 2048 picture gives 119 dB, so no other pair comes near.
IDENTICAL_PSNR = 150.0


def gb(count: float) -> str:
    """Bytes in a sentence, to a tenth of the unit: 19.3 GB, 12.0 MB; MB below 100 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def size(count: float | None) -> str:
    """Bytes in a table, with three figures: 19.3 GB, 842 MB, 7.24 MB, 512 B."""
    if count is None:
        return UNKNOWN
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{figures(count / factor)} {unit}"
    return f"{count:.0f} B"


def figures(value: float) -> str:
    """Three significant figures without an exponent: 0.34, 4.21, 93.5, 1204."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """A measured or expected time, of three figures or in whole seconds or minutes: 340 ms, 4.21 s, 2 min 5 s."""
    if seconds is None:
        return UNKNOWN
    if 0 < seconds < SHORTEST:
        return "under 1 ms"
    if seconds < 1 - SHORTEST:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else _hours(minutes)


def between(low: float, high: float, shown: Callable[[float], str]) -> str:
    """A range for people, each end as one such number is shown: 340 ms to 1.20 s; one number where both look alike."""
    first, last = shown(low), shown(high)
    return first if first == last else f"{first} to {last}"


def in_seconds(seconds: float) -> str:
    """A time in seconds alone, so that two can be compared at a glance: 0.34 s, 4.2 s, 93.5 s."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"


def remaining(seconds: float) -> str:
    """An estimate of what is left, in whole seconds or minutes: under 1 s, 42 s, 12 min, 1 h 45 min."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < MINUTES_BEFORE_HOURS else _hours(minutes)


def lasting(seconds: float) -> str:
    """An estimate of what has not begun, spelled out: under a minute, about 37 minutes, about 1 h 45 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return "under a minute"
    if minutes >= MINUTES_BEFORE_HOURS:
        return f"about {_hours(minutes)}"
    return f"about {minutes} minute{'s' if minutes > 1 else ''}"


def _hours(minutes: int) -> str:
    return f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """A moment, in seconds since 1970: of today as 14:05, of another day as 3 Nov, 14:05."""
    then, now = time.localtime(seconds), time.localtime()
    hour = time.strftime("%H:%M", then)
    return hour if then[:3] == now[:3] else f"{then.tm_mday} {time.strftime('%b', then)}, {hour}"


def decibels(psnr: float | None) -> str:
    """A PSNR: 52.0 dB, identical, or a dash where there is none."""
    if psnr is None:
        return UNKNOWN
    return "identical" if psnr >= IDENTICAL_PSNR else f"{psnr:.1f} dB"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: INT8 W8A8, FP8 and GGUF Q4_K."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
