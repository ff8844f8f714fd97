"""The plan: which recipe, where its weights live, and why; `plan(inputs) -> Plan`, a pure function without torch.

Made before a byte is fetched, from *free* memory, and every decision leaves a `Reason` (catalog/reasons.py).
placement.py says where each recipe could live, policy.py which one to take, peaks.py what the encoder and the decoder
do around it, notes.py what else there is to say; here the answers become one `Plan`.

Left out: other recipes than the preferred ones unless asked for, more than two devices at work, the prompt enhancer.
ComfyUI decides while it runs what to offload; here the decision is made once and can be read, tested, and printed for
a machine that one does not own. Where it proves wrong a new plan is made with less (`limit_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.machine.capabilities import arithmetic, build_note, compute_type, int8_units, obstacle, users_note
from ideogram_app.planning.assumptions import memory_range, picture, step_range
from ideogram_app.planning.downloads import download
from ideogram_app.planning.footprint import Share, device_bytes
from ideogram_app.planning.inputs import DeviceAssignment, PlanInputs, within
from ideogram_app.planning.notes import notes
from ideogram_app.planning.peaks import decode_tile, encoder_mode, peaks
from ideogram_app.planning.placement import Candidate, least_busy, place
from ideogram_app.planning.policy import PREFERRED_RECIPES, choose_candidate, comparison, reason_against
from ideogram_app.planning.step_time import step_flops
from ideogram_app.records import Interval, Prediction


@dataclass(frozen=True)
class Predicted:
    """What a plan expects.

    Device bytes are those of the fuller device, where there are two; host bytes are above those of the idle process;
    weight bytes are of both transformers as they are held; disk bytes are the download and what is made from it.
    Seconds count what is streamed; None where nobody published a time for such a device and none was measured on it.
    `device` says where the peak of the device goes, `locked_host_bytes` how much of the host's is pinned.

    Seconds of a picture are those of the caption, of the request's steps and of decoding, with the weights loaded.
    Ranges are 90 % intervals round the number of the same name (planning/assumptions.py), None where that is not known
    or 0. They are for people: no decision reads them.
    """

    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    weight_bytes: int = 0
    download_bytes: int = 0
    disk_bytes: int = 0
    seconds_per_step: float | None = None
    device: Share | None = None
    locked_host_bytes: int = 0
    seconds_per_step_range: Interval | None = None
    seconds_per_picture: float | None = None
    seconds_per_picture_range: Interval | None = None
    peak_device_bytes_range: Interval | None = None
    peak_host_bytes_range: Interval | None = None
    download_seconds: float | None = None
    download_seconds_range: Interval | None = None

    @property
    def of_picture(self) -> Prediction:
        """What goes with a picture's result, where bytes of a device are those allocated there."""
        device, total = self.peak_device_bytes_range, self.device
        return Prediction(
            seconds_per_step=self.seconds_per_step,
            seconds_per_step_range=self.seconds_per_step_range,
            seconds_per_picture=self.seconds_per_picture,
            seconds_per_picture_range=self.seconds_per_picture_range,
            device_bytes_range=device.scaled(total.allocated / total.total) if device and total else None,
            host_bytes_range=self.peak_host_bytes_range,
        )


@dataclass(frozen=True)
class Rejected:
    """A recipe that was considered, where it would have lived, and why it was not taken."""

    recipe: str
    residency: str | None
    reason: Reason


@dataclass(frozen=True)
class Plan:
    """What to run, or why nothing can.

    Attributes:
        recipe: None where nothing fits; `requested_recipe` is what was asked for by name, if anything.
        residency: where the two transformers live: resident, streamed (from RAM, block by block) or disk.
        encoder: resident, staged (on the device only while it encodes) or streamed (layer by layer, while it encodes).
        reasons: the decision first, then what surrounds it; on the wire their texts.
        suggestion: what would help; `NOTHING` where nothing needs to.
        device: what torch calls the device that computes; `branch_devices` one for each transformer.
        decode: whole, or tiled where the picture is too large to decode at once; `decode_tile`: a tile's side in
            pixels.
        streamed_blocks: how many blocks of each transformer are copied to its device in every step (`streaming.spread`:
            which).
        slots: device buffers that these blocks take in turn, on each device to which any are streamed.
        streamed_bytes: weights that are copied to the device in every step.
        arithmetic: bits of weights and activations in a product: w8a8, w4a8, w4a16, ...
    """

    model: str
    recipe: str | None
    residency: str | None
    encoder: str
    compute_dtype: str
    fits: bool
    predicted: Predicted
    reasons: tuple[Reason, ...]
    rejected: tuple[Rejected, ...] = ()
    suggestion: Reason = NOTHING
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

    @property
    def why(self) -> str:
        """All reasons in one paragraph."""
        return " ".join(each.text for each in self.reasons)


def plan(inputs: PlanInputs) -> Plan:
    """Decide. RequestError: there is no such recipe."""
    inputs, moved = _usable(inputs)
    asked, model = inputs.recipe, inputs.model
    recipes = [find_recipe(name).protecting() for name in ((asked,) if asked else PREFERRED_RECIPES)]
    blocked = obstacle(inputs.hardware, step_flops(model, *inputs.size)) if inputs.published else None
    if blocked:
        why, advice = blocked
        candidates = tuple(Candidate(recipe, inputs.measure(recipe), reason=why) for recipe in recipes)
        return replace(_answer(inputs, candidates[-1], candidates, (why,)), suggestion=advice)
    candidates = tuple(place(inputs, recipe) for recipe in recipes)
    chosen, rejected = choose_candidate(inputs, candidates)
    about_machine = compute_type(inputs.hardware)[1], build_note(inputs.hardware), users_note(inputs.hardware)
    said = (moved, *rejected, chosen.reason, *notes(inputs, chosen), *about_machine)
    answer = _answer(inputs, chosen, candidates, tuple(each for each in said if each))
    return replace(answer, suggestion=_suggestion(inputs, chosen, candidates[0]))


def _usable(inputs: PlanInputs) -> tuple[PlanInputs, Reason]:
    """With the limit on RAM applied, and for the miniature on the processor where torch cannot use the device."""
    hardware = within(inputs.hardware, inputs.host_limit_bytes)
    moved = NOTHING
    if not inputs.published and hardware.kind != "cpu" and hardware.torch_supports_device is False:
        moved = reason("on_processor_instead", device=hardware.name)
        hardware = replace(hardware, kind="cpu", compute_capability=None, architecture="")
    return replace(inputs, hardware=hardware), moved


def _suggestion(inputs: PlanInputs, chosen: Candidate, best: Candidate) -> Reason:
    """What would help: another recipe, memory that others hold, or the miniature."""
    if not chosen.fits:
        return _what_helps(inputs, chosen)
    if inputs.hardware.kind == "cpu" or chosen.recipe.name == PREFERRED_RECIPES[0] or inputs.recipe:
        return NOTHING
    if int8_units(inputs.hardware):
        return reason("more_ram_spares_disk") if chosen.residency == "disk" else NOTHING
    title = best.recipe.title
    missing = [row.missing for row in best.rejected if row.residency == "streamed" and row.lacks == "ram"]
    if missing and not inputs.windows:
        return reason("more_ram_streams", missing=min(missing), title=title)
    needed = device_bytes(best.size.weights, least_busy(inputs, best.size, DeviceAssignment(0, 0, (0, 1))))
    if inputs.device_free < needed <= (inputs.hardware.device_memory_bytes or 0):
        return reason("more_device_memory", needed=needed, title=title)
    return NOTHING


def _what_helps(inputs: PlanInputs, chosen: Candidate) -> Reason:
    """Where it fits nowhere."""
    if inputs.recipe:
        instead, _ = choose_candidate(inputs, tuple(place(inputs, find_recipe(name)) for name in PREFERRED_RECIPES))
        if instead.fits:
            return reason("unasked", title=instead.recipe.title, residency=instead.residency)
    free_first = reason(f"free_{chosen.lacks}") if chosen.lacks else NOTHING
    return free_first + reason("use_miniature") if inputs.published else free_first


def _answer(
    inputs: PlanInputs, chosen: Candidate, candidates: tuple[Candidate, ...], reasons: tuple[Reason, ...]
) -> Plan:
    """Build the `Plan` of a decision."""
    torch_kind = {"rocm": "cuda"}.get(inputs.hardware.kind, inputs.hardware.kind)
    used = chosen.assignments if chosen.fits else (DeviceAssignment(0, 0, (0, 1)),)
    first, second = (
        f"{torch_kind}:{row.device}" if torch_kind in ("cuda", "xpu") else torch_kind for row in (used[0], used[-1])
    )
    tile = decode_tile(inputs, chosen) if chosen.fits else 0
    return Plan(
        model=inputs.model.name,
        recipe=chosen.recipe.name if chosen.fits else None,
        residency=chosen.residency,
        encoder=encoder_mode(inputs, chosen) if chosen.fits else "staged",
        compute_dtype=inputs.dtype,
        fits=chosen.fits,
        predicted=_predicted(inputs, chosen),
        reasons=reasons,
        rejected=_rejected(inputs, chosen, candidates),
        device=first,
        branch_devices=(first, second),
        decode="tiled" if tile else "whole",
        decode_tile=tile,
        streamed_bytes=chosen.streamed,
        streamed_blocks=chosen.streamed_blocks,
        slots=chosen.slots,
        width=inputs.size[0],
        height=inputs.size[1],
        requested_recipe=inputs.recipe,
        arithmetic=arithmetic(inputs.hardware, chosen.recipe)[0],
    )


def _predicted(inputs: PlanInputs, chosen: Candidate) -> Predicted:
    """What the decision is expected to take, and within which ranges."""
    size, expected = chosen.size, peaks(inputs, chosen)
    of_device = expected.device.total if expected.device else 0
    picture_seconds, picture_range = picture(inputs, chosen)
    line = (inputs.known.downloads, inputs.known.outcomes) if inputs.known else ((), ())
    download_seconds, download_range = download(size.download, *line) if size.download else (None, None)
    return Predicted(
        peak_device_bytes=of_device,
        peak_host_bytes=expected.host,
        weight_bytes=size.weights + size.once,
        download_bytes=size.download,
        disk_bytes=size.disk,
        seconds_per_step=chosen.seconds,
        device=expected.device,
        locked_host_bytes=expected.locked,
        seconds_per_step_range=step_range(inputs, chosen),
        seconds_per_picture=picture_seconds,
        seconds_per_picture_range=picture_range,
        peak_device_bytes_range=memory_range(inputs, of_device, on_device=True),
        peak_host_bytes_range=memory_range(inputs, expected.host, on_device=False),
        download_seconds=download_seconds,
        download_seconds_range=download_range,
    )


def _rejected(inputs: PlanInputs, chosen: Candidate, candidates: tuple[Candidate, ...]) -> tuple[Rejected, ...]:
    """A row for every placement and recipe that was rejected, in the order of preference.

    Of a recipe that comes after the chosen one, only where it would have lived: nobody asks why not better there.
    """
    rows: list[Rejected] = []
    below = False
    for candidate in candidates:
        name = candidate.recipe.name
        if not below:
            rows += [Rejected(name, row.residency, row.reason) for row in candidate.rejected]
        if candidate is chosen and candidate.fits:
            below = True
        elif not candidate.fits:
            rows += [] if candidate.rejected else [Rejected(name, None, candidate.reason)]
        else:
            why = comparison(chosen, candidate) if below else reason_against(inputs, candidate, chosen)
            rows.append(Rejected(name, candidate.residency, why.capital()))
    return tuple(rows)
