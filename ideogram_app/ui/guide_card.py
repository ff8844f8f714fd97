"""The first run as a card at the top of the page: seven stages, one of them open, with its facts and its one button.

It is there while a model whose weights come from elsewhere has no picture yet, and gone afterwards. What stands in it
is studio/setup_stages.py's; this file makes HTML of it. The card is replaced as a whole while a job runs, so guide.js
keeps what a person at the keyboard had opened or focused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ideogram_app.records import Request
from ideogram_app.studio.setup_stages import Action, Stage, current_stage, is_first_run, setup_stages
from ideogram_app.studio.state import State
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.form import first_example, request_of
from ideogram_app.ui.words import act, bar, esc, link, linked, progress_words

GUIDE_SCRIPT = Path(__file__).with_name("guide.js")
MARKS = {"done": "Done: ", "blocked": "Needs you: ", "now": "Now: ", "next": ""}  # what a check mark or a colour says
QUIET_FILES = ("prepare", "verify")  # phases whose messages name tensors, which say nothing to most people


def guide_component() -> gr.HTML:
    """The component; its value is what `guide_card` gives."""
    return gr.HTML("", elem_id="guide", js_on_load=GUIDE_SCRIPT.read_text(encoding="utf-8"), apply_default_css=False)


def guide_card(state: State, model: str) -> str:
    """The card, or nothing where the first run is over or was never needed."""
    if not is_first_run(state, model):
        return ""
    stages = setup_stages(state, model)
    number = 1 + stages.index(current_stage(stages))
    return (
        '<section class="card guide" aria-label="First run"><header><h2>First run</h2>'
        f'<p class="quiet">Stage {number} of {len(stages)}. You can leave at any time: it goes on where it stopped.</p>'
        f"</header>{stage_list(stages)}</section>"
    )


def stage_list(stages: tuple[Stage, ...]) -> str:
    """Stages as a numbered list; the one to act on is marked as the current step."""
    return f'<ol class="stages">{"".join(map(_stage, stages))}</ol>'


def _stage(stage: Stage) -> str:
    here = stage.status in ("now", "blocked")
    look = {"next": "waits"}.get(stage.status, stage.status)
    mark = f'<span class="hidden">{MARKS[stage.status]}</span>' if MARKS[stage.status] else ""
    head = f"{mark}<strong>{esc(stage.title)}</strong>"
    current_step = ' aria-current="step"' if here else ""
    attributes = f'class="{look}" data-stage="{stage.name}"{current_step}'
    if here:
        return f"<li {attributes}>{head}{_body(stage)}</li>"
    line = f'{head} <span class="quiet">{linked(stage.sentence)}</span>'
    if stage.status == "next" or not stage.facts:
        return f"<li {attributes}>{line}</li>"
    opened = " open" if stage.is_open else ""
    return f"<li {attributes}><details{opened}><summary>{line}</summary>{_facts(stage)}</details></li>"


def _body(stage: Stage) -> str:
    """The open stage: how it stands, its numbers, how far it is, and what can be done."""
    role = "alert" if stage.status == "blocked" else "status"
    tone = "note warn" if stage.status == "blocked" else "quiet"
    said = f'<p class="{tone}" role="{role}">{linked(stage.sentence)}</p>'
    buttons = f"{link(stage.link[1], stage.link[0], 'button primary') if stage.link else ''}{_button(stage)}"
    return f"{said}{_facts(stage)}{_progress(stage)}{f'<p class=links>{buttons}</p>' if buttons else ''}"


def _facts(stage: Stage) -> str:
    inside = "".join(f"<div><dt>{esc(name)}</dt><dd>{linked(value)}</dd></div>" for name, value in stage.facts)
    return f'<dl class="facts">{inside}</dl>' if inside else ""


def _progress(stage: Stage) -> str:
    event = stage.event
    if event is None:
        return bar(stage.title, None) if stage.action and stage.action.name == "stop" else ""
    file = "" if event.phase in QUIET_FILES else event.message
    words = progress_words(replace(event, message="") if event.phase == "smoke" else event)
    if event.phase == "smoke" and event.total:
        words = f"{event.done} of {event.total} parts tried"
    detail = f'<p class="quiet words file">{esc(file)}</p>' if file and file != words else ""
    return f'{bar(stage.title, event)}<p class="quiet words">{esc(words)}</p>{detail}'


def _button(stage: Stage) -> str:
    action: Action | None = stage.action
    if action is None:
        return ""
    leading = action.name not in ("stop", "check")
    return act(action.name, action.argument, action.label, action.label, primary=leading)


def wire_guide(
    studio: Studio, card: gr.HTML, inputs: list[Any], told: Callable[..., Any], **asking: Any
) -> gr.events.Dependency:
    """What the card's buttons do. `inputs` are the form's, model and prompt first.

    Args:
        told: turns an `AppError` into a note on the page.
        asking: how Gradio is to call it.
    """

    def follow(event: gr.EventData, *values: Any) -> None:
        deed, name = str(event._data.get("act")), str(event._data.get("name"))
        model = str(values[0])
        deeds: dict[str, Callable[[], object]] = {
            "prepare": lambda: studio.submit_prepare(model, tuple(name.split(","))),
            "continue": lambda: studio.submit_prepare(model, tuple(name.split(","))),
            "check": lambda: studio.check_access(model),
            "stop": lambda: studio.stop(name),
            "draw": lambda: studio.submit_compare(first_request(list(values), name)),
        }
        deeds[deed]()

    return card.click(told(follow), inputs, None, **asking)


def first_request(values: list[Any], recipe: str) -> Request:
    """What the form asks for, with one recipe; a model's first example where it is empty.

    Raises:
        RequestError, CaptionError: something in the form cannot be used; names it.
    """
    model, prompt, *others = values
    return replace(request_of(model, prompt or first_example(model), *others), recipes=(recipe,))
