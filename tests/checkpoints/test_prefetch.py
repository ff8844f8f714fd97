"""Prefetched weights: the right bytes in any order, no buffer filled too early, no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ideogram_app.checkpoints.prefetch import Prefetcher, prefetched
from ideogram_app.checkpoints.span import Span, without
from ideogram_app.errors import CheckpointError
from ideogram_app.machine.copies import AsyncCopyStream, BlockingCopyStream, CopyStream, Event

SOON = 20.0  # seconds after which a test gives up
CHUNK, BUFFERS = 64, 4
# In bytes: around whole chunks, a lone byte, nothing at all, more chunks than there are buffers.
SIZES = (10 * CHUNK, 1, CHUNK - 1, CHUNK, 0, CHUNK + 1, 5 * CHUNK + 3, 2 * CHUNK)


class Late(BlockingCopyStream):
    """A device that copies as late as it may: when somebody waits. `most` is how many copies were under way at once."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), lambda size, where: torch.zeros(size, dtype=torch.uint8))
        self.in_place = False
        self.lock = threading.Lock()  # one thread copies, two wait
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.begun = self.most = 0

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        with self.lock:
            self.begun += 1
            self.pending.append((self.begun, source, target))
            self.most = max(self.most, len(self.pending))
            return self.begun  # type: ignore[return-value]

    def synchronize(self, event: Event) -> None:
        with self.lock:
            while self.pending and event is not None and self.pending[0][0] <= event:  # type: ignore[operator]
                _, source, target = self.pending.pop(0)  # a stream works in order
                target.copy_(source)

    wait = synchronize


class OneThread(BlockingCopyStream):
    """A device to which only the thread that computes may copy."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.in_place = self.threads = False


class Counting(Prefetcher):
    """Notes how many spans were begun and not taken yet, and tells when so many were read."""

    def __init__(self, spans: Sequence[Span], enough: int, ahead: int) -> None:
        super().__init__(spans, host(), ahead)
        self.read, self.taken, self.most = 0, 0, 0
        self.enough, self.reached, self.lock = enough, threading.Event(), threading.Lock()

    def _read(self, span: Span) -> tuple[Tensor, Event]:
        with self.lock:
            self.read += 1
            self.most = max(self.most, self.read - self.taken)
            if self.read == self.enough:
                self.reached.set()
        return super()._read(span)

    def take(self, span: Span) -> Tensor:
        tensor = super().take(span)
        with self.lock:
            self.taken += 1
        return tensor


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


def host() -> CopyStream:
    return BlockingCopyStream(torch.device("cpu"))


DEVICES = {"host": host, "streams": Late, "one thread": OneThread}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("order", ["in order", "backwards"])
def test_every_tensor_holds_its_bytes_whatever_the_order(
    device: Callable[[], CopyStream], order: str, file: Path
) -> None:
    spans = spans_of(file)
    with Prefetcher(spans, device(), ahead=CHUNK, chunk=CHUNK) as prefetcher:
        for span in spans if order == "in order" else spans[::-1]:
            assert torch.equal(prefetcher.take(span), expected(span))


def test_a_buffer_is_filled_again_only_when_its_copy_has_ended(file: Path) -> None:
    late = Late()
    with Prefetcher(spans_of(file), late, chunk=CHUNK) as prefetcher:
        for span in spans_of(file):
            assert torch.equal(prefetcher.take(span), expected(span))
    assert 1 < late.most <= BUFFERS and not late.pending


def test_types_and_shapes_are_those_of_the_span(tmp_path: Path) -> None:
    path, weights = tmp_path / "weights.bin", torch.arange(12, dtype=torch.bfloat16)
    path.write_bytes(bytes(weights.view(torch.uint8).tolist()))
    matrix = Span(path, "matrix", 0, torch.bfloat16, (3, 4))
    number = Span(path, "number", 2, torch.bfloat16, ())
    with prefetched([matrix, number], "cpu") as reader:
        assert torch.equal(reader(matrix), weights.view(3, 4)) and reader(number).item() == 1.0


def test_reading_goes_on_while_a_tensor_is_used_and_stops_when_enough_wait(file: Path) -> None:
    spans = spans_of(file, [CHUNK] * 9)
    with Counting(spans, enough=3, ahead=2 * CHUNK) as prefetcher:
        prefetcher.take(spans[0])
        assert prefetcher.reached.wait(SOON)  # two more were read, and nobody asked for them
        for span in spans[1:]:
            prefetcher.take(span)
    assert prefetcher.read == 9
    assert prefetcher.most <= 3  # two that are read ahead, and one taken but not counted yet


def test_a_tensor_larger_than_what_may_wait_is_read_ahead_alone(file: Path) -> None:
    spans = spans_of(file, [3 * CHUNK, 3 * CHUNK])
    with Counting(spans, enough=1, ahead=CHUNK) as prefetcher:
        assert prefetcher.reached.wait(SOON)
        assert [torch.equal(prefetcher.take(span), expected(span)) for span in spans] == [True, True]
    assert prefetcher.most <= 2


def test_what_is_asked_for_out_of_turn_does_not_bring_all_before_it(file: Path) -> None:
    spans = spans_of(file, [CHUNK] * 9)
    with Counting(spans, enough=1, ahead=2 * CHUNK) as prefetcher:
        assert torch.equal(prefetcher.take(spans[8]), expected(spans[8]))
        assert prefetcher.most <= 3, "two that are next, and the one that was asked for"
        for span in spans[:8]:
            assert torch.equal(prefetcher.take(span), expected(span))
    assert prefetcher.read == 9


def test_what_was_not_announced_or_was_taken_before_is_read_at_once(file: Path) -> None:
    first, second, third = spans_of(file)[:3]
    with prefetched([first, second], "cpu") as reader:
        for span in (third, first, first, second):
            assert torch.equal(reader(span), expected(span))
    assert torch.equal(reader(first), expected(first))  # the threads have ended


def test_what_is_left_out_has_a_shape_and_is_not_read(file: Path) -> None:
    first, second, missing = *spans_of(file)[:2], spans_of(file.with_name("nowhere.bin"))[0]
    with prefetched([first, second], "cpu") as reader:
        reader = without({second, missing}, reader)
        assert torch.equal(reader(first), expected(first))
        assert all(reader(span).is_meta and reader(span).shape == span.shape for span in (second, missing))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_file_that_ends_too_early_is_named_where_its_tensor_is_taken(
    device: Callable[[], CopyStream], file: Path
) -> None:
    spans = spans_of(file)
    file.write_bytes(file.read_bytes()[: spans[-2].start + 5])
    with Prefetcher(spans, device(), chunk=CHUNK) as prefetcher:
        for span in spans[:-2]:
            assert torch.equal(prefetcher.take(span), expected(span))
        with pytest.raises(CheckpointError, match=rf"weights.bin ended inside {spans[-2].name}.*Got 5 bytes"):
            prefetcher.take(spans[-2])
        with pytest.raises(CheckpointError, match=r"weights.bin ended inside"):
            prefetcher.take(spans[-1])


def test_many_that_fail_leave_the_buffers_to_those_that_do_not(file: Path) -> None:
    good, missing = spans_of(file), spans_of(file.with_name("nowhere.bin"))
    mixed = [span for pair in zip(missing, good, strict=True) for span in pair]
    with Prefetcher(mixed, Late(), ahead=CHUNK, chunk=CHUNK) as prefetcher:
        for span in mixed:
            if span in missing:
                with pytest.raises(CheckpointError, match=r"nowhere\.bin"):
                    prefetcher.take(span)
            else:
                assert torch.equal(prefetcher.take(span), expected(span))


def test_no_copy_lands_in_memory_that_a_failure_has_freed(file: Path) -> None:
    (span,) = spans_of(file, [3 * CHUNK])
    file.write_bytes(file.read_bytes()[: span.start + 2 * CHUNK + 1])
    late = Late()
    with Prefetcher([span], late, chunk=CHUNK) as prefetcher:
        with pytest.raises(CheckpointError):
            prefetcher.take(span)
        assert late.begun == 2 and not late.pending


def test_what_goes_wrong_in_the_thread_is_raised_where_tensors_are_taken(file: Path) -> None:
    class Full(Late):
        def device_buffer(self, size: int) -> Tensor:
            raise torch.OutOfMemoryError("no room")

    with Prefetcher(spans_of(file), Full()) as prefetcher, pytest.raises(torch.OutOfMemoryError):
        prefetcher.take(spans_of(file)[0])


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_the_threads_and_the_copies(
    device: Callable[[], CopyStream], taken: int, file: Path
) -> None:
    copies, before = device(), threading.active_count()
    with Prefetcher(spans_of(file), copies, ahead=CHUNK, chunk=CHUNK) as prefetcher:
        for span in spans_of(file)[:taken]:
            prefetcher.take(span)
    assert threading.active_count() == before
    assert not getattr(copies, "pending", [])


def test_an_error_of_the_consumer_ends_the_threads_and_stays(file: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), prefetched(spans_of(file), "cpu"):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_leaving_does_not_wait_for_the_rest_of_a_large_tensor(tmp_path: Path) -> None:
    """The first chunk is held up until the context is being left; the thousand behind it are not read."""
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(1000 * CHUNK))
    (span,) = [Span(path, "large", 0, torch.uint8, (1000 * CHUNK,))]
    begun, parts = threading.Event(), list[Tensor]()

    class Slow(Late):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            parts.append(target)
            begun.set()
            assert prefetcher._closing.wait(SOON)
            return super().copy_async(source, target, after)

    prefetcher = Prefetcher([span], Slow(), chunk=CHUNK)
    with prefetcher:
        assert begun.wait(SOON)
    assert len(parts) == 1


def test_what_was_taken_does_not_change_with_its_file(file: Path) -> None:
    spans = spans_of(file)
    with prefetched(spans, "cpu") as reader:
        taken = [reader(span) for span in spans]
    before = [expected(span) for span in spans]
    with file.open("r+b") as opened:
        opened.write(bytes(sum(SIZES)))
    assert all(torch.equal(got, want) for got, want in zip(taken, before, strict=True))


@pytest.mark.gpu
def test_tensors_arrive_on_the_device_while_it_computes(tmp_path: Path) -> None:
    device, path = torch.device("cuda"), tmp_path / "weights.bin"
    weights = torch.randn(64, 1 << 16)  # 16 MB: whole and broken chunks of buffers of 1.5 MB
    path.write_bytes(weights.numpy().tobytes())
    spans = [Span(path, str(row), row * 2**18, torch.float32, (1 << 16,)) for row in range(64)]
    spans.append(Span(path, "all", 0, torch.float32, (64, 1 << 16)))
    copies = AsyncCopyStream(device)
    busy = torch.randn(4096, 4096, device=device)
    with Prefetcher(spans, copies, chunk=3 << 19) as prefetcher:
        for span in spans:
            tensor = prefetcher.take(span)
            busy = (busy @ busy).tanh()
            assert tensor.device.type == "cuda"
            want = weights if span.name == "all" else weights[int(span.name)]
            assert torch.equal((tensor + 0).cpu(), want)
    copies.close()
