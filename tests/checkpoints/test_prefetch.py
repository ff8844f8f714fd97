"""Weights read ahead: the right bytes in any order, no buffer filled too early, no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ideogram_app.checkpoints import prefetch as transit
from ideogram_app.checkpoints.prefetch import HostLane, Lane, StreamLane, Transit, lane_to
from ideogram_app.checkpoints.span import Span
from ideogram_app.errors import CheckpointError

SOON = 20.0  # seconds after which a test gives up
CHUNK, BUFFERS = 64, 3
# In bytes: around whole chunks, a lone byte, nothing at all, more chunks than there are buffers.
SIZES = (10 * CHUNK, 1, CHUNK - 1, CHUNK, 0, CHUNK + 1, 5 * CHUNK + 3, 2 * CHUNK)


class LateCopy:
    """A copy that happens when somebody waits for it, as late as a device may do it."""

    def __init__(self, lane: LateLane, buffer: Tensor, part: Tensor) -> None:
        self.lane, self.buffer, self.part = lane, buffer, part

    def wait(self) -> None:
        with self.lane.lock:
            while self in self.lane.pending:  # a stream works in order
                first = self.lane.pending.pop(0)
                first.part.copy_(first.buffer)


class LateLane:
    """A device that copies as late as it may; `most` is how many copies were under way at once."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.buffers: Sequence[Tensor] = [torch.zeros(CHUNK, dtype=torch.uint8) for _ in range(BUFFERS)]
        self.lock = threading.Lock()  # one thread sends, two wait
        self.pending: list[LateCopy] = []
        self.most = 0
        self.rooms = 0

    def room(self, size: int) -> Tensor:
        self.rooms += 1
        return torch.zeros(size, dtype=torch.uint8)

    def send(self, buffer: Tensor, part: Tensor) -> LateCopy:
        copy = LateCopy(self, buffer, part)
        with self.lock:
            self.pending.append(copy)
            self.most = max(self.most, len(self.pending))
        return copy

    def receive(self, room: Tensor, last: transit.Sent | None) -> Tensor:
        if last:
            last.wait()
        return room


class CountingLane(HostLane):
    """Notes every room, how many of them were not taken yet, and tells when there are `enough`."""

    def __init__(self, enough: int = 0) -> None:
        super().__init__(torch.device("cpu"))
        self.rooms, self.taken, self.most = 0, 0, 0
        self.enough, self.reached = enough, threading.Event()

    def room(self, size: int) -> Tensor:
        self.rooms += 1
        self.most = max(self.most, self.rooms - self.taken)
        if self.rooms == self.enough:
            self.reached.set()
        return super().room(size)

    def receive(self, room: Tensor, last: transit.Sent | None) -> Tensor:
        self.taken += 1
        return super().receive(room, last)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(torch.randint(256, (sum(SIZES) + 7,), dtype=torch.uint8).tolist()))
    return path


def spans_of(path: Path, sizes: Sequence[int] = SIZES) -> list[Span]:
    """Spans one behind the other, after 7 bytes of something else."""
    starts = [7 + sum(sizes[:index]) for index in range(len(sizes))]
    return [Span(path, f"t{start}", start, torch.uint8, (size,)) for start, size in zip(starts, sizes, strict=True)]


def expected(span: Span) -> Tensor:
    raw = span.path.read_bytes()[span.start : span.start + span.size]
    return torch.tensor(list(raw), dtype=torch.uint8).view(span.dtype).view(span.shape)


LANES = {"host": lambda: lane_to("cpu"), "ring": LateLane}


@pytest.mark.parametrize("lane", LANES.values(), ids=LANES)
@pytest.mark.parametrize("order", ["announced", "backwards"])
def test_every_tensor_holds_its_bytes_whatever_the_order(lane, order, file, monkeypatch) -> None:
    monkeypatch.setattr(transit, "CHUNK", CHUNK)
    spans, ring = spans_of(file), lane()
    with Transit(spans, ring, ahead=CHUNK) as reading:
        for span in spans if order == "announced" else spans[::-1]:
            assert torch.equal(reading.take(span), expected(span))


def test_a_buffer_is_filled_again_only_when_its_copy_has_ended(file) -> None:
    spans, ring = spans_of(file), LateLane()
    with Transit(spans, ring) as reading:
        for span in spans:
            assert torch.equal(reading.take(span), expected(span))
    assert 1 < ring.most <= BUFFERS and not ring.pending


def test_types_and_shapes_are_those_of_the_span(tmp_path) -> None:
    path, weights = tmp_path / "weights.bin", torch.arange(12, dtype=torch.bfloat16)
    path.write_bytes(bytes(weights.view(torch.uint8).tolist()))
    matrix = Span(path, "matrix", 0, torch.bfloat16, (3, 4))
    number = Span(path, "number", 2, torch.bfloat16, ())
    with Transit([matrix, number], lane_to("cpu")) as reading:
        assert torch.equal(reading.take(matrix), weights.view(3, 4)) and reading.take(number).item() == 1.0


def test_reading_goes_on_while_a_tensor_is_used_and_stops_when_enough_wait(file) -> None:
    spans, lane = spans_of(file, [CHUNK] * 9), CountingLane(enough=3)
    with Transit(spans, lane, ahead=2 * CHUNK) as reading:
        reading.take(spans[0])
        assert lane.reached.wait(SOON)  # two more were read, and nobody asked for them
        for span in spans[1:]:
            reading.take(span)
    assert lane.rooms == 9
    assert lane.most <= 3  # two that are read ahead, and one taken but not counted yet


def test_a_tensor_larger_than_what_may_wait_is_read_ahead_alone(file) -> None:
    spans, lane = spans_of(file, [3 * CHUNK, 3 * CHUNK]), CountingLane(enough=1)
    with Transit(spans, lane, ahead=CHUNK) as reading:
        assert lane.reached.wait(SOON)
        assert all(torch.equal(reading.take(span), expected(span)) for span in spans)


def test_what_was_not_announced_or_was_taken_before_is_read_at_once(file) -> None:
    first, second, third = spans_of(file)[:3]
    with Transit([first, second], lane_to("cpu")) as reading:
        for span in (third, first, first, second):
            assert torch.equal(reading.take(span), expected(span))
    assert torch.equal(reading.take(first), expected(first))  # the thread has ended


def test_a_file_that_ends_too_early_is_named_where_its_tensor_is_taken(file) -> None:
    spans = spans_of(file)
    file.write_bytes(file.read_bytes()[: spans[-2].start + 5])
    with Transit(spans, lane_to("cpu")) as reading:
        for span in spans[:-2]:
            assert torch.equal(reading.take(span), expected(span))
        with pytest.raises(CheckpointError, match=rf"weights.bin ended inside {spans[-2].name}.*Got 5 bytes"):
            reading.take(spans[-2])
        with pytest.raises(CheckpointError, match=r"weights.bin ended inside"):
            reading.take(spans[-1])


def test_a_file_that_is_missing_is_named(tmp_path) -> None:
    (span,) = spans_of(tmp_path / "nowhere.bin", [8])
    with Transit([span], lane_to("cpu")) as reading, pytest.raises(CheckpointError, match=r"nowhere\.bin"):
        reading.take(span)


def test_what_goes_wrong_in_the_thread_is_raised_where_tensors_are_taken(file) -> None:
    class Full(HostLane):
        def room(self, size: int) -> Tensor:
            raise torch.OutOfMemoryError("no room")

    spans = spans_of(file)
    with Transit(spans, Full(torch.device("cpu"))) as reading, pytest.raises(torch.OutOfMemoryError):
        reading.take(spans[0])


@pytest.mark.parametrize("lane", LANES.values(), ids=LANES)
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_the_thread(lane, taken, file) -> None:
    with Transit(spans_of(file), lane(), ahead=CHUNK) as reading:
        for span, _ in zip(reading._spans, range(taken), strict=False):
            reading.take(span)
    assert not any(thread.is_alive() for thread in reading._threads)


def test_an_error_of_the_consumer_ends_the_thread_and_stays(file) -> None:
    with pytest.raises(ZeroDivisionError), Transit(spans_of(file), lane_to("cpu"), ahead=CHUNK) as reading:
        raise ZeroDivisionError
    assert not any(thread.is_alive() for thread in reading._threads)


def test_what_was_taken_does_not_change_with_its_file(file) -> None:
    spans = spans_of(file)
    with Transit(spans, lane_to("cpu")) as reading:
        taken = [reading.take(span) for span in spans]
    before = [expected(span) for span in spans]
    with file.open("r+b") as opened:
        opened.write(bytes(sum(SIZES)))
    assert all(torch.equal(got, want) for got, want in zip(taken, before, strict=True))


@pytest.mark.gpu
def test_tensors_arrive_on_the_device_while_it_computes(tmp_path) -> None:
    device, path = torch.device("cuda"), tmp_path / "weights.bin"
    weights = torch.randn(64, 1 << 16)  # 16 MB: whole and broken chunks of buffers of 1.5 MB
    path.write_bytes(weights.numpy().tobytes())
    spans = [Span(path, str(row), row * 2**18, torch.float32, (1 << 16,)) for row in range(64)]
    spans.append(Span(path, "all", 0, torch.float32, (64, 1 << 16)))
    lane: Lane = StreamLane(device, size=3 << 19)
    busy = torch.randn(4096, 4096, device=device)
    with Transit(spans, lane) as reading:
        for span in spans:
            tensor, busy = reading.take(span), (busy @ busy).tanh()
            assert tensor.device.type == "cuda"
            want = weights if span.name == "all" else weights[int(span.name)]
            assert torch.equal((tensor + 0).cpu(), want)
