"""Which recipes of a model are at hand, what each is, and a button that prepares one.

Left out: choosing a folder, and the download of a single file; a recipe is prepared as a whole or not at all.
"""

from __future__ import annotations

from typing import Any

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.sources import find_source
from ideogram_app.studio.setup_status import made_bytes
from ideogram_app.studio.state import Job, State
from ideogram_app.text import size
from ideogram_app.ui.form import offered
from ideogram_app.ui.source_card import can_make, source_card
from ideogram_app.ui.words import act, bar, esc, linked, progress_words

RECIPE_LABELS = {
    "ready": ("ready", "ok"),
    "included": ("included", "ok"),
    "missing": ("not prepared", ""),
    "partial": ("begun", "warn"),
    "damaged": ("damaged", "bad"),
}
# The page's own buttons are caught here and handed to Python with what they stand for.
WEIGHTS_SCRIPT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) trigger("click", { act: button.dataset.act, name: button.dataset.name });
});
"""


def weights_table(state: State, model: str) -> str:
    """The source of published weights, then one row a recipe, those for every day first."""
    shape, recipes = find_model(model), offered()
    further = next((recipe.name for recipe in recipes if not recipe.everyday), "")
    rows = "".join(
        ('<tr class="group"><th colspan="5" scope="rowgroup">More precisions, to measure with</th></tr>' * at_break)
        + _row(recipe, state, model)
        for recipe in recipes
        for at_break in [recipe.name == further]
    )
    note = (
        f"Each precision of {esc(shape.title)} is made here from the published weights."
        if shape.source_bytes
        else f"{esc(shape.title)} ships with the program; each precision is made from it in seconds."
    )
    return (
        f'<div class="stack">{_failure(state, model)}{source_card(state, model)}'
        f'<section class="card" aria-label="Precisions on disk">'
        f'<p class="quiet">{note} What a comparison needs is prepared before it is drawn.</p>'
        '<div class="scroller"><table class="weights"><thead><tr><th scope="col">Precision</th>'
        '<th scope="col">Weights</th><th scope="col">Arithmetic</th><th scope="col">State</th>'
        '<th scope="col"><span class="hidden">Action</span></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section></div>"
    )


def _failure(state: State, model: str) -> str:
    """Why the last preparation failed, and the button that takes it up again; until the next job."""
    job, access = state.job, state.access.get(model)
    if job is None or job.kind not in ("prepare", "delete") or job.model != model or not job.error:
        return ""
    if access and access.sentence in job.error:
        return ""  # the gate says so already
    again = ""
    if job.kind == "prepare" and can_make(state, model, job.recipes[0]):
        label = "Continue" if _is_begun(state, job) else "Try again"
        again = f"<p>{act('prepare', ','.join(job.recipes), label, f'{label} what failed')}</p>"
    return f'<div class="note bad gate" role="alert"><p>{linked(job.error)}</p>{again}</div>'


def _is_begun(state: State, job: Job) -> bool:
    """Whether something of what a job was to bring or make is on disk."""
    statuses = state.statuses.get(job.model, {})
    rows = [statuses.get(recipe) for recipe in job.recipes] + [state.sources.get(job.model)]
    return any(row is not None and row.state == "partial" for row in rows)


def _row(recipe: Recipe, state: State, model: str) -> str:
    status = state.statuses.get(model, {}).get(recipe.name)
    job = state.preparing(model, recipe.name)
    held = size(made_bytes(model, recipe.name))
    return (
        f'<tr data-recipe="{esc(recipe.name)}"><th scope="row">{esc(recipe.title)}'
        f'<p class="quiet">{esc(recipe.summary)}</p></th><td>{held}</td><td>{esc(recipe.compute)}</td>'
        f"<td>{_state(recipe, status, job)}</td><td>{_button(recipe, status, job, state, model)}</td></tr>"
    )


def _state(recipe: Recipe, status: Any, job: Job | None) -> str:
    event = job.progress.get(recipe.name) if job else None
    if job and event:
        words = esc(progress_words(event))
        return f'{bar(f"Preparing {recipe.title}", event)}<p class="quiet words">{words}</p>'
    if job:
        return '<span class="chip">waiting</span>'
    if status is None:
        return '<span class="quiet">looking …</span>'
    label, tone = RECIPE_LABELS.get(status.state, (status.state, ""))
    on_disk = f' <span class="quiet">{size(status.bytes)}</span>' if status.bytes else ""
    detail = f'<p class="quiet">{esc(status.detail)}</p>' if status.state in ("partial", "damaged") else ""
    return f'<span class="chip {tone}">{esc(label)}</span>{on_disk}{detail}'


def _button(recipe: Recipe, status: Any, job: Job | None, state: State, model: str) -> str:
    if job:
        return act("stop", job.id, "Cancel", f"Cancel preparing {recipe.title}")
    if status is None or status.usable or not can_make(state, model, recipe.name):
        return ""
    source = state.sources.get(model)
    label = "Prepare" if find_source(model).included or (source and source.at_hand) else "Fetch and prepare"
    label = "Continue" if status.state == "partial" else label
    return act("prepare", recipe.name, label, f"{label} {recipe.title}")
