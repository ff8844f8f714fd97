"""Fallbacks when memory ran out, as buttons; and what a picture gave up that was drawn with less.

Left out: deciding what helps, which is planning/fallbacks.py; and trying it unasked, which is the request's `adapt`.
"""

from __future__ import annotations

from ideogram_app.errors import RequestError
from ideogram_app.planning.fallbacks import apply_fallback
from ideogram_app.records import Fallback, Request, Result
from ideogram_app.ui.words import RESIDENCY_WORDS, act, esc, recipe_title


def offers(result: Result) -> str:
    """One button a fallback, with what it costs; nothing where nothing is offered."""
    if not result.offers:
        return ""
    title = recipe_title(result.recipe)
    items = "".join(_offer(fallback, f"{result.recipe}:{index}", title) for index, fallback in enumerate(result.offers))
    return (
        f'<div class="offers"><p class="quiet">Prompt and seed are kept. Draw it again with less:</p>'
        f'<ul aria-label="Ways to draw {esc(title)} with less memory">{items}</ul></div>'
    )


def _offer(fallback: Fallback, name: str, title: str) -> str:
    same = ' <span class="chip ok">same picture</span>' if fallback.same_picture else ""
    spoken = f"Draw {title} again: {fallback.title}{', the same picture' if fallback.same_picture else ''}"
    return f'<li>{act("offer", name, fallback.title, spoken)}{same}<p class="quiet">{esc(fallback.reason)}</p></li>'


def offered(request: Request, results: tuple[Result, ...], name: str) -> Request:
    """The request that a button stands for; RequestError where the tab has no such offer any more."""
    recipe, _, index = name.rpartition(":")
    found = next((result.offers for result in results if result.recipe == recipe), ())
    if not index.isdigit() or int(index) >= len(found):
        raise RequestError("This is no longer on offer", do="Press Generate, or choose another of the ways shown")
    return apply_fallback(request, recipe, found[int(index)])


def gave_up(result: Result, request: Request) -> str:
    """What was asked for beside what ran, where they differ, with the reasons; else nothing."""
    asked = _as_drawn(result.recipe, result.planned_residency, request.width, request.height)
    ran = _as_drawn(result.engaged, result.residency, result.width, result.height)
    moved = bool(result.planned_residency) and result.planned_residency != result.residency
    resized = (request.width, request.height) != (result.width, result.height)
    if not (result.given_up or moved or resized or result.engaged != result.recipe):
        return ""
    shown = 3 if resized else 2  # the size is named where it differs
    return (
        f'<div class="ran"><p><span>asked: {esc(", ".join(filter(None, asked[:shown])))}</span> · '
        f"<span>ran: {esc(', '.join(filter(None, ran[:shown])))}</span></p>{tried(result)}</div>"
    )


def tried(result: Result) -> str:
    """What was done with less on the way, a sentence each."""
    if not result.given_up:
        return ""
    sentences = "".join(f"<li>{esc(sentence)}</li>" for sentence in result.given_up)
    return f'<details class="why"><summary>Why?</summary><ul>{sentences}</ul></details>'


def _as_drawn(recipe: str, residency: str, width: int, height: int) -> tuple[str, str, str]:
    return recipe_title(recipe), RESIDENCY_WORDS.get(residency, residency), f"{width} × {height}"
