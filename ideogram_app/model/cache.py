"""What stays loaded from one picture to the next: both transformers, and the text encoder where there is room for it.

    loaded = kept.transformers(key, load)      the same ones where the key is the same, else the old ones go first
    kept.unload()                              nothing stays

Loading 17 GB takes longer than drawing with them, and most people draw again with what they have just drawn with. Only
one pair is ever kept: memory of the next belongs to whatever is asked for next. Whoever owns this decides for how long
nothing being asked is long enough. Left out: keeping several pairs in host memory, as ComfyUI does where it has room.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn

from ideogram_app.kernels.processor import held_bytes
from ideogram_app.machine.meter import release
from ideogram_app.model.loader import Homes, Loaded
from ideogram_app.model.transformer.layers import Int8Linear


@dataclass(frozen=True)
class LoadedKey:
    """Everything that decides what is loaded and where it lives; `version` tells files apart that were made anew."""

    model: str
    recipe: str
    version: str
    dtype: torch.dtype
    devices: tuple[torch.device, torch.device]
    offloaded: tuple[int, int]
    from_disk: bool
    slots: int
    arithmetic: str
    compiled: bool

    @classmethod
    def of(
        cls, model: str, recipe: str, version: str, dtype: torch.dtype, homes: Homes, arithmetic: str, compiled: bool
    ) -> LoadedKey:
        """That of transformers in their homes."""
        places = homes.devices, homes.offloaded, homes.from_disk, homes.slots
        return cls(model, recipe, version, dtype, *places, arithmetic, compiled)


class ModelCache:
    """At most one pair of transformers and one text encoder. For one thread at a time."""

    def __init__(self) -> None:
        self._key: LoadedKey | None = None
        self._loaded: Loaded | None = None
        self._encoder_key: Hashable = None
        self._encoder: nn.Module | None = None

    @property
    def key(self) -> LoadedKey | None:
        """Of the transformers that are loaded."""
        return self._key

    @property
    def transformers_host_bytes(self) -> int:
        """Host memory of the transformers that are loaded."""
        return sum(host_bytes(module) for module in self._loaded.modules) if self._loaded else 0

    @property
    def host_bytes(self) -> int:
        """Host memory that `unload` would give back."""
        return self.transformers_host_bytes + (host_bytes(self._encoder) if self._encoder else 0)

    def transformers(self, key: LoadedKey, load: Callable[[], Loaded]) -> Loaded:
        """Those of a key: the ones that are here, or loaded once the memory of any others was given back."""
        if self._loaded is None or self._key != key:
            self.drop_transformers()
            self._loaded, self._key = load(), key
        return self._loaded

    def encoder(self, key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
        """The text encoder of a key, kept as the transformers are."""
        if self._encoder is None or self._encoder_key != key:
            self.drop_encoder()
            self._encoder, self._encoder_key = load(), key
        return self._encoder

    def drop_transformers(self) -> None:
        """Give back what the transformers hold, on devices and on the host."""
        loaded, self._loaded, self._key = self._loaded, None, None  # whatever happens: closed once, drawn with no more
        if loaded is None:
            return
        devices = set(loaded.devices)
        try:
            loaded.close()
        finally:
            del loaded
            for device in devices:
                release(device)

    def drop_encoder(self) -> None:
        """Give back what the text encoder holds."""
        if self._encoder is None:
            return
        device = next(self._encoder.parameters()).device
        self._encoder = self._encoder_key = None
        release(device)

    def unload(self) -> None:
        """Give everything back."""
        try:
            self.drop_encoder()
        finally:
            self.drop_transformers()


def host_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors that lie in host memory."""
    tensors = (*module.parameters(), *module.buffers())
    own = (layer.own for layer in module.modules() if isinstance(layer, Int8Linear) and layer.own is not None)
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu") + sum(map(held_bytes, own))
