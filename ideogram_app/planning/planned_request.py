"""A planned request: one plan for each of its recipes, made in the worker and carried down to the picture.

    planned = plan_request(request, PlanInputs.of_request(request, hardware, ...), tokens)
    planned.plans["gguf-q4_k"]                  by which this recipe is loaded and drawn
    planned.encoding                            by which the text encoder is placed

Its caption has been turned into tokens before, so that memory and time are planned for its own length. A try that ran
out of memory has its plan replaced by the next one (generation/retry.py); nobody else plans again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ideogram_app.planning.fallbacks import ENCODER_MODES
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.records import Request


@dataclass(frozen=True)
class PlannedRequest:
    """A request and how each of its recipes is to be drawn.

    Attributes:
        tokens: of its caption, as the text encoder reads them.
        inputs: what the plans were computed from, but for the recipe.
        plans: recipe -> its plan, in the order of the request.
    """

    request: Request
    tokens: tuple[int, ...]
    inputs: PlanInputs
    plans: Mapping[str, Plan]

    def inputs_of(self, recipe: str) -> PlanInputs:
        """What the plan of one recipe was computed from."""
        # Disk is no question any more: loading refuses what was not prepared.
        return replace(self.inputs, recipe=recipe, ready=(recipe,))

    @property
    def encoding(self) -> Plan:
        """The plan that leaves the text encoder the least room: all recipes share its features, and it runs once."""
        fitting = [found for found in self.plans.values() if found.fits]
        return max(fitting or self.plans.values(), key=lambda found: ENCODER_MODES.index(found.encoder))


def plan_request(request: Request, inputs: PlanInputs, tokens: tuple[int, ...]) -> PlannedRequest:
    """One plan for each recipe of a request, on the machine of `inputs` as it is now; tokens: of its caption."""
    unplanned = PlannedRequest(request, tokens, replace(inputs, text_tokens=len(tokens)), {})
    return replace(unplanned, plans={name: plan(unplanned.inputs_of(name)) for name in request.recipes})
