"""Bar charts of time and memory: HTML tables whose cells are drawn as bars, so that they are read aloud as numbers.

Left out: axes, a chart library, and anything fetched from elsewhere; a few bars to compare need none.
"""

from __future__ import annotations

from ideogram_app.records import REFERENCE, Result
from ideogram_app.text import duration, size
from ideogram_app.ui.results import Shown
from ideogram_app.ui.words import esc, recipe_title

CHARTED_PHASES = (("load", "Load"), ("encode", "Text"), ("denoise", "Draw"), ("decode", "Decode"))


def charts(shown: Shown | None) -> str:
    """Four small charts of the pictures that were drawn."""
    drawn = [result for result in shown.results if result.image] if shown else []
    if not drawn:
        return ""
    return (
        '<section class="card charts" aria-label="Time and memory">'
        f"{_bars('Time a step', [(r, r.seconds_per_step, duration(r.seconds_per_step)) for r in drawn])}"
        f"{_phases(drawn)}"
        f"{_bars('Peak memory', [(r, r.peak_memory_bytes, size(r.peak_memory_bytes)) for r in drawn])}"
        f"{_bars('Weights in memory', [(r, r.weight_bytes, size(r.weight_bytes)) for r in drawn])}</section>"
    )


def _bars(title: str, rows: list[tuple[Result, float | None, str]]) -> str:
    longest = max((value or 0 for _, value, _ in rows), default=0) or 1
    inside = "".join(
        f"{_name(result)}"
        f'<td><div class="track"><span class="fill{" base" if result.recipe == REFERENCE else ""}" '
        f'style="width:{100 * (value or 0) / longest:.1f}%"></span></div></td><td class="number">{esc(text)}</td></tr>'
        for result, value, text in rows
    )
    return f'<table class="bars"><caption>{esc(title)}</caption><tbody>{inside}</tbody></table>'


def _phases(drawn: list[Result]) -> str:
    """Total time, each bar cut into its phases."""
    longest = max(result.seconds.total for result in drawn) or 1
    inside = ""
    for result in drawn:
        parts = "".join(
            f'<span class="fill {key}" style="width:{100 * getattr(result.seconds, key) / longest:.1f}%" '
            f'title="{label}: {duration(getattr(result.seconds, key))}"></span>'
            for key, label in CHARTED_PHASES
        )
        total = duration(result.seconds.total)
        inside += f'{_name(result)}<td><div class="track">{parts}</div></td><td class="number">{esc(total)}</td></tr>'
    legend = "".join(f'<span><i class="fill {key}"></i>{label}</span>' for key, label in CHARTED_PHASES)
    return (
        '<table class="bars"><caption>Total time '
        f'<span class="legend">{legend}</span></caption><tbody>{inside}</tbody></table>'
    )


def _name(result: Result) -> str:
    return f'<tr><th scope="row">{esc(recipe_title(result.recipe))}</th>'
