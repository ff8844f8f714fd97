"""One caption through every recipe of the shipped miniature: real pictures and numbers, failures that stay alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.comparison import compare as comparing
from ideogram_app.comparison.compare import compare
from ideogram_app.comparison.contact_sheet import SMALLEST_SIDE, draw_sheet, write_sheet
from ideogram_app.comparison.history import Comparison
from ideogram_app.comparison.metrics import psnr, ssim
from ideogram_app.errors import RequestError
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.generation.session import Session
from ideogram_app.generation.validate import check_request
from ideogram_app.machine.hardware import Hardware, detect
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder import features as text
from ideogram_app.model.vae import Autoencoder
from ideogram_app.records import Event, Request, Result
from ideogram_app.wire import from_json
from tests.plan_by_name import plan, planned

pytestmark = pytest.mark.slow

NAN = float("nan")
REQUEST = Request(
    "miniature", parse_prompt("a red circle on a yellow background").caption, tuple(RECIPES), preset="turbo-12", seed=1
)


@pytest.fixture(scope="module")
def store(prepared_miniature: Store) -> Store:
    """The miniature in every recipe."""
    return prepared_miniature


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    return detect(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def events(store: Store, machine: Hardware, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return list(compare(planned(REQUEST, machine), Session(store, tmp_path_factory.mktemp("pictures"))))


@pytest.fixture(scope="module")
def results(events: list[Event]) -> dict[str, Result]:
    return {event.result.recipe: event.result for event in events if event.result}


def test_every_recipe_draws_and_says_what_engaged(events: list[Event], results: dict[str, Result]) -> None:
    assert set(results) == set(RECIPES) and events[-1].phase == "done"
    for recipe, result in results.items():
        assert result.error is None and result.engaged == recipe and result.image
        with Image.open(result.image) as picture:
            assert picture.size == (128, 128) and picture.format == "PNG"


def test_the_reference_is_drawn_first_and_has_no_distance(events: list[Event], results: dict[str, Result]) -> None:
    assert next(event.result.recipe for event in events if event.result) == "reference"
    assert results["reference"].psnr is None and results["reference"].ssim is None


def test_four_bits_are_farther_from_the_reference_than_eight(results: dict[str, Result]) -> None:
    distance = {recipe: result.psnr or 0 for recipe, result in results.items() if recipe != "reference"}
    assert min(distance, key=lambda recipe: distance[recipe]) == "gguf-q4_k", distance
    assert min(distance.values()) > 20, "even four bits draw the same picture"


def test_distances_are_those_of_the_files(results: dict[str, Result]) -> None:
    with Image.open(results["reference"].image or "") as truth:
        for recipe, result in results.items():
            if recipe != "reference":
                with Image.open(result.image or "") as picture:
                    assert result.psnr == psnr(picture, truth) and result.ssim == ssim(picture, truth)


def test_weights_in_memory_shrink_with_the_bits(results: dict[str, Result]) -> None:
    held = {recipe: result.weight_bytes or 0 for recipe, result in results.items()}
    assert held["gguf-q4_k"] < held["gguf-q8_0"] < held["reference"] and held["fp8"] < held["reference"]


def test_predicted_weights_are_the_ones_held(results: dict[str, Result], machine: Hardware) -> None:
    for recipe, result in results.items():
        expected = plan(machine, "miniature", recipe=recipe).predicted.weight_bytes
        assert result.weight_bytes == pytest.approx(expected, rel=0.02), recipe


def test_a_damaged_recipe_fails_alone_and_names_its_file(store: Store, machine: Hardware, tmp_path: Path) -> None:
    request = replace(REQUEST, recipes=("reference", "gguf-q8_0", "gguf-q4_k"))
    file = next(store.path("miniature", "gguf-q8_0").rglob("*.gguf"))
    original = file.read_bytes()
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(flipped)
    try:
        events = compare(planned(request, machine), Session(store, tmp_path))
        drawn = [event.result for event in events if event.result]
    finally:
        file.write_bytes(original)
    by_name = {result.recipe: result for result in drawn}
    assert by_name["gguf-q8_0"].image is None and file.name in (by_name["gguf-q8_0"].error or "")
    assert by_name["reference"].image and by_name["gguf-q4_k"].psnr


BROKEN = {"fp8": "TypeError", "int8-w8a8-naive": "restart the program", "gguf-q8_0": "Step 1 of 12"}


def loading(store: Store, model: str, recipe: str, *given: Any, **named: Any) -> Loaded:
    """Of the recipes of `BROKEN` one raises, one loses its device, and one computes NaN."""
    if recipe == "fp8":
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support for it")
    if recipe == "int8-w8a8-naive":
        raise RuntimeError("CUDA error: an illegal memory access")
    loaded = load_transformers(store, model, recipe, *given, **named)
    if recipe == "gguf-q8_0":
        loaded.conditional.register_forward_hook(lambda module, given, velocity: torch.full_like(velocity, NAN))
    return loaded


def test_recipes_that_raise_lose_their_device_or_compute_nan_leave_all_others(
    store: Store, machine: Hardware, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The processor goes on computing after an error of a card, so here all others are drawn."""
    events = list(compare(planned(REQUEST, machine), Session(store, tmp_path, load=loading)))
    drawn = {event.result.recipe: event.result for event in events if event.result}
    assert set(drawn) == set(RECIPES) and events[-1].phase == "done"
    for recipe, result in drawn.items():
        if recipe in BROKEN:
            assert BROKEN[recipe] in (result.error or "") and result.image is None, recipe
        else:
            assert result.error is None and result.image, recipe
            assert recipe == "reference" or result.psnr
    assert "does not have support" in (drawn["fp8"].error or "") and "not finite" in (drawn["gguf-q8_0"].error or "")
    assert {path.stem for path in tmp_path.glob("*.png")} == set(RECIPES) - set(BROKEN)
    assert caplog.text.count("Traceback") == 2, "NaN is no bug"


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (TypeError("a bug"), "TypeError: a bug"),
        (RuntimeError("CUDA error: device-side assert triggered"), "restart the program"),
        (None, "not finite"),
    ],
    ids=["raises", "loses its device", "nan"],
)
def test_a_caption_that_cannot_be_encoded_fails_every_recipe_in_words_and_is_not_kept(
    problem: Exception | None, word: str, machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = text.features

    def broken(*given: Any) -> torch.Tensor:
        if problem:
            raise problem
        features = made(*given).clone()  # that of inference cannot be written to here
        features[0, 1, 2] = NAN
        return features

    request = replace(REQUEST, recipes=("reference", "gguf-q4_k"))
    session = Session(Store(tmp_path), tmp_path)
    monkeypatch.setattr(text, "features", broken)
    events = list(compare(planned(request, machine), session))
    failed = [event.result for event in events if event.result]
    assert [result.recipe for result in failed] == ["reference", "gguf-q4_k"] and events[-1].phase == "done"
    assert all(word in (result.error or "") and result.image is None for result in failed)
    assert session.features.bytes == 0 and session.cache.host_bytes == 0


def test_a_picture_that_is_decoded_to_nan_fails_in_words_and_is_not_written(
    machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda *given, **named: (decode(*given, **named)[0] * NAN,))
    request = replace(REQUEST, recipes=("reference",))
    events = list(compare(planned(request, machine), Session(Store(tmp_path), tmp_path / "pictures")))
    (result,) = [event.result for event in events if event.result]
    assert "not finite" in (result.error or "") and result.image is None
    assert not list(tmp_path.rglob("*.png")) and not any(event.preview for event in events)


def test_a_picture_is_kept_where_it_cannot_be_compared(
    store: Store, machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Image.Image) -> float:
        raise ModuleNotFoundError("No module named 'skimage'")

    monkeypatch.setattr(comparing, "psnr", missing)
    request = replace(REQUEST, recipes=("reference", "gguf-q4_k"))
    events = compare(planned(request, machine), Session(store, tmp_path))
    result = [event.result for event in events if event.result][-1]
    assert result.image and result.error is None and result.psnr is None
    assert "ModuleNotFoundError" in result.given_up[-1]


def test_a_device_that_does_not_answer_at_the_end_does_not_undo_the_comparison(
    machine: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(comparing, "empty_cache", broken)
    monkeypatch.setattr(ModelCache, "unload", broken)
    request = replace(REQUEST, recipes=("reference",))
    events = list(compare(planned(request, machine), Session(Store(tmp_path), tmp_path)))
    assert events[-1].phase == "done" and events[-2].result and events[-2].result.image


def test_a_recipe_that_was_never_prepared_fails_with_what_to_do(machine: Hardware, tmp_path: Path) -> None:
    request = replace(REQUEST, recipes=("fp8",))
    events = compare(planned(request, machine), Session(Store(tmp_path), tmp_path))
    drawn = [event.result for event in events if event.result]
    assert drawn[0].error and "Prepare" in drawn[0].error and drawn[0].image is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"recipes": ("int4",)}, "gguf-q4_k"),
        ({"recipes": ()}, "at least one"),
        ({"recipes": ("fp8", "fp8")}, "once"),
        ({"preset": "slow"}, "turbo-12"),
        ({"width": 130}, "multiple of 16"),
        ({"model": "ideogram-5"}, "miniature"),
        ({"seed": -1}, "seed"),
        ({"guidance": 99.0}, "guidance"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_planned_or_loaded(change: dict[str, object], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        check_request(replace(REQUEST, **change))  # type: ignore[arg-type]


def test_the_contact_sheet_shows_the_pictures_pixel_for_pixel(
    results: dict[str, Result], machine: Hardware, tmp_path: Path
) -> None:
    failed = replace(results["fp8"], image=None, error="The device ran out of memory. Try gguf-q4_k.", psnr=None)
    shown = (results["reference"], failed, results["gguf-q4_k"])
    comparison = Comparison(REQUEST, machine, plan(machine, "miniature"), shown)
    write_sheet(comparison, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(results["reference"].image or "") as picture:
        inside = from_json(Comparison, sheet.text["ideogram_app"])  # type: ignore[attr-defined]
        enlarged = picture.convert("RGB").resize((SMALLEST_SIDE,) * 2, Image.Resampling.NEAREST)
        first_row = enlarged.crop((0, 0, SMALLEST_SIDE, 1)).tobytes()
        column = sheet.crop((20, 0, 20 + SMALLEST_SIDE, sheet.height))
        top = next(y for y in range(sheet.height) if column.crop((0, y, SMALLEST_SIDE, y + 1)).tobytes() == first_row)
        assert column.crop((0, top, SMALLEST_SIDE, top + SMALLEST_SIDE)).tobytes() == enlarged.tobytes()
    assert inside == comparison
    assert draw_sheet(comparison).width >= 3 * SMALLEST_SIDE
