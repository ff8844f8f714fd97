"""A request is planned once: one plan a recipe, in the worker, and what is drawn is what places the text encoder."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from ideogram_app.catalog.models import MODELS
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.comparison.compare import compare
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.generation.draw import SharedInputs
from ideogram_app.generation.encode_prompt import encode_prompt
from ideogram_app.generation.session import Session
from ideogram_app.generation.validate import check_request
from ideogram_app.machine.hardware import Hardware
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.planning import planner
from ideogram_app.planning.fallbacks import ENCODER_MODES
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planned_request import plan_request
from ideogram_app.planning.planner import Plan
from ideogram_app.records import Fallback, Request, Result
from ideogram_app.studio import worker as work
from ideogram_app.studio.studio import Studio
from tests.fake_backend import Fake
from tests.plan_by_name import plan, planned

pytestmark = pytest.mark.slow

HOST = Hardware(name="A processor", host_memory_bytes=32 * 10**9, host_free_bytes=24 * 10**9, disk_free_bytes=10**12)
CARD = Hardware(
    kind="cuda",
    name="NVIDIA RTX A6000",
    compute_capability=(8, 6),
    device_memory_bytes=40 * 10**9,
    device_free_bytes=40 * 10**9,
    host_memory_bytes=64 * 10**9,
    host_free_bytes=60 * 10**9,
)
CAPTION = parse_prompt("a red circle on a yellow background").caption
RECIPES = ("gguf-q4_k", "reference", "int8-w8a8")
REQUEST = Request("miniature", CAPTION, ("reference",), "turbo-12", 96, 64, seed=5)
TOKENS = tuple(range(60))
SOON = 60.0


@pytest.fixture
def calls() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The arguments of every call of these functions from now on, in new threads too, whoever makes it."""
    watched: tuple[Callable[..., Any], ...] = (planner.plan, check_request, work.check_fits)
    names = {function.__code__: function.__name__ for function in watched}
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in names:
            made[names[frame.f_code]].append(dict(frame.f_locals))

    threading.setprofile(note)
    sys.setprofile(note)
    yield made
    sys.setprofile(None)
    threading.setprofile(None)  # type: ignore[arg-type]


def asked(calls: dict[str, list[dict[str, Any]]]) -> list[PlanInputs]:
    """What every plan was computed from."""
    return [given["inputs"] for given in calls["plan"]]


def test_a_request_of_three_recipes_takes_three_plans_in_the_worker(
    calls: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    fake = Fake()
    studio = Studio(fake, tmp_path)
    studio.start()
    while studio.state.machine is None or "miniature" not in studio.state.statuses:
        studio.watch(studio.state.version, 1.0)
    studio.wait(studio.submit_prepare("miniature", ("gguf-q4_k", "int8-w8a8")), SOON)
    for made in calls.values():
        made.clear()
    job = studio.wait(studio.submit_compare(replace(REQUEST, recipes=RECIPES)), SOON)
    studio.close()
    assert job.state == "done"
    drawn = [inputs for inputs in asked(calls) if inputs.recipe]
    shown = [inputs for inputs in asked(calls) if not inputs.recipe]
    assert [inputs.recipe for inputs in drawn] == list(RECIPES)
    assert {inputs.text_tokens for inputs in drawn} == {len(fake.tokens("miniature", CAPTION))}
    assert len(shown) == len(MODELS) + 1, "for the page: each model on the machine as it is now, and the comparison's"
    assert len(calls["check_request"]) == len(calls["check_fits"]) == 1


def test_a_retry_takes_one_plan_more_and_replaces_that_of_its_recipe(
    calls: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    smaller, loads = Fallback("80 x 64", "Nearly the same shape.", "reference", 80, 64, device_limit_bytes=10**9), []

    def first_fails(*given: Any, **named: Any) -> Loaded:
        loads.append(given)
        if len(loads) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.14 GiB.")
        return load_transformers(*given, **named)

    before = planned(replace(REQUEST, adapt=True), HOST)
    assert [inputs.recipe for inputs in asked(calls)] == ["reference"]
    session = Session(Store(tmp_path), tmp_path, load=first_fails, fallbacks=lambda *_: (smaller,))
    (result,) = [event.result for event in compare(before, session) if event.result]
    assert isinstance(result, Result) and result.error is None and result.width == 80
    first, second = asked(calls)
    assert second == replace(first, size=(80, 64), limit_bytes=10**9, hardware=second.hardware)


# The text encoder.


def with_encoders(*homes: str) -> dict[str, Plan]:
    """One plan a home; those with a name in capitals do not fit."""
    made = plan(HOST, "miniature")
    return {str(at): replace(made, encoder=home.lower(), fits=home.islower()) for at, home in enumerate(homes)}


@pytest.mark.parametrize(
    ("homes", "tightest"),
    [
        (("resident",), "resident"),
        (("resident", "staged"), "staged"),
        (("streamed", "resident", "staged"), "streamed"),
        (("resident", "STREAMED"), "resident"),
        (("STAGED", "STREAMED"), "streamed"),
    ],
)
def test_the_encoder_is_placed_by_the_tightest_plan_of_those_that_fit(homes: tuple[str, ...], tightest: str) -> None:
    request = planned(REQUEST, HOST)
    assert replace(request, plans=with_encoders(*homes)).encoding.encoder == tightest


def test_the_encoder_is_placed_by_what_is_drawn_and_not_by_the_default_recipe() -> None:
    """On 40 GB the default recipe leaves room for an encoder that stays; beside the reference there is none."""
    request = Request("ideogram-4", CAPTION, ("reference",), width=1024, height=1024)
    found = plan_request(request, PlanInputs.of_request(request, CARD), TOKENS)
    default = plan(CARD, "ideogram-4", text_tokens=len(TOKENS))
    assert default.recipe == "int8-w8a8-rotated" and default.encoder == "resident"
    assert ENCODER_MODES.index(found.encoding.encoder) > ENCODER_MODES.index(default.encoder)
    both = replace(request, recipes=("int8-w8a8-rotated", "reference"))
    assert plan_request(both, found.inputs, TOKENS).encoding.encoder == found.encoding.encoder


@pytest.mark.parametrize(("home", "stays"), [("resident", True), ("staged", False), ("streamed", False)])
def test_reading_obeys_the_plan_of_what_is_drawn(home: str, stays: bool, tmp_path: Path) -> None:
    request, session = planned(REQUEST, HOST), Session(Store(tmp_path), tmp_path)
    plans = {"reference": replace(request.plans["reference"], encoder=home)}
    shared = encode_prompt(replace(request, plans=plans), session)
    assert isinstance(shared, SharedInputs) and shared.features.shape[1] == len(request.tokens)
    assert (session.cache.host_bytes > 0) is stays
