"""Gradio page: layout of its blocks, wiring of its events, polling. `build(studio, model) -> gr.Blocks`.

Handlers only submit, stop or open; they return at once. What is shown follows from the studio's state: a tab polls
twice a second; as long as neither the state nor what the tab looks at has changed, nothing is made and nothing is sent.
So there is no generator that a reload would kill, and a second tab simply asks again.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.errors import AppError, RequestError
from ideogram_app.studio.state import State
from ideogram_app.studio.studio import Studio
from ideogram_app.ui import form as forms
from ideogram_app.ui.api import add_endpoints
from ideogram_app.ui.guide_card import guide_card
from ideogram_app.ui.machine_card import machine_card
from ideogram_app.ui.memory_bar import MEMORY_SCRIPT, kept_loaded, wire_memory
from ideogram_app.ui.offers import offered
from ideogram_app.ui.results import Shown, charts, downloads, from_entry, from_job, gallery, job_bar, results_grid
from ideogram_app.ui.slider import slider
from ideogram_app.ui.weights import weights_table

TITLE = "Ideogram 4, locally"
REFRESH_SECONDS = 0.5
COMPARE = "compare"  # the tab that pictures are on
RANDOM_SEEDS = 2**31  # random seeds are below this, short enough to be read out
SILENT_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PRIVATE = {**SILENT_EVENT, "queue": False}  # at once, but what it raises reaches nobody
QUEUED_EVENT = {**SILENT_EVENT, "concurrency_limit": None}  # through Gradio's queue, where errors become notes
# The page's own buttons are caught here and handed to Python with what they stand for.
BUTTON_SCRIPT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) trigger("click", { act: button.dataset.act, name: button.dataset.name });
});
"""
HEADER = (
    f'<header class="top"><h1>{TITLE}</h1>'
    "<p>One caption, several precisions, side by side: what fits on this machine, and what each precision costs.</p>"
    "</header>"
)


def errors_as_toast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what the user can act upon into a note that stays until it is closed."""

    @functools.wraps(function)
    def inner(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except AppError as problem:
            raise gr.Error(str(problem), duration=None, title="That did not work", print_exception=False) from problem

    return inner


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


def build(studio: Studio, model: str = "miniature") -> gr.Blocks:
    """The whole page around a studio that runs."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        _pane(HEADER)
        panes = {
            "machine": _pane(machine_card(State(), model), elem_id="machine"),
            "job": _pane(elem_id="job", js_on_load=BUTTON_SCRIPT),
        }
        memory = _pane(elem_id="memory", js_on_load=MEMORY_SCRIPT, min_height=0)
        panes["loaded"] = _pane(elem_id="loaded", js_on_load=BUTTON_SCRIPT)
        opened = gr.State(None)  # the name of an earlier comparison that this tab looks at
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Compare", id=COMPARE):
                panes["guide"] = _script_pane("guide")
                with gr.Row(elem_classes="split"):
                    with gr.Column(scale=4, min_width=300, elem_classes="asking"):
                        form, extras = forms.build_form(model)
                    with gr.Column(scale=9, min_width=300, elem_classes="outcome"):
                        panes["results"] = _pane(elem_id="results", js_on_load=BUTTON_SCRIPT)
                        panes["downloads"] = _pane(elem_id="downloads")
                        panes["slider"] = _script_pane("slider", min_height=0)
                        panes["charts"] = _pane(elem_id="charts")
            with gr.Tab("Precisions on disk", id="weights"):
                panes["weights"] = _pane(elem_id="weights", js_on_load=BUTTON_SCRIPT)
            with gr.Tab("History", id="history"):
                panes["gallery"] = _pane(elem_id="gallery", js_on_load=BUTTON_SCRIPT)
        _wire_form(studio, form, extras, opened)
        _wire_buttons(studio, form, extras, panes, opened, tabs)
        wire_memory(studio, memory, **PRIVATE)
        _wire_panes(studio, page, form, extras, panes, opened)
        add_endpoints(studio, errors_as_toast)
    return page


def _pane(value: str = "", **options: Any) -> gr.HTML:
    """A piece of the page that is made here and replaced in place when it changes."""
    return gr.HTML(value, apply_default_css=False, **{"js_on_load": None, **options})


def _script_pane(name: str, **options: Any) -> gr.HTML:
    """A pane with the script of its name beside this file."""
    return _pane(elem_id=name, js_on_load=Path(__file__).with_name(f"{name}.js").read_text(encoding="utf-8"), **options)


def _submit_on(events: list[Any], submit: Callable[..., None], inputs: Any, opened: gr.State) -> None:
    """Submit a comparison on these events; once it is accepted, the tab shows the newest comparison again."""
    gr.on(events, errors_as_toast(submit), inputs, None, **QUEUED_EVENT).success(lambda: None, None, opened, **PRIVATE)


def _wire_form(studio: Studio, form: forms.Form, extras: forms.Extras, opened: gr.State) -> None:
    """What the inputs do to each other, Generate and Stop."""

    def adopt_model(model: str) -> tuple[Any, ...]:
        width, height = find_model(model).default_size
        examples = gr.Dataset(**forms.example_rows(model))
        return width, height, forms.suggested_recipes(studio.state.machine, model), examples, forms.first_example(model)

    def submit(*values: Any) -> None:
        request = forms.request_of(*values)
        ordered = tuple(sorted(request.recipes, key=list(RECIPES).index))  # boxes come in the order of the clicks
        studio.submit_compare(replace(request, recipes=ordered))

    form.model.input(
        adopt_model, form.model, [form.width, form.height, form.recipes, extras.examples, form.prompt], **PRIVATE
    )
    gr.on(
        [form.preset.change, form.model.change],
        forms.guidance_note,
        [form.preset, form.model],
        extras.guidance,
        **PRIVATE,
    )
    form.prompt.change(forms.caption_note, form.prompt, extras.caption, trigger_mode="always_last", **PRIVATE)
    extras.examples.click(lambda row: row[0], extras.examples, form.prompt, **PRIVATE)
    extras.random.click(lambda: random.randrange(RANDOM_SEEDS), None, form.seed, **PRIVATE)
    extras.stop.click(studio.stop, None, None, **PRIVATE)
    _submit_on([extras.generate.click, form.prompt.submit], submit, form.inputs, opened)


def _filled(shown: Shown | None) -> tuple[Any, ...]:
    """What the inputs and the examples become for a comparison; nothing changes where there is none."""
    if shown is None:
        return tuple(gr.skip() for _ in range(len(fields(forms.Form)) + 1))
    return *forms.values_of(shown.request), gr.Dataset(**forms.example_rows(shown.request.model))


def _wire_panes(
    studio: Studio, page: gr.Blocks, form: forms.Form, extras: forms.Extras, panes: dict[str, gr.HTML], opened: gr.State
) -> None:
    """Fill the form when the page has loaded, then keep the tab up to date by a timer."""
    seen, timer = gr.State(Seen()), gr.Timer(REFRESH_SECONDS, active=False)

    def load() -> tuple[Any, ...]:
        shown = current_comparison(studio, studio.state, None)
        return *_filled(shown), Seen(filled=shown is not None), gr.Timer(active=True)

    def refresh(model: str, opened: str | None, seen: Seen) -> list[Any]:
        studio.wake()  # the tab is up
        source = studio.state.sources.get(model)
        if source and not source.at_hand and model not in studio.state.access:
            studio.check_access(model)  # not before somebody looks at weights that would have to be fetched
        state = studio.state
        fresh, now = changed(studio, state, model, opened, seen)
        recipes: Any = gr.skip()
        if state.machine and not seen.filled:
            recipes, now = forms.suggested_recipes(state.machine, model), replace(now, filled=True)
        if now is seen:
            return [gr.skip()] * (len(panes) + 4)
        running = state.job is not None and not state.job.is_over
        fits = state.machine is None or state.machine.plans[model].fits
        buttons = [gr.Button(interactive=fits), gr.Button(interactive=running)]
        return [*(fresh.get(name, gr.skip()) for name in panes), recipes, *buttons, now]

    inputs = [form.model, opened, seen]
    outputs = [*panes.values(), form.recipes, extras.generate, extras.stop, seen]
    page.load(load, None, [*form.inputs, extras.examples, seen, timer], **PRIVATE).then(
        refresh, inputs, outputs, **PRIVATE
    )
    timer.tick(refresh, inputs, outputs, **PRIVATE)


def _wire_buttons(
    studio: Studio, form: forms.Form, extras: forms.Extras, panes: dict[str, gr.HTML], opened: gr.State, tabs: gr.Tabs
) -> None:
    """Buttons inside panes: prepare, stop, check access, delete, unload, draw; fallbacks; earlier comparisons."""

    def act(event: gr.EventData, *values: Any) -> None:
        model, name = str(values[0]), str(event._data.get("name"))
        actions: dict[str, Callable[[], object]] = {
            "stop": lambda: studio.stop(name),
            "prepare": lambda: studio.submit_prepare(model, tuple(name.split(","))),
            "continue": lambda: studio.submit_prepare(model, tuple(name.split(","))),
            "check": lambda: studio.check_access(model),
            "delete": lambda: studio.submit_delete(model),
            "unload": studio.unload,
            "draw": lambda: studio.submit_compare(forms.first_request(values, name)),
        }
        actions[str(event._data.get("act"))]()

    def draw_with_less(opened: str | None, event: gr.EventData) -> None:
        shown = current_comparison(studio, studio.state, opened)
        if shown:
            studio.submit_compare(offered(shown.request, shown.results, str(event._data.get("name"))))

    def open_again(event: gr.EventData) -> tuple[Any, ...]:
        entry = studio.entry(str(event._data.get("name")))
        return *_filled(from_entry(entry)), entry.id, gr.Tabs(selected=COMPARE)

    for name in ("weights", "job", "loaded"):
        panes[name].click(errors_as_toast(act), form.model, None, **QUEUED_EVENT)
    _submit_on([panes["guide"].click], act, form.inputs, opened)
    _submit_on([panes["results"].click], draw_with_less, opened, opened)
    outputs = [*form.inputs, extras.examples, opened, tabs]
    panes["gallery"].click(errors_as_toast(open_again), None, outputs, **QUEUED_EVENT)
