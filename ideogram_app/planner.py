"""Which recipe, where its weights live, and why: `plan(hardware, model, ...) -> Plan`, a pure function without torch.

The plan is made before a byte is fetched, from *free* memory, and every decision leaves a sentence with its numbers.
Three rules, in order. What was asked for by name is never swapped. INT8 comes first, being closest to the reference,
where the device has units for it and holds it, or nearly all of it. Else Q4_K, wherever that fits best.

Left out: other recipes than these two unless asked for, more than two devices, the prompt enhancer. ComfyUI decides
while it runs what to push out; here the decision is made once and can be read, tested, and printed for a machine that
one does not own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ideogram_app.architecture import check_size, find_model
from ideogram_app.footprint import device_bytes, encoder_weights, gb
from ideogram_app.hardware import Hardware
from ideogram_app.placement import Job, Option, least_busy, place
from ideogram_app.rates import find_rates, step_work
from ideogram_app.recipes import find_recipe
from ideogram_app.verdicts import (
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

# What an unasked plan picks from, best quality first. Of the INT8 family the rotated one: on the miniature its error is
# that of bf16 itself (velocity 1.66 % against 1.65; int8-w8a8 3.8 as calibrated), it needs no calibration, and keeping
# all fragile layers instead, which is as good, makes 23.2 GB of 19.8 (benchmarks/results/int8-family.json).
LADDER = ("int8-w8a8-rotated", "gguf-q4_k")
# A streamed INT8 may cost this much more time than Q4_K, for its quality, and no more of it than this share may be on
# the road: a fifth is 4 GB a step. Beyond that a narrow link and as much locked RAM hurt more than Q4_K does, and a
# card that small holds all of Q4_K (16 GB) or would have to bring half of INT8 (12 GB).
SLOWER_AT_MOST = 1.3
STREAMED_AT_MOST = 0.2
WHAT_HELPS = {
    "disk": "Free that much disk space, or put the weights on another disk.",
    "ram": "Close other programs to free RAM.",
    "device": "Close other programs that use the device, or draw a smaller picture.",
}


@dataclass(frozen=True)
class Predicted:
    """What a plan expects.

    Host bytes are above those of the idle process; weight bytes are of both transformers as they are held; disk bytes
    are the download and what is made from it. Seconds are None where nobody published a time for such a device.
    """

    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    weight_bytes: int = 0
    download_bytes: int = 0
    disk_bytes: int = 0
    seconds_per_step: float | None = None


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
        encoder: staged (on the device only while it encodes) or resident.
        suggestion: what would help; "" where nothing needs to.
        device: what torch calls the device that computes; `branch_devices` one for each transformer.
        decode: whole, or tiled where the picture is too large to decode at once.
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
    streamed_bytes: int = 0
    width: int = 0
    height: int = 0
    requested_recipe: str | None = None
    arithmetic: str = ""


def plan(
    hardware: Hardware,
    model: str,
    *,
    width: int | None = None,
    height: int | None = None,
    recipe: str | None = None,
    stored_bytes: int = 0,
    ready: Iterable[str] = (),
) -> Plan:
    """Decide.

    Args:
        width, height: of the picture; the model's default where None.
        recipe: what was asked for by name; None lets the plan choose.
        stored_bytes: what of the download and of the files made from it is on disk already.
        ready: recipes whose files are complete, whatever became of the download.

    Raises:
        RequestError: the model, recipe or size does not exist.
    """
    shape = find_model(model)
    size = (width or shape.default_size[0], height or shape.default_size[1])
    check_size(*size)
    machine, moved = _usable(hardware, shape.source_bytes == 0)
    dtype, dtype_reason = compute_type(machine)
    job = Job(machine, shape, size, dtype, stored_bytes, frozenset(ready))
    rows = [find_recipe(name).protecting() for name in ((recipe,) if recipe else LADDER)]
    blocked = obstacle(machine, step_work(shape, *size)) if shape.source_bytes else None
    if blocked:
        reason, suggestion = blocked
        options = tuple(Option(row, job.measure(row), reason=reason) for row in rows)
        return replace(_answer(job, options[-1], options, (reason,), recipe), suggestion=suggestion)
    options = tuple(place(job, row) for row in rows)
    chosen, why = _choose(job, options)
    notes = (*why, chosen.reason, *_notes(job, chosen), dtype_reason, build_note(machine), users_note(machine))
    answer = _answer(job, chosen, options, tuple(note for note in (moved, *notes) if note), recipe)
    return replace(answer, suggestion=_suggestion(job, chosen, recipe))


def _usable(hardware: Hardware, small: bool) -> tuple[Hardware, str]:
    """The machine as the model sees it: the miniature moves to the processor where torch cannot use the device."""
    if not small or hardware.kind == "cpu" or hardware.torch_supports_device is not False:
        return hardware, ""
    reason = f"Runs on the processor: the installed PyTorch has no kernels for the {hardware.name}."
    return replace(hardware, kind="cpu", compute_capability=None, architecture=""), reason


def _choose(job: Job, options: tuple[Option, ...]) -> tuple[Option, tuple[str, ...]]:
    """The first option that nothing speaks against, else the last; with a sentence for each that was passed over."""
    passed: list[str] = []
    for option in options[:-1]:
        against = _against(job, option, options[-1])
        if not against:
            return option, tuple(passed)
        passed.append(f"Not {option.recipe.title}: {against}" if option.fits else against)
    return options[-1], tuple(passed)


def _against(job: Job, better: Option, smaller: Option) -> str:
    """Why the better recipe is not the one to take, or ""."""
    if not better.fits:
        return better.reason
    if job.model.source_bytes == 0:
        return ""  # the miniature shows INT8 everywhere: plain torch does it where kernels are missing
    units = int8_units(job.hardware)
    if units or not smaller.fits or better.residency == "resident":
        return units
    share = better.streamed / better.size.weights
    if better.residency == "disk" or share > STREAMED_AT_MOST:
        return (
            f"{gb(better.streamed)} of its {gb(better.size.weights)} find no room in the {gb(job.device_free)} that "
            f"are free; {share:.0%} would travel in every step."
        )
    if better.seconds and smaller.seconds and better.seconds > SLOWER_AT_MOST * smaller.seconds:
        return f"a step would take {better.seconds:.1f} s, with {smaller.recipe.title} {smaller.seconds:.1f} s."
    return ""


def _encoder_resident(job: Job, option: Option) -> bool:
    """Whether the text encoder can stay beside the transformers."""
    if job.hardware.kind == "cpu":
        return True
    size = option.size
    beside = device_bytes(option.on_device + size.encoder, max(size.workspace, size.decode_whole))
    return option.residency == "resident" and beside <= job.device_free


def _encoder_whole(job: Job, option: Option) -> bool:
    """Whether the text encoder fits as a whole before the transformers come."""
    return device_bytes(0, option.size.encoder) <= job.device_free


def _decodes_whole(job: Job, option: Option) -> bool:
    if job.hardware.kind == "cpu":
        return True
    return device_bytes(option.on_device, option.size.decode_whole) <= job.device_free


def _predict(job: Job, option: Option) -> Predicted:
    """Peaks of the worst phase: encoding, denoising or decoding."""
    size = option.size
    decode = size.decode_whole if _decodes_whole(job, option) else size.decode_tiled
    if job.hardware.kind == "cpu":
        device, host = 0, size.weights + size.once + size.encoder + max(size.workspace, decode)
    else:
        kept = option.on_device + (size.encoder if _encoder_resident(job, option) else 0)
        encoding = size.encoder if _encoder_whole(job, option) else size.encoder_layer
        device = max(device_bytes(kept, max(size.workspace, decode)), device_bytes(0, encoding))
        host = size.once + size.staging + (option.streamed if option.residency == "streamed" else 0)
    return Predicted(device, host, size.weights + size.once, size.download, size.disk, option.seconds)


def _notes(job: Job, option: Option) -> tuple[str, ...]:
    """Sentences about what surrounds the transformers, and about a card that is larger than it needs to be."""
    if not option.fits or job.hardware.kind == "cpu":
        return ()
    encoder = gb(encoder_weights(job.model, 2))
    if _encoder_resident(job, option):
        first = f"The text encoder ({encoder}) stays beside them."
    elif _encoder_whole(job, option):
        first = f"The text encoder ({encoder}) is on the device only while it reads the prompt."
    else:
        first = f"The text encoder ({encoder}) passes through the device layer by layer, once a prompt."
    tiles = "" if _decodes_whole(job, option) else f"The picture ({job.size[0]} x {job.size[1]}) is decoded in tiles."
    units = int8_units(job.hardware) if option.recipe.quantizes_activations and job.model.source_bytes else ""
    asked = f"INT8 was asked for by name, but {units}" if units else ""
    how = arithmetic(job.hardware, option.recipe)[1], product_note(job.hardware, option.recipe)
    return first, tiles, asked, *how, _roomy(job, option)


def _roomy(job: Job, option: Option) -> str:
    """What to know where the reference itself would be resident."""
    reference = place(job, find_recipe("reference"))
    if job.model.source_bytes == 0 or option.recipe.name != LADDER[0] or reference.residency != "resident":
        return ""
    if reference.split and not option.split:
        return ""
    note = f"The reference ({gb(reference.size.weights)}) would fit too: --recipe reference."
    rates = find_rates(job.hardware.name)
    if rates and rates.int8_gain < SMALL_GAIN:
        note += f" INT8 products are only {rates.int8_gain:.0f} times as fast as bfloat16 here: INT8 gains little time."
    return note


def _suggestion(job: Job, chosen: Option, asked: str | None) -> str:
    """What would help: another recipe, memory that others hold, or the miniature."""
    if not chosen.fits:
        if asked:
            fallback, _ = _choose(job, tuple(place(job, find_recipe(name)) for name in LADDER))
            if fallback.fits:
                return f"Without a recipe asked for, {fallback.recipe.title} would be taken ({fallback.residency})."
        help_first = WHAT_HELPS.get(chosen.lacks, "")
        return f"{help_first} {USE_MINIATURE}".strip() if job.model.source_bytes else help_first
    if job.hardware.kind == "cpu" or chosen.recipe.name == LADDER[0] or asked:
        return ""
    total = job.hardware.device_memory_bytes or 0
    best = job.measure(find_recipe(LADDER[0]))
    needed = device_bytes(best.weights, least_busy(best))
    if not int8_units(job.hardware) and job.device_free < needed <= total:
        return f"With {gb(needed)} of device memory free, {find_recipe(LADDER[0]).title} would be resident."
    if chosen.residency == "disk":
        return "More free RAM would spare the disk; smaller pictures need less of both."
    return ""


def _answer(job: Job, chosen: Option, options: tuple[Option, ...], reasons: tuple[str, ...], asked: str | None) -> Plan:
    """Put the decision into the shape that travels."""
    torch_kind = {"rocm": "cuda"}.get(job.hardware.kind, job.hardware.kind)
    numbered = torch_kind in ("cuda", "xpu")
    first = f"{torch_kind}:0" if numbered else torch_kind
    second = f"{torch_kind}:1" if chosen.split else first
    return Plan(
        model=job.model.name,
        recipe=chosen.recipe.name if chosen.fits else None,
        residency=chosen.residency,
        encoder="resident" if chosen.fits and _encoder_resident(job, chosen) else "staged",
        compute_dtype=job.dtype,
        fits=chosen.fits,
        predicted=_predict(job, chosen),
        reasons=reasons,
        rejected=tuple(_rejected(job, option, chosen) for option in options if option is not chosen or not chosen.fits),
        device=first,
        branch_devices=(first, second),
        decode="whole" if _decodes_whole(job, chosen) else "tiled",
        streamed_bytes=chosen.streamed,
        width=job.size[0],
        height=job.size[1],
        requested_recipe=asked,
        arithmetic=arithmetic(job.hardware, chosen.recipe)[0],
    )


def _rejected(job: Job, option: Option, chosen: Option) -> Rejected:
    """Why one recipe of the ladder was not taken."""
    reason = option.reason
    if option.fits and chosen.fits:
        saved = chosen.size.weights - option.size.weights
        reason = (
            f"It would save {gb(saved)}, but {chosen.recipe.title} has room and is closer to the reference."
            if saved > 0
            else _against(job, option, chosen)
        )
    return Rejected(option.recipe.name, option.residency, reason)
