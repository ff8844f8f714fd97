"""A plan by the name of a model, and the planned request of a picture of the miniature, as most tests want them."""

from __future__ import annotations

from typing import Any

from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning import planner
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planned_request import PlannedRequest, plan_request
from ideogram_app.planning.planner import Plan
from ideogram_app.records import Request


def plan(hardware: Hardware, model: str, **others: Any) -> Plan:
    """The plan for a model's default size, with any of the other inputs named."""
    return planner.plan(PlanInputs.of(hardware, model, **others))


def planned(request: Request, hardware: Hardware) -> PlannedRequest:
    """As the worker plans it, of a model that ships with the program."""
    from ideogram_app.generation.encode_prompt import caption_tokens
    from ideogram_app.model.components import find_components

    tokens = caption_tokens(find_components(request.model), request.caption)
    return plan_request(request, PlanInputs.of_request(request, hardware), tokens)
