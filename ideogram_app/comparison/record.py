"""One request, what the machine and the plan were, and what each recipe made of it.

The noun beside the verb in comparison/compare.py: it knows no torch, so the page, the command line and old files can
read it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.planner import Plan
from ideogram_app.records import Request, Result


@dataclass(frozen=True)
class Comparison:
    """Results stand in the order in which recipes were asked for, failed ones included."""

    request: Request
    hardware: Hardware
    plan: Plan
    results: tuple[Result, ...] = ()
