"""Which recipe, where its weights live, and why: `plan(inputs) -> Plan`, a pure function without torch.

The plan is made before a byte is fetched, from *free* memory, and every decision leaves a sentence with its numbers.
The inputs are `PlanInputs` (planning/inputs.py); planning/placement.py says where each recipe could live,
planning/policy.py which one to take, planning/peaks.py what the encoder and the decoder do around it; here the answers
become one `Plan`.

Left out: other recipes than those of the ladder unless asked for, more than two devices at work, the prompt enhancer.
ComfyUI decides while it runs what to push out; here the decision is made once and can be read, tested, and printed for
a machine that one does not own. Where it proves wrong a new plan is made with less (`limit_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.machine.capabilities import (
    SMALL_GAIN,
    USE_MINIATURE,
    arithmetic,
    build_note,
    compute_type,
    int8_units,
    obstacle,
    product_note,
    users_note,
)
from ideogram_app.planning.activations import MAX_TEXT_TOKENS
from ideogram_app.planning.footprint import Share, device_bytes, gb
from ideogram_app.planning.inputs import DeviceAssignment, PlanInputs, within
from ideogram_app.planning.option import Candidate, least_busy
from ideogram_app.planning.peaks import decode_tile, encoder_home, peak_note, peaks, phase_notes
from ideogram_app.planning.placement import place
from ideogram_app.planning.policy import PREFERRED_RECIPES, choose_candidate, comparison, reason_against
from ideogram_app.planning.step_time import step_flops

WHAT_HELPS = {
    "disk": "Free that much disk space, or put the weights on another disk.",
    "ram": "Close other programs to free RAM.",
    "device": "Close other programs that use the device, or draw a smaller picture.",
}


@dataclass(frozen=True)
class Predicted:
    """What a plan expects.

    Device bytes are those of the fuller device, where there are two; host bytes are above those of the idle process;
    weight bytes are of both transformers as they are held; disk bytes are the download and what is made from it.
    Seconds count what travels; None where nobody published a time for such a device and none was measured on it.
    `device` says where the peak of the device goes, `locked_host_bytes` how much of the host's cannot be swapped.
    """

    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    weight_bytes: int = 0
    download_bytes: int = 0
    disk_bytes: int = 0
    seconds_per_step: float | None = None
    device: Share | None = None
    locked_host_bytes: int = 0


@dataclass(frozen=True)
class Rejected:
    """A recipe that was considered, where it would have lived, and why it was not taken."""

    recipe: str
    residency: str | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """What to run, or why nothing can.

    Attributes:
        recipe: None where nothing fits; `requested_recipe` is what was asked for by name, if anything.
        residency: where the two transformers live: resident, streamed (from RAM, block by block) or disk.
        encoder: resident, staged (on the device only while it encodes) or streamed (layer by layer, while it encodes).
        suggestion: what would help; "" where nothing needs to.
        device: what torch calls the device that computes; `branch_devices` one for each transformer.
        decode: whole, or tiled where the picture is too large to decode at once; `decode_tile`: a tile's side in
            pixels.
        streamed_blocks: how many blocks of each transformer travel to its device in every step (travel.spread: which).
        slots: places that these blocks take in turn, on each device to which any travel.
        streamed_bytes: weights that travel to the device in every step.
        arithmetic: bits of weights and activations in a product: w8a8, w4a8, w4a16, ...
    """

    model: str
    recipe: str | None
    residency: str | None
    encoder: str
    compute_dtype: str
    fits: bool
    predicted: Predicted
    reasons: tuple[str, ...]
    rejected: tuple[Rejected, ...] = ()
    suggestion: str = ""
    device: str = "cpu"
    branch_devices: tuple[str, str] = ("cpu", "cpu")
    decode: str = "whole"
    decode_tile: int = 0
    streamed_bytes: int = 0
    streamed_blocks: tuple[int, int] = (0, 0)
    slots: int = 0
    width: int = 0
    height: int = 0
    requested_recipe: str | None = None
    arithmetic: str = ""


def plan(inputs: PlanInputs) -> Plan:
    """Decide.

    Raises:
        RequestError: there is no such recipe.
    """
    job, moved = _usable(inputs)
    asked, shape = job.recipe, job.model
    rows = [find_recipe(name).protecting() for name in ((asked,) if asked else PREFERRED_RECIPES)]
    blocked = obstacle(job.hardware, step_flops(shape, *job.size)) if shape.source_bytes else None
    if blocked:
        reason, suggestion = blocked
        options = tuple(Candidate(row, job.measure(row), reason=reason) for row in rows)
        return replace(_answer(job, options[-1], options, (reason,), asked), suggestion=suggestion)
    options = tuple(place(job, row) for row in rows)
    chosen, why = choose_candidate(job, options)
    about_machine = compute_type(job.hardware)[1], build_note(job.hardware), users_note(job.hardware)
    notes = (moved, *why, chosen.reason, *_notes(job, chosen), *about_machine)
    answer = _answer(job, chosen, options, tuple(note for note in notes if note), asked)
    return replace(answer, suggestion=_suggestion(job, chosen, options, asked))


def _usable(inputs: PlanInputs) -> tuple[PlanInputs, str]:
    """With the limit on RAM applied, and for the miniature on the processor where torch cannot use the device."""
    hardware = within(inputs.hardware, inputs.host_limit_bytes)
    moved = ""
    if not inputs.published and hardware.kind != "cpu" and hardware.torch_supports_device is False:
        moved = f"Runs on the processor: the installed PyTorch has no kernels for the {hardware.name}."
        hardware = replace(hardware, kind="cpu", compute_capability=None, architecture="")
    return replace(inputs, hardware=hardware), moved


def _notes(job: PlanInputs, option: Candidate) -> tuple[str, ...]:
    """Sentences about what surrounds the transformers, and about what was asked for or is known of the machine."""
    shown = _shown(job, option)
    if job.hardware.kind == "cpu":
        return shown
    limits = _limits(job)
    if not option.fits:
        return limits
    units = int8_units(job.hardware) if option.recipe.quantizes_activations and job.published else ""
    asked = f"INT8 was asked for by name, but {units}" if units else ""
    how = arithmetic(job.hardware, option.recipe)[1], product_note(job.hardware, option.recipe)
    peak = peak_note(peaks(job, option))
    return (
        *phase_notes(job, option),
        peak,
        *limits,
        *shown,
        _laptop(job, option),
        asked,
        *how,
        _plan_ignoring_disk(job, option),
    )


def _limits(job: PlanInputs) -> tuple[str, ...]:
    """What less than the free memory was planned with, and for how long a caption."""
    notes = []
    if job.reserve_bytes:
        notes.append(f"{gb(job.reserve_bytes)} of free device memory are left to other programs, as asked.")
    if job.limit_bytes is not None:
        notes.append(f"No more than {gb(job.limit_bytes)} of device memory are planned with, as asked.")
    if job.text_tokens != MAX_TEXT_TOKENS:
        notes.append(f"Planned for a caption of {job.text_tokens} tokens; the longest has {MAX_TEXT_TOKENS}.")
    return tuple(notes)


def _shown(job: PlanInputs, option: Candidate) -> tuple[str, ...]:
    """What was measured on this machine and is counted with."""
    if job.known is None:
        return ()
    notes, measured = [], job.known.measured
    if measured:
        rates = (
            (measured.tflops_16bit, 1, f"teraflops in {'16 bits' if job.hardware.kind != 'cpu' else job.dtype}"),
            (measured.tops_int8, 1, "INT8 teraops"),
            (measured.link, 1e9, "GB/s from RAM"),
            (measured.disk, 1e9, "GB/s from disk"),
        )
        told = ", ".join(f"{rate / unit:.3g} {what}" for rate, unit, what in rates if rate)
        notes.append(f"Measured on this machine, and counted with: {told}." if told else "")
    share = job.known.share(job.model.name, arithmetic(job.hardware, option.recipe)[0])
    if share:
        notes.append("The time of a step is predicted from that of earlier pictures on this machine.")
    return tuple(notes)


def _laptop(job: PlanInputs, option: Candidate) -> str:
    """What a time from the table is worth for a laptop part."""
    measured = job.known is not None and job.known.measured is not None
    if option.seconds is None or measured or " laptop " not in f"{job.hardware.name} ".lower():
        return ""
    return "Laptop parts of one name differ by their power limits; the time is that of the slowest of them."


def _plan_ignoring_disk(job: PlanInputs, option: Candidate) -> str:
    """What to know where the reference itself would be resident."""
    if not job.published or option.recipe.name != PREFERRED_RECIPES[0] or option.residency != "resident":
        return ""
    reference = place(job, find_recipe("reference"))
    if reference.residency != "resident":
        return ""
    note = f"The reference ({gb(reference.size.weights)}) would fit too: --recipe reference."
    rates = job.rates()
    if rates and rates.int8_gain < SMALL_GAIN:
        note += f" INT8 products are only {rates.int8_gain:.0f} times as fast as bfloat16 here: INT8 gains little time."
    return note


def _suggestion(job: PlanInputs, chosen: Candidate, options: tuple[Candidate, ...], asked: str | None) -> str:
    """What would help: another recipe, memory that others hold, or the miniature."""
    if not chosen.fits:
        if asked:
            fallback, _ = choose_candidate(job, tuple(place(job, find_recipe(name)) for name in PREFERRED_RECIPES))
            if fallback.fits:
                return f"Without a recipe asked for, {fallback.recipe.title} would be taken ({fallback.residency})."
        help_first = WHAT_HELPS.get(chosen.lacks, "")
        return f"{help_first} {USE_MINIATURE}".strip() if job.published else help_first
    if job.hardware.kind == "cpu" or chosen.recipe.name == PREFERRED_RECIPES[0] or asked:
        return ""
    return _better(job, chosen, options[0])


def _better(job: PlanInputs, chosen: Candidate, best: Candidate) -> str:
    """What it would take for the best recipe of the ladder."""
    if int8_units(job.hardware):
        spare = "More free RAM would spare the disk; smaller pictures need less of both."
        return spare if chosen.residency == "disk" else ""
    title = best.recipe.title
    short = [row.missing for row in best.passed if row.residency == "streamed" and row.lacks == "ram"]
    if short and not job.windows:
        return f"With {gb(min(short))} more RAM free, {title} would be streamed."
    needed = device_bytes(best.size.weights, least_busy(job, best.size, DeviceAssignment(0, 0, (0, 1))))
    if job.device_free < needed <= (job.hardware.device_memory_bytes or 0):
        return f"With {gb(needed)} of device memory free, {title} would be resident."
    return ""


def _answer(
    job: PlanInputs, chosen: Candidate, options: tuple[Candidate, ...], reasons: tuple[str, ...], asked: str | None
) -> Plan:
    """Put the decision into the shape that travels."""
    torch_kind = {"rocm": "cuda"}.get(job.hardware.kind, job.hardware.kind)
    numbered = torch_kind in ("cuda", "xpu")
    seats = chosen.seats if chosen.fits else (DeviceAssignment(0, 0, (0, 1)),)
    first, second = (f"{torch_kind}:{seat.device}" if numbered else torch_kind for seat in (seats[0], seats[-1]))
    tile, expected = decode_tile(job, chosen) if chosen.fits else 0, peaks(job, chosen)
    size, device = chosen.size, expected.device.total if expected.device else 0
    disk = size.download, size.disk
    return Plan(
        model=job.model.name,
        recipe=chosen.recipe.name if chosen.fits else None,
        residency=chosen.residency,
        encoder=encoder_home(job, chosen) if chosen.fits else "staged",
        compute_dtype=job.dtype,
        fits=chosen.fits,
        predicted=Predicted(
            device, expected.host, size.weights + size.once, *disk, chosen.seconds, expected.device, expected.locked
        ),
        reasons=reasons,
        rejected=_rejected(job, chosen, options),
        device=first,
        branch_devices=(first, second),
        decode="tiled" if tile else "whole",
        decode_tile=tile,
        streamed_bytes=chosen.streamed,
        streamed_blocks=chosen.streamed_blocks,
        slots=chosen.slots,
        width=job.size[0],
        height=job.size[1],
        requested_recipe=asked,
        arithmetic=arithmetic(job.hardware, chosen.recipe)[0],
    )


def _rejected(job: PlanInputs, chosen: Candidate, options: tuple[Candidate, ...]) -> tuple[Rejected, ...]:
    """A row for every home and recipe that was passed over, in the order of the ladder.

    Of a recipe that stands below the chosen one, only where it would have lived: nobody asks why not better there.
    """
    rows: list[Rejected] = []
    below = False
    for option in options:
        name = option.recipe.name
        if not below:
            rows += [Rejected(name, row.residency, row.reason) for row in option.passed]
        if option is chosen and option.fits:
            below = True
        elif not option.fits:
            rows += [] if option.passed else [Rejected(name, None, option.reason)]
        else:
            reason = comparison(chosen, option) if below else reason_against(job, option, chosen)
            rows.append(Rejected(name, option.residency, reason[:1].upper() + reason[1:]))
    return tuple(rows)
