"""Numbers and phrases for people, and the escaping of everything that comes from outside.

Left out: translations.
"""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path
from urllib.parse import quote

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.speedups import find_speedup
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.records import IN_BYTES, Event, Request

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

_ADDRESS_OR_COMMAND = re.compile(r"(https://[^\s,;]*[^\s,;.:!?]|`[^`]+`)")


def esc(text: object) -> str:
    """Text that is safe inside HTML, in attributes too."""
    return html.escape(str(text), quote=True)


def size(count: float | None) -> str:
    """Bytes in powers of ten, three figures: 19.3 GB, 842 MB, 7.24 MB."""
    if count is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{figures(count / factor)} {unit}"
    return f"{count:.0f} B"


def figures(value: float) -> str:
    """Three significant figures without an exponent: 0.34, 4.21, 93.5, 1204."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """340 ms, 4.21 s, 2 min 5 s, 1 h 20 min."""
    if seconds is None:
        return "–"
    if 0 < seconds < 0.0005:
        return "under 1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def remaining(seconds: float) -> str:
    """An estimate, in whole seconds or minutes, because it is one."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def clock(seconds: float) -> str:
    """A moment of today as 14:05, of another day as 3 Nov, 14:05."""
    then, now = time.localtime(seconds), time.localtime()
    hour = time.strftime("%H:%M", then)
    return hour if then[:3] == now[:3] else f"{then.tm_mday} {time.strftime('%b', then)}, {hour}"


def recipe_title(name: str) -> str:
    return RECIPES[name].title if name in RECIPES else name


def file_url(path: str | Path) -> str:
    """Where the page gets a file of the output folder, byte for byte; relative, so that it holds behind a proxy."""
    return f"gradio_api/file={quote(Path(path).as_posix())}"


def typed_of(caption: str) -> str:
    """What the user typed, as far as the caption tells: the sentence if it is only wrapped, else the JSON."""
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
    parts = _ADDRESS_OR_COMMAND.split(text)
    return "".join(
        link(part, part)
        if part.startswith("https://")
        else f"<code>{esc(part[1:-1])}</code>"
        if part[:1] == "`"
        else esc(part)
        for part in parts
    )


def act(deed: str, name: str, label: str, spoken: str, primary: bool = False) -> str:
    """A button inside a pane: what it does, and to what."""
    return (
        f'<button type="button" class="button{" primary" if primary else ""}" data-act="{deed}" '
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
