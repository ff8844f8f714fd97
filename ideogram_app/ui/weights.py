"""Weights on disk: the published weights with their download, and every recipe with a button that prepares it.

Everything is said before the first byte: what is fetched, what is made from it, what stays on the disk, under which
licence, and whether the Hub will give it. Left out: a field for a token, which stays with huggingface_hub, so that this
page never sees it; choosing a folder; and the download of a single file.
"""

from __future__ import annotations

from typing import Any

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.recipes import RECIPES, Recipe
from ideogram_app.catalog.sources import find_source
from ideogram_app.planning.policy import PREFERRED_RECIPES
from ideogram_app.studio.setup_stages import CLOSED, plan_facts, setup_stages
from ideogram_app.studio.setup_status import SetupStatus, made_bytes
from ideogram_app.studio.state import Job, State
from ideogram_app.text import listed, size
from ideogram_app.ui.guide_card import stage_list
from ideogram_app.ui.words import act, bar, esc, everyday_first, facts, linked, progress_words, recipe_title

SOURCE_LABELS = {
    "given": ("your own copy", "ok"),
    "missing": ("not on this disk", ""),
    "partial": ("begun", "warn"),
    "complete": ("on this disk", "ok"),
}
RECIPE_LABELS = {
    "ready": ("ready", "ok"),
    "included": ("included", "ok"),
    "missing": ("not prepared", ""),
    "partial": ("begun", "warn"),
    "damaged": ("damaged", "bad"),
}


def weights_table(state: State, model: str) -> str:
    """The card of the published weights, then one row a recipe, those for every day first."""
    shape, recipes = find_model(model), everyday_first()
    rows = [_row(recipe, state, model) for recipe in recipes]
    heading = '<tr class="group"><th colspan="5" scope="rowgroup">More precisions, to measure with</th></tr>'
    rows.insert(sum(recipe.everyday for recipe in recipes), heading)
    note = (
        f"Each precision of {esc(shape.title)} is made here from the published weights."
        if shape.source_bytes
        else f"{esc(shape.title)} ships with the program; each precision is made from it in seconds."
    )
    card = source_card(state, model)
    return (
        f'<div class="stack">{_failure(state, model, card)}{card}<section class="card" aria-label="Precisions on disk">'
        f'<p class="quiet">{note} What a comparison needs is prepared before it is drawn.</p>'
        '<div class="scroller"><table class="weights"><thead><tr><th scope="col">Precision</th>'
        '<th scope="col">Weights</th><th scope="col">Arithmetic</th><th scope="col">State</th>'
        '<th scope="col"><span class="hidden">Action</span></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section></div>"
    )


def source_card(state: State, model: str) -> str:
    """The published weights: stages 3 to 6 of the first run, and the button that deletes a download that has served."""
    row, source = find_source(model), state.sources.get(model)
    if row.included or source is None:
        return ""  # it ships with the program, or the disk has not been looked at
    recipes = _to_make(state, model)
    view, job = SetupStatus(state, model, recipes), state.preparing(model)
    is_fetching = job is not None and job.stage is not None and job.stage.phase == "fetch"
    label, tone = ("being fetched", "warn") if is_fetching else SOURCE_LABELS[source.state]
    before = "" if source.at_hand or job else f"{facts(plan_facts(view))}{_terms(state, model)}"
    stages = setup_stages(state, model, recipes)[2:6]  # licence, fetch, quantize, smoke test
    return (
        f'<section class="card source" aria-label="The published weights"><p class="eyebrow">Published weights</p>'
        f'<h2>{esc(row.repository)} <span class="chip {tone}">{label}</span></h2>'
        f"{before}{stage_list(stages)}{_deletion(state, model)}</section>"
    )


def _to_make(state: State, model: str) -> tuple[str, ...]:
    """What a download is for: the recipes of the first run, or another where those are ready without it."""
    view = SetupStatus(state, model)
    if view.job or view.source.at_hand or not view.is_ready:
        return view.recipes
    names = (*PREFERRED_RECIPES, *RECIPES)
    return (next((name for name in names if not _is_ready(state, model, name)), view.recipes[0]),)


def _terms(state: State, model: str) -> str:
    """What a download costs in time, under which terms, and that this machine cannot draw with it where it cannot."""
    fits = state.machine is None or state.machine.plans[model].fits
    warning = (
        '<p class="note warn">This machine cannot draw with it, as the plan above says. '
        "Precisions can still be made here, to be used on another machine.</p>"
    )
    return (
        '<p class="quiet lead">Every file is checked, and a dropped line or a closed laptop loses nothing: it goes on '
        "where it stopped. For non-commercial use; precisions made from it fall under the same licence.</p>"
        f"{'' if fits else warning}"
    )


def _deletion(state: State, model: str) -> str:
    """The offer to delete a download that has served, with what stays and what would need it again."""
    ready = [recipe for recipe in RECIPES if _is_ready(state, model, recipe)]
    if state.sources[model].state != "complete" or not ready or state.preparing(model):
        return ""
    names, amount = listed([recipe_title(recipe) for recipe in ready]), size(state.sources[model].bytes)
    sure = act("delete", model, f"Delete {amount}", f"Delete the download of {amount}")
    return (
        f'<div class="note"><p>Delete the {amount} download? {esc(names)} {"stays" if len(ready) == 1 else "stay"} '
        'usable; other precisions would need it again.</p><details class="sure"><summary class="button">'
        f"Delete the download …</summary><p>Fetching it again takes as long as the first time. {sure}</p></details>"
        "</div>"
    )


def _failure(state: State, model: str, card: str) -> str:
    """Why the last preparation failed, and the button that takes it up again; until the next job."""
    job, access = state.job, state.access.get(model)
    if job is None or job.kind not in ("prepare", "delete") or job.model != model or not job.error:
        return ""
    if linked(job.error) in card or (access and access.sentence in job.error):
        return ""  # the card of the published weights says so already
    again = ""
    if job.kind == "prepare" and _can_make(state, model, job.recipes[0]):
        begun = any(row and row.state == "partial" for row in map(state.statuses.get(model, {}).get, job.recipes))
        label = "Continue" if begun else "Try again"
        again = f"<p>{act('prepare', ','.join(job.recipes), label, f'{label} what failed')}</p>"
    return f'<div class="note bad gate" role="alert"><p>{linked(job.error)}</p>{again}</div>'


def _can_make(state: State, model: str, recipe: str) -> bool:
    """Whether a recipe could be made now: its weights are at hand, or may be fetched and have room."""
    source, access = state.sources.get(model), state.access.get(model)
    if source is None or state.machine is None:
        return False
    if source.at_hand:
        return find_source(model).included is None or state.machine.plans[model].fits
    return not (access and access.state in CLOSED) and not SetupStatus(state, model, (recipe,)).lacking


def _is_ready(state: State, model: str, recipe: str) -> bool:
    status = state.statuses.get(model, {}).get(recipe)
    return status is not None and status.state == "ready"


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
    if status is None or status.usable or not _can_make(state, model, recipe.name):
        return ""
    source = state.sources.get(model)
    label = "Prepare" if find_source(model).included or (source and source.at_hand) else "Fetch and prepare"
    label = "Continue" if status.state == "partial" else label
    return act("prepare", recipe.name, label, f"{label} {recipe.title}")
