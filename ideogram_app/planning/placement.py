"""Placement of one recipe on one machine: resident on a device, on two, streamed from RAM, or streamed from disk.

`place` answers for a single recipe with a `Candidate`; planning/policy.py compares them. Both device assignments are
tried, both transformers on one device and one on each of two, and for either the three residencies from the fastest
down, each a small function that finds room or says what is missing. The fastest that has room is the answer and keeps
the others as rejected.

Left out: moving whole transformers to and fro between the branches of a step, which SD.Next measured as painfully slow;
blocks are streamed instead, while others compute (planning/streaming.py). Blocks of one recipe never come from RAM and
disk both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.files import DISK_MARGIN
from ideogram_app.machine.gpu_specs import DISK_BYTES_PER_SECOND, LINK_BYTES_PER_SECOND
from ideogram_app.planning.footprint import HOST_PROCESS_BYTES, Footprint, device_bytes, room_for_weights
from ideogram_app.planning.inputs import TILE_SIDES, DeviceAssignment, PlanInputs
from ideogram_app.planning.streaming import (
    FEWEST_SLOTS,
    FILE_BUFFERS,
    SLOTS,
    STREAMING_OVERHEAD,
    TransformerPass,
    apportion,
    fewest,
    step_seconds,
)

RESIDENCIES = ("resident", "streamed", "disk")  # from the fastest down, where no times are known
STALLED_SHARE = 0.02  # of a step: less waiting than this is called none
BRANCH_NAMES = ("conditional", "unconditional")


@dataclass(frozen=True)
class RejectedPlacement:
    """A placement that was tried and not taken, and why.

    Attributes:
        lacks: disk, ram or device, with the bytes `missing` of it; "" and 0 where it would fit.
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
        assignments: the devices and which transformers each holds.
        streamed_blocks: of each transformer, how many are streamed in every step, through `slots` slots a device.
        seconds: of one step, None where nobody knows; `copying`: of it, copies to the busier device.
        reason: why here, or why nowhere.
        lacks: disk, ram or device: what is missing where it fits nowhere.
    """

    recipe: Recipe
    size: Footprint
    residency: str | None = None
    assignments: tuple[DeviceAssignment, ...] = (DeviceAssignment(0, 0, (0, 1)),)
    streamed_blocks: tuple[int, int] = (0, 0)
    slots: int = 0
    seconds: float | None = None
    copying: float = 0.0
    reason: Reason = NOTHING
    lacks: str = ""
    rejected: tuple[RejectedPlacement, ...] = ()

    @property
    def fits(self) -> bool:
        return self.residency is not None

    @property
    def split(self) -> bool:
        """Whether each transformer has a device of its own."""
        return len(self.assignments) > 1

    @property
    def streamed(self) -> int:
        """Bytes of weights that are streamed in every step."""
        return sum(self.streamed_blocks) * self.size.block

    @property
    def buffers(self) -> int:
        """Bytes of pinned memory that blocks are read into from disk: two for each device they go to."""
        reached = sum(any(self.streamed_blocks[branch] for branch in row.branches) for row in self.assignments)
        return reached * FILE_BUFFERS * self.size.block

    def held(self, assignment: DeviceAssignment) -> int:
        """Bytes of weights, and of slots for those that are streamed, on one device while a step runs."""
        moved = sum(self.streamed_blocks[branch] for branch in assignment.branches)
        weights = sum(self.size.branches[branch] for branch in assignment.branches)
        return weights + (self.slots - moved) * self.size.block if moved else weights


def place(inputs: PlanInputs, recipe: Recipe) -> Candidate:
    """Find where a recipe can live: disk space first, then the fastest residency that has room."""
    candidate = Candidate(recipe, inputs.measure(recipe))
    no_disk = NOTHING if recipe.name in inputs.ready else _disk_reason(inputs, candidate.size)
    if no_disk:
        return replace(candidate, reason=no_disk, lacks="disk")
    if inputs.hardware.kind == "cpu":
        return _on_processor(inputs, candidate)
    found: list[Candidate] = []
    rejected: list[RejectedPlacement] = []
    for assignments in _device_assignments(inputs, candidate.size):
        for residency in (_resident, _from_ram, _from_disk):  # the fastest first
            answer = residency(inputs, replace(candidate, assignments=assignments))
            if isinstance(answer, Candidate):
                found.append(answer)
                break
            rejected.append(answer)
    once = tuple({row.reason: row for row in rejected}.values())
    if not found:
        nearest = min((row for row in rejected if row.residency == "disk"), key=lambda row: row.missing)
        return replace(candidate, reason=nearest.reason, lacks=nearest.lacks, rejected=once)
    best = min(found, key=_slowness)
    return replace(best, rejected=(*once, *(_slower(best, other) for other in found if other is not best)))


def _device_assignments(inputs: PlanInputs, size: Footprint) -> tuple[tuple[DeviceAssignment, ...], ...]:
    """Those of the inputs; a GPU that shares the RAM leaves to the process what it needs of it beside the weights."""
    free = inputs.hardware.host_free_bytes
    tried = inputs.device_assignments()
    if inputs.hardware.kind != "mps" or free is None:
        return tried
    shared = max(0, free - HOST_PROCESS_BYTES - size.once - size.staging - FEWEST_SLOTS * size.block)
    return tuple(tuple(replace(row, free=min(row.free, shared)) for row in assignments) for assignments in tried)


def _slowness(candidate: Candidate) -> tuple[float, int, bool]:
    """Sorts the fastest first; where no time is known, by residency, and then two devices before one."""
    return candidate.seconds or 0.0, RESIDENCIES.index(candidate.residency or "disk"), not candidate.split


def _slower(best: Candidate, other: Candidate) -> RejectedPlacement:
    """The same recipe on one device instead of two, or the other way round."""
    if best.seconds and other.seconds:
        code = "pair_slower" if other.split else "alone_slower"
        return RejectedPlacement(other.residency, reason(code, seconds=other.seconds, best=best.seconds))
    if other.split:
        return RejectedPlacement(other.residency, reason("pair_streams_more", moved=other.streamed, best=best.streamed))
    return RejectedPlacement(other.residency, reason("alone_in_turn"))


def _disk_reason(inputs: PlanInputs, size: Footprint) -> Reason:
    """What the disk lacks; `NOTHING` where it has room, or where free space is not known."""
    free, needed = inputs.hardware.disk_free_bytes, round(max(0, size.disk - inputs.stored_bytes) * DISK_MARGIN)
    if free is None or needed <= free:
        return NOTHING
    return reason("disk_lacks", missing=needed - free, download=size.download, needed=needed, free=free)


def _on_processor(inputs: PlanInputs, candidate: Candidate) -> Candidate:
    size = candidate.size
    missing = inputs.host_lacks(size.weights + size.once + size.encoder + max(size.workspace, size.decode_whole))
    if missing:
        lacking = reason("no_ram_for_processor", missing=missing, model=inputs.model.title)
        return replace(candidate, reason=lacking, lacks="ram")
    why = reason("on_processor", title=candidate.recipe.title, weights=size.weights + size.once)
    return replace(candidate, residency="resident", seconds=resident_seconds(inputs, candidate), reason=why)


def _resident(inputs: PlanInputs, candidate: Candidate) -> Candidate | RejectedPlacement:
    """Everything stays. On two devices that is exact too, since the transformers meet only in their outputs."""
    size, title = candidate.size, candidate.recipe.title
    for row in candidate.assignments:
        needed = device_bytes(candidate.held(row), least_busy(inputs, size, row))
        if needed > row.free:
            code = "no_room_for_both" if len(row.branches) > 1 else "no_room_for_one"
            why = reason(code, title=title, needed=needed, free=row.free, branch=BRANCH_NAMES[row.branches[0]])
            return RejectedPlacement("resident", why, "device", needed - row.free)
    missing = inputs.host_lacks(size.once + size.staging)
    if missing:
        return _no_ram_to_load(candidate, "resident", missing)
    seconds = resident_seconds(inputs, candidate)
    if candidate.split:
        why = _pair_reason(inputs, candidate, seconds)
    else:
        why = reason("resident", title=title, weights=size.weights, free=candidate.assignments[0].free)
    return replace(candidate, residency="resident", seconds=seconds, reason=why)


def _from_ram(inputs: PlanInputs, candidate: Candidate) -> Candidate | RejectedPlacement:
    """The blocks that do not fit come from pinned memory. No gain where the GPU shares the RAM."""
    size, title = candidate.size, candidate.recipe.title
    if inputs.hardware.kind == "mps":
        return RejectedPlacement("streamed", reason("no_gain_from_ram", title=title), "device")
    moved = _streamed(inputs, candidate, [_link(inputs, row) for row in candidate.assignments])
    if moved is None:
        return _no_room_streamed(inputs, candidate, "streamed")
    missing = inputs.host_lacks(size.once + size.staging, moved.streamed)
    if missing:
        why = reason("no_ram_to_stream", missing=missing, moved=moved.streamed, title=title)
        why += reason("windows_locks_half") if inputs.windows else NOTHING
        return RejectedPlacement("streamed", why, "ram", missing)
    return replace(moved, residency="streamed", reason=_streaming_reason("streamed", inputs, moved))


def _from_disk(inputs: PlanInputs, candidate: Candidate) -> Candidate | RejectedPlacement:
    """The blocks that do not fit are read from disk in every step, through two pinned buffers; the last resort."""
    size, rates = candidate.size, inputs.rates()
    measured = rates.disk if rates else None
    speed = (measured or DISK_BYTES_PER_SECOND) / len(candidate.assignments)
    moved = _streamed(inputs, candidate, [min(speed, _link(inputs, row)) for row in candidate.assignments])
    if moved is None:
        return _no_room_streamed(inputs, candidate, "disk")
    missing = inputs.host_lacks(size.once + size.staging, moved.buffers)
    if missing:
        return _no_ram_to_load(candidate, "disk", missing)
    if inputs.hardware.kind == "mps":
        not_ram = reason("ram_is_shared")
    else:
        not_ram = reason("ram_lacks", missing=inputs.host_lacks(size.once + size.staging, moved.streamed))
    why = _streaming_reason("from_disk", inputs, moved) + not_ram
    if measured is None:
        why += reason("disk_assumed", gigabytes=DISK_BYTES_PER_SECOND / 1e9)
    return replace(moved, residency="disk", reason=why)


def _streamed(inputs: PlanInputs, candidate: Candidate, bytes_per_second: Sequence[float]) -> Candidate | None:
    """As few streamed blocks as the devices allow, with as many slots as make a step the fastest; None where a device
    has no room for what cannot be streamed. bytes_per_second: of the copies to each device."""
    tried = (with_slots(inputs, candidate, bytes_per_second, slots) for slots in SLOTS)
    fitting = [moved for moved in tried if moved is not None]
    return min(fitting, key=lambda moved: (moved.seconds or 0.0, moved.slots), default=None)


def with_slots(
    inputs: PlanInputs, candidate: Candidate, bytes_per_second: Sequence[float], slots: int
) -> Candidate | None:
    """The candidate streamed through this many slots; None where a device is too small for it."""
    size, blocks, seconds, copying = candidate.size, [0, 0], [], []
    for row, speed in zip(candidate.assignments, bytes_per_second, strict=True):
        layers = [inputs.model.branches[branch].num_layers for branch in row.branches]
        weights = sum(size.branches[branch] for branch in row.branches)
        room = room_for_weights(row.free, least_busy(inputs, size, row))
        moved = fewest(room, weights, size.block, sum(layers), slots)
        if moved is None:
            return None
        for branch, own in zip(row.branches, apportion(moved, layers), strict=True):
            blocks[branch] = own
        passes = _passes(inputs, candidate, row, (blocks[0], blocks[1]))
        seconds.append(step_seconds(passes, size.block / speed, slots) if passes else None)
        copying.append(moved * size.block / speed)
    known = [each for each in seconds if each is not None]
    return replace(
        candidate,
        streamed_blocks=(blocks[0], blocks[1]),
        slots=slots if any(blocks) else 0,
        seconds=max(known) if len(known) == len(seconds) else None,
        copying=max(copying),
    )


def resident_seconds(inputs: PlanInputs, candidate: Candidate) -> float | None:
    """Seconds of a step if nothing were streamed: both transformers in turn, or the longer where each has a device."""
    each = [_passes(inputs, candidate, row, (0, 0)) for row in candidate.assignments]
    if any(passes is None for passes in each):
        return None
    return max(sum(row.seconds for row in passes or ()) for passes in each)


def least_busy(inputs: PlanInputs, size: Footprint, assignment: DeviceAssignment) -> int:
    """Device bytes that a phase needs beside the weights: decoding can shrink to tiles, the encoder to layers; both
    happen where the conditional transformer is."""
    if 0 not in assignment.branches:
        return size.workspace
    return max(size.workspace, inputs.decoding(size, TILE_SIDES[-1]), size.encoder_layer)


def _passes(
    inputs: PlanInputs, candidate: Candidate, assignment: DeviceAssignment, streamed: tuple[int, int]
) -> list[TransformerPass] | None:
    """The transformers of one device for planning/streaming.py; None where their time is not known."""
    passes = []
    for branch in assignment.branches:
        seconds = inputs.pass_seconds(candidate.recipe, branch, assignment.device)
        if seconds is None:
            return None
        passes.append(TransformerPass(inputs.model.branches[branch].num_layers, seconds, streamed[branch]))
    return passes


def _no_room_streamed(inputs: PlanInputs, candidate: Candidate, residency: str) -> RejectedPlacement:
    """The first of its devices that is too small even where all blocks are streamed through as few slots as can be."""
    size, needs = candidate.size, []
    for row in candidate.assignments:
        blocks = sum(inputs.model.branches[branch].num_layers for branch in row.branches)
        fixed = sum(size.branches[branch] for branch in row.branches) - (blocks - FEWEST_SLOTS) * size.block
        needs.append((device_bytes(fixed, least_busy(inputs, size, row)), row.free))
    needed, free = next(((needed, free) for needed, free in needs if needed > free), needs[-1])
    why = reason("no_room_streamed", title=candidate.recipe.title, needed=needed, free=free)
    return RejectedPlacement(residency, why, "device", max(1, needed - free))


def _no_ram_to_load(candidate: Candidate, residency: str, missing: int) -> RejectedPlacement:
    why = reason("no_ram_to_load", title=candidate.recipe.title, missing=missing)
    return RejectedPlacement(residency, why, "ram", missing)


def _link(inputs: PlanInputs, assignment: DeviceAssignment) -> float:
    rates = inputs.rates(assignment.device)
    return rates.link if rates else LINK_BYTES_PER_SECOND


def _pair_reason(inputs: PlanInputs, candidate: Candidate, seconds: float | None) -> Reason:
    """Why two devices, and what each has."""
    first, second = candidate.assignments
    alone = resident_seconds(inputs, replace(candidate, assignments=(replace(first, branches=(0, 1)),)))
    known = seconds is not None and alone is not None
    return reason(
        "resident_pair_timed" if known else "resident_pair",
        title=candidate.recipe.title,
        first=first.device,
        first_weights=candidate.size.branches[0],
        first_free=first.free,
        second=second.device,
        second_weights=candidate.size.branches[1],
        second_free=second.free,
        seconds=seconds,
        alone=alone,
    )


def _streaming_reason(code: str, inputs: PlanInputs, moved: Candidate) -> Reason:
    """What stays, what is streamed, and whether copying hides behind computing."""
    size = moved.size
    return reason(
        code,
        title=moved.recipe.title,
        kept=size.weights - moved.streamed,
        weights=size.weights,
        moved=moved.streamed,
        count=sum(moved.streamed_blocks),
        blocks=sum(branch.num_layers for branch in inputs.model.branches),
        slots=moved.slots,
        pair=reason("blocks_of_pair", first=moved.streamed_blocks[0]) if moved.split else "",
        copies=_copies(inputs, moved),
    )


def _copies(inputs: PlanInputs, moved: Candidate) -> Reason:
    """How long copying takes, and how much of that a step waits for."""
    computing = resident_seconds(inputs, moved)
    if moved.seconds is None or computing is None:
        return reason("copies_unknown", copying=moved.copying)
    blocks = sum(branch.num_layers for branch in inputs.model.branches)
    waits = moved.seconds - computing * (1 + (STREAMING_OVERHEAD - 1) * sum(moved.streamed_blocks) / blocks)
    if waits < STALLED_SHARE * moved.seconds:
        return reason("copies_hidden", copying=moved.copying, computing=computing)
    return reason("copies_waited_for", copying=moved.copying, waits=waits, computing=computing)
