"""Copies in any order that streams allow: a ring and a prefetcher compute on the right bytes in all of them.

The device is simulated: work is queued on two streams and done when somebody waits for it, in an order drawn at random
from those that the events leave open; memory that is freed is given out again at once.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ideogram_app.checkpoints.prefetch import Prefetcher
from ideogram_app.checkpoints.span import Span
from ideogram_app.errors import CheckpointError
from ideogram_app.machine.copies import BlockingCopyStream, StagingBuffers
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.model.offload.ring import Ring

CPU = torch.device("cpu")
ROUNDS = 60  # orders tried; a ring or prefetcher without one of its waits fails within a dozen
MEMORY = 2**17  # bytes of the device


class Work:
    """Something that a stream does once the work before it on its stream, and some on the other, is done."""

    def __init__(self, do: Callable[[], object], after: list[Work]) -> None:
        self.do, self.after, self.is_done = do, after, False


class Streams(BlockingCopyStream):
    """A device with a copy stream and a compute stream. An event is the work that it is behind."""

    def __init__(self, seed: int) -> None:
        super().__init__(CPU, self._allocate)
        self.in_place, self.threads = False, True
        self._random, self._lock = random.Random(seed), threading.RLock()
        self._copying, self._computing = deque[Work](), deque[Work]()
        self._awaited: list[Work] = []  # by whatever is computed next
        self._bytes = np.zeros(MEMORY, np.uint8)
        self._memory = torch.from_numpy(self._bytes)
        self._given: dict[int, tuple[int, weakref.ref[np.ndarray]]] = {}  # arrays live as long as any view of theirs

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        """The first gap that is large enough, whatever the device has yet to do with it."""
        with self._lock:
            start = 0
            for begin, (taken, array) in sorted(self._given.items()):
                if array() is not None:
                    if begin - start >= size:
                        break
                    start = max(start, begin + taken)
            memory = self._bytes[start : start + size]
            self._given[start] = size, weakref.ref(memory)
            return torch.from_numpy(memory)

    def copy_async(self, source: Tensor, target: Tensor, after: Any) -> Any:
        start, end = self.place(target), self.place(target) + len(target)  # so that it holds no memory itself
        work = Work(lambda: self._memory[start:end].copy_(source), [after] if after else [])
        with self._lock:
            self._copying.append(work)
        return work

    def compute(self, do: Callable[[], object]) -> Work:
        with self._lock:
            work, self._awaited = Work(do, self._awaited), []
            self._computing.append(work)
        return work

    def event(self) -> Any:
        return self.compute(lambda: None)

    def wait(self, event: Any) -> None:
        with self._lock:
            self._awaited += [event] if event else []

    def synchronize(self, event: Any) -> None:
        while event and not event.is_done:
            assert self.step() or event.is_done, "the streams wait for each other"  # done by another thread meanwhile

    def step(self) -> bool:
        """Do one of the works that may come next; whether there is one."""
        with self._lock:
            heads = [stream for stream in (self._copying, self._computing) if stream]
            ready = [stream for stream in heads if all(work.is_done for work in stream[0].after)]
            if ready:
                work = self._random.choice(ready).popleft()
                work.do()
                work.is_done = True
            return bool(ready)

    def some_steps(self) -> None:
        for _ in range(self._random.randrange(4)):
            self.step()

    def finish(self) -> None:
        while self.step():
            pass

    def place(self, tensor: Tensor) -> int:
        return tensor.data_ptr() - self._memory.data_ptr()

    def at(self, place: int, size: int) -> bytes:
        return bytes(self._memory[place : place + size].tolist())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(random.Random(0).randbytes(8000))
    return path


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_whatever_the_streams_do_first_prefetched_tensors_are_right_when_they_are_computed_with(
    seed: int, file: Path
) -> None:
    draw, streams, data = random.Random(seed), Streams(seed), file.read_bytes()
    sizes = [draw.randint(1, 400) for _ in range(draw.randint(1, 12))]
    spans = [Span(file, str(turn), sum(sizes[:turn]), torch.uint8, (size,)) for turn, size in enumerate(sizes)]
    damaged = [
        Span(file, f"damaged {turn}", 8000 - 50 * turn, torch.uint8, (200,)) for turn in range(draw.choice([0, 3]))
    ]
    order = draw.sample(spans + damaged, len(spans + damaged))
    taken = order if draw.random() < 0.6 else draw.sample(order, draw.randint(1, len(order)))
    wrong, kept = list[str](), list[Tensor]()

    def computed(span: Span, place: int) -> None:
        wrong.extend([span.name] if streams.at(place, span.size) != data[span.start : span.start + span.size] else [])

    with Prefetcher(order, streams, draw.choice([50, 500, 5000]), draw.choice([16, 64, 100])) as prefetcher:
        for span in taken:
            if span in damaged:
                with pytest.raises(CheckpointError):
                    prefetcher.take(span)
                continue
            tensor = prefetcher.take(span)
            place = streams.place(tensor)
            streams.compute(lambda span=span, place=place: computed(span, place))  # type: ignore[misc]
            kept += [tensor] if draw.random() < 0.3 else []
            del tensor  # its memory may be given out before it is computed with
            streams.some_steps()
    streams.finish()
    assert wrong == []


class FileBlock(PackedBlock):
    """A block whose bytes come from elsewhere than host memory at every visit; now and then they cannot be read."""

    in_memory, fails = False, False

    def fill(self, flat: Tensor) -> None:
        if self.fails:
            raise CheckpointError("The file ended")
        super().fill(flat)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_whatever_the_streams_do_first_a_block_computes_on_its_own_bytes(seed: int) -> None:
    draw, streams = random.Random(seed), Streams(seed)
    streams.threads = draw.random() < 0.8
    layers = [nn.Linear(8, 8, bias=False) for _ in range(draw.randint(1, 8))]
    weights = [bytes(layer.weight.detach().view(-1).view(torch.uint8).tolist()) for layer in layers]
    blocks = [draw.choice([PackedBlock, FileBlock])(layer, streams.pinned_buffer) for layer in layers]
    ring, wrong = Ring(streams, draw.randint(1, 4), blocks), list[int]()

    def computed(number: int, place: int) -> None:
        wrong.extend([number] if streams.at(place, len(weights[number])) != weights[number] else [])

    for _ in range(4):
        order = (
            range(len(blocks)) if draw.random() < 0.7 else draw.sample(range(len(blocks)), draw.randint(1, len(blocks)))
        )
        for number in order:
            block = blocks[number]
            if isinstance(block, FileBlock):
                block.fails = draw.random() < 0.1
            try:
                ring.take(block)
            except CheckpointError:
                continue
            place = streams.place(layers[number].weight)
            streams.compute(lambda number=number, place=place: computed(number, place))  # type: ignore[misc]
            streams.some_steps()
            ring.release(block)
    ring.close()
    streams.finish()
    assert wrong == []


def test_staging_buffers_are_filled_again_only_when_their_copies_are_over() -> None:
    streams = Streams(0)
    target, staging = streams.device_buffer(40), StagingBuffers(streams, 2, 10)
    for number in range(4):
        staging.copy(lambda part, number=number: part.fill_(number), target[10 * number :][:10], None)  # type: ignore[misc]
    staging.synchronize()
    assert target.view(4, 10).eq(torch.arange(4)[:, None]).all()
