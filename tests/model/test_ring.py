"""The ring of device buffers by itself: blocks come in the order of use, and nothing in use is overwritten."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ideogram_app.errors import CheckpointError
from ideogram_app.machine.copies import BlockingCopyStream, Event
from ideogram_app.model.offload.offload import OffloadHooks, offload
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.model.offload.ring import Ring
from tests.late_copies import Late

CPU = torch.device("cpu")


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_blocks_are_prefetched_in_the_order_of_use(slots: int, count: int) -> None:
    copied: list[Tensor] = []

    class Noting(BlockingCopyStream):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            copied.append(source)
            return super().copy_async(source, target, after)

    copies = Noting(CPU)
    blocks = [PackedBlock(nn.Linear(4, 4), copies.pinned_buffer) for _ in range(count)]
    ring = Ring(copies, slots, blocks)
    assert len(copied) == min(slots, count), "the first ones come before they are asked for"
    for _ in range(3):
        for turn, block in enumerate(blocks):
            before = len(copied)
            ring.take(block)
            assert len(copied) == before, "what is taken in turn is there already"
            ring.release(block)
            if slots < count:
                assert copied[-1] is blocks[(turn + slots) % count].held
    assert ring.copies == (min(slots, count) if slots >= count else slots + 3 * count)


def test_a_slot_is_overwritten_only_behind_the_last_use_of_it() -> None:
    """Every copy is told to wait for an event that was recorded after the block before it was used."""
    log: list[tuple[str, int]] = []

    class Noting(BlockingCopyStream):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            log.append((f"copy after {after}", target.data_ptr()))
            return super().copy_async(source, target, after)

        def event(self) -> Event:
            log.append(("event", 0))
            return len(log)  # type: ignore[return-value]

    copies = Noting(CPU)
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    hooks = OffloadHooks(CPU, 2, copies)
    offload(layers, list(layers), frozenset(range(6)), hooks)
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, __: log.append(("use", layer.weight.data_ptr())), prepend=True)
    hooks.start()
    layers(torch.zeros(1, 4))
    uses: dict[int, int] = {}
    for moment, (what, pointer) in enumerate(log, 1):
        if what == "use":
            uses[pointer] = moment
        last = max((when for used, when in uses.items() if 0 <= used - pointer < 4096), default=0)
        if what.startswith("copy") and last:
            assert int(what.split()[-1]) > last
    assert len(uses) >= 2


def test_the_first_copies_wait_for_whatever_had_the_memory_of_a_slot_before() -> None:
    """Memory that was freed may still be read or written by what the device was given before."""
    told: list[Event] = []

    class Noting(BlockingCopyStream):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            told.append(after)
            return super().copy_async(source, target, after)

        def event(self) -> Event:
            return "a point in its work"  # type: ignore[return-value]

    copies = Noting(CPU)
    Ring(copies, 2, [PackedBlock(nn.Linear(4, 4), copies.pinned_buffer) for _ in range(3)])
    assert told == ["a point in its work"] * 2


@pytest.mark.parametrize("threads", [True, False], ids=["by a thread", "by the only one"])
def test_a_block_whose_file_cannot_be_read_is_told_of_where_it_is_taken_and_read_again(threads: bool) -> None:
    class Unreadable(PackedBlock):
        in_memory, readable = False, False

        def fill(self, flat: Tensor) -> None:
            if not self.readable:
                raise CheckpointError("The file ended")
            super().fill(flat)

    copies = Late()
    copies.threads = threads
    layers = [nn.Linear(4, 4) for _ in range(3)]
    weights = [layer.weight.clone() for layer in layers]
    blocks = [Unreadable(layer, copies.pinned_buffer) for layer in layers]
    ring = Ring(copies, 2, blocks)
    for block in blocks:
        with pytest.raises(CheckpointError, match="ended"):
            ring.take(block)
        block.readable = True
        ring.take(block)
        ring.release(block)
    for block, layer, weight in zip(blocks, layers, weights, strict=True):
        ring.take(block)
        assert torch.equal(layer.weight, weight)
        ring.release(block)
    ring.close()
