"""Offers and what was given up: as buttons on the page, as flags on the command line, as a request in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from ideogram_app.catalog.reasons import Reason
from ideogram_app.cli import app as command_line
from ideogram_app.cli.output import describe_offer, describe_result
from ideogram_app.errors import RequestError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.records import Fallback, Request, Result
from ideogram_app.studio.state import Job
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.form import request_of, values_of
from ideogram_app.ui.offers import gave_up, offered, offers, tried
from ideogram_app.ui.results import Shown, results_grid
from tests.fake_backend import LIMIT, SHORTAGE, offers_for, result_of

INT8 = "int8-w8a8-rotated"
REQUEST = Request("miniature", wrap_plain("a red circle"), ("reference", INT8), "turbo-12", 256, 128, 7)
ERROR = SHORTAGE.sentence()
RAN_OUT = replace(result_of(REQUEST, INT8, None, ERROR), offers=offers_for(REQUEST, INT8))


def test_every_offer_is_a_button_that_says_what_it_does() -> None:
    shown = offers(RAN_OUT)
    for index, rung in enumerate(RAN_OUT.offers):
        assert f'data-act="offer" data-name="{INT8}:{index}"' in shown and rung.reason.text in shown
    assert shown.count("same picture</span>") == 1
    assert offers(replace(RAN_OUT, offers=())) == ""


def test_what_an_offer_says_is_shown_as_text() -> None:
    rung = Fallback("<b>less</b>", Reason("", '"quoted" & <i>more</i>'), INT8, 64, 64)
    shown = offers(replace(RAN_OUT, offers=(rung,)))
    assert "<b>" not in shown and "<i>" not in shown and "&lt;b&gt;less" in shown


def test_a_button_stands_for_the_request_with_one_recipe_drawn_otherwise() -> None:
    same, smallest, smaller = (offered(REQUEST, (RAN_OUT,), f"{INT8}:{index}") for index in range(3))
    assert same == replace(REQUEST, device_limit_bytes=LIMIT)
    assert smallest.recipes == ("reference", "gguf-q4_k") and smallest.seed == REQUEST.seed
    assert (smaller.width, smaller.height, smaller.caption) == (128, 64, REQUEST.caption)


@pytest.mark.parametrize(
    "name", [f"{INT8}:3", f"{INT8}:-1", f"{INT8}:", INT8, "reference:0", "fp8:0", "", ":0", "a:b:c"]
)
def test_a_button_of_something_that_is_no_longer_there_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="no longer on offer"):
        offered(REQUEST, (RAN_OUT, result_of(REQUEST, "reference", None)), name)


def test_a_picture_drawn_as_asked_has_nothing_to_explain() -> None:
    assert gave_up(result_of(REQUEST, INT8, None), REQUEST) == ""
    from_before = replace(result_of(REQUEST, INT8, None), residency="", planned_residency="")
    assert gave_up(from_before, REQUEST) == ""


@pytest.mark.parametrize(
    ("changes", "asked", "ran"),
    [
        ({"engaged": "gguf-q4_k"}, "INT8 W8A8 rotated, resident", "GGUF Q4_K, resident"),
        ({"residency": "streamed"}, "INT8 W8A8 rotated, resident", "INT8 W8A8 rotated, streamed from RAM"),
        ({"residency": "disk"}, "INT8 W8A8 rotated, resident", "INT8 W8A8 rotated, streamed from disk"),
        ({"width": 128, "height": 64}, "rotated, resident, 256 × 128", "rotated, resident, 128 × 64"),
    ],
)
def test_what_was_asked_for_and_what_ran_stand_side_by_side(changes: dict[str, Any], asked: str, ran: str) -> None:
    result: Result = replace(result_of(REQUEST, INT8, None), **changes, given_up=(SHORTAGE.account("<less>"),))
    shown = gave_up(result, REQUEST)
    assert asked in shown and ran in shown and shown.index("asked: ") < shown.index("ran: ")
    assert "Went on with less: &lt;less&gt;." in shown


def test_what_was_tried_in_vain_is_told_beside_the_offers() -> None:
    failed = replace(RAN_OUT, given_up=(SHORTAGE.account("stream 5.3 GB from RAM"),))
    assert "Went on with less" in tried(failed)
    card = results_grid(Shown(REQUEST, (failed,), {}))
    assert card.index(ERROR.split(".")[0]) < card.index("Went on with less") < card.index('data-act="offer"')


def test_expected_memory_is_that_of_what_was_measured() -> None:
    drawn = replace(result_of(REQUEST, INT8, None), image="a.png", predicted_device_bytes=20_800_000_000)
    on_device = replace(drawn, peak_device_bytes=20_100_000_000, peak_memory_bytes=20_100_000_000)
    assert "20.1 GB <small>expected 20.8 GB</small>" in results_grid(Shown(REQUEST, (on_device,), {}))
    assert "expected 20.8 GB" not in results_grid(Shown(REQUEST, (drawn,), {})), "the process was measured"
    unplanned = replace(drawn, predicted_host_bytes=None)
    assert "<small>" not in results_grid(Shown(REQUEST, (unplanned,), {}))


def test_the_form_asks_and_shows_whether_to_go_on_with_less() -> None:
    asked = request_of("miniature", "a red circle", "turbo-12", 128, 128, 7, ["reference"], [], True)
    assert asked.adapt and values_of(asked)[-1] is True
    assert not request_of("miniature", "a red circle", "turbo-12", 128, 128, 7, ["reference"]).adapt


def test_the_command_line_names_the_flags_that_take_an_offer() -> None:
    line = describe_offer(replace(RAN_OUT.offers[0], host_limit_bytes=8_500_000_000))
    assert line == (
        f"Stream 5.3 GB from RAM (the same picture): --recipe {INT8} --width 256 --height 128 "
        "--device-limit 9.00 --host-limit 8.50"
    )
    shown = describe_result(RAN_OUT).splitlines()
    assert ERROR in shown[0] and len(shown) == 4 and all("--recipe" in row for row in shown[1:])
    adapted = replace(result_of(REQUEST, INT8, None), engaged="gguf-q4_k", given_up=(SHORTAGE.account("less"),))
    first, second = describe_result(adapted).splitlines()
    assert "ran: gguf-q4_k, resident" in first and second.strip() == f"- {SHORTAGE.account('less')}"


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_flags_of_the_command_line_reach_the_request(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    seen: list[tuple[Request, int]] = []

    def submitted(studio: Studio, request: Request) -> str:
        seen.append((request, studio.reserve_bytes))
        return "1"

    def done(_: Studio, submit: Callable[[], str]) -> Job:
        return Job(submit(), "compare", "miniature", state="done", results=(RAN_OUT,))

    monkeypatch.setattr(Studio, "submit_compare", submitted)
    monkeypatch.setattr(command_line, "run_job", done)
    line = [command, "--prompt", "a red circle", "--out", str(tmp_path / "a.png"), "--data-dir", str(tmp_path)]
    line += ["--recipe", INT8] if command == "generate" else ["--recipes", INT8]
    flags = ["--adapt", "--device-limit", "9.5", "--host-limit", "8", "--reserve-vram", "1.5"]
    for further in ([], flags):
        CliRunner().invoke(command_line.app, [*line, *further])
    (plain, nothing), (limited, reserve) = seen
    assert (plain.adapt, plain.device_limit_bytes, plain.host_limit_bytes, nothing) == (False, None, None, 0)
    assert (limited.adapt, limited.device_limit_bytes, limited.host_limit_bytes) == (True, 9_500_000_000, 8_000_000_000)
    assert reserve == 1_500_000_000
