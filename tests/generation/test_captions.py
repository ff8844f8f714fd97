"""Captions: what is accepted, how it is serialised, and which rule an error names."""

from __future__ import annotations

import json

import pytest

from ideogram_app.errors import CaptionError
from ideogram_app.generation.captions import LONGEST_PROMPT, check_caption, parse_prompt, wrap_plain

SCENE = {"background": "a beach", "elements": [{"type": "obj", "bbox": [1, 2, 3, 4], "desc": "a dog"}]}
PHOTO = {"aesthetics": "calm", "lighting": "soft", "photo": "35 mm", "medium": "photograph"}


def caption(**parts: object) -> str:
    return json.dumps({"compositional_deconstruction": SCENE} | parts)


def refusal(text: str) -> str:
    with pytest.raises(CaptionError) as caught:
        parse_prompt(text)
    return str(caught.value)


def element(**parts: object) -> str:
    return json.dumps({"compositional_deconstruction": {"background": "x", "elements": [parts]}})


def test_plain_text_becomes_the_smallest_valid_caption() -> None:
    prompt = parse_prompt("  a red circle ")
    assert prompt.was_plain
    assert json.loads(prompt.caption)["compositional_deconstruction"]["elements"] == [
        {"type": "obj", "bbox": [100, 100, 900, 900], "desc": "a red circle"}
    ]
    assert check_caption(prompt.caption) == prompt.caption


def test_a_caption_is_serialised_without_spaces_and_without_escapes() -> None:
    written = parse_prompt('{ "compositional_deconstruction" : {"background": "caf\\u00e9", "elements": []} }')
    assert written.caption == '{"compositional_deconstruction":{"background":"café","elements":[]}}'
    assert not written.was_plain


def test_quotes_and_line_breaks_in_plain_text_survive() -> None:
    text = 'a sign that says "STOP"\nin red \\ white'
    assert json.loads(wrap_plain(text))["compositional_deconstruction"]["elements"][0]["desc"] == text


def test_both_kinds_of_style_are_accepted() -> None:
    art = {"aesthetics": "a", "lighting": "b", "medium": "c", "art_style": "d", "color_palette": ["#FFAA00"]}
    for style in (PHOTO, art):
        text = json.dumps({"style_description": style, "compositional_deconstruction": SCENE})
        assert json.loads(check_caption(text))["style_description"] == style


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_refused_with_an_example(text: str) -> None:
    assert "empty" in refusal(text) and "for example" in refusal(text)


def test_ten_megabytes_are_refused_at_once_with_both_numbers() -> None:
    message = refusal("x" * 10_000_000)
    assert f"{LONGEST_PROMPT:,}" in message and "10,000,000" in message


def test_broken_json_names_line_and_column() -> None:
    assert "line 2, column" in refusal('{"compositional_deconstruction":\n oops}')


@pytest.mark.parametrize(
    ("text", "place", "rule"),
    [
        (json.dumps({"high_level_description": "x"}), "compositional_deconstruction", "required"),
        (caption(mood="x"), "mood", "no such key"),
        (element(type="obj", desc="a", bbox=[1, 2, 3, 4]), "elements[0]", "order: type, bbox, desc"),
        (element(type="obj", bbox=[9, 2, 3, 4], desc="a"), "elements[0]", "minimum above its maximum"),
        (element(type="obj", bbox=[0, 0, 1001, 4], desc="a"), "bbox[2]", "less than or equal to 1000"),
        (element(type="obj", bbox=[0, 0, 4], desc="a"), "bbox", "at least 4"),
        (element(type="obj", text="HI", desc="a"), "text", "no such key"),
        (element(type="text", desc="a"), "text", "required"),
        (element(type="blob", desc="a"), "elements[0]", "'obj', 'text'"),
        (element(type="obj", desc="a", color_palette=["#ffffff"]), "color_palette[0]", "#[0-9A-F]"),
        (element(type="obj", desc="a", color_palette=["#FFFFFF"] * 6), "color_palette", "at most 5"),
        (
            json.dumps({"style_description": PHOTO | {"art_style": "x"}, **json.loads(caption())}),
            "art_style",
            "exactly",
        ),
        (json.dumps({"style_description": {"lighting": "x"}, **json.loads(caption())}), "style_description", "exactly"),
    ],
)
def test_a_broken_rule_is_named_with_its_place(text: str, place: str, rule: str) -> None:
    message = refusal(text)
    assert place in message and rule in message, message
