"""Memory that runs out: what was loaded goes, the way on is offered, or taken for those who said so, and told."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ideogram_app.catalog.reasons import Reason
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.comparison.compare import compare
from ideogram_app.errors import Cancelled
from ideogram_app.generation import draw as drawing
from ideogram_app.generation import encode_prompt as reading
from ideogram_app.generation import retry
from ideogram_app.generation import session as sessions
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.session import Session, free_memory, with_free_memory
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder.features import FeatureCache
from ideogram_app.model.vae import Autoencoder
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.profile import Observation
from ideogram_app.prepare.transformers import prepare
from ideogram_app.records import Event, Fallback, Request, Result
from ideogram_app.wire import from_json
from tests.plan_by_name import plan, planned

pytestmark = pytest.mark.slow

HOST = Hardware(name="A processor", host_memory_bytes=32 * 10**9, host_free_bytes=24 * 10**9, disk_free_bytes=10**12)
CAPTION = parse_prompt("a red circle on a yellow background").caption
REQUEST = Request("miniature", CAPTION, ("reference", "gguf-q4_k"), "turbo-12", 96, 64, seed=5)
ADAPTING = replace(REQUEST, recipes=("reference",), adapt=True)
Q4_K = Fallback("GGUF Q4_K, resident", Reason("", "It takes less."), "gguf-q4_k", 96, 64)
PACKED = Fallback("INT8", Reason("", "It is not prepared."), "int8-w8a8", 96, 64)
SMALLER = Fallback("80 x 64", Reason("", "Nearly the same shape."), "reference", 80, 64, device_limit_bytes=10**9)
FULL = "CUDA out of memory. Tried to allocate 2.14 GiB. GPU 0 has a total capacity of 8 GiB"
PHASES = {"load": "weights were loaded", "denoise": "while drawing", "decode": "was decoded", "encode": "was read"}


def full() -> Exception:
    return torch.OutOfMemoryError(FULL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = Store(tmp_path_factory.mktemp("data"))
    list(prepare(made, "miniature", "gguf-q4_k"))
    return made


@pytest.fixture(autouse=True)
def no_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    """They decode too, and on a busy machine there is time for one."""
    monkeypatch.setattr(drawing, "PREVIEW_SECONDS", 1e9)


@pytest.fixture
def session(store: Store, tmp_path: Path) -> Session:
    return Session(store, tmp_path)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let a phase run out of memory the first so many times; the list tells how often it was begun."""

    def let(phase: str, times: int = 1, problem: Callable[[], Exception] = full) -> list[int]:
        begun: list[int] = []
        places: dict[str, tuple[Any, str]] = {
            "load": (ModelCache, "transformers"),
            "denoise": (GuidedModel, "__call__"),
            "decode": (Autoencoder, "decode"),
            "encode": (FeatureCache, "put"),
        }
        owner, name = places[phase]
        real = getattr(owner, name)

        def perhaps(*given: Any, **named: Any) -> Any:
            begun.append(len(begun))
            if len(begun) <= times:
                raise problem()
            return real(*given, **named)

        monkeypatch.setattr(owner, name, perhaps)
        return begun

    return let


def offering(session: Session, *rungs: Fallback) -> Session:
    """A session in which these are the ways to go on."""
    return replace(session, fallbacks=lambda *_: rungs)


def results(request: Request, session: Session, plans: PlannedRequest | None = None) -> dict[str, Result]:
    events = compare(plans or planned(request, HOST), session)
    return {event.result.recipe: event.result for event in events if event.result}


@pytest.mark.parametrize("phase", ["load", "denoise", "decode"])
def test_memory_that_runs_out_is_told_and_the_way_on_is_offered(
    phase: str, failing: Callable[..., list[int]], session: Session
) -> None:
    failing(phase)
    drawn = results(REQUEST, offering(session, Q4_K, SMALLER))
    failed = drawn["reference"]
    assert failed.error and PHASES[phase] in failed.error and "2.3 GB more were asked for" in failed.error
    assert failed.offers == (Q4_K, SMALLER) and failed.image is None
    assert (failed.caption, failed.seed) == (REQUEST.caption, REQUEST.seed)
    assert drawn["gguf-q4_k"].error is None, "one recipe does not take the others down"


def test_a_caption_that_found_no_room_is_offered_for_every_recipe(
    failing: Callable[..., list[int]], session: Session
) -> None:
    failing("encode")
    drawn = results(REQUEST, offering(session, Q4_K))
    assert all(PHASES["encode"] in (result.error or "") and result.offers == (Q4_K,) for result in drawn.values())


def test_who_said_so_gets_the_next_rung_and_is_told_what_ran_instead(
    failing: Callable[..., list[int]], session: Session
) -> None:
    failing("denoise")
    result = results(ADAPTING, offering(session, PACKED, Q4_K))["reference"]
    assert result.error is None and result.image
    assert (result.recipe, result.engaged) == ("reference", "gguf-q4_k"), "INT8 would have to be prepared first"
    (account,) = result.given_up
    assert account.startswith("The device ran out of memory while drawing") and Q4_K.title in account
    with Image.open(result.image) as picture:
        assert from_json(Result, picture.info["ideogram_app"]).given_up == result.given_up


def test_rungs_are_taken_one_after_another_until_one_holds(failing: Callable[..., list[int]], session: Session) -> None:
    begun = failing("load", times=2)
    result = results(ADAPTING, offering(session, Q4_K))["reference"]
    assert result.error is None and len(result.given_up) == 2 and len(begun) == 3


def test_a_ladder_that_ends_is_a_failure_that_says_what_was_tried(
    failing: Callable[..., list[int]], session: Session
) -> None:
    failing("load", times=9)
    left: Iterator[tuple[Fallback, ...]] = iter([(Q4_K,), ()])
    result = results(ADAPTING, replace(session, fallbacks=lambda *_: next(left)))["reference"]
    assert result.error and len(result.given_up) == 1 and result.offers == ()


def test_a_smaller_picture_has_noise_of_its_size_and_no_distance_to_a_larger_one(session: Session) -> None:
    smaller, calls = replace(SMALLER, recipe="gguf-q4_k"), []

    def second_fails(*given: Any, **named: Any) -> Loaded:
        calls.append(given)
        if len(calls) == 2:
            raise full()
        return load_transformers(*given, **named)

    drawn = results(replace(REQUEST, adapt=True), replace(offering(session, smaller), load=second_fails))
    assert (drawn["gguf-q4_k"].width, drawn["gguf-q4_k"].height) == (80, 64)
    assert drawn["gguf-q4_k"].psnr is None and drawn["reference"].width == 96
    with Image.open(drawn["gguf-q4_k"].image or "") as picture:
        assert picture.size == (80, 64)


def test_everything_is_given_back_before_anything_is_decided(monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
    ghosts: list[weakref.ref[Any]] = []

    def run_out(velocity: Any, *_: Any) -> Any:
        ghosts.extend(weakref.ref(branch.backbone.trunk) for branch in velocity._branches)
        raise full()

    def nothing_left(*_: Any) -> tuple[Fallback, ...]:
        gc.collect()
        assert ghosts and all(ghost() is None for ghost in ghosts)
        return ()

    monkeypatch.setattr(GuidedModel, "__call__", run_out)
    session = replace(session, stays=True, fallbacks=nothing_left)
    drawn = results(replace(REQUEST, recipes=("reference",)), session)
    assert drawn["reference"].error and session.cache.key is None


@pytest.mark.parametrize("phase", ["load", "denoise", "decode"])
def test_what_is_no_shortage_of_memory_fails_one_recipe_and_is_no_conversation(
    phase: str, failing: Callable[..., list[int]], session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    failing(phase, problem=lambda: ZeroDivisionError("a bug"))
    drawn = results(replace(REQUEST, adapt=True), offering(session, Q4_K))
    failed = drawn["reference"]
    assert failed.error and "ZeroDivisionError: a bug" in failed.error and PHASES[phase] in failed.error
    assert failed.image is None and failed.offers == () and failed.given_up == ()
    assert drawn["gguf-q4_k"].image and "Traceback" in caplog.text


def test_a_picture_that_cannot_be_written_fails_one_recipe(monkeypatch: pytest.MonkeyPatch, session: Session) -> None:
    written: list[Path] = []
    write = drawing.write_png

    def full_disk(path: Path, *given: Any) -> None:
        written.append(path)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *given)

    monkeypatch.setattr(drawing, "write_png", full_disk)
    drawn = results(REQUEST, session)
    assert "disk filled up" in (drawn["reference"].error or "") and drawn["gguf-q4_k"].image


def test_a_picture_is_kept_where_its_seconds_cannot_be_noted(session: Session) -> None:
    def unwritable(_: Observation) -> None:
        raise PermissionError("profile.json")

    drawn = results(replace(REQUEST, recipes=("gguf-q4_k",)), replace(session, observe=unwritable))
    assert drawn["gguf-q4_k"].image and drawn["gguf-q4_k"].error is None


def test_a_fallback_that_cannot_be_planned_fails_one_recipe(
    failing: Callable[..., list[int]], session: Session
) -> None:
    failing("load")
    drawn = results(replace(REQUEST, adapt=True), replace(session, fallbacks=lambda *_: [][0]))
    assert "IndexError" in (drawn["reference"].error or "") and drawn["gguf-q4_k"].image


@pytest.mark.parametrize("stop", [Cancelled("Stopped"), KeyboardInterrupt()], ids=["cancelled", "interrupted"])
def test_only_cancelling_passes(stop: BaseException, failing: Callable[..., list[int]], session: Session) -> None:
    failing("denoise", problem=lambda: stop)
    with pytest.raises(type(stop)):
        results(REQUEST, session)


def test_memory_that_cannot_be_given_back_does_not_hide_the_reason(
    failing: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    def broken(_: ModelCache) -> None:
        raise RuntimeError("the ring could not be closed")

    failing("denoise", problem=lambda: TypeError("a bug"))
    monkeypatch.setattr(ModelCache, "unload", broken)
    drawn = results(REQUEST, session)
    assert "TypeError: a bug" in (drawn["reference"].error or "") and drawn["gguf-q4_k"].image


class OnACard:
    """A comparison of which some recipes are planned for cards that are not there: what drawing them raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, session: Session, problem: Exception) -> None:
        self.tried: list[str] = []
        self.patch, self.session, self.problem, self.real = monkeypatch, session, problem, retry._draw
        monkeypatch.setattr(retry, "_draw", self._draw)
        on_host = planned(REQUEST, HOST).encoding
        monkeypatch.setattr(PlannedRequest, "encoding", property(lambda self: on_host))

    def _draw(self, attempt: retry.Attempt, session: Session) -> Iterator[Event]:
        self.tried.append(attempt.recipe)
        if attempt.plan.device != "cpu":
            raise self.problem
        yield from self.real(attempt, session)

    def results(self, devices: dict[str, str], session: Session | None = None) -> dict[str, Result]:
        found = planned(replace(REQUEST, recipes=tuple(devices)), HOST)
        plans = {
            name: replace(found.plans[name], device=device, branch_devices=(device, device))
            for name, device in devices.items()
        }
        return results(found.request, session or self.session, replace(found, plans=plans))


STICKY = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
RESTART = "restart the program"


def test_after_a_sticky_error_nothing_more_is_tried_on_that_device_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    card = OnACard(monkeypatch, session, torch.AcceleratorError(STICKY))
    drawn = card.results({"reference": "cuda:0", "int8-w8a8": "cuda", "fp8": "cuda:1", "gguf-q4_k": "cpu"})
    assert card.tried == ["reference", "fp8", "gguf-q4_k"], "cuda is cuda:0, which is lost; cuda:1 is another"
    for recipe in ("reference", "int8-w8a8"):
        error = drawn[recipe].error or ""
        assert RESTART in error and "illegal memory access" in error and "asynchronously" not in error
    assert (drawn["int8-w8a8"].error or "").startswith("Not tried") and drawn["gguf-q4_k"].image
    again = card.results({"gguf-q4_k": "cuda:0"})
    assert RESTART in (again["gguf-q4_k"].error or "") and card.tried[3:] == [], "nor by a later comparison"


def test_a_device_that_turns_out_to_be_lost_while_memory_is_given_back_is_lost(
    monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    def broken(_: ModelCache) -> None:
        raise RuntimeError(STICKY)

    card = OnACard(monkeypatch, session, RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"))
    monkeypatch.setattr(ModelCache, "unload", broken)
    drawn = card.results({"reference": "cuda:0", "fp8": "cuda:0"})
    assert card.tried == ["reference"]
    assert all(RESTART in (result.error or "") for result in drawn.values())


def test_free_memory_that_a_lost_device_does_not_tell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Hardware) -> MemoryNow:
        raise RuntimeError(STICKY)

    monkeypatch.setattr(sessions, "memory_now", broken)
    assert free_memory(HOST) == MemoryNow()
    inputs = planned(REQUEST, HOST).inputs
    assert with_free_memory(inputs) == inputs


def test_a_second_picture_needs_no_loading_and_is_measured_as_the_first_was(session: Session, tmp_path: Path) -> None:
    session, request = replace(session, stays=True), replace(REQUEST, recipes=("gguf-q4_k",))
    first = results(request, replace(session, output=tmp_path / "a"))["gguf-q4_k"]
    second = results(replace(request, seed=6), replace(session, output=tmp_path / "b"))["gguf-q4_k"]
    assert not first.warm and second.warm
    assert second.seconds.load < first.seconds.load
    assert second.peak_host_bytes and second.peak_host_bytes > second.weight_bytes
    assert first.residency == second.residency == first.planned_residency == "resident"
    assert first.predicted_host_bytes and first.predicted_host_bytes > first.weight_bytes


def test_nothing_stays_loaded_where_nobody_said_that_it_stays(session: Session) -> None:
    ghosts = []

    def noted(*given: Any, **named: Any) -> Loaded:
        loaded = load_transformers(*given, **named)
        ghosts.append(weakref.ref(loaded.conditional))
        return loaded

    results(REQUEST, replace(session, load=noted))
    gc.collect()
    assert len(ghosts) == 2 and all(ghost() is None for ghost in ghosts)


def test_all_recipes_of_a_comparison_are_decoded_in_the_tiles_of_the_one_that_needs_the_smallest(
    monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    """Else seams would be told apart as a recipe's own error."""
    sides: list[int] = []
    decode, found = Autoencoder.decode, planned(REQUEST, HOST)
    tiles = {"reference": 0, "gguf-q4_k": 64}
    plans = {name: replace(chosen, decode_tile=tiles[name]) for name, chosen in found.plans.items()}

    def noted(vae: Autoencoder, *given: Any, **named: Any) -> Any:
        sides.append(vae.tile or 0)
        return decode(vae, *given, **named)

    monkeypatch.setattr(Autoencoder, "decode", noted)
    drawn = results(REQUEST, session, replace(found, plans=plans))
    assert all(result.error is None for result in drawn.values()) and set(sides) == {64}


def test_a_picture_that_was_stopped_leaves_nothing_locked_where_nobody_said_that_it_stays(
    monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    closed: list[Loaded] = []
    monkeypatch.setattr(Loaded, "close", lambda loaded: closed.append(loaded))
    events = compare(planned(REQUEST, HOST), session)
    next(event for event in events if event.phase == "denoise")
    events.close()  # type: ignore[attr-defined]
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("home", "loaded", "adapt", "ways"),
    [
        ("resident", False, False, ["resident"]),
        ("resident", True, False, ["resident", "resident"]),  # beside others than those that the plan is for
        ("staged", True, False, ["streamed", "staged"]),
        ("staged", True, True, ["streamed", "staged", "streamed"]),
        ("streamed", True, True, ["streamed", "streamed"]),
    ],
)
def test_the_encoder_tries_beside_what_is_loaded_and_then_without_it(
    home: str, loaded: bool, adapt: bool, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = replace(plan(HOST, "miniature"), encoder=home, device="cuda:0")
    cache = ModelCache()
    monkeypatch.setattr(cache, "key", "something" if loaded else None)
    assert reading._modes(adapt, chosen, cache) == ways
