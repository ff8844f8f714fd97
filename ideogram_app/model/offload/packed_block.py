"""A module as one run of bytes: what of it stays in host memory, what is read from its file again, where it goes.

    [ tensors kept in host memory | tensors that are spans of a file, read at every visit ]
      biases, norms, scales, all of      weights, the bytes of a file unless a type differs
      it where RAM holds them

One copy brings a whole block to a device, where its tensors become views of the place that it was given: nothing is
allocated, and nothing is left behind. While a module is away its parameters and buffers are views of what is kept, or
stand on the meta device, so that using it by mistake is an error and not a wrong picture.

diffusers' group offloading moves tensor by tensor and knows no files. Left out: when anything travels (ring.py), and
how a device copies (carrier.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ideogram_app.checkpoints.span import Span, open_in_order
from ideogram_app.errors import CheckpointError

ALIGNMENT = 256  # bytes between starts of tensors, as CUDA's own allocations have it: vector loads and TMA rely on 16


@dataclass(frozen=True)
class Item:
    """One tensor of a module, and its place among the bytes.

    Attributes:
        spans: where it lies in a file, rows of one below those of another; () where it is kept in host memory.
    """

    owner: nn.Module
    name: str
    is_parameter: bool
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[Span, ...] = ()

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def part(self, flat: Tensor) -> Tensor:
        """Its bytes among those of the module, uint8 (size,)."""
        return flat[self.start : self.start + self.size]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor itself there; nothing is copied."""
        return self.part(flat).view(self.dtype).view(self.shape)

    def put(self, tensor: Tensor) -> None:
        """Let the module use this tensor; a parameter stays a parameter."""
        if isinstance(tensor, nn.Parameter):
            self.owner._parameters[self.name] = tensor
        else:
            self.owner._buffers[self.name] = tensor

    def read(self, flat: Tensor, files: Callable[[Path], FileIO]) -> None:
        """Its bytes from the file into their place in host memory, in the type in which the module holds them.

        Raises:
            CheckpointError: the file ends too early or cannot be read.
        """
        into, done = self.part(flat), 0
        for span in self.spans:
            size = prod(span.shape) * self.dtype.itemsize
            place = into[done : done + size]
            if span.dtype == self.dtype:
                span.fill(files(span.path), 0, place)
            else:
                place.view(self.dtype).view(span.shape).copy_(span.read())
            done += size


class Freight:
    """The tensors of one module, ready to travel; from now on they are views of what is kept, or away.

    Args:
        shelf: makes host memory, uint8, that copies to the device start from.
        located: by the name of a tensor, where its bytes lie in a file; such a tensor is not kept in host memory.
    """

    def __init__(
        self, module: nn.Module, shelf: Callable[[int], Tensor], located: Mapping[str, Sequence[Span]] | None = None
    ) -> None:
        found = _tensors(module)
        located = located or {}
        ordered = sorted(found, key=lambda name: name in located)  # stable: what is kept comes first
        self.items: list[Item] = []
        start = kept = 0
        for name in ordered:
            owner, leaf, tensor, is_parameter = found[name]
            spans = tuple(located.get(name, ()))
            _expect(name, tensor, spans)
            self.items.append(Item(owner, leaf, is_parameter, start, tensor.dtype, tuple(tensor.shape), spans))
            start += -(-self.items[-1].size // ALIGNMENT) * ALIGNMENT
            kept = kept if spans else start
        self.size, self.kept = start, shelf(kept)
        for name, item in zip(ordered, self.items, strict=True):
            if not item.spans:
                item.part(self.kept).copy_(found[name][2].contiguous().view(-1).view(torch.uint8))
        self._views: dict[int, list[Tensor]] = {}
        self._home = [_as(item, _absent(item) if item.spans else item.view(self.kept)) for item in self.items]
        self.go_home()

    @property
    def in_memory(self) -> bool:
        """Whether all of it is kept in host memory."""
        return not any(item.spans for item in self.items)

    def fill(self, flat: Tensor) -> None:
        """All bytes into host memory, uint8 (size,) or longer: what is kept, and what is read.

        Raises:
            CheckpointError: a file ends too early or cannot be read.
        """
        flat[: len(self.kept)].copy_(self.kept)
        with ExitStack() as stack:
            opened: dict[Path, FileIO] = {}

            def files(path: Path) -> FileIO:
                if path not in opened:
                    opened[path] = stack.enter_context(open_in_order(path))
                return opened[path]

            for item in self.items:
                if item.spans:
                    item.read(flat, files)

    def go_to(self, flat: Tensor) -> None:
        """Let the module use the tensors at a place that holds its bytes, uint8 (size,) or longer on any device."""
        key = flat.data_ptr()
        if key not in self._views:
            with torch.inference_mode(False):
                self._views[key] = [_as(item, item.view(flat)) for item in self.items]
        for item, tensor in zip(self.items, self._views[key], strict=True):
            item.put(tensor)

    def go_home(self) -> None:
        """Let the module use what is kept; what is not kept has shapes and no numbers."""
        for item, tensor in zip(self.items, self._home, strict=True):
            item.put(tensor)

    def vanish(self) -> None:
        """Let go of every place and of what is kept, for good: the module is left with shapes."""
        for item in self.items:
            item.put(_as(item, _absent(item)))
        self._views.clear()
        self._home, self.kept = [], self.kept[:0].clone()


def _tensors(module: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor, bool]]:
    """Every parameter and buffer by its name: who owns it, as what, the tensor, whether it is a parameter."""
    found = {}
    for path, owner in module.named_modules():
        for tensors, is_parameter in ((owner._parameters, True), (owner._buffers, False)):
            for leaf, tensor in tensors.items():
                if tensor is not None:
                    found[f"{path}.{leaf}" if path else leaf] = (owner, leaf, tensor, is_parameter)
    return found


def _as(item: Item, tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if item.is_parameter else tensor


def _absent(item: Item) -> Tensor:
    return torch.empty(item.shape, dtype=item.dtype, device="meta")


def _expect(name: str, tensor: Tensor, spans: tuple[Span, ...]) -> None:
    """Refuse spans that are not as many numbers as the tensor that they should become."""
    count = sum(prod(span.shape) for span in spans)
    if spans and count != tensor.numel():
        raise CheckpointError(
            f"{spans[0].path} does not hold what {name} is made of",
            expected=f"{tensor.numel():,} numbers",
            got=f"{count:,}",
        )
