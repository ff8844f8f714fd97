"""Packed block, the unit of offload: a module's tensors as one run of bytes.

    [ tensors held in host memory | tensors that are spans of a file, read in every step ]
      biases, norms, scales, all of      weights, the bytes of a file unless a type differs
      it where RAM holds them

FSDP calls such a run of bytes a flat parameter. One copy brings a whole block to a device, where its tensors become
views of a slot: nothing is allocated, and nothing is left behind. While a block is offloaded its parameters and buffers
are views of what the host holds, or stand on the meta device, so that using it by mistake is an error and not a wrong
picture.

diffusers' group offloading moves tensor by tensor and knows no files. Left out: when a block is copied (ring.py) and
how (machine/copies.py); files in other layouts than the program's own, from which nothing large is ever drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.span import Span, open_in_order
from ideogram_app.errors import CheckpointError

# Bytes between starts of tensors, as CUDA's own allocations have it: vector loads and TMA rely on 16.
TENSOR_ALIGNMENT = 256


@dataclass(frozen=True)
class Item:
    """One tensor of a module, and where its bytes begin among those of the block."""

    owner: nn.Module
    name: str
    absent: Tensor  # on the meta device: its shape, its type, and whether it is a parameter
    start: int
    spans: tuple[Span, ...]  # of a file, rows of one below those of another; () where host memory holds it

    def part(self, flat: Tensor) -> Tensor:
        """Its bytes among those of the block, uint8."""
        return flat[self.start : self.start + self.absent.nbytes]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor itself there; nothing is copied."""
        tensor = self.part(flat).view(self.absent.dtype).view(self.absent.shape)
        return nn.Parameter(tensor, requires_grad=False) if isinstance(self.absent, nn.Parameter) else tensor

    def put(self, tensor: Tensor) -> None:
        """Let the module use this tensor; a parameter stays a parameter."""
        if isinstance(tensor, nn.Parameter):
            self.owner._parameters[self.name] = tensor
        else:
            self.owner._buffers[self.name] = tensor

    def read(self, flat: Tensor, files: Callable[[Path], FileIO]) -> None:
        """Its bytes from the file into host memory, in the type in which the module holds them; errors of `fill`."""
        into, done = self.part(flat), 0
        for span in self.spans:
            size = prod(span.shape) * self.absent.itemsize
            target = into[done : done + size]
            if span.dtype == self.absent.dtype:
                span.fill(files(span.path), 0, target)
            else:
                target.view(self.absent.dtype).view(span.shape).copy_(span.read())
            done += size


class PackedBlock:
    """The tensors of one module, ready to be copied; from now on they are views of what the host holds, or meta.

    Args:
        pinned_buffer: makes host memory, uint8 (size,), that copies to the device start from.
        file_spans: by the name of a tensor, where its bytes lie in a file; the host does not hold such a tensor.

    Attributes:
        size: bytes of the whole block; held: uint8 (at most size,), its first tensors, in host memory.
    """

    def __init__(
        self,
        module: nn.Module,
        pinned_buffer: Callable[[int], Tensor],
        file_spans: Mapping[str, Sequence[Span]] | None = None,
    ) -> None:
        found, file_spans = _tensors(module), file_spans or {}
        ordered = sorted(found, key=lambda name: name in file_spans)  # stable: what the host holds comes first
        self.items: list[Item] = []
        start = held = 0
        for name in ordered:
            owner, leaf, tensor = found[name]
            spans = tuple(file_spans.get(name, ()))
            _expect(name, tensor, spans)
            self.items.append(Item(owner, leaf, _absent(tensor), start, spans=spans))
            start += -(-tensor.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
            held = held if spans else start
        self.size, self.held = start, pinned_buffer(held)
        for name, item in zip(ordered, self.items, strict=True):
            if not item.spans:
                item.part(self.held).copy_(found[name][2].contiguous().view(-1).view(torch.uint8))
        self._views: dict[int, list[Tensor]] = {}  # by the address of a slot
        self._on_host = [item.absent if item.spans else item.view(self.held) for item in self.items]
        self.bind_host()

    @property
    def in_memory(self) -> bool:
        """Whether the host holds all of it."""
        return not any(item.spans for item in self.items)

    def fill(self, flat: Tensor) -> None:
        """All bytes into host memory, uint8 (size,) or longer: what the host holds, and what is read.

        Raises:
            CheckpointError: a file ends too early or cannot be read.
        """
        flat[: len(self.held)].copy_(self.held)
        with ExitStack() as stack:
            opened: dict[Path, FileIO] = {}

            def files(path: Path) -> FileIO:
                if path not in opened:
                    opened[path] = stack.enter_context(open_in_order(path))
                return opened[path]

            for item in self.items:
                if item.spans:
                    item.read(flat, files)

    def bind_device(self, slot: Tensor) -> None:
        """Let the module use the tensors in a slot that holds its bytes, uint8 (size,) or longer on any device."""
        key = slot.data_ptr()
        if key not in self._views:
            with torch.inference_mode(False):
                self._views[key] = [item.view(slot) for item in self.items]
        for item, tensor in zip(self.items, self._views[key], strict=True):
            item.put(tensor)

    def bind_host(self) -> None:
        """Let the module use what the host holds; its other tensors have shapes and no numbers."""
        for item, tensor in zip(self.items, self._on_host, strict=True):
            item.put(tensor)

    def detach(self) -> None:
        """Drop every slot and what the host holds, for good: the module is left with shapes."""
        for item in self.items:
            item.put(item.absent)
        self._views.clear()
        self._on_host, self.held = [], self.held[:0].clone()


def file_spans(
    file: PackedFile, module: nn.Module, linears: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Span, ...]]:
    """For every weight of a module the spans that it is made of, by the weight's name in the module.

    A merged layer's weight is the rows of its parts one below another, so it is a list of spans. Scales, norms and
    biases are small, may be computed (a Q4_K row's INT8 scale is), and stay in host memory.

    Args:
        linears: by the path of a layer, the Linears of the file that are merged into it, the first on top.
    """
    found = {}
    for path, names in linears.items():
        spans = deque(span for name in names for span in file.weight_spans(name))
        for inner, layer in module.get_submodule(path).named_modules(prefix=path):
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor):
                continue  # a SideBySide, whose own layers follow
            taken: list[Span] = []
            while sum(span.shape[0] for span in taken) < len(weight):
                taken.append(spans.popleft())
            found[f"{inner}.weight"] = tuple(taken)
    return found


def _tensors(module: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer by its name: who owns it, as what, the tensor."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, owner in module.named_modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                found[f"{path}.{leaf}" if path else leaf] = (owner, leaf, tensor)
    return found


def _absent(tensor: Tensor) -> Tensor:
    """Its shape and type, without numbers."""
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


def _expect(name: str, tensor: Tensor, spans: tuple[Span, ...]) -> None:
    """Refuse spans that are not as many numbers as the tensor that they should become."""
    count = sum(prod(span.shape) for span in spans)
    if spans and count != tensor.numel():
        raise CheckpointError(
            f"{spans[0].path} does not hold what {name} is made of",
            expected=f"{tensor.numel():,} numbers",
            got=f"{count:,}",
        )
