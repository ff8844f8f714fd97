"""What surrounds the steps of a picture on the device: the text encoder before them, the decoder after them.

Both make room for the transformers, not the other way round: they run once a picture, the transformers every step. The
encoder stays beside them, is there only while it reads, or passes layer by layer; the picture is decoded whole or in
the largest tiles that fit. The peak of a plan is that of its worst phase, on the device that has more to hold.

Left out: previews between steps, which decode a miniature of the picture, and what a driver keeps for itself beyond
the constants of footprint.py.
"""

from __future__ import annotations

from ideogram_app.footprint import device_bytes, encoder_weights, gb
from ideogram_app.job import TILE_SIDES, Job, Seat
from ideogram_app.option import Option


def encoder_home(job: Job, option: Option) -> str:
    """Where the text encoder lives: resident, staged or streamed."""
    if job.hardware.kind == "cpu":
        return "resident"
    size, seat = option.size, _with_text(option)
    beside = max(size.workspace, size.decode_whole)
    if option.residency == "resident" and device_bytes(option.held(seat) + size.encoder, beside) <= seat.free:
        return "resident"
    return "staged" if device_bytes(0, size.encoder) <= seat.free else "streamed"


def decode_tile(job: Job, option: Option) -> int:
    """The side in pixels of the largest tiles that fit beside the weights; 0 where the whole picture does."""
    if job.hardware.kind == "cpu":
        return 0
    seat = _with_text(option)

    def fits(side: int) -> bool:
        return device_bytes(option.held(seat), job.decoding(option.size, side)) <= seat.free

    if fits(0):
        return 0
    smaller = [side for side in TILE_SIDES if side < max(job.size)]
    return next((side for side in smaller if fits(side)), TILE_SIDES[-1])


def peaks(job: Job, option: Option) -> tuple[int, int]:
    """Bytes of the worst phase: on the fuller device, and of RAM."""
    size = option.size
    decode = job.decoding(size, decode_tile(job, option))
    if job.hardware.kind == "cpu":
        return 0, size.weights + size.once + size.encoder + max(size.workspace, decode)
    home = encoder_home(job, option)
    first, *others = option.seats
    kept = option.held(first) + (size.encoder if home == "resident" else 0)
    encoding = size.encoder_layer if home == "streamed" else size.encoder
    device = max(
        device_bytes(kept, max(size.workspace, decode)),
        device_bytes(0, encoding),
        *(device_bytes(option.held(seat), size.workspace) for seat in others),
    )
    locked = {"streamed": option.streamed, "disk": min(2, sum(option.streamed_blocks)) * size.block}
    return device, size.once + size.staging + locked.get(option.residency or "", 0)


def phase_notes(job: Job, option: Option) -> tuple[str, str]:
    """A sentence about the encoder, and one about the decoder where it cannot have the whole picture."""
    encoder = gb(encoder_weights(job.model, 2))
    first = {
        "resident": f"The text encoder ({encoder}) stays beside them.",
        "staged": f"The text encoder ({encoder}) is on the device only while it reads the prompt.",
        "streamed": f"The text encoder ({encoder}) passes through the device layer by layer, once a prompt.",
    }[encoder_home(job, option)]
    side, (width, height) = decode_tile(job, option), job.size
    whole = gb(option.size.decode_whole)
    tiles = f"Decoding {width} x {height} at once takes {whole} beside them, so it is done in tiles of {side} pixels."
    return first, tiles if side else ""


def _with_text(option: Option) -> Seat:
    """The seat of the conditional transformer, where text is encoded and the picture decoded."""
    return option.seats[0]
