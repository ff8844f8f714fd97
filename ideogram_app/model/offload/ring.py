"""Ring buffer of device slots: offloaded blocks are prefetched, each copied ahead of its use.

    order       a  b  c  d  a  b ...                 of use, over and over: a step after the other
    slot 0      [ a computes ]           [ c computes ]
    slot 1        b is copied [ b computes ]  d is copied [ d computes ]
    slot 0                      c is copied

    EMPTY --> READING --> COPYING --> READY <--> IN_USE      of a slot; blocks that host memory holds are not read first

A slot is filled again as soon as the block in it was used, so with two slots one block is copied while another one
computes, and copying is hidden wherever it takes no longer than computing. The order is an advice: what is taken out
of turn is copied at once, what is never taken is evicted. Blocks that lie in a file are read by a thread, for a
processor into the slot itself, for a device through two pinned buffers; where no thread but the one that computes may
copy, by that one.

Left out: deciding which blocks are offloaded (the plan does), and sharing a slot between small blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch import Tensor

from ideogram_app.errors import AppError
from ideogram_app.machine.copies import CopyStream, Event, StagingBuffers
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.planning.streaming import FILE_BUFFERS


class SlotState(Enum):
    """Of a slot."""

    EMPTY = auto()  # no block
    READING = auto()  # a block's bytes are read from its file; `Slot.reading` ends with the event behind their copy
    COPYING = auto()  # the copy was begun; `Slot.copied` is behind it
    READY = auto()  # computing comes behind the copy
    IN_USE = auto()  # the block computes, or may


@dataclass(eq=False)
class Slot:
    """Memory on the device for one block."""

    memory: Tensor
    used: Event  # behind the last computation with what is here; at first behind that with what had the memory before
    state: SlotState = SlotState.EMPTY
    block: PackedBlock | None = None
    reading: Future[Event] | None = None
    copied: Event = None

    def empty(self) -> None:
        """Evict the block; a reading that is under way ends first, and its failure is ignored."""
        reading, self.reading = self.reading, None
        if reading is not None and not reading.cancel():
            wait([reading])
            self.copied = self.copied if reading.exception() else reading.result()
        self.state, self.block = SlotState.EMPTY, None


class Ring:
    """Slots on one device, at least two for copies to hide, and the blocks that share them, in the order of use."""

    def __init__(self, copies: CopyStream, slots: int, order: Sequence[PackedBlock]) -> None:
        size = max(block.size for block in order)
        self._copies, self._order = copies, list(order)
        self._turn = {block: turn for turn, block in enumerate(self._order)}
        memory = [copies.device_buffer(size) for _ in range(min(slots, len(self._order)))]
        self._slots = [Slot(each, copies.event()) for each in memory]
        from_file = any(not block.in_memory for block in self._order)
        self._reader: Executor = ThreadPoolExecutor(1, "weights") if from_file and copies.threads else _InThisThread()
        self._buffers = StagingBuffers(copies, FILE_BUFFERS if from_file and not copies.in_place else 0, size)
        self._copied = 0
        self._prefetch(len(self._order) - 1)

    @property
    def copies(self) -> int:
        """How often a block was copied to a slot."""
        return self._copied

    def take(self, block: PackedBlock) -> None:
        """Have whatever is computed from now on come behind the copy of this block, and point its tensors at its slot.

        Raises:
            CheckpointError: its file ends too early or cannot be read.
        """
        slot = self._slot_of(block)
        if slot is None:
            slot = self._spare(())
            assert slot is not None  # blocks are used one after another, so at most one is in use
            self._copy(block, slot)
        if slot.state is SlotState.READING:
            self._await_reading(slot)
        if slot.state is SlotState.COPYING:
            self._copies.wait(slot.copied)
        slot.state = SlotState.IN_USE
        block.bind_device(slot.memory)

    def release(self, block: PackedBlock) -> None:
        """The block was used; its slot goes to the next one that has none."""
        slot = self._slot_of(block)
        block.bind_host()
        if slot is None:
            return
        slot.used, slot.state = self._copies.event(), SlotState.READY
        self._prefetch(self._turn[block])

    def close(self) -> None:
        """Wait for everything under way and free all slots."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        for slot in self._slots:
            slot.empty()
            self._copies.synchronize(slot.copied)
            self._copies.synchronize(slot.used)
        self._slots.clear()

    def _prefetch(self, turn: int) -> None:
        """Begin to copy those of the next blocks, as many as there are slots, that have none yet."""
        ahead = range(turn + 1, turn + 1 + len(self._slots))
        wanted = [self._order[number % len(self._order)] for number in ahead]
        for block in wanted:
            if self._slot_of(block) is not None:
                continue
            slot = self._spare(wanted)
            if slot is None:
                return
            self._copy(block, slot)

    def _slot_of(self, block: PackedBlock) -> Slot | None:
        return next((slot for slot in self._slots if slot.block is block), None)

    def _spare(self, wanted: Collection[PackedBlock]) -> Slot | None:
        """A slot that is neither in use nor has a block that is wanted soon."""
        free = (slot for slot in self._slots if slot.state is not SlotState.IN_USE)
        return next((slot for slot in free if slot.block not in wanted), None)

    def _copy(self, block: PackedBlock, slot: Slot) -> None:
        """Begin to copy a block to a slot, behind the last use of what was there."""
        slot.empty()
        self._copied += 1
        if block.in_memory:
            slot.copied = self._copies.copy_async(block.held, slot.memory[: block.size], slot.used)
            slot.block, slot.state = block, SlotState.COPYING
        else:
            slot.reading = self._reader.submit(self._read, block, slot.memory[: block.size], slot.used)
            slot.block, slot.state = block, SlotState.READING

    def _await_reading(self, slot: Slot) -> None:
        assert slot.reading is not None
        try:
            slot.copied = slot.reading.result()
        except BaseException:
            slot.empty()
            raise
        slot.reading, slot.state = None, SlotState.COPYING

    def _read(self, block: PackedBlock, memory: Tensor, used: Event) -> Event:
        """A block from its file to the memory of a slot; in the thread, where there is one."""
        if self._copies.in_place:
            block.fill(memory)
            return None
        return self._buffers.copy(block.fill, memory, used)


class _InThisThread(Executor):
    """Does what is submitted at once; it is done, or has failed, when `submit` returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except (AppError, OSError, RuntimeError, MemoryError) as problem:
            future.set_exception(problem)
        return future
