"""Assumed errors: how far a plan's numbers may be off before this machine has shown its own, with their sources.

    step_range(inputs, candidate)      round the seconds of a step
    picture(inputs, candidate)         seconds of a picture, and the range round them
    memory_range(inputs, ...)          round a peak of memory

Wide where a number rests on a published rate, narrow where pictures were drawn here, wider again for a picture of
another size than those. Factors of independent causes are multiplied, which errs on the wide side. What a range is
made of, and how this machine's own errors take the place of these: planning/intervals.py.

Left out: downloads (planning/downloads.py), and decisions: no placement and no choice of a recipe reads a range.
"""

from __future__ import annotations

import math
import statistics

from ideogram_app.machine.capabilities import arithmetic
from ideogram_app.machine.gpu_specs import DISK_BYTES_PER_SECOND
from ideogram_app.planning.activations import MAX_TEXT_TOKENS
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.intervals import DEVICE, HOST, PICTURE, STEP, Factors, interval, scores_of
from ideogram_app.planning.placement import Candidate, resident_seconds
from ideogram_app.planning.step_time import TYPICAL_TEXT_TOKENS, step_work
from ideogram_app.records import Interval

# (basis, whether products run on INT8 units) -> of the seconds of a step. INT8 counts with 26 % of the peak, which a
# 3090 reached; 80 % was reported from a 5090, and an H100 took 207 ms where 374 were expected from its data sheet, and
# 0.29 times what its own measured peaks would give. Dense products: 0.8 to 1.05 times on that H100. Nobody published
# a time twice as long; a card that is throttled or shared gives one.
OF_STEP: dict[tuple[str, bool], Factors] = {
    ("published", True): (1 / 3, 2.0),
    ("published", False): (1 / 1.5, 2.0),
    ("measured", True): (1 / 4, 1.5),
    ("measured", False): (1 / 1.5, 1.5),
    # Of five equal rounds of the miniature on a processor: spreads of 4 to 27 %; of two on an H100 0.5 to 5 %.
    ("drawn", True): (1 / 1.25, 1.25),
    ("drawn", False): (1 / 1.25, 1.25),
}
OF_LAPTOP: Factors = (0.6, 1.0)  # counted at the low end of clocks; most are faster, by up to two thirds (gpu_specs.py)
CAPTION_TOKENS = (50, 1000)  # of a caption that is not known yet, which is timed as `TYPICAL_TEXT_TOKENS`
# Copies: PCIe 4 x16 in a slot of half the lanes, or a generation more; a disk of 0.5 GB/s (SATA) to 7 (NVMe, PCIe 4).
OF_LINK: Factors = (0.5, 2.0)
OF_MEASURED_COPIES: Factors = (1 / 1.2, 1.2)
OF_DISK: Factors = (DISK_BYTES_PER_SECOND / 7e9, DISK_BYTES_PER_SECOND / 0.5e9)
# What caption, first step and decoding take beside the steps, in steps. Computed for 1024 x 1024 pixels: 5 Tflop of
# the encoder and 2.5 of the decoder are 0.05 of a step of 170, at a tenth of its efficiency half a step; the first
# step warms up. No picture of the published model has been timed whole.
BESIDE_STEPS, BESIDE_STEPS_RANGE = 1.0, (0.2, 5.0)
# Once pictures were drawn: their median, and this much of it either way (a caption may be new or remembered).
OF_BESIDE: Factors = (0.4, 1.6)
# Of counted bytes. An H100 allocated 0.9 to 4 % less than was predicted, and half of it for the miniature, whose
# kernels' workspaces are small.
OF_DEVICE_MEMORY: Factors = (0.92, 1.03)
OF_SMALL_DEVICE_MEMORY: Factors = (0.4, 1.05)
# Of RAM: on a processor the prediction was above every measured peak (peaks.py), by four fifths of it in a process that
# had drawn before and used again what it still held; beside a device nobody has measured it.
OF_RAM: Factors = (0.2, 1.1)
OF_RAM_BESIDE_DEVICE: Factors = (0.5, 1.25)


def step_range(inputs: PlanInputs, candidate: Candidate) -> Interval | None:
    """The range round the seconds of a step; None where no time is known."""
    if not candidate.seconds:
        return None
    basis = _basis(inputs, candidate)
    return interval(STEP, candidate.seconds, _of_step(inputs, candidate, basis), basis, _scores(inputs, STEP, basis))


def picture(inputs: PlanInputs, candidate: Candidate) -> tuple[float, Interval] | tuple[None, None]:
    """Seconds of a picture with its weights loaded, and the range round them; None where no time is known."""
    if not candidate.seconds:
        return None, None
    basis, seen = _basis(inputs, candidate), inputs.known.beside.get(inputs.model.name) if inputs.known else None
    beside = statistics.median(seen) if seen else BESIDE_STEPS
    fewest, most = (beside * OF_BESIDE[0], beside * OF_BESIDE[1]) if seen else BESIDE_STEPS_RANGE
    steps = inputs.steps + beside
    assumed = _times(
        _of_step(inputs, candidate, basis), ((inputs.steps + fewest) / steps, (inputs.steps + most) / steps)
    )
    seconds = candidate.seconds * steps
    return seconds, interval(PICTURE, seconds, assumed, basis, _scores(inputs, PICTURE, basis))


def memory_range(inputs: PlanInputs, expected: int, on_device: bool) -> Interval | None:
    """The range round a peak of memory, of a device or of RAM; None where there is none."""
    if not expected:
        return None
    if on_device:
        assumed = OF_DEVICE_MEMORY if inputs.published else OF_SMALL_DEVICE_MEMORY
    else:
        assumed = OF_RAM if inputs.hardware.kind == "cpu" else OF_RAM_BESIDE_DEVICE
    quantity = DEVICE if on_device else HOST
    return interval(quantity, expected, assumed, "counted", _scores(inputs, quantity, "counted"))


def _basis(inputs: PlanInputs, candidate: Candidate) -> str:
    """What the seconds of a step rest on."""
    known, how = inputs.known, arithmetic(inputs.hardware, candidate.recipe)[0]
    if known and known.share(inputs.model.name, how):
        return "drawn"
    return "measured" if known and known.measured and known.measured.tflops_16bit else "published"


def _of_step(inputs: PlanInputs, candidate: Candidate, basis: str) -> Factors:
    how = arithmetic(inputs.hardware, candidate.recipe)[0]
    laptop = basis == "published" and " laptop " in f"{inputs.hardware.name} ".lower()
    return _times(
        OF_STEP[basis, how.endswith("a8")],
        OF_LAPTOP if laptop else (1.0, 1.0),
        _of_caption(inputs),
        _of_size(inputs, how) if basis == "drawn" else (1.0, 1.0),
        _of_copies(inputs, candidate),
    )


def _of_caption(inputs: PlanInputs) -> Factors:
    """Of a caption that is not known yet: from a short one to a long one."""
    if inputs.text_tokens != MAX_TEXT_TOKENS:
        return 1.0, 1.0
    short, typical, long = (
        step_work(inputs.model, inputs.size, tokens)
        for tokens in (CAPTION_TOKENS[0], TYPICAL_TEXT_TOKENS, CAPTION_TOKENS[1])
    )
    return short / typical, long / typical


def _of_size(inputs: PlanInputs, how: str) -> Factors:
    """Of a picture unlike those drawn: its time lies between theirs, as where every step is launches, and in proportion
    to its work, which is what is expected."""
    drawn = inputs.known.typical_works(inputs.model.name, how) if inputs.known else ()
    if not drawn:
        return 1.0, 1.0
    tokens = TYPICAL_TEXT_TOKENS if inputs.text_tokens == MAX_TEXT_TOKENS else inputs.text_tokens
    work = step_work(inputs.model, inputs.size, tokens)
    return min(1.0, min(drawn) / work), max(1.0, max(drawn) / work)


def _of_copies(inputs: PlanInputs, candidate: Candidate) -> Factors:
    """Of streamed blocks: a slower link is waited for, a faster one saves no more than is waited for now."""
    computing, seconds = resident_seconds(inputs, candidate), candidate.seconds
    if not sum(candidate.streamed_blocks) or not computing or not seconds:
        return 1.0, 1.0
    measured = inputs.known.measured if inputs.known else None
    known = measured and (measured.disk if candidate.residency == "disk" else measured.link)
    fast, slow = OF_MEASURED_COPIES if known else OF_DISK if candidate.residency == "disk" else OF_LINK
    return min(1.0, max(fast, computing / seconds)), max(1.0, slow * candidate.copying / seconds)


def _times(*causes: Factors) -> Factors:
    return math.prod(low for low, _ in causes), math.prod(high for _, high in causes)


def _scores(inputs: PlanInputs, quantity: str, basis: str) -> tuple[float, ...]:
    return scores_of(inputs.known.outcomes, quantity, basis, inputs.model.name) if inputs.known else ()
