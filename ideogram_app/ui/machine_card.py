"""Machine card: the hardware, the plan for the chosen model, and *Why?*: every reason and every rejected recipe.

Numbers that are expected stand with their 90 % interval; those of a result stand beside what came of it
(ui/results.py). Left out: live meters of memory and load; the numbers are those the plan was made from.
"""

from __future__ import annotations

from collections.abc import Callable

from ideogram_app.catalog.models import find_model
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.intervals import PICTURE, held
from ideogram_app.planning.planner import Plan, Rejected
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import Interval
from ideogram_app.studio.state import State
from ideogram_app.text import between, duration, remaining, size
from ideogram_app.ui.words import RESIDENCY_WORDS, esc, facts, recipe_title

KINDS = {"cuda": "NVIDIA GPU", "rocm": "AMD GPU", "mps": "Apple GPU", "xpu": "Intel GPU", "cpu": "Processor, no GPU"}


def machine_card(state: State, model: str) -> str:
    """The card; while the machine is not known it says so."""
    if state.machine is None:
        text = state.machine_error or "Looking at the machine …"
        role = "alert" if state.machine_error else "status"
        return f'<section class="card machine" aria-label="This machine"><p role="{role}">{esc(text)}</p></section>'
    return (
        '<section class="card machine" aria-label="This machine and the plan">'
        f"{_machine(state.machine.hardware)}{_plan(state.machine.plans[model], _outcome(state.machine.known, model))}"
        "</section>"
    )


def _machine(hardware: Hardware) -> str:
    disk = hardware.disk_free_bytes
    rows = (
        ("Device memory", _free_of(hardware.device_free_bytes, hardware.device_memory_bytes)),
        ("RAM", _free_of(hardware.host_free_bytes, hardware.host_memory_bytes)),
        ("Disk", f"{size(disk)} free" if disk is not None else ""),
        ("PyTorch", hardware.torch),
        ("Self-check", hardware.self_check),
    )
    problem = f'<p class="note warn">{esc(hardware.problem)}</p>' if hardware.problem else ""
    return (
        f'<div><p class="eyebrow">This machine</p><h2>{esc(hardware.name)}</h2>'
        f'<p class="quiet">{esc(_kind(hardware))}</p>{facts(row for row in rows if row[1])}{problem}</div>'
    )


def _kind(hardware: Hardware) -> str:
    parts = [KINDS.get(hardware.kind, hardware.kind)]
    if hardware.architecture:
        parts.append(hardware.architecture)
    if hardware.kind == "cuda" and hardware.compute_capability:
        parts.append("compute capability {}.{}".format(*hardware.compute_capability))
    if hardware.device_count > 1:
        parts.append(f"{hardware.device_count} devices")
    if hardware.kind == "cpu" and hardware.cpu_cores:
        parts.append(f"{hardware.cpu_cores} cores")
    return " · ".join(parts)


def _free_of(free: int | None, total: int | None) -> str:
    if not total:
        return ""
    return f"{size(free)} free of {size(total)}" if free is not None else size(total)


def _plan(plan: Plan, outcome: list[tuple[str, str]]) -> str:
    title = find_model(plan.model).title
    if not plan.fits or plan.recipe is None:
        advice = f'<p class="note warn">{esc(plan.suggestion)}</p>' if plan.suggestion else ""
        smallest = plan.predicted  # what the smallest recipe would take, to compare with a machine one has in mind
        needs = [("Weights at least", size(smallest.weight_bytes)), ("Download", size(smallest.download_bytes))]
        return (
            f'<div><p class="eyebrow">Plan for {esc(title)}</p><h2 class="no">Cannot run here</h2>'
            f'<p class="quiet">{esc(plan.reasons[0] if plan.reasons else "")}</p>'
            f"{facts(needs)}{advice}{_why(plan)}</div>"
        )
    home = RESIDENCY_WORDS.get(plan.residency or "", "")
    words = (home, plan.compute_dtype, plan.arithmetic, f"on {plan.device}")
    chips = "".join(f'<span class="chip">{esc(word)}</span>' for word in words if word)
    advice = f'<p class="note">{esc(plan.suggestion)}</p>' if plan.suggestion else ""
    return (
        f'<div><p class="eyebrow">Plan for {esc(title)}</p>'
        f"<h2>{esc(recipe_title(plan.recipe))} {chips}</h2>{facts(_expected(plan) + outcome)}{advice}{_why(plan)}</div>"
    )


def _expected(plan: Plan) -> list[tuple[str, str]]:
    """What the plan expects, each number with its 90 % interval."""
    predicted = plan.predicted
    rows = [
        ("Weights", size(predicted.weight_bytes)),
        ("Peak device memory", _within(predicted.peak_device_bytes, predicted.peak_device_bytes_range, size)),
        ("Peak RAM", _within(predicted.peak_host_bytes, predicted.peak_host_bytes_range, size)),
        ("Download", size(predicted.download_bytes) if predicted.download_bytes else ""),
        ("Disk", size(predicted.disk_bytes)),
        ("Expected, a step", _within(predicted.seconds_per_step, predicted.seconds_per_step_range, duration)),
        ("Expected, a picture", _within(predicted.seconds_per_picture, predicted.seconds_per_picture_range, duration)),
        ("Expected, the download", _within(predicted.download_seconds, predicted.download_seconds_range, remaining)),
    ]
    return [(name, value) for name, value in rows if value]


def _outcome(known: MachineProfile | None, model: str) -> list[tuple[str, str]]:
    """What came of earlier plans on this machine: the last picture of this model, and how many numbers of all pictures
    lay within their ranges."""
    outcomes = known.outcomes if known else ()
    last = next((row for row in reversed(outcomes) if (row.quantity, row.model) == (PICTURE, model)), None)
    counts, rows = held(outcomes).values(), []
    if last:
        said = f"{duration(last.expected)} ({between(last.low, last.high, duration)}) expected"
        rows.append(("Last picture", f"{duration(last.measured)}, {said}"))
    if counts:
        inside, of = sum(row.held for row in counts), sum(row.of for row in counts)
        rows.append(("Ranges held here", f"{inside} of the last {of}"))
    return rows


def _within(expected: float | None, within: Interval | None, shown: Callable[[float], str]) -> str:
    """An expected number with its 90 % interval; "" where nobody knows it."""
    if not expected:
        return ""
    return f"{shown(expected)} ({between(within.low, within.high, shown)})" if within else shown(expected)


def _why(plan: Plan) -> str:
    """Every decision with its numbers."""
    reasons = "".join(f"<li>{esc(reason)}</li>" for reason in plan.reasons)
    rejected = "".join(
        f"<li><strong>{esc(_title(row))}:</strong> {esc(row.reason)}</li>"
        for row in plan.rejected
        if row.reason not in plan.reasons
    )
    others = f'<p class="eyebrow">Not taken</p><ul>{rejected}</ul>' if rejected else ""
    return f'<details class="why"><summary>Why?</summary><ul>{reasons}</ul>{others}</details>'


def _title(row: Rejected) -> str:
    """The recipe, and where its weights would have stayed."""
    home = RESIDENCY_WORDS.get(row.residency or "", "")
    return f"{recipe_title(row.recipe)}, {home}" if home else recipe_title(row.recipe)
