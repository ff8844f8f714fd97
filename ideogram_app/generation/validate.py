"""Validation of a request before anything is loaded: sizes, preset, guidance, recipes, speed-ups, seed."""

from __future__ import annotations

from ideogram_app.catalog.models import check_size, find_model
from ideogram_app.catalog.presets import find_preset, guidance_for
from ideogram_app.catalog.recipes import RECIPES, find_recipe
from ideogram_app.catalog.speedups import check_speedups
from ideogram_app.errors import RequestError
from ideogram_app.records import Request

SEED_LIMIT = 2**63  # torch generators take what fits a signed 64-bit number


def check_request(request: Request) -> None:
    """Refuse what cannot be drawn.

    Raises:
        RequestError: names the field, what it may be and what it was.
    """
    check_size(request.width, request.height)
    guidance_for(find_preset(request.preset), find_model(request.model), request.guidance)
    check_recipes(request.recipes)
    check_speedups(request.savings)
    if not 0 <= request.seed < SEED_LIMIT:
        raise RequestError("The seed cannot be used", expected="0 to 2^63 - 1", got=str(request.seed))


def check_recipes(recipes: tuple[str, ...]) -> None:
    """Refuse unknown recipes, the same one twice, and none at all."""
    for recipe in recipes:
        find_recipe(recipe)
    if not recipes or len(set(recipes)) < len(recipes):
        raise RequestError("Choose at least one precision, each once", expected=" or ".join(RECIPES))
