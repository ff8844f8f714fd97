"""HTML helpers of the page: escaping, links, buttons, progress bars, fact lists, and phrases about progress.

Left out: translations.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from ideogram_app.catalog.recipes import RECIPES, Recipe
from ideogram_app.catalog.speedups import find_speedup
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.records import IN_BYTES, Event, Request
from ideogram_app.text import remaining, size

RESIDENCY_WORDS = {"resident": "resident", "streamed": "streamed from RAM", "disk": "streamed from disk"}
PHASE_VERBS = {
    "fetch": "Fetching",
    "prepare": "Preparing",
    "smoke": "Trying what was written",
    "verify": "Checking",
    "calibrate": "Measuring activations",
    "load": "Loading weights",
    "encode": "Reading the caption",
    "denoise": "Drawing",
    "decode": "Decoding",
    "result": "Finished",
    "done": "Finished",
}

ADDRESS_OR_COMMAND = re.compile(r"(https://[^\s,;]*[^\s,;.:!?]|`[^`]+`)")


def esc(text: object) -> str:
    """Text that is safe inside HTML, in attributes too."""
    return html.escape(str(text), quote=True)


def everyday_first() -> list[Recipe]:
    """Every recipe, those for every day first."""
    return sorted(RECIPES.values(), key=lambda row: not row.everyday)


def recipe_title(name: str) -> str:
    return RECIPES[name].title if name in RECIPES else name


def file_url(path: str | Path) -> str:
    """Where the page gets a file of the output folder, byte for byte; relative, so that it holds behind a proxy."""
    return f"gradio_api/file={quote(Path(path).as_posix())}"


def typed_of(caption: str) -> str:
    """What the user typed, as far as the caption shows: the sentence if it is only wrapped, else the JSON."""
    try:
        sentence = json.loads(caption)["compositional_deconstruction"]["elements"][0]["desc"]
    except (ValueError, KeyError, IndexError, TypeError):
        return caption
    return sentence if isinstance(sentence, str) and wrap_plain(sentence) == caption else caption


def gist(caption: str) -> str:
    """A caption in a few words: its sentence, or what its elements say, joined."""
    typed = typed_of(caption)
    if not typed.startswith("{"):
        return typed
    try:
        whole = json.loads(caption)
        scene = whole["compositional_deconstruction"]
        parts = [element.get("text") or element["desc"] for element in scene["elements"]]
        background = [f"on {scene['background']}"] if scene["background"] else []
        return str(whole.get("high_level_description") or ", ".join([*parts, *background]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return caption


def settings(request: Request) -> str:
    """The settings of a request in one line."""
    left_out = "".join(f" · {find_speedup(name).title.lower()}" for name in request.savings)
    return f"{request.width} × {request.height} · {request.preset} · seed {request.seed}{left_out}"


def progress_words(event: Event) -> str:
    """How far a phase is: Step 7 of 20 · 2.9 steps a second · 4 s left."""
    if event.phase == "denoise" and event.total:
        parts = [f"Step {event.done} of {event.total}"]
        if event.rate:
            slow = event.rate < 1
            parts.append(f"{1 / event.rate:.1f} s a step" if slow else f"{event.rate:.1f} steps a second")
    elif event.phase in IN_BYTES and event.total:
        verb = f"{PHASE_VERBS[event.phase]} " if event.phase == "fetch" else ""
        parts = [f"{verb}{size(event.done)} of {size(event.total)}"]
        if event.rate:
            parts.append(f"{size(event.rate)}/s")
    else:
        parts = [event.message.rstrip(".") or PHASE_VERBS.get(event.phase, event.phase)]
    if event.seconds_left:
        parts.append(f"{remaining(event.seconds_left)} left")
    return " · ".join(parts)


def link(url: str, text: str, kind: str = "") -> str:
    """A link that opens beside the page."""
    look = f' class="{kind}"' if kind else ""
    return f'<a{look} href="{esc(url)}" target="_blank" rel="noopener noreferrer">{esc(text)}</a>'


def linked(text: str) -> str:
    """A sentence in which addresses are links, and `commands` look like commands."""
    parts = ADDRESS_OR_COMMAND.split(text)
    return "".join(
        link(part, part)
        if part.startswith("https://")
        else f"<code>{esc(part[1:-1])}</code>"
        if part[:1] == "`"
        else esc(part)
        for part in parts
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Pairs of a name and a value as a description list; "" where there are none."""
    inside = "".join(f"<div><dt>{esc(name)}</dt><dd>{linked(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{inside}</dl>' if inside else ""


def act(action: str, name: str, label: str, spoken: str, primary: bool = False) -> str:
    """A button inside a pane: its action, and what it acts on."""
    return (
        f'<button type="button" class="button{" primary" if primary else ""}" data-act="{action}" '
        f'data-name="{esc(name)}" aria-label="{esc(spoken)}">{esc(label)}</button>'
    )


def bar(label: str, event: Event | None) -> str:
    """A progress bar; without a known total it only says that something is going on."""
    if event is None or not event.total:
        return f'<div class="bar idle" role="progressbar" aria-label="{esc(label)}"><span></span></div>'
    percent = min(100.0, 100 * event.done / event.total)
    return (
        f'<div class="bar" role="progressbar" aria-label="{esc(label)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><span style="width:{percent:.1f}%"></span></div>'
    )
