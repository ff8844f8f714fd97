"""Pinned memory: locked for every device, given back once, and a refusal leaves nothing behind."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from ideogram_app.machine import copies as copies_module
from ideogram_app.machine.copies import NOT_PINNED, PORTABLE, AsyncCopyStream, copy_stream


@pytest.mark.gpu
def test_locked_memory_is_locked_and_given_back() -> None:
    stream = copy_stream(torch.device("cuda:0"))
    memory = stream.pinned_buffer(3_000_001)
    assert memory.is_pinned() and not stream.notes
    target = stream.device_buffer(len(memory))
    memory.fill_(7)
    stream.synchronize(stream.copy_async(memory, target, None))
    assert bool((target == 7).all())
    stream.close()
    assert not memory.is_pinned()


class Driver:
    """What `torch.cuda.cudart()` gives: it locks memory, or refuses with an error's number."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.locked = answer, list[tuple[int, int, int]]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.locked += [(pointer, size, flags)] if not self.answer else []
        return self.answer

    def cudaHostUnregister(self, pointer: int) -> int:
        self.locked = [row for row in self.locked if row[0] != pointer]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """CUDA as far as an `AsyncCopyStream` touches it to lock memory; streams do nothing."""
    made = Driver()
    monkeypatch.setattr(torch, "Stream", MagicMock())
    monkeypatch.setattr(torch.accelerator, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_locked_memory_is_locked_for_every_device_and_unlocked_once(driver: Driver) -> None:
    streamed = AsyncCopyStream(torch.device("cuda", 1))
    shelves = [streamed.pinned_buffer(size) for size in (5000, 1, 0)]
    assert [(size, flags) for _, size, flags in driver.locked] == [(5000, PORTABLE), (1, PORTABLE)]
    assert [len(shelf) for shelf in shelves] == [5000, 1, 0] and not streamed.notes
    streamed.close()
    streamed.close()
    assert driver.locked == []


def test_a_refusal_to_lock_is_noted_once_and_its_error_is_not_left_for_whoever_computes_next(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[torch.device] = []

    def computed(device: torch.device) -> None:
        left.append(device)
        raise RuntimeError("CUDA error: out of memory")  # of the refusal, told late

    monkeypatch.setattr(copies_module, "_compute_something", computed)
    driver.answer = 2
    device = torch.device("cuda", 0)
    streamed = AsyncCopyStream(device)
    for _ in range(3):
        streamed.pinned_buffer(100).fill_(7)
    assert left == [device] * 3 and streamed.notes == [NOT_PINNED]
    streamed.close()
