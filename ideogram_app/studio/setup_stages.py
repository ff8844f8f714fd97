"""The first run as seven stages: machine, plan, licence, fetch, quantize, smoke test, first picture.

    setup_stages(state, model) -> tuple[Stage, ...]

A pure function of the studio's state: the machine, the disk, the Hub's answer and the running job. So the stages are
right in a second tab, after a reload, a lost connection, a full disk or a killed process, and the page and `python -m
ideogram_app prepare` show the same.

At most one stage is the one to act on (`now` or `blocked`), and it has at most one action. Everything that costs time
or disk is shown before the first byte. Left out: choosing a folder, or another source than the first of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ideogram_app.catalog.sources import find_source
from ideogram_app.records import Event
from ideogram_app.studio.setup_status import STAGE_NAMES, SetupStatus, disk_short, fetch_time, make_time
from ideogram_app.studio.state import Job, State
from ideogram_app.text import gb, listed

# State of access to gated weights -> tone, heading, and what its page is for.
GATES: dict[str, tuple[str, str, str]] = {
    "ready": ("ok", "Your account may fetch it.", ""),
    "no_token": ("warn", "Log in to Hugging Face first.", "Make a token"),
    "not_accepted": ("warn", "The licence is not accepted yet.", "Read and accept the licence"),
    "wrong_scope": ("warn", "Your token does not reach this far.", "Edit the token"),
    "not_found": ("bad", "The weights are not where they were.", "Look there"),
    "offline": ("warn", "Working offline.", ""),
    "unreachable": ("bad", "Hugging Face does not answer.", "See whether it is down"),
}
CLOSED = ("no_token", "not_accepted", "wrong_scope", "not_found", "offline")  # no file can be fetched
PROGRESS_IS_KEPT = "What is done is kept."


@dataclass(frozen=True)
class Action:
    """A button: what it does, to what, and its label."""

    name: str  # prepare, continue, check (ask the Hub again), stop or draw
    argument: str  # recipes with commas, the id of a job, or a model
    label: str


@dataclass(frozen=True)
class Stage:
    """One stage of the first run, of `STAGE_NAMES`.

    Attributes:
        status: done, now (it runs, or waits for its action), next, or blocked (something stands in the way).
        sentence: for people; of what is blocked, what happened and what to do.
        facts: pairs of a name and a value.
        link: what a page is for, and its address.
        event: the latest of the job, where it is at this stage.
        is_open: whether its facts are unfolded.
    """

    name: str
    title: str
    status: str
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
    stages: list[Stage] = []
    for make in (_machine, _plan, _licence, _fetch, _quantize, _smoke, _picture):
        stage = make(view)
        if stages and stages[-1].status != "done":
            stage = Stage(stage.name, stage.title, "next", _later(view, stage.name))
        elif stage.status != "done" or (stage.name == "plan" and not view.is_begun):
            stage = replace(stage, is_open=True)  # the plan: before the first byte everything is shown
        stages.append(stage)
    return tuple(stages)


def current_stage(stages: tuple[Stage, ...]) -> Stage:
    """The stage to act on, or the last where all are done."""
    return next((stage for stage in stages if stage.status in ("now", "blocked")), stages[-1])


def is_first_run(state: State, model: str) -> bool:
    """Whether weights of this model have to come from elsewhere, and no picture was drawn with them yet."""
    if find_source(model).included or model not in state.sources or state.machine is None:
        return False
    return not SetupStatus(state, model).is_drawn


def _later(view: SetupStatus, name: str) -> str:
    """What a stage will do, before its turn has come."""
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
    facts = _known(
        ("Device memory", _free_of(hardware.device_free_bytes, hardware.device_memory_bytes)),
        ("RAM", _free_of(hardware.host_free_bytes, hardware.host_memory_bytes)),
        ("Disk", _free_of(hardware.disk_free_bytes, None)),
    )
    first = "".join(f", {value} {name if name == 'RAM' else name.lower()}" for name, value in facts[:1])
    return Stage("machine", title, "done", f"{hardware.name}{first}.", facts)


def _free_of(free: int | None, total: int | None) -> str:
    if free is None:
        return gb(total) if total else ""
    return f"{gb(free)} free" + (f" of {gb(total)}" if total else "")


def _known(*facts: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Those that have a value."""
    return tuple((name, value) for name, value in facts if value)


def _plan(view: SetupStatus) -> Stage:
    planned = view.plan_ignoring_disk
    stage = Stage("plan", "Plan", "done", facts=plan_facts(view))
    if planned is None:
        return replace(stage, sentence="Made as soon as the machine is known.")
    named = bool(view.asked or view.job or view.is_ready)
    if not planned.fits and not named:
        advice = f" {planned.suggestion}" if planned.suggestion else ""
        return replace(stage, status="blocked", sentence=f"{planned.reasons[0]}{advice}")
    if view.lacking and not view.is_begun and not named:
        again = Action("prepare", ",".join(view.recipes), "I made room: try again")
        return replace(stage, status="blocked", sentence=view.failure or disk_short(view), action=again)
    fetched = [f"{gb(view.to_fetch)} to fetch"] if view.to_fetch else []
    costs = f": {listed([*fetched, f'{gb(view.to_make)} to make'])}" if view.missing else ""
    sentence = f"{view.titles}{costs}."
    if not planned.fits:
        sentence += " This machine cannot draw with it; it can be made here and used on another."
    return replace(stage, sentence=sentence)


def plan_facts(view: SetupStatus) -> tuple[tuple[str, str], ...]:
    """What is fetched, made and stays on disk, how long it takes, and whether the disk has room."""
    rows: list[tuple[str, str]] = []
    if view.missing:
        is_fetched = not view.row.included and view.source.state != "given"
        made, both = gb(view.to_make), gb(view.row.size + view.to_make)
        rows += [
            ("Fetched, once", gb(view.row.size) if is_fetched else ""),
            ("Made from it", f"{made}, the text encoder included" if view.lacks_encoder else made),
            ("Kept", f"{both}, or {made} without the download" if is_fetched else ""),
            ("Time to fetch", fetch_time(view)),
            ("Time to make", make_time(view)),
        ]
    free = "" if view.free is None else gb(view.free)
    return _known(*rows, ("Free on this disk", free), ("Lacking", gb(view.lacking) if view.lacking else ""))


def _licence(view: SetupStatus) -> Stage:
    source, answer, licence = view.source.state, view.access, view.row.licence
    is_here = source == "complete" or view.is_ready or view.at > STAGE_NAMES.index("licence")
    is_asked = view.model in view.state.checking and source != "partial" and not view.job
    refused = answer and (answer.state in CLOSED or (answer.state != "ready" and source != "partial"))
    refusal = f"{GATES[answer.state][1]} {answer.sentence}" if answer else ""
    # (whether it is so, status, sentence, label of the button); the first that is so: files on disk come before the Hub
    cases = (
        (view.row.included, "done", "The weights ship with the program.", ""),
        (source == "given", "done", "Read from your own copy; nothing is asked of Hugging Face.", ""),
        (is_here, "done", f"Fetched under the {licence}.", ""),
        (is_asked, "now", "Asking Hugging Face whether you may fetch it …", ""),
        (refused, "blocked", refusal, "Check again"),
        (source == "partial", "done", "It was granted when the download began.", ""),
        (view.job, "done", "Asked as it begins.", ""),
        (answer, "done", GATES["ready"][1], ""),
        (True, "now", "Nobody has asked yet whether you may fetch it.", "Check access"),
    )
    status, sentence, label = next(case[1:] for case in cases if case[0])
    facts = () if view.row.included else _known(("Licence", licence), ("From", view.row.url))
    stage = Stage("licence", "Licence and token", status, sentence, facts)
    if label:
        stage = replace(stage, action=Action("check", view.model, label))
    purpose = GATES[answer.state][2] if answer and status == "blocked" else ""
    return replace(stage, link=(purpose, answer.url)) if purpose and answer and answer.url else stage


def _fetch(view: SetupStatus) -> Stage:
    stage, source = Stage("fetch", "Fetch", "done"), view.source
    if view.row.included:
        return replace(stage, sentence="Nothing to fetch.")
    if view.job and view.at == STAGE_NAMES.index("fetch"):
        return _running(stage, view.job, f"{gb(view.row.size)} come and are checked, file by file. {PROGRESS_IS_KEPT}")
    if source.state == "complete":
        version = f" Version {source.commit[:7]}." if source.commit else ""
        return replace(stage, sentence=f"{gb(source.bytes)} fetched and checked.{version}")
    if source.at_hand:
        return replace(stage, sentence=f"Read from {source.folder}.")
    if view.is_ready:
        return replace(stage, sentence="Not needed any more: what was made is enough to draw.")
    stage = replace(stage, sentence="A dropped line or a closed laptop loses nothing: it goes on where it stopped.")
    if source.state != "partial":
        return _offered(view, stage, "prepare", f"Fetch it and make {view.titles}")
    facts = ("On this disk", gb(source.bytes)), ("To go", gb(view.to_fetch)), ("Time to fetch", fetch_time(view))
    return _offered(view, replace(stage, facts=facts), "continue", f"Continue: {gb(view.to_fetch)} to go")


def _quantize(view: SetupStatus) -> Stage:
    stage = Stage("quantize", "Quantize", "done", facts=(("Made", gb(view.to_make)), ("Time", make_time(view))))
    if view.job and view.at == STAGE_NAMES.index("quantize"):
        event = view.job.stage
        working = f"{view.titles} is packed, row by row, and compared as it is written."
        if event and event.recipe not in view.job.recipes and event.phase != "fetch":
            working = f"The text encoder, tokenizer and decoder are kept beside {view.titles}."
        return _running(stage, view.job, f"{working} {PROGRESS_IS_KEPT}")
    if view.is_ready:
        taken = sum(row.bytes for row in map(view.status, view.recipes) if row is not None)
        on_disk = f": {gb(taken)} on this disk" if taken else ""
        return replace(stage, sentence=f"{view.titles} is ready{on_disk}.", facts=())
    if view.at > STAGE_NAMES.index("quantize"):
        return replace(stage, sentence=f"{view.titles} is packed.", facts=())
    stage = replace(stage, sentence=f"{view.titles} is made from the published weights, {make_time(view)}.")
    if view.source.state == "complete" or view.is_partial:
        return _offered(view, stage, "continue", f"Continue: make {view.titles}")
    return _offered(view, stage, "prepare", f"Make {view.titles}")


def _smoke(view: SetupStatus) -> Stage:
    stage = Stage("smoke", "Smoke test", "done")
    if view.job and view.at == STAGE_NAMES.index("smoke"):
        test = (
            "Blocks filled from the file must compute what blocks filled from the source compute; then all is hashed."
        )
        return _running(stage, view.job, test)
    row = view.status(view.recipes[0])
    if view.is_ready and row is not None and row.smoke:
        name, worst = max(row.smoke.items(), key=lambda pair: pair[1])
        passed = f"Passed: {len(row.smoke)} parts compute what the source computes"
        return replace(stage, sentence=f"{passed}; furthest off is {name}, by {worst:.1%}.")
    if view.is_ready or view.at > STAGE_NAMES.index("smoke"):
        included = row is not None and row.state == "included"
        return replace(stage, sentence="Nothing was packed." if included else "Passed before the files got their name.")
    return replace(stage, status="now", sentence="What was written is tried before it gets its name.")


def _picture(view: SetupStatus) -> Stage:
    stage = Stage("picture", "First picture", "done")
    if view.job and view.at == STAGE_NAMES.index("picture"):
        return _running(stage, view.job, "It is being drawn.")
    if view.is_drawn:
        return replace(stage, sentence="Drawn.")
    if not view.is_ready:
        return replace(stage, status="now", sentence="One click, once all of this is done.")
    draw = Action("draw", view.recipes[0], "Draw the first picture")
    if view.failure and view.last and view.last.kind == "compare":
        return replace(stage, status="blocked", sentence=view.failure, action=replace(draw, label="Try again"))
    planned = view.plan_ignoring_disk
    if planned and not planned.fits:
        return replace(stage, status="blocked", sentence=f"{planned.reasons[0]} {planned.suggestion}".strip())
    return replace(stage, status="now", sentence="Everything is here. Draws your prompt, or an example.", action=draw)


def _running(stage: Stage, job: Job, sentence: str) -> Stage:
    """A stage that a job works at, or waits to."""
    words = sentence if job.state != "waiting" else "It waits for its turn."
    stop = Action("stop", job.id, "Stop")
    return replace(stage, status="now", sentence=words, facts=(), action=stop, event=job.stage)


def _offered(view: SetupStatus, stage: Stage, name: str, label: str) -> Stage:
    """A stage that can be begun or continued, with what went wrong last and what the disk lacks."""
    short, sentence = disk_short(view), stage.sentence
    if short:
        label = "I made room: continue" if view.is_begun else "Try again"
        facts = (*stage.facts, ("Free on this disk", gb(view.free or 0)), ("Lacking", gb(view.lacking)))
        stage = replace(stage, facts=facts)
    elif view.last and view.last.state == "stopped":
        sentence = f"Stopped. {PROGRESS_IS_KEPT}"
    action = Action(name, ",".join(view.recipes), label)
    problem = view.failure or short
    return replace(stage, status="blocked" if problem else "now", sentence=problem or sentence, action=action)
