"""The published weights of a model: what a download takes, whether it is allowed, how far it is, and its end.

Everything is said before the first byte: what is fetched, what is made from it, what stays on the disk, under which
licence, and whether the Hub will give it. Left out: a field for a token. It stays with huggingface_hub, which has a
login of its own, so that this page never sees it.
"""

from __future__ import annotations

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import Source, find_source
from ideogram_app.hub.access import Access
from ideogram_app.planning.policy import PREFERRED_RECIPES
from ideogram_app.studio.setup_stages import CLOSED, GATES, setup_stages
from ideogram_app.studio.setup_status import SetupStatus, disk_short
from ideogram_app.studio.state import Job, SourceState, State
from ideogram_app.text import listed, size
from ideogram_app.ui.guide_card import stage_list
from ideogram_app.ui.words import act, esc, link, linked, recipe_title

SOURCE_LABELS = {
    "given": ("your own copy", "ok"),
    "missing": ("not on this disk", ""),
    "partial": ("begun", "warn"),
    "complete": ("on this disk", "ok"),
}


def source_card(state: State, model: str) -> str:
    """The card; nothing for a model that ships with the program, or while the disk has not been looked at."""
    row, source = find_source(model), state.sources.get(model)
    if row.included or source is None:
        return ""
    job = state.preparing(model)
    label, tone = ("being fetched", "warn") if _is_fetching(job) else SOURCE_LABELS[source.state]
    return (
        f'<section class="card source" aria-label="The published weights"><p class="eyebrow">Published weights</p>'
        f'<h2>{esc(row.repository)} <span class="chip {tone}">{label}</span></h2>'
        f"{_facts(row, source, job, state, model)}{_now(row, source, job, state, model)}</section>"
    )


def _is_fetching(job: Job | None) -> bool:
    return job is not None and job.stage is not None and job.stage.phase == "fetch"


def can_make(state: State, model: str, recipe: str) -> bool:
    """Whether a recipe could be made now: its weights are at hand, or may be fetched and have room."""
    source, access = state.sources.get(model), state.access.get(model)
    if source is None or state.machine is None:
        return False
    if source.at_hand:
        return find_source(model).included is None or state.machine.plans[model].fits
    return not (access and access.state in CLOSED) and not SetupStatus(state, model, (recipe,)).lacking


def suggested(state: State, model: str) -> str:
    """The recipe to begin with: the plan's, or the first of its ladder where nothing fits this machine."""
    planned = state.machine.plans[model].recipe if state.machine else None
    return planned or PREFERRED_RECIPES[0]


def _next(state: State, model: str) -> str:
    """What a download would be for: the recipe to begin with, or another one where that is ready."""
    names = (suggested(state, model), *PREFERRED_RECIPES, *RECIPES)
    return next((name for name in names if not _is_ready(state, model, name)), names[0])


def _facts(row: Source, source: SourceState, job: Job | None, state: State, model: str) -> str:
    """What is fetched, made and kept, in bytes, and under which terms."""
    view = SetupStatus(state, model, job.recipes if job else (suggested(state, model),))
    recipes, made = view.missing, view.to_make
    licence = link(row.url, row.licence)
    if source.state == "given":
        rows = [("Read from", esc(source.folder)), ("Licence", licence)]
    elif source.state == "complete":
        version = f", version {esc(source.commit[:7])}" if source.commit else ""
        rows = [("Fetched", f"{size(source.bytes)}{version}"), ("Licence", licence)]
    else:
        free = state.machine.hardware.disk_free_bytes if state.machine else None
        rows = [("Fetched, once", size(row.size))]
        if recipes:
            titles = [recipe_title(name) for name in recipes]
            named = listed(titles if source.components_bytes else [*titles, "the text encoder"])
            rows.append(("Made from it", f"{size(made)}, {esc(named)}"))
            rows.append(("Kept", f"{size(row.size + made)}, or {size(made)} without the download"))
        rows += [("Free on this disk", size(free)), ("Licence", licence)]
    inside = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{inside}</dl>'


def _now(row: Source, source: SourceState, job: Job | None, state: State, model: str) -> str:
    """What goes on, or what can be done next."""
    if job:
        return stage_list(setup_stages(state, model, job.recipes)[3:6])  # fetch, quantize, smoke test
    if source.state == "complete":
        return _farewell(source, state, model)
    if source.state == "given":
        return '<p class="quiet lead">Nothing is fetched: precisions are made from this copy, which stays as it is.</p>'
    return f"{_promise(state, model)}{_gate(state, model)}{_begin(row, source, state, model)}"


def _promise(state: State, model: str) -> str:
    """What happens to somebody's time, in two sentences; and what this machine will not do with it."""
    ready = [name for name, status in state.statuses.get(model, {}).items() if status.state == "ready"]
    kept = f"{listed([recipe_title(name) for name in ready])} can be used without it. " if ready else ""
    fits = state.machine is None or state.machine.plans[model].fits
    warning = (
        ""
        if fits
        else '<p class="note warn">This machine cannot draw with it, as the plan above says. '
        "Precisions can still be made here, to be used on another machine.</p>"
    )
    return (
        f'<p class="quiet lead">{esc(kept)}Every file is checked, and a dropped line or a closed laptop loses nothing: '
        f"it goes on where it stopped. For non-commercial use; precisions made from it fall under the same licence.</p>"
        f"{warning}"
    )


def _gate(state: State, model: str) -> str:
    """Whether the Hub gives the weights to this user, and where to act."""
    access: Access | None = state.access.get(model)
    if model in state.checking:
        return '<div class="note gate" role="status"><p>Asking Hugging Face whether you may fetch it …</p></div>'
    if access is None:
        again = act("check", model, "Check access", "Check whether you may fetch the weights")
        return f'<div class="note gate" role="status"><p>You need access to fetch it.</p><p>{again}</p></div>'
    tone, heading, page = GATES[access.state]
    if access.state == "ready":
        return f'<div class="note gate ok" role="status" data-gate="ready"><p><strong>{heading}</strong></p></div>'
    go = link(access.url, page, "button") if page and access.url else ""
    again = act("check", model, "Check again", "Check again whether you may fetch the weights")
    return (
        f'<div class="note gate {tone}" role="status" data-gate="{access.state}"><p><strong>{heading}</strong> '
        f"{linked(access.sentence)}</p><p>{go}{again}</p></div>"
    )


def _begin(row: Source, source: SourceState, state: State, model: str) -> str:
    """The button that starts it, or why there is none."""
    recipe = suggested(state, model)
    view = SetupStatus(state, model, (_next(state, model),))
    if view.lacking:
        return f'<p class="note bad" role="alert">{esc(disk_short(view))}</p>'
    if not can_make(state, model, recipe) or _is_ready(state, model, recipe):
        return ""  # what is suggested may be there, and the others have buttons of their own in the table
    label = f"Fetch it and make {recipe_title(recipe)}"
    if source.state == "partial":
        label = f"Continue: {size(max(0, row.size - source.bytes))} to go"
    return f'<p class="links">{act("prepare", recipe, label, label, primary=True)}</p>'


def _farewell(source: SourceState, state: State, model: str) -> str:
    """The offer to delete a download that has served, with what stays and what would need it again."""
    ready = [recipe for recipe in RECIPES if _is_ready(state, model, recipe)]
    if not ready:
        return (
            '<p class="quiet lead">Fetched and checked. Prepare a precision below; the download can go after that.</p>'
        )
    kept = listed([recipe_title(recipe) for recipe in ready])
    stays = "stays" if len(ready) == 1 else "stay"
    amount = size(source.bytes)
    sure = act("delete", model, f"Delete {amount}", f"Delete the download of {amount}")
    return (
        f'<div class="note"><p>Delete the {amount} download? {esc(kept)} {stays} usable; other precisions would need '
        f'it again.</p><details class="sure"><summary class="button">Delete the download …</summary>'
        f"<p>Fetching it again takes as long as the first time. {sure}</p></details></div>"
    )


def _is_ready(state: State, model: str, recipe: str) -> bool:
    status = state.statuses.get(model, {}).get(recipe)
    return status is not None and status.state == "ready"
