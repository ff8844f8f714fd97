"""One recipe placed on one machine, and what that takes of memory and time.

`Candidate` is an answer of planning/placement.py: who sits on which device, what travels, how long a step takes. The
functions beside it count for one that is being tried: what a phase needs beside the weights, how few blocks must
travel, through how many places, and the seconds of a step with and without that.

Left out: whether RAM suffices, and sentences (planning/placement.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ideogram_app.catalog.reasons import NOTHING, Reason
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.planning.footprint import Footprint, room_for_weights
from ideogram_app.planning.inputs import TILE_SIDES, DeviceAssignment, PlanInputs
from ideogram_app.planning.streaming import FILE_BUFFERS, TransformerPass, apportion, fewest, step_seconds


@dataclass(frozen=True)
class RejectedPlacement:
    """A home that was passed over.

    Attributes:
        reason: why, with its numbers.
        lacks: disk, ram or device: what is missing; `missing` how many bytes of it, "" and 0 where it would fit.
    """

    residency: str | None
    reason: Reason
    lacks: str = ""
    missing: int = 0


@dataclass(frozen=True)
class Candidate:
    """One recipe, placed.

    Attributes:
        residency: resident, streamed or disk; None where it fits nowhere.
        seats: the devices and which transformers each holds.
        streamed_blocks: of each transformer, how many travel in every step, through `slots` places on each device.
        seconds: of one step, None where nobody knows; `copying`: of it, bringing blocks to the busier device.
        reason: why here, or why nowhere.
        lacks: disk, ram or device: what is missing where it fits nowhere.
        passed: the homes that were passed over.
    """

    recipe: Recipe
    size: Footprint
    residency: str | None = None
    seats: tuple[DeviceAssignment, ...] = (DeviceAssignment(0, 0, (0, 1)),)
    streamed_blocks: tuple[int, int] = (0, 0)
    slots: int = 0
    seconds: float | None = None
    copying: float = 0.0
    reason: Reason = NOTHING
    lacks: str = ""
    passed: tuple[RejectedPlacement, ...] = ()

    @property
    def fits(self) -> bool:
        return self.residency is not None

    @property
    def split(self) -> bool:
        """Whether each transformer has a device of its own."""
        return len(self.seats) > 1

    @property
    def streamed(self) -> int:
        """Bytes of weights that travel in every step."""
        return sum(self.streamed_blocks) * self.size.block

    @property
    def buffers(self) -> int:
        """Bytes of locked RAM that blocks are read into on their way from disk: two for each device they go to."""
        reached = sum(any(self.streamed_blocks[branch] for branch in seat.branches) for seat in self.seats)
        return reached * FILE_BUFFERS * self.size.block

    def held(self, seat: DeviceAssignment) -> int:
        """Bytes of weights, and of places for those that travel, on one device while a step runs."""
        moved = sum(self.streamed_blocks[branch] for branch in seat.branches)
        weights = sum(self.size.branches[branch] for branch in seat.branches)
        return weights + (self.slots - moved) * self.size.block if moved else weights


def least_busy(job: PlanInputs, size: Footprint, seat: DeviceAssignment) -> int:
    """Device bytes that a phase needs beside the weights: decoding can shrink to tiles, the encoder to layers; both
    happen where the conditional transformer is."""
    if 0 not in seat.branches:
        return size.workspace
    return max(size.workspace, job.decoding(size, TILE_SIDES[-1]), size.encoder_layer)


def with_slots(job: PlanInputs, option: Candidate, bytes_per_second: Sequence[float], slots: int) -> Candidate | None:
    """The option with this many places; None where a device is too small for it."""
    size, blocks, seconds, copying = option.size, [0, 0], [], []
    for seat, speed in zip(option.seats, bytes_per_second, strict=True):
        layers = [job.model.branches[branch].num_layers for branch in seat.branches]
        weights = sum(size.branches[branch] for branch in seat.branches)
        room = room_for_weights(seat.free, least_busy(job, size, seat))
        moved = fewest(room, weights, size.block, sum(layers), slots)
        if moved is None:
            return None
        for branch, own in zip(seat.branches, apportion(moved, layers), strict=True):
            blocks[branch] = own
        passes = passes_of(job, option, seat, (blocks[0], blocks[1]))
        seconds.append(step_seconds(passes, size.block / speed, slots) if passes else None)
        copying.append(moved * size.block / speed)
    known = [each for each in seconds if each is not None]
    return replace(
        option,
        streamed_blocks=(blocks[0], blocks[1]),
        slots=slots if any(blocks) else 0,
        seconds=max(known) if len(known) == len(seconds) else None,
        copying=max(copying),
    )


def resident_seconds(job: PlanInputs, option: Candidate) -> float | None:
    """Seconds of a step if nothing travelled: both transformers in turn, or the longer one where each has a device."""
    each = [passes_of(job, option, seat, (0, 0)) for seat in option.seats]
    if any(passes is None for passes in each):
        return None
    return max(sum(row.seconds for row in passes or ()) for passes in each)


def passes_of(
    job: PlanInputs, option: Candidate, seat: DeviceAssignment, streamed: tuple[int, int]
) -> list[TransformerPass] | None:
    """The transformers of one device for planning/streaming.py; None where their time is not known."""
    passes = []
    for branch in seat.branches:
        seconds = job.pass_seconds(option.recipe, branch, seat.device)
        if seconds is None:
            return None
        passes.append(TransformerPass(job.model.branches[branch].num_layers, seconds, streamed[branch]))
    return passes
