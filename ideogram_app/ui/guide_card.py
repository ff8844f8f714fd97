"""First run card (onboarding) at the top of the page: seven stages with status, facts, progress and one action.

It is there while a model whose weights come from elsewhere has no picture yet, and gone afterwards. What stands in it
is studio/setup_stages.py's; this file makes HTML of it. The card is replaced as a whole while a job runs, so guide.js
keeps what a person at the keyboard had opened or focused.
"""

from __future__ import annotations

from dataclasses import replace

from ideogram_app.studio.setup_stages import Stage, current_stage, is_first_run, setup_stages
from ideogram_app.studio.state import State
from ideogram_app.ui.words import act, bar, esc, facts, link, linked, progress_words

MARKS = {"done": "Done: ", "blocked": "Needs you: ", "now": "Now: ", "next": ""}  # what a check mark or a colour says
QUIET_FILES = ("prepare", "verify")  # phases whose messages name tensors, which say nothing to most people


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
    look = "waits" if stage.status == "next" else stage.status
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
    return f"<li {attributes}><details{opened}><summary>{line}</summary>{facts(stage.facts)}</details></li>"


def _body(stage: Stage) -> str:
    """The open stage: its status, its numbers, how far it is, and what can be done."""
    blocked, action = stage.status == "blocked", stage.action
    role, tone = ("alert", "note warn") if blocked else ("status", "quiet")
    buttons = link(stage.link[1], stage.link[0], "button primary") if stage.link else ""
    if action:
        leading = action.name not in ("stop", "check")
        buttons += act(action.name, action.argument, action.label, action.label, primary=leading)
    said = f'<p class="{tone}" role="{role}">{linked(stage.sentence)}</p>'
    return f"{said}{facts(stage.facts)}{_progress(stage)}{f'<p class=links>{buttons}</p>' if buttons else ''}"


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
