"""The first run as seven stages: machine, plan, licence, fetch, quantize, smoke test, first picture.

    guide(state, model) -> tuple[Stage, ...]

Nothing is remembered here: every stage follows from what the studio knows now, that is from the machine, the disk, the
Hub's answer and the running job. So the answer is right in a second tab, after a reload, after a cut line, a full disk
or a killed process, and the page and `python -m ideogram_app prepare` say the same.

At most one stage is the one to act on (`now` or `blocked`), and it has at most one action. Everything that costs time
or disk is said before the first byte. Left out: choosing a folder, or another source than the first of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ideogram_app.catalog.sources import find_source
from ideogram_app.records import Event
from ideogram_app.studio.setup_status import STAGE_NAMES, SetupStatus, disk_short, fetch_time, make_time
from ideogram_app.studio.state import Job, State
from ideogram_app.text import gb, listed

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
PROGRESS_IS_KEPT = "What is done is kept."


@dataclass(frozen=True)
class Action:
    """What can be done: prepare, continue, check (ask the Hub again), stop or draw; and to what.

    Attributes:
        argument: recipes with commas, the id of a job, or a model.
        label: for a button.
    """

    deed: str
    argument: str
    label: str


@dataclass(frozen=True)
class Stage:
    """One stage of the first run.

    Attributes:
        name: one of `STAGE_NAMES`.
        standing: done, now (it runs, or waits for its action), next, or blocked (something stands in the way).
        sentence: how it stands; of what is blocked, what happened and what to do.
        facts: pairs of a name and a value.
        link: what a page is for, and its address.
        event: the latest of the job, where it is at this stage.
        is_open: whether its facts are to be read now.
    """

    name: str
    title: str
    standing: str
    sentence: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    action: Action | None = None
    link: tuple[str, str] | None = None
    event: Event | None = None
    is_open: bool = False


def setup_stages(state: State, model: str, recipes: tuple[str, ...] = ()) -> tuple[Stage, ...]:
    """The seven stages of a model's first run, in order.

    Args:
        recipes: what was asked for by name; the running job's, what is begun, or the plan's where none was.

    Raises:
        RequestError: no such model or recipe.
    """
    view = SetupStatus(state, model, recipes)
    makers: tuple[Callable[[SetupStatus], Stage], ...] = (
        _machine,
        _plan,
        _licence,
        _fetch,
        _quantize,
        _smoke,
        _picture,
    )
    stages: list[Stage] = []
    reached = True
    for make in makers:
        stage = make(view)
        if not reached:
            stage = Stage(stage.name, stage.title, "next", _later(view, stage.name))
        elif stage.standing != "done":
            reached = False
            stage = replace(stage, is_open=True)
        elif stage.name == "plan" and not view.is_begun:
            stage = replace(stage, is_open=True)  # before the first byte everything is said
        stages.append(stage)
    return tuple(stages)


def current(stages: tuple[Stage, ...]) -> Stage:
    """The stage to act on, or the last where all are done."""
    return next((stage for stage in stages if stage.standing in ("now", "blocked")), stages[-1])


def is_first_run(state: State, model: str) -> bool:
    """Whether weights of this model have to come from elsewhere, and no picture was drawn with them yet."""
    if find_source(model).included or model not in state.sources or state.machine is None:
        return False
    return not SetupStatus(state, model).is_drawn


def _later(view: SetupStatus, name: str) -> str:
    """What a stage will be about, before its turn has come."""
    from_where = "your own copy" if view.source.state == "given" else "the published weights"
    return {
        "plan": "What is fetched, made and kept, how long it takes and how much disk.",
        "licence": "Whether Hugging Face gives the weights to you.",
        "fetch": f"{gb(view.row.size)}, {fetch_time(view)}." if view.to_fetch else "Nothing to fetch.",
        "quantize": f"{view.titles} is made from {from_where}, {make_time(view)}." if view.missing else "",
        "smoke": "What was written is tried before it gets its name.",
        "picture": "One click, once all of this is done.",
    }[name]


def _machine(view: SetupStatus) -> Stage:
    title, machine = "This machine", view.state.machine
    if machine is None:
        problem = view.state.machine_error
        return Stage("machine", title, "blocked" if problem else "now", problem or "Looking at the machine …")
    hardware = machine.hardware
    facts = (
        ("Device memory", _of(hardware.device_free_bytes, hardware.device_memory_bytes)),
        ("RAM", _of(hardware.host_free_bytes, hardware.host_memory_bytes)),
        ("Disk", _of(hardware.disk_free_bytes, None)),
    )
    known = tuple((name, value) for name, value in facts if value)
    first = "".join(f", {value} {name if name == 'RAM' else name.lower()}" for name, value in known[:1])
    return Stage("machine", title, "done", f"{hardware.name}{first}.", known)


def _of(free: int | None, total: int | None) -> str:
    if free is None:
        return gb(total) if total else ""
    return f"{gb(free)} free" + (f" of {gb(total)}" if total else "")


def _plan(view: SetupStatus) -> Stage:
    planned = view.plan_ignoring_disk
    stage = Stage("plan", "Plan", "done", facts=plan_facts(view))
    if planned is None:
        return replace(stage, sentence="Made as soon as the machine is known.")
    named = bool(view.asked or view.job or view.is_ready)
    if not planned.fits and not named:
        advice = f" {planned.suggestion}" if planned.suggestion else ""
        return replace(stage, standing="blocked", sentence=f"{planned.reasons[0]}{advice}")
    if view.lacking and not view.is_begun and not named:
        again = Action("prepare", ",".join(view.recipes), "I made room: try again")
        return replace(stage, standing="blocked", sentence=view.failure or disk_short(view), action=again)
    costs = [f"{gb(view.to_fetch)} to fetch" if view.to_fetch else "", f"{gb(view.to_make)} to make"]
    sentence = f"{view.titles}: {listed([cost for cost in costs if cost])}." if view.missing else f"{view.titles}."
    if not planned.fits:
        sentence += " This machine cannot draw with it; it can be made here and used on another."
    return replace(stage, sentence=sentence)


def plan_facts(view: SetupStatus) -> tuple[tuple[str, str], ...]:
    """What is fetched, made and kept, how long it takes, and whether the disk has room."""
    rows: list[tuple[str, str]] = []
    if view.missing:
        if not view.row.included and view.source.state != "given":
            rows.append(("Fetched, once", gb(view.row.size)))
        beside = "" if view.source.companions_bytes or view.row.included else ", the text encoder included"
        rows.append(("Made from it", f"{gb(view.to_make)}{beside}"))
        if not view.row.included and view.source.state != "given":
            rows.append(("Kept", f"{gb(view.row.size + view.to_make)}, or {gb(view.to_make)} without the download"))
        rows += [("Time to fetch", fetch_time(view)), ("Time to make", make_time(view))]
    if view.free is not None:
        rows.append(("Free on this disk", gb(view.free)))
    if view.lacking:
        rows.append(("Lacking", gb(view.lacking)))
    return tuple((name, value) for name, value in rows if value)


@dataclass(frozen=True)
class _Access:
    """One way in which access to the weights can stand.

    Attributes:
        holds: whether it is so.
        status: of the stage then; sentence: what the stage says.
        offer: the label of its button, "" for none.
    """

    holds: Callable[[SetupStatus], bool]
    status: str
    sentence: Callable[[SetupStatus], str]
    offer: str = ""


def _is_closed(view: SetupStatus) -> bool:
    """Whether the Hub refuses, or did not answer before anything was fetched."""
    state = view.access.state if view.access else "ready"
    return state in CLOSED or (state != "ready" and view.source.state != "partial")


def _refusal(view: SetupStatus) -> str:
    return f"{GATES[view.access.state][1]} {view.access.sentence}" if view.access else ""


# The first that holds is how it stands: what is here already comes before what the Hub says.
ACCESS = (
    _Access(lambda view: bool(view.row.included), "done", lambda view: "The weights ship with the program."),
    _Access(
        lambda view: view.source.state == "given",
        "done",
        lambda view: "Read from your own copy; nothing is asked of Hugging Face.",
    ),
    _Access(
        lambda view: view.source.state == "complete" or view.is_ready or view.at > STAGE_NAMES.index("licence"),
        "done",
        lambda view: f"Fetched under the {view.row.licence}.",
    ),
    _Access(
        lambda view: view.model in view.state.checking and view.source.state != "partial" and not view.job,
        "now",
        lambda view: "Asking Hugging Face whether you may fetch it …",
    ),
    _Access(_is_closed, "blocked", _refusal, "Check again"),
    _Access(
        lambda view: view.source.state == "partial", "done", lambda view: "It was granted when the download began."
    ),
    _Access(lambda view: view.job is not None, "done", lambda view: "Asked as it begins."),
    _Access(lambda view: view.access is not None, "done", lambda view: GATES["ready"][1]),
    _Access(lambda view: True, "now", lambda view: "Nobody has asked yet whether you may fetch it.", "Check access"),
)


def _licence(view: SetupStatus) -> Stage:
    case = next(case for case in ACCESS if case.holds(view))
    facts = tuple((name, value) for name, value in (("Licence", view.row.licence), ("From", view.row.url)) if value)
    stage = Stage("licence", "Licence and token", case.status, case.sentence(view), () if view.row.included else facts)
    if case.offer:
        stage = replace(stage, action=Action("check", view.model, case.offer))
    purpose = GATES[view.access.state][2] if view.access and case.status == "blocked" else ""
    if purpose and view.access and view.access.url:
        stage = replace(stage, link=(purpose, view.access.url))
    return stage


def _fetch(view: SetupStatus) -> Stage:
    stage, source = Stage("fetch", "Fetch", "done"), view.source
    if view.row.included:
        return replace(stage, sentence="Nothing to fetch.")
    if view.at == STAGE_NAMES.index("fetch"):
        assert view.job
        return _running(stage, view.job, f"{gb(view.row.size)} come and are checked, file by file. {PROGRESS_IS_KEPT}")
    if source.state == "complete":
        version = f" Version {source.commit[:7]}." if source.commit else ""
        return replace(stage, sentence=f"{gb(source.bytes)} fetched and checked.{version}")
    if source.at_hand:
        return replace(stage, sentence=f"Read from {source.folder}.")
    if view.is_ready:
        return replace(stage, sentence="Not needed any more: what was made is enough to draw.")
    begun = source.state == "partial"
    facts = [("On this disk", gb(source.bytes)), ("To go", gb(view.to_fetch)), ("Time to fetch", fetch_time(view))]
    label = f"Continue: {gb(view.to_fetch)} to go" if begun else f"Fetch it and make {view.titles}"
    resumes = "A dropped line or a closed laptop loses nothing: it goes on where it stopped."
    stage = replace(stage, sentence=resumes, facts=tuple(facts) if begun else ())  # else the plan says it
    return _offered(view, stage, Action("continue" if begun else "prepare", ",".join(view.recipes), label))


def _quantize(view: SetupStatus) -> Stage:
    stage = Stage("quantize", "Quantize", "done", facts=(("Made", gb(view.to_make)), ("Time", make_time(view))))
    if view.at == STAGE_NAMES.index("quantize"):
        assert view.job
        event = view.job.stage
        on = f"{view.titles} is packed, row by row, and compared as it is written. {PROGRESS_IS_KEPT}"
        if event and event.recipe not in view.job.recipes and event.phase != "fetch":
            on = f"The text encoder, tokenizer and decoder are kept beside {view.titles}. {PROGRESS_IS_KEPT}"
        return _running(stage, view.job, on)
    if view.is_ready or view.at > STAGE_NAMES.index("quantize"):
        taken = sum(row.bytes for row in map(view.status, view.recipes) if row is not None)
        made = f"{view.titles} is packed."
        if view.is_ready:
            made = f"{view.titles} is ready" + (f": {gb(taken)} on this disk." if taken else ".")
        return replace(stage, sentence=made, facts=())
    begun = view.source.state == "complete" or any(
        row is not None and row.state == "partial" for row in map(view.status, view.missing)
    )
    label = f"{'Continue: make' if begun else 'Make'} {view.titles}"
    stage = replace(stage, sentence=f"{view.titles} is made from the published weights, {make_time(view)}.")
    return _offered(view, stage, Action("continue" if begun else "prepare", ",".join(view.recipes), label))


def _smoke(view: SetupStatus) -> Stage:
    stage = Stage("smoke", "Smoke test", "done")
    if view.at == STAGE_NAMES.index("smoke"):
        assert view.job
        on = "Blocks filled from the file must compute what blocks filled from the source compute; then all is hashed."
        return _running(stage, view.job, on)
    row = view.status(view.recipes[0])
    if view.is_ready and row is not None and row.smoke:
        name, worst = max(row.smoke.items(), key=lambda pair: pair[1])
        parts = f"Passed: {len(row.smoke)} parts compute what the source computes"
        return replace(stage, sentence=f"{parts}; furthest off is {name}, by {worst:.1%}.")
    if view.is_ready or view.at > STAGE_NAMES.index("smoke"):
        included = row is not None and row.state == "included"
        return replace(stage, sentence="Nothing was packed." if included else "Passed before the files got their name.")
    return replace(stage, standing="now", sentence="What was written is tried before it gets its name.")


def _picture(view: SetupStatus) -> Stage:
    stage = Stage("picture", "First picture", "done")
    if view.at == STAGE_NAMES.index("picture"):
        assert view.job
        return _running(stage, view.job, "It is being drawn.")
    if view.is_drawn:
        return replace(stage, sentence="Drawn.")
    if not view.is_ready:
        return replace(stage, standing="now", sentence="One click, once all of this is done.")
    draw = Action("draw", view.recipes[0], "Draw the first picture")
    if view.failure and view.last and view.last.kind == "compare":
        return replace(stage, standing="blocked", sentence=view.failure, action=replace(draw, label="Try again"))
    if view.plan_ignoring_disk and not view.plan_ignoring_disk.fits:
        return replace(
            stage,
            standing="blocked",
            sentence=f"{view.plan_ignoring_disk.reasons[0]} {view.plan_ignoring_disk.suggestion}".strip(),
        )
    return replace(stage, standing="now", sentence="Everything is here. Draws your prompt, or an example.", action=draw)


def _running(stage: Stage, job: Job, sentence: str) -> Stage:
    """A stage that a job works at, or waits to."""
    stop = Action("stop", job.id, "Stop")
    words = sentence if job.state != "waiting" else "It waits for its turn."
    return replace(stage, standing="now", sentence=words, facts=(), action=stop, event=job.stage)


def _offered(view: SetupStatus, stage: Stage, action: Action) -> Stage:
    """A stage that can be begun or continued, with what went wrong last and what the disk lacks."""
    short = disk_short(view)
    if short:
        facts = (*stage.facts, ("Free on this disk", gb(view.free or 0)), ("Lacking", gb(view.lacking)))
        stage = replace(stage, standing="blocked", sentence=view.failure or short, facts=facts)
        return replace(stage, action=replace(action, label="I made room: continue" if view.is_begun else "Try again"))
    if view.failure:
        return replace(stage, standing="blocked", sentence=view.failure, action=action)
    if view.last and view.last.state == "stopped":
        return replace(stage, standing="now", sentence=f"Stopped. {PROGRESS_IS_KEPT}", action=action)
    return replace(stage, standing="now", action=action)
