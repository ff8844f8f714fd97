"""What flows turns into JSON and back without loss, and errors read as sentences."""

from __future__ import annotations

import json

import pytest

from ideogram_app.comparison.history import Comparison
from ideogram_app.errors import AppError, RequestError
from ideogram_app.machine.hardware import Hardware
from ideogram_app.records import Event, Request, Result, Seconds
from ideogram_app.wire import from_json, to_json, to_plain
from tests.plan_by_name import plan

HARDWARE = Hardware(
    kind="cuda",
    name="RTX 3090",
    compute_capability=(8, 6),
    device_memory_bytes=24 * 2**30,
    device_free_bytes=23 * 2**30,
    host_memory_bytes=64 * 2**30,
    host_free_bytes=50 * 2**30,
    disk_free_bytes=500 * 10**9,
)
RESULT = Result(
    recipe="gguf-q4_k",
    engaged="gguf-q4_k",
    image="pictures/ü.png",
    width=128,
    height=96,
    seed=2**53 + 1,
    preset="turbo-12",
    steps=12,
    caption='{"x":"“quoted” – 日本"}',
    seconds=Seconds(0.1, 0.2, 0.3, 0.4, 0.5, 1.5),
    psnr=41.25,
    ssim=0.987654321,
    guidance=(1.5,) * 12,
    versions={"torch": "2.13.0"},
)


@pytest.mark.parametrize(
    "value",
    [
        HARDWARE,
        plan(HARDWARE, "ideogram-4"),
        Request("miniature", "{}", ("reference", "fp8"), seed=2**62),
        Event("denoise", "fp8", 3, 20, 1.5, 11.0, preview="aGk="),
        Event("result", result=RESULT),
        Comparison(Request("miniature", "{}"), HARDWARE, plan(HARDWARE, "miniature"), (RESULT,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_that_flows_survives_json(value: object) -> None:
    assert from_json(type(value), to_json(value)) == value


def test_a_result_from_before_attention_was_named_still_reads() -> None:
    older = to_plain(Result("reference", "reference", None, 64, 64, 0, "turbo-12", 12, "{}", attention="flash"))
    del older["attention"]
    assert from_json(Result, json.dumps(older)).attention == ""


def test_json_uses_the_names_of_the_design() -> None:
    names = set(json.loads(to_json(RESULT)))
    assert names >= {
        "recipe", "engaged", "image", "width", "height", "seed", "preset", "steps", "caption", "seconds",
        "seconds_per_step", "peak_memory_bytes", "peak_device_bytes", "peak_device_reserved_bytes", "peak_host_bytes",
        "weight_bytes", "psnr", "ssim", "error", "versions",
    }  # fmt: skip
    assert set(json.loads(to_json(RESULT))["seconds"]) == {"load", "encode", "first_step", "denoise", "decode", "total"}


def test_a_wrong_type_is_named_with_its_field() -> None:
    text = to_json(RESULT).replace('"seed": 9007199254740993', '"seed": "many"')
    with pytest.raises(RequestError, match="seed"):
        from_json(Result, text)


def test_text_that_is_not_json_says_so() -> None:
    with pytest.raises(RequestError, match="not JSON"):
        from_json(Request, "{oops")


def test_an_error_says_what_happened_what_was_expected_and_what_to_do() -> None:
    error = AppError("The file is too short", expected="10 bytes", got="7 bytes", do="Fetch it again")
    assert str(error) == "The file is too short. Expected 10 bytes. Got 7 bytes. Fetch it again."
