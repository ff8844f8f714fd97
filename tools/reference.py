"""Reference tables of the pages: commands, flags, environment variables, endpoints and errors, from their definitions.

Nothing is described twice: a flag's sentence is its `help`, an endpoint's and an error's its docstring. Left out:
prose around them, which stands in the pages.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer.main

from ideogram_app import errors
from ideogram_app.catalog.sources import find_source
from ideogram_app.cli.app import app as command_line
from ideogram_app.cli.serve import page
from ideogram_app.comparison.history import Comparison
from ideogram_app.files import project_folder
from ideogram_app.hub.access import CASES, TOKENS_PAGE
from ideogram_app.interop.quant_config import PRECISIONS
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.oom import HAPPENED, HELPS
from ideogram_app.planning.planner import Plan, Predicted
from ideogram_app.records import Request, Result, Seconds
from ideogram_app.ui import api
from tools.tables import table


def commands() -> dict[str, Any]:
    """Every command of `python -m ideogram_app` by its name, as typer's parser knows it."""
    found: dict[str, Any] = typer.main.get_command(command_line).commands  # type: ignore[attr-defined]
    return found


def page_flags() -> list[Any]:
    """Every flag of the page, `--help` apart."""
    return [flag for flag in typer.main.get_command(page).params if flag.name != "help"]


def page_variable(flag: Any) -> str:
    """The environment variable that stands for a flag of the page: the first, where there are two."""
    variable: str = flag.envvar if isinstance(flag.envvar, str) else flag.envvar[0]
    return variable


def endpoints() -> list[ast.FunctionDef]:
    """The public endpoints of the page, as they are written in ui/api.py."""
    tree = ast.parse(inspect.getsource(api))
    outer = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "add_endpoints")
    return [node for node in outer.body if isinstance(node, ast.FunctionDef)]


def error_kinds() -> list[type[errors.AppError]]:
    """The family of errors, its head first."""
    return [errors.AppError, *errors.AppError.__subclasses__()]


def command_tables() -> str:
    """A section for each command: what it does, its arguments and flags."""
    return "\n\n".join(_command(name, command) for name, command in commands().items())


def page_flag_table() -> str:
    """The flags of the page, which `python launch.py` hands on."""
    rows = []
    for flag in page_flags():
        value = "" if flag.is_flag else f" {flag.metavar or _word(flag.opts[0])}"
        default = "off" if flag.is_flag else _default(flag.default)
        rows.append([f"`{flag.opts[0]}{value}`", f"`{page_variable(flag)}`", default, _cell(flag.help)])
    return table(["flag", "environment variable", "default", "what it does"], rows)


def endpoint_table() -> str:
    """Name, arguments and meaning of every public endpoint."""
    rows = [
        [
            f"`/{endpoint.name}`",
            ", ".join(f"`{text}`" for text in _arguments(endpoint)) or "none",
            _cell(ast.get_docstring(endpoint)),
        ]
        for endpoint in endpoints()
    ]
    return table(["endpoint", "arguments", "what it answers"], rows)


def error_table() -> str:
    """Every kind of error with its meaning."""
    return table(
        ["kind", "what it means"],
        [[f"`{kind.__name__}`", _cell((kind.__doc__ or "").split("\n\n")[0])] for kind in error_kinds()],
    )


def out_of_memory_table() -> str:
    """The four memories that can run out, and what helps."""
    return table(
        ["what ran out", "the sentence", "what helps"],
        [[f"`{kind}`", f"{sentence}.", _cell(HELPS[kind])] for kind, sentence in HAPPENED.items()],
    )


def gate_table() -> str:
    """Every way to be turned away by the Hub, and what to do."""
    source = find_source("ideogram-4")
    places = {
        "repository": source.repository,
        "licence": source.licence,
        "revision": source.revision,
        "tokens": TOKENS_PAGE,
        "url": source.url,
    }
    rows = [[f"`{row.state}`", _sentence(row.what, places), _sentence(row.do, places)] for row in CASES.values()]
    return table(["state", "what happened", "what to do"], rows)


def wire_table() -> str:
    """What the endpoints, `--json` and saved comparisons hold: every object with its fields."""
    objects = (Hardware, Plan, Predicted, Request, Result, Seconds, Comparison)
    rows = [[kind.__name__, ", ".join(f"`{field.name}`" for field in fields(kind))] for kind in objects]
    return table(["object", "fields"], rows)


def precision_table() -> str:
    """What stock diffusers can quantize while it loads, by the rows of recipe_api."""
    rows = [
        [f"`{name}`", row.backend, f"`{row.method}`" if row.method else "NF4", row.needs or "nothing further"]
        for name, row in PRECISIONS.items()
    ]
    return table(["precision", "package", "configuration", "needs"], rows)


def _command(name: str, command: Any) -> str:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_flag = getattr(parameter, "is_flag", False)
        is_option = parameter.param_type_name == "option"
        names = ", ".join(parameter.opts) if is_option else parameter.name.upper()
        value = f" {_word(parameter.opts[0])}" if is_option and not is_flag else ""
        default = "required" if parameter.required else "off" if is_flag else _default(parameter.default)
        variable = f"`{parameter.envvar}`" if parameter.envvar else "–"
        rows.append([f"`{names}{value}`", variable, default, _cell(parameter.help)])
    header = ["flag", "environment variable", "default", "what it does"]
    return f"### {name}\n\n{_cell(command.help)}\n\n{table(header, rows)}"


def _arguments(endpoint: ast.FunctionDef) -> Iterator[str]:
    """`name: type = default` of every argument."""
    given = endpoint.args.args
    defaults = [None] * (len(given) - len(endpoint.args.defaults)) + list(endpoint.args.defaults)
    for argument, default in zip(given, defaults, strict=True):
        kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        yield f"{argument.arg}{kind}{f' = {ast.unparse(default)}' if default else ''}".replace("|", "or")


def _word(option: str) -> str:
    """What stands for the value of a flag: the last word of its name."""
    return option.split("-")[-1].upper()


def _default(value: Any) -> str:
    """A default for people; a folder of the project by its name alone."""
    if isinstance(value, Path):
        inside = value.is_relative_to(project_folder())
        return f"`{value.relative_to(project_folder()).as_posix() if inside else value}`"
    shown = f"{value:g}" if isinstance(value, float) else value
    return "none" if value in (None, "") else f"`{shown}`"


def _cell(text: str | None) -> str:
    """One line, safe inside a table."""
    return " ".join((text or "").split()).replace("|", "\\|") or "–"


def _sentence(text: str, places: dict[str, str]) -> str:
    filled = text.format(**places)
    return _cell(f"{filled[:1].upper()}{filled[1:]}.")
