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

from ideogram_app.catalog.recipes import Recipe
from ideogram_app.files import DISK_MARGIN
from ideogram_app.machine.gpu_specs import DISK_BYTES_PER_SECOND, LINK_BYTES_PER_SECOND
from ideogram_app.planning.footprint import HOST_PROCESS_BYTES, Footprint, device_bytes
from ideogram_app.planning.inputs import DeviceAssignment, PlanInputs
from ideogram_app.planning.option import Candidate, RejectedPlacement, least_busy, resident_seconds, with_slots
from ideogram_app.planning.streaming import FEWEST_SLOTS, SLOTS, STREAMING_OVERHEAD
from ideogram_app.text import gb, in_seconds

RESIDENCIES = ("resident", "streamed", "disk")  # from the fastest down, where no times are known
STALLED_SHARE = 0.02  # of a step: less waiting than this is called none


def place(job: PlanInputs, recipe: Recipe) -> Candidate:
    """Find where a recipe can live: disk space first, then the fastest home that has room."""
    option = Candidate(recipe, job.measure(recipe))
    lacking = 0 if recipe.name in job.ready else _disk_lacks(job, option.size)
    if lacking:
        return replace(option, reason=_disk_reason(job, option.size, lacking), lacks="disk")
    if job.hardware.kind == "cpu":
        return _on_processor(job, option)
    found: list[Candidate] = []
    passed: list[RejectedPlacement] = []
    for seats in _seatings(job, option.size):
        for home in (_resident, _from_ram, _from_disk):
            answer = home(job, replace(option, seats=seats))
            if isinstance(answer, Candidate):
                found.append(answer)
                break
            passed.append(answer)
    once = tuple({row.reason: row for row in passed}.values())
    if not found:
        nearest = min((row for row in passed if row.residency == "disk"), key=lambda row: row.missing)
        return replace(option, reason=nearest.reason, lacks=nearest.lacks, passed=once)
    best = min(found, key=_slowness)
    return replace(best, passed=(*once, *(_slower(best, other) for other in found if other is not best)))


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
    where = "One device for each transformer" if other.split else "On one device both transformers"
    if best.seconds and other.seconds:
        verb = "would take" if other.split else "would take, one after the other,"
        reason = f"{where} {verb} {in_seconds(other.seconds)} a step, not {in_seconds(best.seconds)}."
    elif other.split:
        reason = f"{where} would let {gb(other.streamed)} travel in every step, not {gb(best.streamed)}."
    else:
        reason = f"{where} would compute one after the other; on two a step takes the longer one."
    return RejectedPlacement(other.residency, reason)


def _disk_lacks(job: PlanInputs, size: Footprint) -> int:
    """Bytes of disk space missing; 0 where it is enough or not known."""
    free = job.hardware.disk_free_bytes
    return 0 if free is None else max(0, _disk_wanted(job, size) - free)


def _disk_wanted(job: PlanInputs, size: Footprint) -> int:
    return round(max(0, size.disk - job.stored_bytes) * DISK_MARGIN)


def _disk_reason(job: PlanInputs, size: Footprint, lacking: int) -> str:
    return (
        f"The disk lacks {gb(lacking)}: the download ({gb(size.download)}) and the files made from it need "
        f"{gb(_disk_wanted(job, size))} with a tenth to spare, {gb(job.hardware.disk_free_bytes or 0)} are free."
    )


def _on_processor(job: PlanInputs, option: Candidate) -> Candidate:
    size = option.size
    missing = job.host_lacks(size.weights + size.once + size.encoder + max(size.workspace, size.decode_whole))
    if missing:
        reason = f"RAM lacks {gb(missing)} for the {job.model.title} on the processor."
        return replace(option, reason=reason, lacks="ram")
    held = gb(size.weights + size.once)
    reason = f"{option.recipe.title}: both transformers ({held}) live in RAM and run on the processor."
    return replace(option, residency="resident", seconds=resident_seconds(job, option), reason=reason)


def _resident(job: PlanInputs, option: Candidate) -> Candidate | RejectedPlacement:
    """Everything stays. On two devices that is exact too, since the transformers meet only in their outputs."""
    size, title = option.size, option.recipe.title
    for seat in option.seats:
        needed = device_bytes(option.held(seat), least_busy(job, size, seat))
        if needed > seat.free:
            what = "both transformers" if len(seat.branches) > 1 else f"the {_name(seat.branches[0])} transformer"
            reason = f"{title} needs {gb(needed)} of device memory for {what} to stay; {gb(seat.free)} are free."
            return RejectedPlacement("resident", reason, "device", needed - seat.free)
    short = job.host_lacks(size.once + size.staging)
    if short:
        return RejectedPlacement("resident", _no_ram(option, short), "ram", short)
    seconds = resident_seconds(job, option)
    if option.split:
        reason = f"{title}: {_pair_reason(job, option, seconds)}"
    else:
        free = gb(option.seats[0].free)
        reason = f"{title} keeps both transformers ({gb(size.weights)}) in the {free} that are free."
    return replace(option, residency="resident", seconds=seconds, reason=reason)


def _from_ram(job: PlanInputs, option: Candidate) -> Candidate | RejectedPlacement:
    """The blocks that do not fit come from locked RAM. No gain where the GPU shares the RAM."""
    size, title = option.size, option.recipe.title
    if job.hardware.kind == "mps":
        reason = f"{title} gains nothing from blocks that wait in RAM: the GPU shares it."
        return RejectedPlacement("streamed", reason, "device")
    moved = _moved(job, option, [_link(job, seat) for seat in option.seats])
    if isinstance(moved, RejectedPlacement):
        return moved
    short = job.host_lacks(size.once + size.staging, moved.streamed)
    if short:
        limit = " Windows locks about half of the RAM." if job.windows else ""
        reason = f"RAM lacks {gb(short)} for the {gb(moved.streamed)} of {title} that would travel from it.{limit}"
        return RejectedPlacement("streamed", reason, "ram", short)
    return replace(moved, residency="streamed", reason=_road(job, moved, "locked RAM"))


def _from_disk(job: PlanInputs, option: Candidate) -> Candidate | RejectedPlacement:
    """The blocks that do not fit are read from disk in every step, through two locked buffers; the last resort."""
    size = option.size
    rates = job.rates()
    disk = (rates.disk if rates else None) or DISK_BYTES_PER_SECOND
    moved = _moved(job, option, [min(disk / len(option.seats), _link(job, seat)) for seat in option.seats])
    if isinstance(moved, RejectedPlacement):
        return replace(moved, residency="disk")
    short = job.host_lacks(size.once + size.staging, moved.buffers)
    if short:
        return RejectedPlacement("disk", _no_ram(option, short), "ram", short)
    missing = job.host_lacks(size.once + size.staging, moved.streamed)
    why = "the GPU shares the RAM" if job.hardware.kind == "mps" else f"RAM lacks {gb(missing)} to hold them"
    reason = f"{_road(job, moved, 'disk')} They are read there because {why}."
    if rates is None or rates.disk is None:
        reason += f" The disk is taken to read {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s."
    return replace(moved, residency="disk", reason=reason)


def _moved(job: PlanInputs, option: Candidate, bytes_per_second: Sequence[float]) -> Candidate | RejectedPlacement:
    """As few travelling blocks as the devices allow, with as many places as make a step the fastest.

    Args:
        bytes_per_second: of the way to each seat.
    """
    found = [with_slots(job, option, bytes_per_second, slots) for slots in SLOTS]
    fitting = [moved for moved in found if moved is not None]
    if fitting:
        return min(fitting, key=lambda moved: (moved.seconds or 0.0, moved.slots))
    size = option.size
    for seat in option.seats:
        blocks = sum(job.model.branches[branch].num_layers for branch in seat.branches)
        fixed = sum(size.branches[branch] for branch in seat.branches) - (blocks - FEWEST_SLOTS) * size.block
        needed = device_bytes(fixed, least_busy(job, size, seat))
        if needed > seat.free:
            break
    reason = (
        f"{option.recipe.title} needs {gb(needed)} of device memory even when all of its blocks travel; "
        f"{gb(seat.free)} are free."
    )
    return RejectedPlacement("streamed", reason, "device", max(1, needed - seat.free))


def _link(job: PlanInputs, seat: DeviceAssignment) -> float:
    rates = job.rates(seat.device)
    return rates.link if rates else LINK_BYTES_PER_SECOND


def _no_ram(option: Candidate, short: int) -> str:
    return f"{option.recipe.title} lacks {gb(short)} of free RAM to load even one matrix at a time."


def _name(branch: int) -> str:
    return ("conditional", "unconditional")[branch]


def _pair_reason(job: PlanInputs, option: Candidate, seconds: float | None) -> str:
    """Why two devices, and what each has."""
    sizes = option.size.branches
    first, second = option.seats
    reason = (
        f"the conditional transformer ({gb(sizes[0])}) has device {first.device} ({gb(first.free)} free), the "
        f"unconditional one ({gb(sizes[1])}) device {second.device} ({gb(second.free)} free), and a step takes the "
        f"longer of the two"
    )
    alone = resident_seconds(job, replace(option, seats=(replace(first, branches=(0, 1)),)))
    if seconds is None or alone is None:
        return f"{reason}."
    return f"{reason}, {in_seconds(seconds)}, and not their sum, {in_seconds(alone)}."


def _road(job: PlanInputs, moved: Candidate, source: str) -> str:
    """What stays, what travels, and whether copying hides behind computing."""
    size, count = moved.size, sum(moved.streamed_blocks)
    blocks = sum(branch.num_layers for branch in job.model.branches)
    reason = (
        f"{moved.recipe.title} keeps {gb(size.weights - moved.streamed)} of {gb(size.weights)} on the device and "
        f"brings {gb(moved.streamed)} in every step from {source}, {count} of {blocks} blocks through {moved.slots} "
        "places"
    )
    if moved.split:
        reason += f" a device ({moved.streamed_blocks[0]} of the conditional transformer)"
    computing = resident_seconds(job, moved)
    if moved.seconds is None or computing is None:
        return f"{reason}: at least {in_seconds(moved.copying)} a step."
    waits = moved.seconds - computing * (1 + (STREAMING_OVERHEAD - 1) * count / blocks)
    if waits < STALLED_SHARE * moved.seconds:
        return f"{reason}: {in_seconds(moved.copying)} of copying, hidden behind {in_seconds(computing)} of computing."
    return (
        f"{reason}: {in_seconds(moved.copying)} of copying, of which {in_seconds(waits)} do not hide behind "
        f"{in_seconds(computing)} of computing."
    )
