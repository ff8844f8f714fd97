"""What is on the device, and when: one mechanism for transformers of every recipe and for the text encoder.

    resident   on the device for as long as it is loaded
    streamed   some blocks rest in locked host memory and pass through a ring of places on the device (ring.py)
    disk       the same, and their large tensors are read from the recipe's file at every visit
    staged     a guest: on the device for a while and freed afterwards (the text encoder)

Any share of the blocks may travel, of one transformer or of both. Those that do are spread over its depth, so that
between two of them others compute; both transformers of a device share one ring. A hook before each travelling block
waits for its bytes, a hook behind it gives its place up, so a module that is called block by block needs to know
nothing of this: the backbone, Qwen's layers and diffusers' transformer alike.

diffusers' group offloading moves every tensor by itself, keeps no split, and reads no files. Left out: choosing the
split, and which blocks those are (planning/streaming.py); evicting what others need: ComfyUI decides that while it
runs, here a plan was made before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.checkpoints.span import Span
from ideogram_app.machine.meter import release
from ideogram_app.model.offload.carrier import Carrier, carrier_to
from ideogram_app.model.offload.packed_block import Freight
from ideogram_app.model.offload.ring import Ring
from ideogram_app.model.transformer.backbone import Backbone
from ideogram_app.model.transformer.conditioner import Conditioning
from ideogram_app.planning.streaming import FEWEST_SLOTS

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Residence:
    """The travelling blocks of one device, in the order in which they are added: that of their use.

    Args:
        slots: places for them.
        carrier: of the device; that of its kind where None.
    """

    def __init__(self, device: torch.device, slots: int = FEWEST_SLOTS, carrier: Carrier | None = None) -> None:
        self.device, self.slots = device, slots
        self.carrier = carrier or carrier_to(device)
        self._freights: list[Freight] = []
        self._hooks: list[Any] = []
        self.ring: Ring | None = None

    def add(self, block: nn.Module, located: Mapping[str, Sequence[Span]] | None = None) -> None:
        """Let a block travel: its tensors move to locked memory, or, where they are located in a file, away.

        Args:
            located: names of its tensors, and the spans of a file that they are made of.
        """
        freight = Freight(block, self.carrier.shelf, located)
        self._freights.append(freight)

        def before(module: nn.Module, inputs: Any) -> None:
            self._open().take(freight)

        def behind(module: nn.Module, inputs: Any, output: Any) -> None:
            self._open().release(freight)

        self._hooks.append(block.register_forward_pre_hook(before))
        self._hooks.append(block.register_forward_hook(behind, always_call=True))

    def start(self) -> None:
        """Make the ring and bring the first blocks, if any travel."""
        if self._freights and self.ring is None:
            with torch.inference_mode(False):
                self.ring = Ring(self.carrier, self.slots, self._freights)

    def close(self) -> None:
        """Give the ring and all locked memory back, all of it even where some of that fails. What travelled cannot be
        computed with any more."""
        for hook in self._hooks:
            hook.remove()
        ring, freights, self.ring, self._freights = self.ring, self._freights, None, []
        self._hooks.clear()
        with ExitStack() as stack:  # the last one first
            stack.callback(self.carrier.close)
            for freight in freights:
                stack.callback(freight.vanish)
            if ring:
                stack.callback(ring.close)

    def _open(self) -> Ring:
        self.start()
        assert self.ring is not None
        return self.ring


class Residences:
    """One residence for each device in use."""

    def __init__(self, slots: int = FEWEST_SLOTS, carriers: Mapping[torch.device, Carrier] | None = None) -> None:
        self._slots, self._carriers = slots, carriers or {}
        self._on: dict[torch.device, Residence] = {}

    def on(self, device: torch.device) -> Residence:
        """That of a device, made when it is first asked for."""
        if device not in self._on:
            self._on[device] = Residence(device, self._slots, self._carriers.get(device))
        return self._on[device]

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should, a sentence each."""
        return tuple(note for residence in self._on.values() for note in residence.carrier.notes)

    def start(self) -> None:
        for residence in self._on.values():
            residence.start()

    def close(self) -> None:
        closing, self._on = self._on, {}
        with ExitStack() as stack:
            for residence in closing.values():
                stack.callback(residence.close)


def reside(module: nn.Module, blocks: Sequence[nn.Module], offloaded: frozenset[int], residence: Residence) -> None:
    """Move a module to a device, and let some of its blocks travel there.

    Args:
        blocks: those of the module that are called one after another; `offloaded`: which of them.
    """
    guests = [block for index, block in enumerate(blocks) if index in offloaded]
    _settle(module, residence.device, guests)
    for block in guests:
        residence.add(block)


def _settle(module: nn.Module, device: torch.device, guests: Sequence[nn.Module]) -> None:
    """Move a module to a device, all but some of its parts."""
    away = {id(part) for guest in guests for part in guest.modules()}
    for part in module.modules():
        if id(part) in away:
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


@contextmanager
def staged(module: Any, device: torch.device, home: torch.device) -> Iterator[Any]:
    """The module on `device` while the context is open, back at `home` afterwards."""
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
    """`Backbone.prepare` on a device, where layers of the conditioner are guests, whose room is given back.

    Args:
        features: (n, taps x encoder) on any device; only a branch that sees text takes them there, in its own type.
    """
    with current(device):
        prepared = backbone.prepare(features, times, rows, columns, device)
    if device != backbone.conditioner.norms.device:
        release(device)
    return prepared
