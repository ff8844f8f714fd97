"""Panes: HTML of everything on the page that follows from the studio's state, and which of it has changed.

A tab asks twice a second; as long as neither the state nor what the tab looks at has changed, nothing is made and
nothing is sent. Jobs live in the studio, so a reload or a second tab simply asks again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from ideogram_app.errors import RequestError
from ideogram_app.studio.state import State
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.charts import charts
from ideogram_app.ui.guide_card import guide_card
from ideogram_app.ui.machine_card import machine_card
from ideogram_app.ui.memory_bar import kept_loaded
from ideogram_app.ui.results import Shown, downloads, from_entry, from_job, gallery, job_bar, results_grid
from ideogram_app.ui.slider import slider
from ideogram_app.ui.weights import weights_table

PANE_NAMES = ("machine", "loaded", "job", "guide", "results", "downloads", "slider", "charts", "weights", "gallery")


@dataclass(frozen=True)
class Seen:
    """What a tab shows already: of which state, and a digest of every pane. `filled`: its form has had its values."""

    version: int = -1
    model: str = ""
    opened: str | None = None
    digests: dict[str, str] = field(default_factory=dict)
    filled: bool = False


def current_comparison(studio: Studio, state: State, opened: str | None) -> Shown | None:
    """The comparison a tab shows: the one it opened, else the last job's, else the newest of the history."""
    if opened:
        try:
            return from_entry(studio.entry(opened))
        except RequestError:
            return None
    job = state.comparison
    if job:
        return from_job(job, next((entry for entry in state.history if entry.id == job.entry), None))
    return from_entry(state.history[0]) if state.history else None


def render(studio: Studio, state: State, model: str, opened: str | None) -> dict[str, str]:
    """Every pane by name."""
    shown = current_comparison(studio, state, opened)
    current = shown.entry.id if shown and shown.entry else None
    return {
        "machine": machine_card(state, model),
        "loaded": kept_loaded(state),
        "job": job_bar(state.job, len(state.waiting)),
        "guide": guide_card(state, model),
        "results": results_grid(shown),
        "downloads": downloads(shown),
        "slider": slider(shown),
        "charts": charts(shown),
        "weights": weights_table(state, model),
        "gallery": gallery(state.history, current),
    }


def changed(studio: Studio, state: State, model: str, opened: str | None, seen: Seen) -> tuple[dict[str, str], Seen]:
    """The panes that differ from what the tab has seen, and what it will have seen then."""
    if (seen.version, seen.model, seen.opened) == (state.version, model, opened):
        return {}, seen
    panes = render(studio, state, model, opened)
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in panes.items()}
    fresh = {name: text for name, text in panes.items() if seen.digests.get(name) != digests[name]}
    return fresh, replace(seen, version=state.version, model=model, opened=opened, digests=digests)
