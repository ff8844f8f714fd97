"""Reserved device memory for a sequence of tensors: a model of PyTorch's caching allocator on CUDA.

Memory comes from the driver in segments, which are cut into blocks and never given back until `torch.cuda.empty_cache`
or until the driver has no more. The rules are those of PyTorch's CUDACachingAllocator without options: sizes in 512
bytes; blocks to 1 MiB out of segments of 2 MiB, to 10 MiB out of 20 MiB, larger ones by 2 MiB; the smallest free block
that is large enough is cut, where enough is left, and neighbours that are free become one.

Left out: several streams, whose blocks do not mix, and expandable segments, which leave fewer gaps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

ALLOCATION_UNIT = 512
SMALL = 2**20  # blocks up to this size lie in segments of their own
SMALL_SEGMENT = 2 * 2**20
MIDDLE, MIDDLE_SEGMENT = 10 * 2**20, 20 * 2**20
LARGE_UNIT = 2 * 2**20


class Full(MemoryError):
    """The limit leaves no room for a block, not even after all that is cached was given back."""


@dataclass
class AllocatedBlock:
    """A piece of a segment; `before` and `after` are its neighbours in it."""

    size: int
    place: int
    is_small: bool
    is_free: bool = False
    before: AllocatedBlock | None = None
    after: AllocatedBlock | None = None


@dataclass
class Allocator:
    """One device's.

    Attributes:
        limit: bytes that may be reserved; None where there is no end.
        reserved, highest: bytes of all segments, now and at most.
    """

    limit: int | None = None
    reserved: int = 0
    highest: int = 0
    _free: dict[bool, list[tuple[int, int, AllocatedBlock]]] = field(default_factory=lambda: {True: [], False: []})
    _next_place: int = 0

    def allocate(self, wanted: int) -> AllocatedBlock:
        """A block of at least so many bytes.

        Raises:
            Full: the limit is reached.
        """
        size = max(ALLOCATION_UNIT, -(-wanted // ALLOCATION_UNIT) * ALLOCATION_UNIT)
        is_small = size <= SMALL
        free = self._free[is_small]
        index = bisect_left(free, (size, 0), key=lambda row: row[:2])
        block = free.pop(index)[2] if index < len(free) else self._segment(size, is_small)
        block.is_free = False
        left = block.size - size
        if left >= ALLOCATION_UNIT if is_small else left > SMALL:
            rest = AllocatedBlock(left, block.place + size, is_small, False, block, block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.after, block.size = rest, size
            self._put(rest)
        return block

    def free(self, block: AllocatedBlock) -> None:
        """Take a block back and join it with free neighbours."""
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._take(other)
                first, second = (other, block) if other is block.before else (block, other)
                first.size, first.after = first.size + second.size, second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        self._put(block)

    def empty_cache(self) -> None:
        """Give back every segment that is free as a whole."""
        for pool in self._free.values():
            for row in [row for row in pool if row[2].before is None and row[2].after is None]:
                pool.remove(row)
                self.reserved -= row[0]

    def _segment(self, size: int, is_small: bool) -> AllocatedBlock:
        whole = SMALL_SEGMENT if is_small else MIDDLE_SEGMENT if size < MIDDLE else -(-size // LARGE_UNIT) * LARGE_UNIT
        if self.limit is not None and self.reserved + whole > self.limit:
            self.empty_cache()
            if self.reserved + whole > self.limit:
                raise Full(f"{whole} bytes more than {self.reserved} are beyond {self.limit}")
        self.reserved += whole
        self.highest = max(self.highest, self.reserved)
        place, self._next_place = self._next_place, self._next_place + 2 * whole  # segments are no neighbours
        return AllocatedBlock(whole, place, is_small)

    def _put(self, block: AllocatedBlock) -> None:
        block.is_free = True
        insort(self._free[block.is_small], (block.size, block.place, block), key=lambda row: row[:2])

    def _take(self, block: AllocatedBlock) -> None:
        pool = self._free[block.is_small]
        pool.pop(bisect_left(pool, (block.size, block.place), key=lambda row: row[:2]))


def reserved_bytes(events: Iterable[tuple[int, int]], limit: int | None = None) -> int:
    """The most that is reserved while tensors come and go.

    Args:
        events: (number of a storage, its bytes) in their order, 0 bytes where it ends; a number below 0 stands for
            `torch.cuda.empty_cache`.
        limit: bytes that the device has.

    Raises:
        Full: they do not fit.
    """
    allocator, blocks = Allocator(limit), dict[int, AllocatedBlock]()
    for number, size in events:
        if number < 0:
            allocator.empty_cache()
        elif size:
            blocks[number] = allocator.allocate(size)
        elif number in blocks:
            allocator.free(blocks.pop(number))
    return allocator.highest


def fits(events: Iterable[tuple[int, int]], limit: int) -> bool:
    """Whether `reserved_bytes` finds room within a limit."""
    try:
        reserved_bytes(events, limit)
    except Full:
        return False
    return True
