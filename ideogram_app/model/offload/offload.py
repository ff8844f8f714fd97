"""CPU and disk offload: hooks that have blocks copied to slots on the device before their use.

    resident   on the device for as long as it is loaded
    streamed   some blocks are offloaded to pinned host memory and copied to a ring of slots on the device (ring.py)
    disk       the same, and their large tensors are read from the recipe's file in every step
    staged     on the device for a while and freed afterwards (the text encoder)

Any share of the blocks may be offloaded, of one transformer or of both, spread over its depth, so that between two of
them others compute; both transformers of a device share one ring. A hook before each offloaded block waits for its
copy, a hook behind it frees its slot, so a module that is called block by block needs to know nothing of this: the
backbone, Qwen's layers and diffusers' transformer alike.

diffusers' group offloading moves every tensor by itself, keeps no split, and reads no files. Left out: choosing the
split, and which blocks those are (planning/streaming.py); evicting what others need: ComfyUI decides that while it
runs, here a plan was made before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ideogram_app.checkpoints.span import Span
from ideogram_app.errors import DeviceError
from ideogram_app.machine.copies import CopyStream, copy_stream
from ideogram_app.machine.meter import release
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.model.offload.ring import Ring
from ideogram_app.model.transformer.backbone import Backbone
from ideogram_app.model.transformer.conditioner import Conditioning
from ideogram_app.planning.streaming import FEWEST_SLOTS

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FileSpans = Mapping[str, Sequence[Span]]  # of a module's tensors by their names, see `packed_block.file_spans`
AnyBlock = TypeVar("AnyBlock", bound=nn.Module)


class OffloadHooks:
    """The offloaded blocks of one device, added in the order of their use, which share its slots of one block each."""

    def __init__(self, device: torch.device, slots: int = FEWEST_SLOTS, copies: CopyStream | None = None) -> None:
        self.device, self.slots = device, slots
        self.copies = copies or copy_stream(device)
        self._blocks: list[PackedBlock] = []
        self._hooks: list[Any] = []
        self.ring: Ring | None = None

    def add(self, module: nn.Module, file_spans: FileSpans | None = None) -> None:
        """Offload a block: its tensors move to pinned memory; those that a file has are dropped."""
        block = PackedBlock(module, self.copies.pinned_buffer, file_spans)
        self._blocks.append(block)
        self._hooks.append(module.register_forward_pre_hook(lambda *_: self._started().take(block)))
        self._hooks.append(module.register_forward_hook(lambda *_: self._started().release(block), always_call=True))

    def add_some(
        self,
        blocks: Iterable[AnyBlock],
        chosen: Collection[int],
        spans_of: Callable[[int, AnyBlock], FileSpans | None] = lambda index, block: None,
    ) -> Iterator[AnyBlock]:
        """All blocks, each as soon as it is made; those of the chosen numbers are offloaded before the next is made.

        `spans_of` says, by number and block, where a file has its tensors; None where host memory is to hold them.
        """
        for index, block in enumerate(blocks):
            if index in chosen:
                self.add(block, spans_of(index, block))
            yield block

    def start(self) -> None:
        """Allocate the ring's slots and begin to prefetch, if any blocks are offloaded."""
        if self._blocks and self.ring is None:
            with torch.inference_mode(False):
                self.ring = Ring(self.copies, self.slots, self._blocks)

    def close(self) -> None:
        """Free the ring and all pinned memory, even where some of that fails. Offloaded blocks can compute no more."""
        for hook in self._hooks:
            hook.remove()
        ring, blocks, self.ring, self._blocks = self.ring, self._blocks, None, []
        self._hooks.clear()
        with ExitStack() as stack:  # the last one first
            stack.callback(self.copies.close)
            for block in blocks:
                stack.callback(block.detach)
            if ring:
                stack.callback(ring.close)

    def _started(self) -> Ring:
        self.start()
        assert self.ring is not None
        return self.ring


class Offload:
    """The hooks of every device in use.

    A context while modules are loaded: an error in it closes everything and is the one raised, whatever closing raises.
    Otherwise everything stays, until `close`.
    """

    def __init__(self, slots: int = FEWEST_SLOTS, copies: Mapping[torch.device, CopyStream] | None = None) -> None:
        self._slots, self._copies = slots, copies or {}
        self._on: dict[torch.device, OffloadHooks] = {}

    def __enter__(self) -> Offload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if problem is not None:
            with suppress(DeviceError, RuntimeError):
                self.close()

    def on(self, device: torch.device) -> OffloadHooks:
        """Those of a device, made when they are first asked for."""
        if device not in self._on:
            self._on[device] = OffloadHooks(device, self._slots, self._copies.get(device))
        return self._on[device]

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should, a sentence each, once."""
        return tuple(dict.fromkeys(note for hooks in self._on.values() for note in hooks.copies.notes))

    def start(self) -> None:
        for hooks in self._on.values():
            hooks.start()

    def close(self) -> None:
        closing, self._on = self._on, {}
        with ExitStack() as stack:
            for hooks in closing.values():
                stack.callback(hooks.close)


def offload(module: nn.Module, blocks: Sequence[nn.Module], chosen: frozenset[int], hooks: OffloadHooks) -> None:
    """Move a module to a device, but for the chosen of its blocks (called in this order), which are offloaded."""
    offloaded = {part for index in chosen for part in blocks[index].modules()}
    for part in module.modules():
        if part in offloaded:
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to(hooks.device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(hooks.device)
    for index in sorted(chosen):
        hooks.add(blocks[index])


@contextmanager
def staged(module: Any, device: torch.device, home: torch.device) -> Iterator[Any]:
    """The module on `device` while the context is open, on `home` again afterwards."""
    module.to(device)
    try:
        yield module
    finally:
        if device != home:
            module.to(home)
            release(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the one on which kernels are launched; nothing to do where there is only one of its kind."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def prepare(
    backbone: Backbone, features: Tensor, times: Tensor, rows: int, columns: int, device: torch.device
) -> Conditioning:
    """`Backbone.prepare` on a device, where layers of the conditioner are staged; what they took there is freed."""
    with current(device):
        prepared = backbone.prepare(features, times, rows, columns, device)
    if device != backbone.conditioner.norms.device:
        release(device)
    return prepared
