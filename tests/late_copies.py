"""A device whose copies come as late as they may: what does not wait for them reads old bytes."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ideogram_app.machine.copies import BlockingCopyStream, Event


class Late(BlockingCopyStream):
    """A device that copies when somebody waits for it and not a moment sooner; it reads nothing in place."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.in_place = False
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._sent = 0
        self._lock = threading.Lock()  # the reader of a file waits too

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        with self._lock:
            self._sent += 1
            self._pending.append((self._sent, source, target))
            return self._sent  # type: ignore[return-value]

    def wait(self, event: Event) -> None:
        with self._lock:
            while self._pending and event is not None and self._pending[0][0] <= event:  # type: ignore[operator]
                _, source, target = self._pending.pop(0)
                target.copy_(source)

    synchronize = wait
