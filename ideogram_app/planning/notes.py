"""Notes of a plan: what it says beside the decision, one table of rules, each a reason or nothing, in reading order.

The text encoder and the decoder, the peak, what was asked for, what is known of the machine, how matrices are
multiplied. A rule decides whether there is something to say; catalog/reasons.py says it.

Left out: the decision itself and what was rejected (planning/placement.py, planning/policy.py).
"""

from __future__ import annotations

from collections.abc import Callable

from ideogram_app.catalog.reasons import MEASURED_RATES, NOTHING, Reason, measured_list, reason
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.machine.capabilities import SMALL_GAIN, arithmetic, int8_units, product_note
from ideogram_app.planning.activations import MAX_TEXT_TOKENS
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.peaks import decoder_note, encoder_note, peak_note
from ideogram_app.planning.placement import Candidate, place
from ideogram_app.planning.policy import PREFERRED_RECIPES


def notes(inputs: PlanInputs, candidate: Candidate) -> tuple[Reason, ...]:
    """Everything that there is to say of the candidate that was chosen, whether it fits or not."""
    said = (note(inputs, candidate) for applies, note in NOTE_RULES if applies(inputs, candidate))
    return tuple(each for each in said if each)


def _reserve(inputs: PlanInputs, candidate: Candidate) -> Reason:
    return reason("reserve", reserve=inputs.reserve_bytes) if inputs.reserve_bytes else NOTHING


def _limit(inputs: PlanInputs, candidate: Candidate) -> Reason:
    return NOTHING if inputs.limit_bytes is None else reason("limit", limit=inputs.limit_bytes)


def _kept_within(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """The limit of the device that computes first, where torch is given one."""
    used = {row.device for row in candidate.assignments}
    return next((limit.reason for limit in inputs.memory_limits if limit.device in used), NOTHING)


def _caption(inputs: PlanInputs, candidate: Candidate) -> Reason:
    longest = inputs.text_tokens == MAX_TEXT_TOKENS
    return NOTHING if longest else reason("caption", tokens=inputs.text_tokens, longest=MAX_TEXT_TOKENS)


def _measured(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """The rates of this machine that are counted with."""
    measured = inputs.known.measured if inputs.known else None
    if measured is None:
        return NOTHING
    rates = {
        "tflops_float32" if inputs.dtype == "float32" else "tflops_16bit": measured.tflops_16bit,
        "tops_int8": measured.tops_int8,
        "link": measured.link / 1e9 if measured.link else None,
        "disk": measured.disk / 1e9 if measured.disk else None,
    }
    said = measured_list(MEASURED_RATES, rates)
    return reason("measured", rates=said, **rates) if said else NOTHING


def _learned(inputs: PlanInputs, candidate: Candidate) -> Reason:
    how = arithmetic(inputs.hardware, candidate.recipe)[0]
    return reason("learned") if inputs.known and inputs.known.share(inputs.model.name, how) else NOTHING


def _laptop(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """What a time from the table is worth for a laptop part."""
    measured = inputs.known is not None and inputs.known.measured is not None
    named = " laptop " in f"{inputs.hardware.name} ".lower()
    return reason("laptop") if named and candidate.seconds is not None and not measured else NOTHING


def _asked_int8(inputs: PlanInputs, candidate: Candidate) -> Reason:
    units = int8_units(inputs.hardware) if candidate.recipe.quantizes_activations and inputs.published else NOTHING
    return reason("int8_asked", units=units) if units else NOTHING


def _reference(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """What to know where the reference itself would be resident."""
    if not inputs.published or candidate.recipe.name != PREFERRED_RECIPES[0] or candidate.residency != "resident":
        return NOTHING
    reference = place(inputs, find_recipe("reference"))
    if reference.residency != "resident":
        return NOTHING
    rates = inputs.rates()
    little = reason("int8_gains_little", times=rates.int8_gain) if rates and rates.int8_gain < SMALL_GAIN else NOTHING
    return reason("reference_fits", weights=reference.size.weights) + little


def _on_device(inputs: PlanInputs, candidate: Candidate) -> bool:
    return inputs.hardware.kind != "cpu"


def _fits_device(inputs: PlanInputs, candidate: Candidate) -> bool:
    return _on_device(inputs, candidate) and candidate.fits


def _fits_or_processor(inputs: PlanInputs, candidate: Candidate) -> bool:
    return not _on_device(inputs, candidate) or candidate.fits


# What is said after the decision, in this order: to whom, and what.
NOTE_RULES: tuple[tuple[Callable[[PlanInputs, Candidate], bool], Callable[[PlanInputs, Candidate], Reason]], ...] = (
    (_fits_device, encoder_note),
    (_fits_device, decoder_note),
    (_fits_device, peak_note),
    (_on_device, _reserve),
    (_on_device, _limit),
    (_fits_device, _kept_within),
    (_on_device, lambda inputs, candidate: inputs.not_paired),
    (_on_device, _caption),
    (_fits_or_processor, _measured),
    (_fits_or_processor, _learned),
    (_fits_device, _laptop),
    (_fits_device, _asked_int8),
    (_fits_device, lambda inputs, candidate: arithmetic(inputs.hardware, candidate.recipe)[1]),
    (_fits_device, lambda inputs, candidate: product_note(inputs.hardware, candidate.recipe)),
    (_fits_device, _reference),
)
