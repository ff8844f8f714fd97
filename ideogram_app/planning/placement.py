"""Where the weights of one recipe can live on one machine: on the device, on two of them, in RAM, or on disk.

`place` answers for a single recipe; planning/policy.py compares the answers. Both seatings are tried, both transformers
on one device and one on each of two, and for either the three homes from the fastest down, each a small function that
finds room or says what is missing. The fastest that has room is the answer; the others stay with it as what was passed
over.

Left out: moving whole transformers to and fro between the branches of a step, which SD.Next measured as painfully slow;
blocks travel instead, while others compute (planning/streaming.py). Blocks of one recipe never come from RAM and disk
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.files import DISK_MARGIN
from ideogram_app.machine.gpu_specs import DISK_BYTES_PER_SECOND, LINK_BYTES_PER_SECOND
from ideogram_app.planning.footprint import HOST_PROCESS_BYTES, Footprint, device_bytes
from ideogram_app.planning.inputs import DeviceAssignment, PlanInputs
from ideogram_app.planning.option import Candidate, RejectedPlacement, least_busy, resident_seconds, with_slots
from ideogram_app.planning.streaming import FEWEST_SLOTS, SLOTS, STREAMING_OVERHEAD

RESIDENCIES = ("resident", "streamed", "disk")  # from the fastest down, where no times are known
STALLED_SHARE = 0.02  # of a step: less waiting than this is called none


def place(job: PlanInputs, recipe: Recipe) -> Candidate:
    """Find where a recipe can live: disk space first, then the fastest home that has room."""
    option = Candidate(recipe, job.measure(recipe))
    missing = 0 if recipe.name in job.ready else _disk_lacks(job, option.size)
    if missing:
        return replace(option, reason=_disk_reason(job, option.size, missing), lacks="disk")
    if job.hardware.kind == "cpu":
        return _on_processor(job, option)
    found: list[Candidate] = []
    passed: list[RejectedPlacement] = []
    for seats in _seatings(job, option.size):
        placed, without_room = _fastest_home(job, replace(option, seats=seats))
        found += [placed] if placed else []
        passed += without_room
    once = tuple({row.reason: row for row in passed}.values())
    if not found:
        nearest = min((row for row in passed if row.residency == "disk"), key=lambda row: row.missing)
        return replace(option, reason=nearest.reason, lacks=nearest.lacks, passed=once)
    best = min(found, key=_slowness)
    return replace(best, passed=(*once, *(_slower(best, other) for other in found if other is not best)))


def _fastest_home(job: PlanInputs, option: Candidate) -> tuple[Candidate | None, list[RejectedPlacement]]:
    """The first home, from the fastest down, that has room for these seats; and those before it, which have none."""
    passed: list[RejectedPlacement] = []
    for home in (_resident, _from_ram, _from_disk):
        match home(job, option):
            case Candidate() as placed:
                return placed, passed
            case RejectedPlacement() as without_room:
                passed.append(without_room)
    return None, passed


def _seatings(job: PlanInputs, size: Footprint) -> tuple[tuple[DeviceAssignment, ...], ...]:
    """Those of the job; a GPU that shares the RAM leaves to the process what it needs of it beside the weights."""
    free = job.hardware.host_free_bytes
    if job.hardware.kind != "mps" or free is None:
        return job.device_assignments()
    ours = HOST_PROCESS_BYTES + size.once + size.staging + FEWEST_SLOTS * size.block
    shared = max(0, free - ours)
    return tuple(
        tuple(replace(seat, free=min(seat.free, shared)) for seat in seats) for seats in job.device_assignments()
    )


def _slowness(option: Candidate) -> tuple[float, int, bool]:
    """What the fastest has least of; where no time is known, the home decides, and then two devices before one."""
    return option.seconds or 0.0, RESIDENCIES.index(option.residency or "disk"), not option.split


def _slower(best: Candidate, other: Candidate) -> RejectedPlacement:
    """The same recipe on one device instead of two, or the other way round."""
    if best.seconds and other.seconds:
        code = "pair_slower" if other.split else "alone_slower"
        return RejectedPlacement(other.residency, reason(code, seconds=other.seconds, best=best.seconds))
    if other.split:
        return RejectedPlacement(other.residency, reason("pair_streams_more", moved=other.streamed, best=best.streamed))
    return RejectedPlacement(other.residency, reason("alone_in_turn"))


def _disk_lacks(job: PlanInputs, size: Footprint) -> int:
    """Bytes of disk space missing; 0 where it is enough or not known."""
    free = job.hardware.disk_free_bytes
    return 0 if free is None else max(0, _disk_wanted(job, size) - free)


def _disk_wanted(job: PlanInputs, size: Footprint) -> int:
    return round(max(0, size.disk - job.stored_bytes) * DISK_MARGIN)


def _disk_reason(job: PlanInputs, size: Footprint, missing: int) -> Reason:
    needed, free = _disk_wanted(job, size), job.hardware.disk_free_bytes or 0
    return reason("disk_lacks", missing=missing, download=size.download, needed=needed, free=free)


def _on_processor(job: PlanInputs, option: Candidate) -> Candidate:
    size = option.size
    missing = job.host_lacks(size.weights + size.once + size.encoder + max(size.workspace, size.decode_whole))
    if missing:
        lacking = reason("no_ram_for_processor", missing=missing, model=job.model.title)
        return replace(option, reason=lacking, lacks="ram")
    why = reason("on_processor", title=option.recipe.title, weights=size.weights + size.once)
    return replace(option, residency="resident", seconds=resident_seconds(job, option), reason=why)


def _resident(job: PlanInputs, option: Candidate) -> Candidate | RejectedPlacement:
    """Everything stays. On two devices that is exact too, since the transformers meet only in their outputs."""
    size, title = option.size, option.recipe.title
    for seat in option.seats:
        needed = device_bytes(option.held(seat), least_busy(job, size, seat))
        if needed > seat.free:
            code = "no_room_for_both" if len(seat.branches) > 1 else "no_room_for_one"
            why = reason(code, title=title, needed=needed, free=seat.free, branch=_name(seat.branches[0]))
            return RejectedPlacement("resident", why, "device", needed - seat.free)
    missing = job.host_lacks(size.once + size.staging)
    if missing:
        return _no_ram_to_load(option, "resident", missing)
    seconds = resident_seconds(job, option)
    if option.split:
        why = _pair_reason(job, option, seconds)
    else:
        why = reason("resident", title=title, weights=size.weights, free=option.seats[0].free)
    return replace(option, residency="resident", seconds=seconds, reason=why)


def _from_ram(job: PlanInputs, option: Candidate) -> Candidate | RejectedPlacement:
    """The blocks that do not fit come from locked RAM. No gain where the GPU shares the RAM."""
    size, title = option.size, option.recipe.title
    if job.hardware.kind == "mps":
        return RejectedPlacement("streamed", reason("no_gain_from_ram", title=title), "device")
    moved = _moved(job, option, [_link(job, seat) for seat in option.seats])
    if moved is None:
        return _no_room_streamed(job, option, "streamed")
    missing = job.host_lacks(size.once + size.staging, moved.streamed)
    if missing:
        why = reason("no_ram_to_stream", missing=missing, moved=moved.streamed, title=title)
        return RejectedPlacement(
            "streamed", why + (reason("windows_locks_half") if job.windows else NOTHING), "ram", missing
        )
    return replace(moved, residency="streamed", reason=_travel_reason("streamed", job, moved))


def _from_disk(job: PlanInputs, option: Candidate) -> Candidate | RejectedPlacement:
    """The blocks that do not fit are read from disk in every step, through two locked buffers; the last resort."""
    size = option.size
    rates = job.rates()
    measured = rates.disk if rates else None
    speed = (measured or DISK_BYTES_PER_SECOND) / len(option.seats)
    moved = _moved(job, option, [min(speed, _link(job, seat)) for seat in option.seats])
    if moved is None:
        return _no_room_streamed(job, option, "disk")
    missing = job.host_lacks(size.once + size.staging, moved.buffers)
    if missing:
        return _no_ram_to_load(option, "disk", missing)
    if job.hardware.kind == "mps":
        not_ram = reason("ram_is_shared")
    else:
        not_ram = reason("ram_lacks", missing=job.host_lacks(size.once + size.staging, moved.streamed))
    why = _travel_reason("from_disk", job, moved) + not_ram
    if measured is None:
        why += reason("disk_assumed", gigabytes=DISK_BYTES_PER_SECOND / 1e9)
    return replace(moved, residency="disk", reason=why)


def _moved(job: PlanInputs, option: Candidate, bytes_per_second: Sequence[float]) -> Candidate | None:
    """As few travelling blocks as the devices allow, with as many places as make a step the fastest.

    None where a device has no room for what cannot travel.

    Args:
        bytes_per_second: of the way to each seat.
    """
    tried = (with_slots(job, option, bytes_per_second, slots) for slots in SLOTS)
    fitting = [moved for moved in tried if moved is not None]
    return min(fitting, key=lambda moved: (moved.seconds or 0.0, moved.slots), default=None)


def _no_room_streamed(job: PlanInputs, option: Candidate, residency: str) -> RejectedPlacement:
    """The first of its devices that is too small even where all blocks travel."""
    needs = [(_needed_even_streamed(job, option, seat), seat.free) for seat in option.seats]
    needed, free = next(((needed, free) for needed, free in needs if needed > free), needs[-1])
    why = reason("no_room_streamed", title=option.recipe.title, needed=needed, free=free)
    return RejectedPlacement(residency, why, "device", max(1, needed - free))


def _needed_even_streamed(job: PlanInputs, option: Candidate, seat: DeviceAssignment) -> int:
    """Device bytes where all blocks travel through as few places as can be."""
    size = option.size
    blocks = sum(job.model.branches[branch].num_layers for branch in seat.branches)
    fixed = sum(size.branches[branch] for branch in seat.branches) - (blocks - FEWEST_SLOTS) * size.block
    return device_bytes(fixed, least_busy(job, size, seat))


def _no_ram_to_load(option: Candidate, residency: str, missing: int) -> RejectedPlacement:
    return RejectedPlacement(
        residency, reason("no_ram_to_load", title=option.recipe.title, missing=missing), "ram", missing
    )


def _link(job: PlanInputs, seat: DeviceAssignment) -> float:
    rates = job.rates(seat.device)
    return rates.link if rates else LINK_BYTES_PER_SECOND


def _name(branch: int) -> str:
    return ("conditional", "unconditional")[branch]


def _pair_reason(job: PlanInputs, option: Candidate, seconds: float | None) -> Reason:
    """Why two devices, and what each has."""
    first, second = option.seats
    alone = resident_seconds(job, replace(option, seats=(replace(first, branches=(0, 1)),)))
    known = seconds is not None and alone is not None
    return reason(
        "resident_pair_timed" if known else "resident_pair",
        title=option.recipe.title,
        first=first.device,
        first_weights=option.size.branches[0],
        first_free=first.free,
        second=second.device,
        second_weights=option.size.branches[1],
        second_free=second.free,
        seconds=seconds,
        alone=alone,
    )


def _travel_reason(code: str, job: PlanInputs, moved: Candidate) -> Reason:
    """What stays, what travels, and whether copying hides behind computing."""
    size = moved.size
    return reason(
        code,
        title=moved.recipe.title,
        kept=size.weights - moved.streamed,
        weights=size.weights,
        moved=moved.streamed,
        count=sum(moved.streamed_blocks),
        blocks=sum(branch.num_layers for branch in job.model.branches),
        slots=moved.slots,
        pair=reason("blocks_of_pair", first=moved.streamed_blocks[0]) if moved.split else "",
        copies=_copies(job, moved),
    )


def _copies(job: PlanInputs, moved: Candidate) -> Reason:
    """How long copying takes, and how much of that a step waits for."""
    computing = resident_seconds(job, moved)
    if moved.seconds is None or computing is None:
        return reason("copies_unknown", copying=moved.copying)
    blocks = sum(branch.num_layers for branch in job.model.branches)
    waits = moved.seconds - computing * (1 + (STREAMING_OVERHEAD - 1) * sum(moved.streamed_blocks) / blocks)
    if waits < STALLED_SHARE * moved.seconds:
        return reason("copies_hidden", copying=moved.copying, computing=computing)
    return reason("copies_waited_for", copying=moved.copying, waits=waits, computing=computing)
