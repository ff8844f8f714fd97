"""Blocks on the road: how many must travel, which, and how long a step takes while they do.

    computing   [ b0 ][ b1 ][ b2 ][ b3 ][ b4 ][ b5 ]...        b1, b3, b5 travel, the others stay
    copying     [   b3     ]      [   b5     ]                 through two places: b3 is copied into the place of b1
                                                               of the step before, as soon as that was computed

A step's time is not the larger of two sums. A copy cannot begin before the place it goes to is free, and a block cannot
begin before its copy has ended; so a step is played through, block by block, until it repeats itself, and what copying
could not hide behind computing is in the answer. The order is that of model/offload/ring.py: both transformers of one
device share its places, and after the last block of a step comes the first one of the next.

Left out: a link that is slower while other devices use it, and computing that is slower for want of the memory's
bandwidth other than by `STREAMING_OVERHEAD`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A travelling block computes this much longer: Wan 14B on an H100, every block streamed and the copies hidden, 4919 ms
# against 4602 ms (diffusers #11605). It stands for waits, launches and memory bandwidth that copies take.
STREAMING_OVERHEAD = 1.07
# Places that blocks take in turn. With two, one block computes while the next arrives. A third holds another block
# ready where travelling blocks follow one another closely and now and then a copy is late; it costs the room of a
# block, so one block more travels. The faster of both is taken, two where they are equal or no time is known.
FEWEST_SLOTS = 2
SLOTS = (FEWEST_SLOTS, 3)
FILE_BUFFERS = 2  # of locked RAM, a block each, between a file and a device: one is filled, one is copied
STEPS_PLAYED = 8  # the first two fill the places; the others are averaged, for odd counts repeat after several steps


@dataclass(frozen=True)
class TransformerPass:
    """One transformer in one step: its blocks, seconds with all of them at hand, and how many of them travel."""

    blocks: int
    seconds: float
    offloaded: int = 0


def spread(offloaded: int, blocks: int) -> frozenset[int]:
    """Which of so many blocks travel: as evenly as can be, the last one among them.

    >>> sorted(spread(3, 12))
    [3, 7, 11]
    """
    return frozenset((turn + 1) * blocks // offloaded - 1 for turn in range(offloaded))


def apportion(offloaded: int, blocks: Sequence[int]) -> tuple[int, ...]:
    """Travelling blocks of each transformer, in proportion to its depth; what is left over goes to the first one,
    which computes the longest and hides the most.

    >>> apportion(5, (34, 34))
    (3, 2)
    """
    shares = [offloaded * own // sum(blocks) for own in blocks]
    shares[0] += offloaded - sum(shares)
    return tuple(shares)


def fewest(room: int, weights: int, block: int, movable: int, slots: int) -> int | None:
    """How few blocks must travel so that the rest, and the places for these, find room.

    Args:
        room, weights, block: bytes for weights, of all weights, and of one block.
        movable: blocks that can travel.

    Returns:
        0 where everything stays; None where even with all of them on the road the rest does not fit.
    """
    if weights <= room:
        return 0
    moved = math.ceil((weights + slots * block - room) / block)
    return moved if moved <= movable else None


def step_seconds(passes: Sequence[TransformerPass], copy_seconds: float, slots: int) -> float:
    """Seconds of one step on one device, once a step repeats itself.

    Args:
        passes: of the transformers on this device, in order.
        copy_seconds: of one block.
    """
    if not any(row.offloaded for row in passes):
        return sum(row.seconds for row in passes)
    order = [
        (row.seconds / row.blocks, index in chosen)
        for row in passes
        for chosen in [spread(row.offloaded, row.blocks)]
        for index in range(row.blocks)
    ]
    computed = arrived = 0.0
    freed = [0.0] * slots  # when each place was last computed from, the oldest first
    ends = []
    for _ in range(STEPS_PLAYED):
        for seconds, travels in order:
            if travels:
                arrived = max(arrived, freed.pop(0)) + copy_seconds
                computed = max(computed, arrived) + seconds * STREAMING_OVERHEAD
                freed.append(computed)
            else:
                computed += seconds
        ends.append(computed)
    return (ends[-1] - ends[1]) / (STEPS_PLAYED - 2)
