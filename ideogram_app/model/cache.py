"""Model cache: transformers, and text encoder where it fits, stay loaded between pictures.

    loaded = cache.transformers(key, load)     the cached ones where the key is the same, else those are unloaded first
    cache.unload()                             nothing stays

Loading 17 GB takes longer than drawing with them, and most people draw again with what they have just drawn with. One
pair is cached at most. Its owner decides when to unload. Left out: caching several pairs in host memory, as ComfyUI
does where it has room.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn

from ideogram_app.machine.meter import release
from ideogram_app.model.loader import Homes, Loaded
from ideogram_app.model.transformer.layers import weight_bytes


@dataclass(frozen=True)
class LoadedKey:
    """Cache key: everything that decides what is loaded and where; files that were made anew have another `version`."""

    model: str
    recipe: str
    version: str
    dtype: torch.dtype
    homes: Homes
    arithmetic: str
    compiled: bool


class ModelCache:
    """At most one pair of transformers and one text encoder. For one thread at a time."""

    def __init__(self) -> None:
        self.key: LoadedKey | None = None  # of the transformers that are loaded
        self._loaded: Loaded | None = None
        self._encoder_key: Hashable = None
        self._encoder: nn.Module | None = None

    @property
    def transformers_host_bytes(self) -> int:
        """Host memory of the transformers that are loaded."""
        return sum(weight_bytes(module, on_host=True) for module in self._loaded.modules) if self._loaded else 0

    @property
    def host_bytes(self) -> int:
        """Host memory that `unload` would free."""
        return self.transformers_host_bytes + (weight_bytes(self._encoder, on_host=True) if self._encoder else 0)

    def transformers(self, key: LoadedKey, load: Callable[[], Loaded]) -> Loaded:
        """Those of a key: the cached ones, or loaded once the memory of any others was freed."""
        if self._loaded is None or self.key != key:
            self.drop_transformers()
            self._loaded, self.key = load(), key
        return self._loaded

    def encoder(self, key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
        """The text encoder of a key, cached as the transformers are."""
        if self._encoder is None or self._encoder_key != key:
            self.drop_encoder()
            self._encoder, self._encoder_key = load(), key
        return self._encoder

    def drop_transformers(self) -> None:
        """Free what the transformers hold, on devices and on the host."""
        loaded, self._loaded, self.key = self._loaded, None, None  # whatever happens: closed once, drawn with no more
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
        """Free what the text encoder holds."""
        if self._encoder is None:
            return
        device = next(self._encoder.parameters()).device
        self._encoder = self._encoder_key = None
        release(device)

    def unload(self) -> None:
        """Free everything."""
        try:
            self.drop_encoder()
        finally:
            self.drop_transformers()
