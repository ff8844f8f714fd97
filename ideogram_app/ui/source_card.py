"""The published weights of a model: what a download takes, whether it is allowed, how far it is, and its end.

Everything is said before the first byte: what is fetched, what is made from it, what stays on the disk, under which
licence, and whether the Hub will give it. Left out: a field for a token. It stays with huggingface_hub, which has a
login of its own, so that this page never sees it.
"""

from __future__ import annotations

from ideogram_app.architecture import find_model, weight_bytes
from ideogram_app.backend import SourceState
from ideogram_app.checkpoints.access import Access
from ideogram_app.checkpoints.sources import Source, find_source
from ideogram_app.flow import Event
from ideogram_app.footprint import DISK_MARGIN, encoder_weights
from ideogram_app.jobs import Job, State
from ideogram_app.planner import LADDER
from ideogram_app.recipes import RECIPES, find_recipe
from ideogram_app.ui.words import act, bar, both, esc, link, linked, progress_words, recipe_title, size

# State of the gate -> tone, heading, and what its page is for; states that are not here stand in nobody's way.
GATES: dict[str, tuple[str, str, str]] = {
    "ready": ("ok", "Your account may fetch it.", ""),
    "no_token": ("warn", "Log in to Hugging Face first.", "Make a token"),
    "not_accepted": ("warn", "The licence is not accepted yet.", "Read and accept the licence"),
    "wrong_scope": ("warn", "Your token does not reach this far.", "Edit the token"),
    "not_found": ("bad", "The weights are not where they were.", "Look there"),
    "offline": ("warn", "Working offline.", ""),
    "unreachable": ("bad", "Hugging Face does not answer.", "See whether it is down"),
}
CLOSED = ("no_token", "not_accepted", "wrong_scope", "not_found", "offline")  # asking for a file would be in vain
LABELS = {
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
    label, tone = ("being fetched", "warn") if _is_fetching(job) else LABELS[source.state]
    return (
        f'<section class="card source" aria-label="The published weights"><p class="eyebrow">Published weights</p>'
        f'<h2>{esc(row.repository)} <span class="chip {tone}">{label}</span></h2>'
        f"{_facts(row, source, job, state, model)}{_now(row, source, job, state, model)}</section>"
    )


def _is_fetching(job: Job | None) -> bool:
    return job is not None and job.stage is not None and job.stage.phase == "fetch"


def can_make(state: State, model: str) -> bool:
    """Whether a recipe could be made now: its weights are at hand, or may be fetched and have room."""
    source, access = state.sources.get(model), state.access.get(model)
    if source is None or state.machine is None:
        return False
    if source.at_hand:
        return find_source(model).included is None or state.machine.plans[model].fits
    return not (access and access.state in CLOSED) and not _short_of(state, model)


def made_bytes(model: str, recipe: str) -> int:
    """What the files of a recipe take, both transformers."""
    row = find_recipe(recipe).protecting()
    return sum(weight_bytes(branch, row) for branch in find_model(model).branches)


def _to_write(source: SourceState, model: str, recipes: tuple[str, ...]) -> int:
    """Bytes of these recipes, and of the text encoder where it is not kept beside others yet."""
    beside = 0 if source.companions_bytes else encoder_weights(find_model(model), 2)
    return sum(made_bytes(model, recipe) for recipe in recipes) + beside


def suggested(state: State, model: str) -> str:
    """The recipe to begin with: the plan's, or the first of its ladder where nothing fits this machine."""
    planned = state.machine.plans[model].recipe if state.machine else None
    return planned or LADDER[0]


def _to_make(state: State, model: str) -> tuple[str, ...]:
    """What the card offers to make: the recipe to begin with, unless it is there."""
    recipe = suggested(state, model)
    return () if _is_ready(state, model, recipe) else (recipe,)


def _facts(row: Source, source: SourceState, job: Job | None, state: State, model: str) -> str:
    """What is fetched, made and kept, in bytes, and under which terms."""
    recipes = job.recipes if job else _to_make(state, model)
    made = _to_write(source, model, recipes)
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
            named = both(titles if source.companions_bytes else [*titles, "the text encoder"])
            rows.append(("Made from it", f"{size(made)}, {esc(named)}"))
            rows.append(("Kept", f"{size(row.size + made)}, or {size(made)} without the download"))
        rows += [("Free on this disk", size(free)), ("Licence", licence)]
    inside = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{inside}</dl>'


def _now(row: Source, source: SourceState, job: Job | None, state: State, model: str) -> str:
    """What goes on, or what can be done next."""
    if job:
        return _stages(row, source, job)
    if source.state == "complete":
        return _farewell(source, state, model)
    if source.state == "given":
        return '<p class="quiet lead">Nothing is fetched: precisions are made from this copy, which stays as it is.</p>'
    return f"{_promise(state, model)}{_gate(state, model)}{_begin(row, source, state, model)}"


def _promise(state: State, model: str) -> str:
    """What happens to somebody's time, in two sentences; and what this machine will not do with it."""
    ready = [name for name, status in state.statuses.get(model, {}).items() if status.state == "ready"]
    kept = f"{both([recipe_title(name) for name in ready])} can be used without it. " if ready else ""
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
    short = _short_of(state, model)
    if short:
        free = state.machine.hardware.disk_free_bytes if state.machine else 0
        return (
            f'<p class="note bad" role="alert">Fetching it takes {size(short)} of free disk, a margin included, and '
            f"{size(free)} are free. Make room, or start the program with --data-dir on another disk.</p>"
        )
    if not can_make(state, model) or not _to_make(state, model):
        return ""  # what is suggested may be there, and the others have buttons of their own in the table
    recipe = suggested(state, model)
    label = f"Fetch it and make {recipe_title(recipe)}"
    if source.state == "partial":
        label = f"Continue: {size(max(0, row.size - source.bytes))} to go"
    return f'<p class="links">{act("prepare", recipe, label, label, primary=True)}</p>'


def _short_of(state: State, model: str) -> float:
    """Bytes of disk that fetching and making need, where that many are not free; else 0."""
    source = state.sources.get(model)
    free = state.machine.hardware.disk_free_bytes if state.machine else None
    if source is None or free is None or source.at_hand:
        return 0
    left = max(0, find_source(model).size - source.bytes)
    needed = (left + _to_write(source, model, _to_make(state, model))) * DISK_MARGIN
    return needed if needed > free else 0


def _stages(row: Source, source: SourceState, job: Job) -> str:
    """Both halves of the work, the one that runs with its bar and the file it is at."""
    event = job.stage
    making = event is not None and not _is_fetching(job)
    titles = both([recipe_title(recipe) for recipe in job.recipes])
    first = "Fetched." if source.state == "complete" or making else f"Fetch {size(row.size)}"
    return (
        '<ol class="stages">'
        f"{_stage(first, None if making else event, done=making, waits=job.state == 'waiting')}"
        f"{_stage(f'Make {titles}', event if making else None, waits=not making)}</ol>"
        f'<p class="links">{act("stop", job.id, "Stop; what is done is kept", "Stop this job")}</p>'
    )


def _stage(title: str, event: Event | None, done: bool = False, waits: bool = False) -> str:
    if done or waits:
        return f'<li class="{"done" if done else "waits"}"><strong>{esc(title)}</strong></li>'
    words = esc(progress_words(event)) if event else "Starting …"
    file = f'<p class="quiet words file">{esc(event.message)}</p>' if event and event.message else ""
    return (
        f'<li class="now"><strong>{esc(title)}</strong>{bar(title, event)}<p class="quiet words">{words}</p>{file}</li>'
    )


def _farewell(source: SourceState, state: State, model: str) -> str:
    """The offer to delete a download that has served, with what stays and what would need it again."""
    ready = [recipe for recipe in RECIPES if _is_ready(state, model, recipe)]
    if not ready:
        return (
            '<p class="quiet lead">Fetched and checked. Prepare a precision below; the download can go after that.</p>'
        )
    kept = both([recipe_title(recipe) for recipe in ready])
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
