"""Predicted peaks of memory: the worst phase of a plan, and where the text encoder and the decoder find room.

Both make room for the transformers, not the other way round: they run once a picture, the transformers every step. The
encoder stays on the device (resident), is there only while it encodes (staged), or is streamed layer by layer; the
picture is decoded whole or in the largest tiles that fit. The peak of a plan is that of its worst phase, on the fuller
device.

Left out: previews between steps, which decode a miniature of the picture, and what a driver allocates beyond the
constants of planning/footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.catalog.reasons import NOTHING, PEAK_PARTS, Reason, measured_list, reason
from ideogram_app.machine.staging import AHEAD, BUFFERS, CHUNK
from ideogram_app.planning.footprint import Share, device_bytes, device_share, encoder_weights
from ideogram_app.planning.inputs import TILE_SIDES, PlanInputs
from ideogram_app.planning.placement import Candidate

PREFETCHED_BYTES = AHEAD + BUFFERS * CHUNK  # of weights read ahead, and the pinned buffers that copies start from
# On a processor, of the miniature at 128 to 1024 pixels a side, in float32 on two cores: convolutions take up to 1.4
# times the counted bytes, because oneDNN reorders what it reads, and the process 80 MB beside tensors (thread stacks,
# compiled primitives, what glibc keeps). Predictions were then above every measured peak: at 1024 pixels by 7 to 28 %,
# at 512 by 17 to 112 MB, at 128 by 80. Resident memory of the same picture differs by up to 90 MB from run to run.
PROCESSOR_DECODES = 1.4
PROCESSOR_BYTES = 80_000_000


def encoder_mode(inputs: PlanInputs, candidate: Candidate) -> str:
    """How the text encoder is loaded: resident, staged or streamed; on the device of the conditional transformer."""
    if inputs.hardware.kind == "cpu":
        return "resident"
    size, first = candidate.size, candidate.assignments[0]
    beside = max(size.workspace, size.decode_whole)
    if candidate.residency == "resident" and device_bytes(candidate.held(first) + size.encoder, beside) <= first.free:
        return "resident"
    return "staged" if device_bytes(0, size.encoder) <= first.free else "streamed"


def decode_tile(inputs: PlanInputs, candidate: Candidate) -> int:
    """The side in pixels of the largest tiles that fit beside the weights; 0 where the whole picture does."""
    if inputs.hardware.kind == "cpu":
        return 0
    first = candidate.assignments[0]

    def fits(side: int) -> bool:
        return device_bytes(candidate.held(first), inputs.decoding(candidate.size, side)) <= first.free

    if fits(0):
        return 0
    smaller = [side for side in TILE_SIDES if side < max(inputs.size)]
    return next((side for side in smaller if fits(side)), TILE_SIDES[-1])


@dataclass(frozen=True)
class PredictedPeaks:
    """A plan's worst phase: where the memory of the fuller device goes (None without one), bytes of RAM, and those of
    them that are pinned."""

    device: Share | None
    host: int
    locked: int = 0


def peaks(inputs: PlanInputs, candidate: Candidate) -> PredictedPeaks:
    """The worst phase: on the fuller device, and of RAM."""
    size = candidate.size
    decode = inputs.decoding(size, decode_tile(inputs, candidate))
    if inputs.hardware.kind == "cpu":
        busy = max(size.workspace, round(decode * PROCESSOR_DECODES), size.encoder)
        return PredictedPeaks(
            None, size.weights + size.once + encoder_weights(inputs.model, 4) + busy + PROCESSOR_BYTES
        )
    encoder = encoder_mode(inputs, candidate)
    first, *others = candidate.assignments
    weights = candidate.held(first) + (size.encoder if encoder == "resident" else 0)
    encoding = size.encoder_layer if encoder == "streamed" else size.encoder
    phases = (
        device_share(weights, size.workspace, size.standing),
        device_share(weights, decode, size.standing),
        device_share(0, encoding),
        *(device_share(candidate.held(assignment), size.workspace, size.standing) for assignment in others),
    )
    locked = {"streamed": candidate.streamed, "disk": candidate.buffers}.get(candidate.residency or "", 0)
    loading = PREFETCHED_BYTES + (size.block if locked else 0)  # a block is built before it is copied to pinned memory
    streaming = size.encoder_table + 2 * size.encoder_layer if encoder == "streamed" else 0  # and two pinned buffers
    host = size.once + locked + inputs.feature_bytes + max(loading, streaming)
    return PredictedPeaks(max(phases, key=lambda phase: phase.total), host, locked)


def peak_note(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """Where the memory of the device goes at its fullest, and how much memory is pinned."""
    found = peaks(inputs, candidate)
    if found.device is None:
        return NOTHING
    shares = {
        "weights": found.device.weights,
        "standing": found.device.standing,
        "activations": found.device.activations,
        "libraries": found.device.libraries + found.device.slack,
        "context": found.device.context,
    }
    peak = reason("peak", total=found.device.total, parts=measured_list(PEAK_PARTS, shares), **shares)
    return peak + (reason("locked", locked=found.locked) if found.locked else NOTHING)


def encoder_note(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """Where the text encoder lives."""
    return reason(f"encoder_{encoder_mode(inputs, candidate)}", encoder=encoder_weights(inputs.model, 2))


def decoder_note(inputs: PlanInputs, candidate: Candidate) -> Reason:
    """How the picture is decoded where the decoder cannot have the whole of it."""
    side, (width, height) = decode_tile(inputs, candidate), inputs.size
    if not side:
        return NOTHING
    return reason("decoded_in_tiles", width=width, height=height, whole=candidate.size.decode_whole, side=side)
