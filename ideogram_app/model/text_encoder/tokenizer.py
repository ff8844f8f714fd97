"""Tokenizer of captions: chat template and token ids, from the files of a tokenizer folder.

    tokenizer.json           the vocabulary and how text is split, as the tokenizers package reads it
    chat_template.jinja      what stands around a user's turn; older folders have it in tokenizer_config.json

transformers' `AutoTokenizer` reads the same files into the same two things, and imports the Hub's client, HTTP and its
table of models before it does. Its two methods that features.py uses have their names and arguments here. Left out:
everything else that it can; a folder without tokenizer.json, which only it can read, is left to it (components.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.errors import CheckpointError

VOCABULARY, TEMPLATE, SETTINGS = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"


class CaptionTokenizer:
    """A tokenizer folder that has a tokenizer.json.

    Raises:
        CheckpointError: a file is missing or damaged; the message names the folder.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self._folder, self._template = folder, _compiled(_template(folder), folder)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / VOCABULARY))
        except Exception as problem:  # tokenizers raises nothing narrower
            raise CheckpointError(f"{folder / VOCABULARY} cannot be read", got=str(problem)) from problem
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, tokenize: bool = False
    ) -> str:
        """The text of a conversation, with the marks of its turns.

        Raises:
            CheckpointError: the template fails, or asks for what it must not have.
        """
        from jinja2 import TemplateError

        assert not tokenize
        try:
            return str(self._template.render(messages=conversation, add_generation_prompt=add_generation_prompt))
        except TemplateError as problem:
            raise CheckpointError(f"The chat template in {self._folder} fails", got=str(problem)) from problem

    def __call__(self, text: str, return_tensors: str = "pt", add_special_tokens: bool = True) -> dict[str, Tensor]:
        """`input_ids`, (1, n)."""
        assert return_tensors == "pt"
        return {"input_ids": torch.tensor([self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids])}


def _template(folder: Path) -> str:
    path, settings = folder / TEMPLATE, folder / SETTINGS
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as problem:
        raise CheckpointError(f"{settings} cannot be read", expected="JSON", got=str(problem)) from problem
    if not isinstance(template, str):
        raise CheckpointError(f"{folder} holds no chat template", expected=f"{TEMPLATE}, or one in {SETTINGS}")
    return template


def _compiled(template: str, folder: Path) -> Any:
    """The template, ready to be filled.

    It is a program that came with the weights, so it gets a sandbox and nothing else. Blanks around its statements
    count as transformers has them count; extension, filter and function are those that it offers to templates.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise TemplateError(message)

    extensions = ["jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes it for HTML
    sandbox.globals["raise_exception"] = fail
    try:
        return sandbox.from_string(template)
    except TemplateError as problem:
        raise CheckpointError(f"The chat template in {folder} cannot be read", got=str(problem)) from problem
