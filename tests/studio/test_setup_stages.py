"""The first run as a table: what the studio knows, and which stage that makes the one to act on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ideogram_app.catalog.models import MODELS, find_model
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import find_source
from ideogram_app.checkpoints.prepared.store import Status
from ideogram_app.errors import RequestError
from ideogram_app.hub.access import TOKENS_PAGE, Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.weight_bytes import weight_bytes
from ideogram_app.records import Event
from ideogram_app.studio.setup_stages import CLOSED, Stage, current_stage, is_first_run, setup_stages
from ideogram_app.studio.setup_status import STAGE_NAMES, SetupStatus
from ideogram_app.studio.state import Job, Machine, SourceState, State
from ideogram_app.text import lasting
from ideogram_app.ui.guide_card import guide_card
from tests.plan_by_name import plan

MODEL, RECIPE, OTHER = "ideogram-4", "int8-w8a8-rotated", "gguf-q4_k"
SOURCE = find_source(MODEL)
CARD = Hardware(
    kind="cuda",
    name="RTX 4090",
    compute_capability=(8, 9),
    device_count=1,
    device_memory_bytes=25_700_000_000,
    device_free_bytes=24_500_000_000,
    host_memory_bytes=64_000_000_000,
    host_free_bytes=50_000_000_000,
    disk_free_bytes=200_000_000_000,
)
PROCESSOR = Hardware(kind="cpu", name="Example processor", host_free_bytes=24 * 10**9, disk_free_bytes=200 * 10**9)
NOTHING, BEGUN = SourceState("missing"), SourceState("partial", 12_000_000_000)
FETCHED = SourceState("complete", 27_500_000_000, Path("data/sources/x"), "ee79a7237b519f1402ceacf952f30c8a31ec5073")
READY = Access("ready", "It can be fetched.", SOURCE.url)
RATE, FULL = 41_000_000.0, "The disk filled up. Got 0.0 MB free."


def known(
    source: SourceState = NOTHING,
    access: Access | None = READY,
    statuses: dict[str, str] | None = None,
    hardware: Hardware = CARD,
    **others: Any,
) -> State:
    """A studio's state once machine and disk were looked at."""
    rows = {name: row(name, (statuses or {}).get(name, "missing")) for name in RECIPES}
    ready = [name for name, status in rows.items() if status.usable]
    plans = {name: plan(hardware, name, ready=ready, stored_bytes=source.bytes) for name in MODELS}
    asked = {} if access is None else {MODEL: access}
    seen = {"statuses": {MODEL: rows}, "sources": {MODEL: source, "miniature": SourceState("included")}}
    return State(1, Machine(hardware, plans), access=asked, **seen, **others)


def row(recipe: str, state: str) -> Status:
    taken = {"ready": 19_800_000_000, "partial": 9_000_000_000}.get(state, 0)
    tried = {"transformer block 0": 0.011, "transformer block 33": 0.0132} if state == "ready" else {}
    return Status(MODEL, recipe, state, Path("nowhere"), taken, smoke=tried)


def job(phase: str = "", recipe: str | None = RECIPE, kind: str = "prepare", state: str = "running", **row: Any) -> Job:
    done, total = (3, 18) if phase == "smoke" else (4_000_000_000, 19_800_000_000)
    stage = Event(phase, recipe, done, total, RATE, 385.0, "a message") if phase else None
    over = {"finished": 2.0} if state in ("failed", "stopped", "done") else {}
    return Job("0badcafe", kind, MODEL, (RECIPE,), state=state, stage=stage, started=1.0, **over, **row)


def closed(state: str, url: str = "") -> Access:
    return Access(state, f"Words about {state}.", url)


def drawn() -> Any:
    """An entry of the history with a picture of this model."""
    result = SimpleNamespace(image="picture.png", recipe=RECIPE)
    return SimpleNamespace(comparison=SimpleNamespace(request=SimpleNamespace(model=MODEL), results=(result,)))


def undrawn(error: str) -> Any:
    return SimpleNamespace(image=None, recipe=RECIPE, error=error)


@dataclass(frozen=True)
class Case:
    """A state, and what must follow from it: the stage to act on, how it stands, what can be done, and words in it."""

    state: State
    stage: str
    status: str
    action: str | None
    words: str


FAILED_FETCH = job("fetch", state="failed", error="Hugging Face cannot be reached.")
FILLED_UP = job("fetch", state="failed", error=FULL)
PACKING_FILLED_UP = job("prepare", state="failed", error=FULL)
ALMOST_FULL = replace(CARD, disk_free_bytes=1_000_000)
DISK_OF_30 = replace(CARD, disk_free_bytes=30_000_000_000)

CASES = {
    "nobody has looked yet": Case(State(), "machine", "now", None, "Looking"),
    "the look failed": Case(State(machine_error="It broke."), "machine", "blocked", None, "It broke."),
    "this machine cannot run it": Case(known(hardware=PROCESSOR), "plan", "blocked", None, "No GPU"),
    "the disk is too small": Case(known(hardware=DISK_OF_30), "plan", "blocked", "prepare", "are lacking"),
    "nobody has asked the Hub": Case(known(access=None), "licence", "now", "check", "Nobody has asked"),
    "the Hub is being asked": Case(known(access=None, checking=frozenset({MODEL})), "licence", "now", None, "Asking"),
    "no token": Case(known(access=closed("no_token", TOKENS_PAGE)), "licence", "blocked", "check", "Log in"),
    "licence not accepted": Case(known(access=closed("not_accepted", SOURCE.url)), "licence", "blocked", "check", ""),
    "too narrow a token": Case(known(access=closed("wrong_scope", TOKENS_PAGE)), "licence", "blocked", "check", ""),
    "working offline": Case(known(access=closed("offline")), "licence", "blocked", "check", "offline"),
    "the Hub does not answer": Case(known(access=closed("unreachable")), "licence", "blocked", "check", "not answer"),
    "nothing there, all allowed": Case(known(), "fetch", "now", "prepare", "goes on where it stopped"),
    "it waits for its turn": Case(known(waiting=(job(state="waiting"),)), "fetch", "now", "stop", "waits"),
    "it asks for the listing": Case(known(job=job()), "fetch", "now", "stop", "checked"),
    "it fetches": Case(known(BEGUN, job=job("fetch")), "fetch", "now", "stop", "checked"),
    "part of the download": Case(known(BEGUN), "fetch", "now", "continue", "goes on where it stopped"),
    "part of it, after a restart": Case(known(BEGUN, access=None), "fetch", "now", "continue", "goes on"),
    "stopped": Case(known(BEGUN, job=job("fetch", state="stopped")), "fetch", "now", "continue", "Stopped"),
    "the line was cut": Case(
        known(BEGUN, closed("unreachable"), job=FAILED_FETCH), "fetch", "blocked", "continue", "cannot be reached"
    ),
    "the token was revoked": Case(known(BEGUN, closed("no_token")), "licence", "blocked", "check", "Log in"),
    "the disk filled up": Case(
        known(BEGUN, job=FILLED_UP, hardware=ALMOST_FULL), "fetch", "blocked", "continue", "filled up"
    ),
    "all fetched": Case(known(FETCHED), "quantize", "now", "continue", "is made from"),
    "one's own copy": Case(known(SourceState("given", 0, Path("w"))), "quantize", "now", "prepare", "is made from"),
    "packing half": Case(known(FETCHED, statuses={RECIPE: "partial"}), "quantize", "now", "continue", "is made from"),
    "it packs": Case(known(FETCHED, job=job("prepare")), "quantize", "now", "stop", "row by row"),
    "it packs the encoder": Case(
        known(FETCHED, job=job("prepare", "encoder-q8_0")), "quantize", "now", "stop", "text encoder"
    ),
    "it tries the encoder": Case(known(FETCHED, job=job("smoke", "encoder-q8_0")), "quantize", "now", "stop", "kept"),
    "the disk filled up while packing": Case(
        known(FETCHED, statuses={RECIPE: "partial"}, job=PACKING_FILLED_UP, hardware=ALMOST_FULL),
        *("quantize", "blocked", "continue", "filled up"),
    ),
    "it tries what was written": Case(known(FETCHED, job=job("smoke")), "smoke", "now", "stop", "must compute"),
    "it hashes what was written": Case(known(FETCHED, job=job("verify")), "smoke", "now", "stop", "hashed"),
    "ready": Case(known(FETCHED, statuses={RECIPE: "ready"}), "picture", "now", "draw", "Everything is here"),
    "ready, download deleted": Case(known(statuses={RECIPE: "ready"}), "picture", "now", "draw", "Everything"),
    "it draws": Case(
        known(FETCHED, statuses={RECIPE: "ready"}, job=job("denoise", kind="compare")), "picture", "now", "stop", ""
    ),
    "drawing failed": Case(
        known(statuses={RECIPE: "ready"}, job=job("denoise", kind="compare", state="failed", error="Out of memory.")),
        *("picture", "blocked", "draw", "Out of memory."),
    ),
    "the device ran out of memory": Case(
        known(
            statuses={RECIPE: "ready"}, job=job("result", kind="compare", state="done", results=(undrawn("No room."),))
        ),
        *("picture", "blocked", "draw", "No room."),
    ),
    "drawn": Case(known(statuses={RECIPE: "ready"}, history=(drawn(),)), "picture", "done", None, "Drawn"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_stage_to_act_on_follows_from_what_is_known(name: str) -> None:
    case = CASES[name]
    stage = current_stage(setup_stages(case.state, MODEL))
    assert (stage.name, stage.status) == (case.stage, case.status)
    assert (stage.action.name if stage.action else None) == case.action
    assert case.words in stage.sentence


@pytest.mark.parametrize("name", CASES)
def test_what_is_before_it_is_done_and_what_is_behind_it_waits_without_a_button(name: str) -> None:
    stages = setup_stages(CASES[name].state, MODEL)
    assert tuple(stage.name for stage in stages) == STAGE_NAMES
    place = stages.index(current_stage(stages))
    assert {stage.status for stage in stages[:place]} <= {"done"}
    assert {stage.status for stage in stages[place + 1 :]} <= {"next"}
    assert all(stage.action is None and stage.event is None for stage in stages if stage is not stages[place])
    assert all(stage.title and stage.sentence for stage in stages)


@pytest.mark.parametrize("name", CASES)
def test_the_card_shows_one_current_step_and_every_button_names_itself(name: str) -> None:
    state = CASES[name].state
    card = guide_card(state, MODEL)
    assert bool(card) == is_first_run(state, MODEL) == (state.machine is not None and name != "drawn")
    if card:
        assert card.count('aria-current="step"') == 1 and card.count("<li ") == 7
        assert card.count("<button") == card.count("aria-label=") - 1 - card.count('role="progressbar"')
        stage = current_stage(setup_stages(state, MODEL))
        assert (f'data-act="{stage.action.name}"' in card) if stage.action else "<button" not in card


def test_a_model_that_ships_with_the_program_has_no_card() -> None:
    assert guide_card(known(), "miniature") == "" and not is_first_run(known(), "miniature")
    stages = {stage.name: stage for stage in setup_stages(known(), "miniature")}
    assert stages["licence"].status == stages["fetch"].status == "done" and stages["quantize"].status == "now"


def facts(state: State, name: str, recipes: tuple[str, ...] = ()) -> dict[str, str]:
    return dict(next(stage for stage in setup_stages(state, MODEL, recipes) if stage.name == name).facts)


def test_before_the_first_byte_the_plan_is_open_and_says_what_it_costs() -> None:
    stages = setup_stages(known(), MODEL)
    assert [stage.name for stage in stages if stage.is_open] == ["plan", "fetch"]
    assert [stage.name for stage in setup_stages(known(BEGUN), MODEL) if stage.is_open] == ["fetch"]
    told = facts(known(), "plan")
    shape, int8 = find_model(MODEL), RECIPES[RECIPE].protecting()
    made = sum(weight_bytes(branch, int8) for branch in shape.branches) + 7_568_000_000 * 1.0625  # Q8_0: 34 bytes of 32
    assert told["Fetched, once"] == "27.5 GB" and told["Free on this disk"] == "200.0 GB"
    assert told["Made from it"].startswith(f"{made / 1e9:.1f} GB") and "text encoder" in told["Made from it"]
    assert told["Kept"] == f"{(27.5e9 + made) / 1e9:.1f} GB, or {made / 1e9:.1f} GB without the download"
    assert told["Time to fetch"] == "at 100 Mbit/s about 37 minutes"  # 27.5 GB x 8 / 100 Mbit/s = 2200 s
    # 2 x 9 279 288 448 weights and the encoder's 7.568 G at 64.6 M a second: 404 s
    assert told["Time to make"] == "about 7 minutes on two cores"
    assert "Lacking" not in told


def test_the_slower_search_of_q4_k_is_told_as_it_was_measured() -> None:
    # 18.56 G weights at 33.2 M a second and 7.568 G at 64.6: 559 + 117 s
    assert facts(known(), "plan", (OTHER,))["Time to make"] == "about 11 minutes on two cores"
    assert facts(known(), "plan", (RECIPE, OTHER))["Time to make"] == "about 16 minutes on two cores"


def test_once_bytes_came_the_time_is_that_of_the_line() -> None:
    stopped = known(BEGUN, job=job("fetch", state="stopped"))
    assert facts(stopped, "fetch")["Time to fetch"] == f"{lasting((27.5e9 - 12e9) / RATE)} at 41.0 MB/s"
    assert current_stage(setup_stages(stopped, MODEL)).action.label == "Continue: 15.5 GB to go"


def test_what_the_disk_lacks_is_what_would_make_it_enough() -> None:
    view = SetupStatus(known(hardware=DISK_OF_30), MODEL)
    assert (
        view.lacking
        and f"{view.lacking / 1e9:.1f} GB are lacking" in current_stage(setup_stages(view.state, MODEL)).sentence
    )
    roomier = replace(CARD, disk_free_bytes=30_000_000_000 + view.lacking)
    assert SetupStatus(known(hardware=roomier), MODEL).lacking == 0
    assert current_stage(setup_stages(known(hardware=roomier), MODEL)).name == "fetch"


def test_what_is_on_the_disk_already_is_not_asked_for_again() -> None:
    whole, begun = SetupStatus(known(), MODEL).needed, SetupStatus(known(BEGUN), MODEL).needed
    assert whole - begun == round(12e9 * 1.1)
    encoder = replace(FETCHED, components_begun=3_000_000_000)
    packed = known(encoder, statuses={RECIPE: "partial"})
    assert SetupStatus(known(FETCHED), MODEL).needed - SetupStatus(packed, MODEL).needed == round((9e9 + 3e9) * 1.1)
    assert SetupStatus(known(replace(FETCHED, components_bytes=8_041_000_000)), MODEL).to_make < 20e9


def test_after_a_restart_what_is_begun_is_continued_and_not_what_the_plan_would_choose_now() -> None:
    state = known(FETCHED, statuses={OTHER: "partial"})
    assert state.machine and state.machine.plans[MODEL].recipe == RECIPE
    assert current_stage(setup_stages(state, MODEL)).action.argument == OTHER
    assert current_stage(setup_stages(known(statuses={OTHER: "ready"}), MODEL)).action.argument == OTHER


def test_what_is_asked_for_by_name_is_made_also_where_it_cannot_be_drawn_with() -> None:
    stages = setup_stages(known(hardware=PROCESSOR), MODEL, (OTHER,))
    assert current_stage(stages).name == "fetch" and "cannot draw with it" in stages[1].sentence
    with pytest.raises(RequestError, match="int4"):
        setup_stages(known(), MODEL, ("int4",))


def test_a_picture_of_any_precision_ends_the_first_run() -> None:
    state = known(FETCHED, history=(drawn(),))
    assert not is_first_run(state, MODEL)
    undrawn = drawn()
    undrawn.comparison.results[0].image = None
    assert is_first_run(replace(state, history=(undrawn,)), MODEL)


def test_what_came_of_the_smoke_test_is_told_afterwards() -> None:
    stages = {stage.name: stage for stage in setup_stages(known(statuses={RECIPE: "ready"}), MODEL)}
    assert "2 parts" in stages["smoke"].sentence and "transformer block 33, by 1.3%" in stages["smoke"].sentence
    older = known(statuses={RECIPE: "ready"})
    forgotten = {RECIPE: replace(older.statuses[MODEL][RECIPE], smoke={})}
    smoke: Stage = setup_stages(replace(older, statuses={MODEL: forgotten}), MODEL)[5]
    assert smoke.status == "done" and "Passed" in smoke.sentence


@pytest.mark.parametrize("state", CLOSED)
def test_a_closed_gate_offers_nothing_but_to_ask_again(state: str) -> None:
    card = guide_card(known(access=closed(state, SOURCE.url)), MODEL)
    assert card.count("<button") == 1 and 'data-act="check"' in card and "Words about" in card


def test_what_comes_from_outside_is_escaped() -> None:
    hostile = known(BEGUN, job=job("fetch", state="failed", error="<img src=x onerror=alert(1)>"))
    assert "<img" not in guide_card(hostile, MODEL)
