"""Which recipes of a model are at hand, what each is, and a button that prepares one.

Left out: choosing a folder, and the download of a single file; a recipe is prepared as a whole or not at all.
"""

from __future__ import annotations

from typing import Any

from ideogram_app.architecture import find_model, weight_bytes
from ideogram_app.recipes import RECIPES, Recipe
from ideogram_app.studio import AT_HAND, Job, State
from ideogram_app.ui.words import bar, esc, progress_words, size

LABELS = {
    "ready": ("ready", "ok"),
    "included": ("included", "ok"),
    "missing": ("not prepared", ""),
    "partial": ("begun", "warn"),
    "damaged": ("damaged", "bad"),
}
# The page's own buttons are caught here and handed to Python with what they stand for.
SCRIPT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) trigger("click", { act: button.dataset.act, name: button.dataset.name });
});
"""


def weights_table(state: State, model: str) -> str:
    """One row a recipe."""
    shape = find_model(model)
    rows = "".join(_row(recipe, state, model) for recipe in RECIPES.values())
    note = (
        f"{esc(shape.title)} is fetched once ({size(shape.source_bytes)}); each precision is made from it here."
        if shape.source_bytes
        else f"{esc(shape.title)} ships with the program; each precision is made from it in seconds."
    )
    return (
        f'<section class="card" aria-label="Precisions on disk">{_failure(state, model)}'
        f'<p class="quiet">{note} What a comparison needs is prepared before it is drawn.</p>'
        '<div class="scroller"><table class="weights"><thead><tr><th scope="col">Precision</th>'
        '<th scope="col">Weights</th><th scope="col">Arithmetic</th><th scope="col">State</th>'
        '<th scope="col"><span class="hidden">Action</span></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _failure(state: State, model: str) -> str:
    """Why the last preparation failed, until the next job."""
    job = state.job
    if job is None or job.kind != "prepare" or job.model != model or not job.error:
        return ""
    return f'<p class="note bad" role="alert">{esc(job.error)}</p>'


def _row(recipe: Recipe, state: State, model: str) -> str:
    held = sum(weight_bytes(branch, recipe) for branch in find_model(model).branches)
    status = state.statuses.get(model, {}).get(recipe.name)
    job = _preparing(recipe, state, model)
    return (
        f'<tr data-recipe="{esc(recipe.name)}"><th scope="row">{esc(recipe.title)}'
        f'<p class="quiet">{esc(recipe.summary)}</p></th><td>{size(held)}</td><td>{esc(recipe.compute)}</td>'
        f"<td>{_state(recipe, status, job)}</td><td>{_button(recipe, status, job, state, model)}</td></tr>"
    )


def _preparing(recipe: Recipe, state: State, model: str) -> Job | None:
    """The job that prepares this recipe now or soon, if one does."""
    jobs = [*state.waiting, *([state.job] if state.job and not state.job.is_over else [])]
    return next((j for j in jobs if j.kind == "prepare" and j.model == model and recipe.name in j.recipes), None)


def _state(recipe: Recipe, status: Any, job: Job | None) -> str:
    event = job.progress.get(recipe.name) if job else None
    if job and event:
        words = esc(progress_words(event))
        return f'{bar(f"Preparing {recipe.title}", event)}<p class="quiet words">{words}</p>'
    if job:
        return '<span class="chip">waiting</span>'
    if status is None:
        return '<span class="quiet">looking …</span>'
    label, tone = LABELS.get(status.state, (status.state, ""))
    on_disk = f' <span class="quiet">{size(status.bytes)}</span>' if status.bytes else ""
    detail = f'<p class="quiet">{esc(status.detail)}</p>' if status.state in ("partial", "damaged") else ""
    return f'<span class="chip {tone}">{esc(label)}</span>{on_disk}{detail}'


def _button(recipe: Recipe, status: Any, job: Job | None, state: State, model: str) -> str:
    if job:
        return _act("stop", job.id, "Cancel", f"Cancel preparing {recipe.title}")
    fits = state.machine is not None and state.machine.plans[model].fits
    if status is None or status.state in AT_HAND or not fits:
        return ""
    label = "Continue" if status.state == "partial" else "Prepare"
    return _act("prepare", recipe.name, label, f"{label} {recipe.title}")


def _act(act: str, name: str, label: str, spoken: str) -> str:
    return (
        f'<button type="button" class="button" data-act="{act}" data-name="{esc(name)}" aria-label="{esc(spoken)}">'
        f"{label}</button>"
    )
