"""A few places on a device that many blocks take in turn, each brought there ahead of its use.

    order        a  b  c  d  a  b ...                 of use, over and over: a step after the other
    place 0      [ a computes ]           [ c computes ]
    place 1        b arrives  [ b computes ]  d arrives  [ d computes ]
    place 0                     c arrives

A place is filled again as soon as the block in it has been used, so with two places one block arrives while another
one computes, and copying is hidden wherever it takes no longer than computing. The order is an advice: what is taken
out of turn is brought at once, what is never taken gives its place up. Blocks that lie in a file are read by a thread,
towards a processor into the place itself, towards a device through two buffers in locked memory; where no thread but
the one that computes may copy, by that one.

Left out: deciding who travels (the plan does), and sharing a place between small blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from torch import Tensor

from ideogram_app.model.offload.carrier import Carrier, Mark
from ideogram_app.model.offload.packed_block import Freight
from ideogram_app.planning.streaming import FILE_BUFFERS


@dataclass(eq=False)
class Place:
    """Memory on the device for one block.

    Attributes:
        holds: whose bytes are here, or coming.
        reading: set while they are read from a file; then `arrived` is behind their copy.
        used: behind the last computation with what is here; at first behind that with whatever had this memory before.
        taken: whether that may still be going on.
    """

    memory: Tensor
    holds: Freight | None = None
    reading: Future[None] | None = None
    arrived: Mark = None
    used: Mark = None
    taken: bool = False


@dataclass(eq=False)
class Buffer:
    """Locked memory between a file and a device; `sent` is behind the last copy out of it."""

    memory: Tensor
    sent: Mark = None


class Ring:
    """Places on one device, and the blocks that share them.

    Args:
        slots: how many places, at least two for copies to hide.
        order: every block, in the order of use.
    """

    def __init__(self, carrier: Carrier, slots: int, order: Sequence[Freight]) -> None:
        size = max(freight.size for freight in order)
        self._carrier, self._order = carrier, list(order)
        self._turn = {freight: turn for turn, freight in enumerate(self._order)}
        self._places = [Place(carrier.room(size)) for _ in range(min(slots, len(self._order)))]
        for place in self._places:
            place.used = carrier.mark()
        reads = any(not freight.in_memory for freight in self._order)
        self._reader = ThreadPoolExecutor(1, "weights") if reads and carrier.threads else None
        through = FILE_BUFFERS if reads and not carrier.direct else 0
        self._buffers = [Buffer(carrier.shelf(size)) for _ in range(through)]
        self._copies = 0
        self._bring_ahead(len(self._order) - 1)

    @property
    def copies(self) -> int:
        """How often a block was brought."""
        return self._copies

    def take(self, freight: Freight) -> None:
        """Whatever is computed from now on finds this block on the device.

        Raises:
            CheckpointError: its file ends too early or cannot be read.
        """
        place = self._place_of(freight)
        if place is None:
            place = self._spare(())
            assert place is not None  # blocks are used one after another, so at most one is taken
            self._begin(freight, place)
        if place.reading is not None:
            reading, place.reading = place.reading, None
            try:
                reading.result()
            except BaseException:
                place.holds = None
                raise
        self._carrier.wait(place.arrived)
        place.taken = True
        freight.go_to(place.memory)

    def release(self, freight: Freight) -> None:
        """The block was used; its place goes to the next one that has none."""
        place = self._place_of(freight)
        freight.go_home()
        if place is None:
            return
        place.used, place.taken = self._carrier.mark(), False
        self._bring_ahead(self._turn[freight])

    def close(self) -> None:
        """Wait for everything under way and let go of all places."""
        if self._reader:
            self._reader.shutdown(wait=True, cancel_futures=True)
        for place in self._places:
            self._carrier.settle(place.arrived)
            self._carrier.settle(place.used)
        self._places.clear()
        self._buffers.clear()

    def _bring_ahead(self, turn: int) -> None:
        """Begin with those of the next blocks that are neither here nor coming."""
        following = list(self._after(turn))
        wanted = set(following)
        for freight in following:
            if self._place_of(freight) is not None:
                continue
            place = self._spare(wanted)
            if place is None:
                return
            self._begin(freight, place)

    def _after(self, turn: int) -> Iterator[Freight]:
        """As many as there are places, in the order of use."""
        for ahead in range(1, len(self._places) + 1):
            yield self._order[(turn + ahead) % len(self._order)]

    def _place_of(self, freight: Freight) -> Place | None:
        return next((place for place in self._places if place.holds is freight), None)

    def _spare(self, wanted: Collection[Freight]) -> Place | None:
        """A place that is neither in use nor holds what is wanted soon."""
        return next((place for place in self._places if not place.taken and place.holds not in wanted), None)

    def _begin(self, freight: Freight, place: Place) -> None:
        """Bring a block to a place, once what was there is used."""
        if place.reading is not None and not place.reading.cancel():
            wait([place.reading])  # of what nobody took; a failure of it is nobody's either
        self._copies += 1
        place.reading = None
        place.holds, place.arrived = freight, None
        if freight.in_memory:
            place.arrived = self._carrier.send(freight.kept, place.memory[: freight.size], place.used)
        elif self._reader:
            place.reading = self._reader.submit(self._read, freight, place, self._copies)
        else:
            place.holds = None  # until all of it is there
            self._read(freight, place, self._copies)
            place.holds = freight

    # Runs in the thread, where there is one.

    def _read(self, freight: Freight, place: Place, turn: int) -> None:
        if self._carrier.direct:
            freight.fill(place.memory)
            return
        buffer = self._buffers[turn % len(self._buffers)]
        self._carrier.settle(buffer.sent)
        freight.fill(buffer.memory)
        buffer.sent = self._carrier.send(buffer.memory[: freight.size], place.memory[: freight.size], place.used)
        place.arrived = buffer.sent
