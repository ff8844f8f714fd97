"""Every sentence of a plan: the golden file holds the texts, and what is on the wire is what people read."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import pytest

from ideogram_app.catalog.reasons import NOTHING, SENTENCES, Reason, reason
from ideogram_app.errors import RequestError
from ideogram_app.planning.planner import Plan
from ideogram_app.wire import from_json, to_json, to_plain
from tests.machines import RTX_3060, RTX_3090
from tests.plan_by_name import plan

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import golden_reasons


def test_what_is_said_to_every_machine_is_what_the_golden_file_holds() -> None:
    assert golden_reasons.golden() == golden_reasons.GOLDEN.read_text(encoding="utf-8"), (
        "sentences, or plans, have changed: run python tools/golden_reasons.py and read the difference"
    )


def test_every_row_is_said_to_some_machine_of_the_golden_file_and_nothing_else_is() -> None:
    assert golden_reasons.said() == set(SENTENCES)


@pytest.mark.parametrize("code", SENTENCES)
def test_every_field_of_a_sentence_has_a_name(code: str) -> None:
    assert all(name is None or name.isidentifier() for _, name, _, _ in string.Formatter().parse(SENTENCES[code]))


def test_a_reason_keeps_its_numbers_as_they_were_and_says_them_rounded() -> None:
    told = reason("resident", title="GGUF Q4_K", weights=9_799_123_456, free=15_600_000_000)
    assert told.code == "resident" and told.numbers == {"weights": 9_799_123_456, "free": 15_600_000_000}
    assert told.text == "GGUF Q4_K keeps both transformers (9.8 GB) in the 15.6 GB that are free."


def test_a_reason_within_another_and_one_after_another_are_both_named() -> None:
    why = reason("too_much_travels", moved=4e9, weights=17e9, free=14e9, share=0.25, accepted=0.2)
    inside = reason("not_taken", title="INT8", why=why)
    assert inside.code == "not_taken+too_much_travels" and inside.numbers == why.numbers
    assert inside.text == f"Not INT8: {why.text}"
    after = reason("free_disk") + reason("use_miniature")
    assert after.code == "free_disk+use_miniature"
    assert after.text == f"{SENTENCES['free_disk']} {SENTENCES['use_miniature']}"


def test_nothing_to_say_is_false_and_adds_nothing() -> None:
    assert not NOTHING and NOTHING + why() is not NOTHING
    assert NOTHING + why() == why() == why() + NOTHING and (NOTHING + NOTHING).text == ""


def test_a_row_or_a_field_that_is_missing_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(KeyError):
        reason("no_such_row")
    with pytest.raises(KeyError):
        reason("limit")


def test_json_holds_the_texts_that_people_read() -> None:
    decided = plan(RTX_3060, "ideogram-4")
    plain = to_plain(decided)
    assert plain["reasons"] == [each.text for each in decided.reasons]
    assert [row["reason"] for row in plain["rejected"]] == [row.reason.text for row in decided.rejected]
    assert (
        plan(RTX_3090, "ideogram-4").suggestion is NOTHING
        and to_plain(plan(RTX_3090, "ideogram-4"))["suggestion"] == ""
    )


def test_a_plan_that_was_kept_as_json_comes_back_with_its_texts_and_is_written_the_same_again() -> None:
    text = to_json(plan(RTX_3060, "ideogram-4"))
    read = from_json(Plan, text)
    assert read == plan(RTX_3060, "ideogram-4") and to_json(read) == text
    assert {each.code for each in read.reasons} == {""}


def test_a_reason_on_the_wire_that_is_no_text_is_refused() -> None:
    plain = json.loads(to_json(plan(RTX_3060, "ideogram-4"))) | {"reasons": [3]}
    with pytest.raises(RequestError, match="reasons"):
        from_json(Plan, json.dumps(plain))


def why() -> Reason:
    return reason("limit", limit=8_000_000_000)
