"""Block streaming: how many blocks are offloaded, which, and the time of a step with their copies overlapped.

    computing   [ b0 ][ b1 ][ b2 ][ b3 ][ b4 ][ b5 ]...        b1, b3, b5 are offloaded, the others stay resident
    copying     [   b3     ]      [   b5     ]                 through two slots: b3 is copied into the slot of b1
                                                               of the step before, as soon as that was computed

A step's time is not the larger of two sums. A copy cannot begin before its slot is free, and a block cannot begin
before its copy has ended; so a step is simulated, block by block, until it repeats itself, and what copying could not
hide behind computing is in the answer. The order is that of model/offload/ring.py: both transformers of one device
share its slots, and after the last block of a step comes the first one of the next.

Left out: a link that is slower while other devices use it, and computing that is slower for want of the memory's
bandwidth other than by `STREAMING_OVERHEAD`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

# An offloaded block computes this much longer: Wan 14B on an H100, every block streamed and the copies hidden, 4919 ms
# against 4602 ms (diffusers #11605). It stands for waits, launches and memory bandwidth that copies take.
STREAMING_OVERHEAD = 1.07
# Slots: device buffers that offloaded blocks take in turn. With two, one block computes while the next is copied. A
# third has another block ready where offloaded blocks follow one another closely and now and then a copy is late; it
# costs the memory of a block, so one block more is offloaded. The faster of both is taken, two where they are equal or
# no time is known.
FEWEST_SLOTS = 2
SLOTS = (FEWEST_SLOTS, 3)
FILE_BUFFERS = 2  # pinned buffers of a block each between a file and a device: one is filled, one is copied
STEPS_PLAYED = 8  # the first two fill the slots; the others are averaged, for odd counts repeat after several steps


@dataclass(frozen=True)
class TransformerPass:
    """One transformer in one step: its blocks, seconds with all of them resident, and how many are offloaded."""

    blocks: int
    seconds: float
    offloaded: int = 0


def spread(offloaded: int, blocks: int) -> frozenset[int]:
    """Which of so many blocks are offloaded, as evenly as can be, the last among them: 3 of 12 are 3, 7 and 11."""
    return frozenset((turn + 1) * blocks // offloaded - 1 for turn in range(offloaded))


def apportion(offloaded: int, blocks: Sequence[int]) -> tuple[int, ...]:
    """Offloaded blocks of each transformer, in proportion to its depth: 5 of (34, 34) are 3 and 2. What is left over
    goes to the first one, which computes the longest and hides the most."""
    shares = [offloaded * own // sum(blocks) for own in blocks]
    shares[0] += offloaded - sum(shares)
    return tuple(shares)


def fewest(room: int, weights: int, block: int, movable: int, slots: int) -> int | None:
    """How few blocks must be offloaded so that the rest, and the slots for these, find room: 0 where everything stays,
    None where the rest does not fit even with all `movable` ones offloaded; room, weights and block are bytes."""
    if weights <= room:
        return 0
    moved = math.ceil((weights + slots * block - room) / block)
    return moved if moved <= movable else None


def step_seconds(passes: Sequence[TransformerPass], copy_seconds: float, slots: int) -> float:
    """Seconds of one step on one device, once it repeats itself: its transformers in order; copy_seconds: a block."""
    if not any(row.offloaded for row in passes):
        return sum(row.seconds for row in passes)
    order = []
    for row in passes:
        chosen = spread(row.offloaded, row.blocks)
        order += [(row.seconds / row.blocks, index in chosen) for index in range(row.blocks)]
    return _simulate(order, copy_seconds, slots)


def _simulate(order: Sequence[tuple[float, bool]], copy_seconds: float, slots: int) -> float:
    """Two streams, one that computes and one that copies, played block by block until a step repeats itself; order: the
    seconds of each block of a step, and whether it is offloaded."""
    compute_time = copy_time = 0.0  # until when each stream is busy
    slot_free = deque([0.0] * slots)  # when each slot was last computed from, the oldest first
    step_ends = []
    for _ in range(STEPS_PLAYED):
        for seconds, is_offloaded in order:
            if not is_offloaded:
                compute_time += seconds
                continue
            copy_time = max(copy_time, slot_free.popleft()) + copy_seconds  # waits for the slot
            compute_time = max(compute_time, copy_time) + seconds * STREAMING_OVERHEAD  # waits for the copy
            slot_free.append(compute_time)
        step_ends.append(compute_time)
    return (step_ends[-1] - step_ends[1]) / (STEPS_PLAYED - 2)
