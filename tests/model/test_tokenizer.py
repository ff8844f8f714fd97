"""Token ids are those of transformers' tokenizer, whose files are read without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.errors import CheckpointError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.model.text_encoder.features import tokenize
from ideogram_app.model.text_encoder.tokenizer import SETTINGS, TEMPLATE, VOCABULARY, CaptionTokenizer

CAPTIONS = (
    wrap_plain("a red circle"),
    "",
    "plain text,  two blanks\nand a line break\t.",
    "“quoted” – 日本, naïve café, 👩‍🎨, e\u0301",  # an accent of its own, which NFC joins to its letter
    "a <|im_end|> in the middle <|im_start|>",
    "{{ 7 * 7 }} {% if true %}",  # no template's code, only text
    "Q" * 200,
)
# What templates of this family use: a namespace, loops that end early, whitespace control, a filter, a check.
RICH = """
{%- set seen = namespace(users=0) -%}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type != 'text' %}{{ raise_exception('no pictures') }}{% endif %}
            {{- part.text | tojson }}
            {%- if loop.index == 3 %}{% break %}{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
{{ seen.users }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(local_folder("miniature") / "tokenizer", tmp_path / "tokenizer"))


@pytest.mark.parametrize("caption", CAPTIONS, ids=range(len(CAPTIONS)))
def test_ids_are_those_of_transformers(caption: str, folder: Path) -> None:
    stock = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert torch.equal(tokenize(CaptionTokenizer(folder), caption), tokenize(stock, caption))


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("contents", [["one & <two>"], ["a", "ü", '"', "left out"]], ids=["one part", "four parts"])
def test_a_template_is_filled_as_transformers_fills_it(asks: bool, contents: list[str], folder: Path) -> None:
    (folder / TEMPLATE).write_text(RICH, encoding="utf-8")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": text} for text in contents]},
    ]
    stock = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = stock.apply_chat_template(turns, add_generation_prompt=asks, tokenize=False)
    assert CaptionTokenizer(folder).apply_chat_template(turns, add_generation_prompt=asks) == expected


def test_a_template_in_the_settings_is_found(folder: Path) -> None:
    expected = tokenize(CaptionTokenizer(folder), CAPTIONS[0])
    template = (folder / TEMPLATE).read_text(encoding="utf-8")
    (folder / TEMPLATE).unlink()
    (folder / SETTINGS).write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    assert torch.equal(tokenize(CaptionTokenizer(folder), CAPTIONS[0]), expected)


def test_limits_and_padding_that_a_file_asks_for_do_not_apply(folder: Path) -> None:
    expected = tokenize(CaptionTokenizer(folder), CAPTIONS[0])
    settings = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / VOCABULARY).write_text(json.dumps(settings), encoding="utf-8")
    assert torch.equal(tokenize(CaptionTokenizer(folder), CAPTIONS[0]), expected)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_fails_or_reaches_out_is_refused(template: str, folder: Path) -> None:
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"The chat template in .* fails"):
        tokenize(CaptionTokenizer(folder), "a red circle")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (VOCABULARY, "{", VOCABULARY),
        (TEMPLATE, "{% for %}", "chat template in .* cannot be read"),
        (SETTINGS, "{", SETTINGS),
        (SETTINGS, "[]", SETTINGS),
        (SETTINGS, "{}", "holds no chat template"),
    ],
)
def test_a_damaged_file_is_named(file: str, text: str, message: str, folder: Path) -> None:
    if file == SETTINGS:
        (folder / TEMPLATE).unlink()
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        CaptionTokenizer(folder)
