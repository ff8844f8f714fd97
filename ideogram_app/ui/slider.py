"""Image comparison slider: two pictures, one divider, around `<input type="range">`, so that the keyboard works.

Any two of the finished pictures can be chosen; *Difference* shows where they differ, amplified eight times. Pictures
are the PNG files, and pixels stay pixels when enlarged. gr.ImageSlider has neither keyboard nor names nor a choice.
"""

from __future__ import annotations

from pathlib import Path

from ideogram_app.records import Result
from ideogram_app.ui.results import Shown
from ideogram_app.ui.words import esc, file_url, recipe_title

SLIDER_SCRIPT = Path(__file__).with_name("slider.js")
GAIN = 8  # difference is shown this many times as bright
ZOOMS = (("fit", "Fit"), ("1", "100 %"), ("2", "200 %"), ("4", "400 %"), ("8", "800 %"))


def slider(shown: Shown | None) -> str:
    """The comparer of a comparison, or nothing where fewer than two pictures are there."""
    drawn = [result for result in shown.results if result.image] if shown else []
    if shown is None or shown.running or len(drawn) < 2:
        return ""
    first, second = drawn[0], drawn[-1]
    return (
        '<section class="card slider" aria-label="Compare two pictures"><div class="tools">'
        f"{_choice('left', 'Left', drawn, first)}{_choice('right', 'Right', drawn, second)}"
        f"{_select('mode', 'Show', [('divider', 'Divider'), ('difference', f'Difference × {GAIN}')])}"
        f"{_select('zoom', 'Zoom', list(ZOOMS))}</div>"
        f'<div class="scroller"><div class="stage" data-width="{first.width}" '
        f'style="--split:50%;--ratio:{first.width} / {first.height};--gain:{GAIN}">'
        f'<div class="layers">{_layer("left", first)}{_layer("right", second)}</div>'
        f'<span class="tag left">{esc(recipe_title(first.recipe))}</span>'
        f'<span class="tag right">{esc(recipe_title(second.recipe))}</span><i class="line" aria-hidden="true"></i>'
        '<input type="range" min="0" max="100" step="1" value="50" aria-label="Divider between the pictures">'
        '</div></div><p class="quiet">Drag, or use the arrow keys; Home and End show one picture whole.</p></section>'
    )


def _layer(side: str, result: Result) -> str:
    return f'<img class="{side}" src="{esc(file_url(result.image or ""))}" alt="{esc(recipe_title(result.recipe))}">'


def _choice(side: str, label: str, drawn: list[Result], chosen: Result) -> str:
    options = "".join(
        f'<option value="{esc(file_url(result.image or ""))}"{" selected" if result is chosen else ""}>'
        f"{esc(recipe_title(result.recipe))}</option>"
        for result in drawn
    )
    return f'<label>{label} <select data-side="{side}">{options}</select></label>'


def _select(name: str, label: str, choices: list[tuple[str, str]]) -> str:
    options = "".join(f'<option value="{value}">{esc(text)}</option>' for value, text in choices)
    return f'<label>{label} <select data-tool="{name}">{options}</select></label>'
