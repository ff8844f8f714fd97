"""The page: its blocks, and what happens when something is pressed. `build(studio, model) -> gr.Blocks`.

Handlers only submit, stop or open; they return at once. What is shown comes from `panes`, asked for by a timer, so a
generator that a reload would kill is nowhere. `told` is the one place where an `AppError` becomes a note on the page.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.errors import AppError
from ideogram_app.studio.state import State
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.api import add_endpoints
from ideogram_app.ui.form import (
    Extras,
    Form,
    build_form,
    caption_note,
    example_rows,
    first_example,
    first_request,
    guidance_note,
    request_of,
    suggested_recipes,
    values_of,
)
from ideogram_app.ui.machine_card import machine_card
from ideogram_app.ui.memory_bar import memory_pane, wire_memory
from ideogram_app.ui.offers import offered
from ideogram_app.ui.panes import PANE_NAMES, Seen, changed, current_comparison
from ideogram_app.ui.results import Shown, from_entry
from ideogram_app.ui.slider import slider_component
from ideogram_app.ui.weights import WEIGHTS_SCRIPT

GUIDE_SCRIPT = Path(__file__).with_name("guide.js")
TITLE = "Ideogram 4, locally"
REFRESH_SECONDS = 0.5
COMPARE = "compare"  # the tab that pictures are on
RANDOM_SEEDS = 2**31  # random seeds are below this, short enough to be read out
SILENT_EVENT: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PRIVATE = {**SILENT_EVENT, "queue": False}  # at once, but what it raises reaches nobody
QUEUED_EVENT = {**SILENT_EVENT, "concurrency_limit": None}  # through Gradio's queue, where errors become notes
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


def build(studio: Studio, model: str = "miniature") -> gr.Blocks:
    """The whole page around a studio that runs."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        _pane(HEADER)
        panes = {
            "machine": _pane(machine_card(State(), model), elem_id="machine"),
            "job": _pane(elem_id="job", js_on_load=WEIGHTS_SCRIPT),
        }
        memory = memory_pane()
        panes["loaded"] = _pane(elem_id="loaded", js_on_load=WEIGHTS_SCRIPT)
        opened = gr.State(None)  # the name of an earlier comparison that this tab looks at
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Compare", id=COMPARE):
                panes["guide"] = _pane(elem_id="guide", js_on_load=GUIDE_SCRIPT.read_text(encoding="utf-8"))
                with gr.Row(elem_classes="split"):
                    with gr.Column(scale=4, min_width=300, elem_classes="asking"):
                        form, extras = build_form(model)
                    with gr.Column(scale=9, min_width=300, elem_classes="outcome"):
                        panes["results"] = _pane(elem_id="results", js_on_load=WEIGHTS_SCRIPT)
                        panes["downloads"] = _pane(elem_id="downloads")
                        panes["slider"] = slider_component()
                        panes["charts"] = _pane(elem_id="charts")
            with gr.Tab("Precisions on disk", id="weights"):
                panes["weights"] = _pane(elem_id="weights", js_on_load=WEIGHTS_SCRIPT)
            with gr.Tab("History", id="history"):
                panes["gallery"] = _pane(elem_id="gallery", js_on_load=WEIGHTS_SCRIPT)
        _wire_form(studio, form, extras, opened)
        _wire_gallery(studio, form, extras, panes["gallery"], opened, tabs)
        _wire_buttons(studio, form, panes, opened)
        _wire_offers(studio, panes["results"], opened)
        wire_memory(studio, memory, **PRIVATE)
        _wire_panes(studio, page, form, extras, panes, opened)
        add_endpoints(studio, errors_as_toast)
    return page


def _pane(value: str = "", **options: Any) -> gr.HTML:
    """A piece of the page that is made here and replaced in place when it changes."""
    return gr.HTML(value, apply_default_css=False, **{"js_on_load": None, **options})


def _is_unasked(state: State, model: str) -> bool:
    """Whether somebody looks at weights that would have to be fetched, and nobody has asked if that is allowed.

    Before somebody does, this program does not speak to the Hub.
    """
    source = state.sources.get(model)
    return source is not None and not source.at_hand and model not in state.access


def _wire_form(studio: Studio, form: Form, extras: Extras, opened: gr.State) -> None:
    """What the inputs do to each other, Generate and Stop."""

    def adopt_model(model: str) -> tuple[Any, ...]:
        width, height = find_model(model).default_size
        examples = gr.Dataset(**example_rows(model))
        return width, height, suggested_recipes(studio.state.machine, model), examples, first_example(model)

    def submit(*values: Any) -> None:
        request = request_of(*values)
        ordered = tuple(sorted(request.recipes, key=list(RECIPES).index))  # boxes come in the order of the clicks
        studio.submit_compare(replace(request, recipes=ordered))

    form.model.input(
        adopt_model, form.model, [form.width, form.height, form.recipes, extras.examples, form.prompt], **PRIVATE
    )
    gr.on([form.preset.change, form.model.change], guidance_note, [form.preset, form.model], extras.guidance, **PRIVATE)
    form.prompt.change(caption_note, form.prompt, extras.caption, trigger_mode="always_last", **PRIVATE)
    extras.examples.click(lambda row: row[0], extras.examples, form.prompt, **PRIVATE)
    extras.random.click(lambda: random.randrange(RANDOM_SEEDS), None, form.seed, **PRIVATE)
    extras.stop.click(studio.stop, None, None, **PRIVATE)
    gr.on(
        [extras.generate.click, form.prompt.submit], errors_as_toast(submit), form.inputs, None, **QUEUED_EVENT
    ).success(lambda: None, None, opened, **PRIVATE)


def _filled(shown: Shown | None) -> tuple[Any, ...]:
    """What the inputs and the examples become for a comparison; nothing changes where there is none."""
    if shown is None:
        return tuple(gr.skip() for _ in range(len(fields(Form)) + 1))
    return *values_of(shown.request), gr.Dataset(**example_rows(shown.request.model))


def _wire_panes(
    studio: Studio, page: gr.Blocks, form: Form, extras: Extras, panes: dict[str, gr.HTML], opened: gr.State
) -> None:
    """Fill the form when the page has loaded, then keep the tab up to date by a timer."""
    seen, timer = gr.State(Seen()), gr.Timer(REFRESH_SECONDS, active=False)

    def load() -> tuple[Any, ...]:
        shown = current_comparison(studio, studio.state, None)
        return *_filled(shown), Seen(filled=shown is not None), gr.Timer(active=True)

    def refresh(model: str, opened: str | None, seen: Seen) -> list[Any]:
        studio.wake()  # the tab is up
        if _is_unasked(studio.state, model):
            studio.check_access(model)
        state = studio.state
        fresh, now = changed(studio, state, model, opened, seen)
        recipes: Any = gr.skip()
        if state.machine and not seen.filled:
            recipes, now = suggested_recipes(state.machine, model), replace(now, filled=True)
        if now is seen:
            return [gr.skip()] * (len(PANE_NAMES) + 4)
        running = state.job is not None and not state.job.is_over
        fits = state.machine is None or state.machine.plans[model].fits
        buttons = [gr.Button(interactive=fits), gr.Button(interactive=running)]
        return [*(fresh.get(name, gr.skip()) for name in PANE_NAMES), recipes, *buttons, now]

    inputs = [form.model, opened, seen]
    outputs = [*(panes[name] for name in PANE_NAMES), form.recipes, extras.generate, extras.stop, seen]
    page.load(load, None, [*form.inputs, extras.examples, seen, timer], **PRIVATE).then(
        refresh, inputs, outputs, **PRIVATE
    )
    timer.tick(refresh, inputs, outputs, **PRIVATE)


def _wire_gallery(
    studio: Studio, form: Form, extras: Extras, gallery: gr.HTML, opened: gr.State, tabs: gr.Tabs
) -> None:
    """Open an earlier comparison: its pictures, and its settings in the form."""

    def open_again(event: gr.EventData) -> tuple[Any, ...]:
        entry = studio.entry(str(event._data.get("name")))
        return *_filled(from_entry(entry)), entry.id, gr.Tabs(selected=COMPARE)

    gallery.click(errors_as_toast(open_again), None, [*form.inputs, extras.examples, opened, tabs], **QUEUED_EVENT)


def _wire_buttons(studio: Studio, form: Form, panes: dict[str, gr.HTML], opened: gr.State) -> None:
    """The buttons inside panes: prepare a recipe, stop a job, ask about access, delete a download, draw."""

    def act(event: gr.EventData, *values: Any) -> None:
        model, name = str(values[0]), str(event._data.get("name"))

        def prepare() -> None:
            studio.submit_prepare(model, tuple(name.split(",")))

        actions: dict[str, Callable[[], object]] = {
            "stop": lambda: studio.stop(name),
            "prepare": prepare,
            "continue": prepare,
            "check": lambda: studio.check_access(model),
            "delete": lambda: studio.submit_delete(model),
            "unload": studio.unload,
            "draw": lambda: studio.submit_compare(first_request(values, name)),
        }
        actions[str(event._data.get("act"))]()

    for name in ("weights", "job", "loaded"):
        panes[name].click(errors_as_toast(act), form.model, None, **QUEUED_EVENT)
    panes["guide"].click(errors_as_toast(act), form.inputs, None, **QUEUED_EVENT).success(
        lambda: None, None, opened, **PRIVATE
    )


def _wire_offers(studio: Studio, results: gr.HTML, opened: gr.State) -> None:
    """What is offered where memory ran out: the same request, drawn with less."""

    def draw_with_less(opened: str | None, event: gr.EventData) -> None:
        shown = current_comparison(studio, studio.state, opened)
        if shown:
            studio.submit_compare(offered(shown.request, shown.results, str(event._data.get("name"))))

    results.click(errors_as_toast(draw_with_less), opened, None, **QUEUED_EVENT).success(
        lambda: None, None, opened, **PRIVATE
    )
