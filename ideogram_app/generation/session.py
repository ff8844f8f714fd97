"""A session of drawing: store, output folder, caches and lost devices, shared by all recipes of a request.

Giving memory back and asking how much is free are done here after failures too, when a device may answer every call
with an error: neither raises. Left out: the machine and the limits to plan with, which are in a request's plan inputs
(planning/inputs.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow, memory_now
from ideogram_app.machine.meter import release
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder.features import FeatureCache
from ideogram_app.planning.fallbacks import fallbacks
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.lost_device import LostDevice, lost_device
from ideogram_app.planning.profile import Observation
from ideogram_app.records import Fallback

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """Store, output folder, caches and the functions that drawing calls."""

    store: Store
    output: Path  # of PNGs
    cache: ModelCache = field(default_factory=ModelCache)
    features: FeatureCache = field(default_factory=FeatureCache)  # captions in it need no text encoder
    stays: bool = False  # whether models stay loaded after the last picture
    observe: Callable[[Observation], None] | None = None  # of step times, where nothing was left out
    load: Callable[..., Loaded] = load_transformers
    fallbacks: Callable[..., tuple[Fallback, ...]] = fallbacks
    lost: dict[str, LostDevice] = field(default_factory=dict)  # by device: what can compute no more in this process

    def ready(self, model: str) -> frozenset[str]:  # recipes that can be loaded
        return frozenset(recipe for recipe in RECIPES if self.store.status(model, recipe).usable)

    def lost_among(self, devices: Iterable[str]) -> LostDevice | None:
        """Why nothing can be computed on these devices any more; None where something can."""
        return next((self.lost[name] for name in map(_numbered, devices) if name in self.lost), None)

    def lose(self, lost: LostDevice, devices: Iterable[str]) -> None:
        """Remember a device as lost, by those that were in use: which of them it was, the error does not say."""
        self.lost.update({_numbered(device): lost for device in devices if lost.takes(device)})

    def unload(self, devices: Collection[str], phase: str = "") -> LostDevice | None:
        """Free everything that was loaded, and what torch caches on these devices.

        An error in it is logged, and the rest is still freed; where it says that a device is lost, that is returned.
        """
        found = [give_back(self.cache.unload, phase)]
        found += [give_back(partial(release, torch.device(device)), phase) for device in dict.fromkeys(devices)]
        return next(filter(None, found), None)


def give_back(step: Callable[[], None], phase: str = "") -> LostDevice | None:
    """One step of giving memory back, which raises nothing: what it cannot free must not hide why it is freed."""
    try:
        step()
    except Exception as problem:
        log.warning("memory could not be given back", exc_info=True)
        return lost_device(problem, phase)
    return None


def free_memory(hardware: Hardware) -> MemoryNow:
    """The memory in use now; nothing is known of it where a device does not answer."""
    try:
        return memory_now(hardware)
    except Exception:
        log.warning("free memory could not be read", exc_info=True)
        return MemoryNow()


def with_free_memory(inputs: PlanInputs) -> PlanInputs:
    """The inputs with the memory that is free now."""
    machine, now = inputs.hardware, free_memory(inputs.hardware)
    device = machine.device_free_bytes  # what torch caches on the device can be given out again
    if now.device_free is not None:
        device = now.device_free + (now.device_ours or 0)
    host = machine.host_free_bytes if now.host_free is None else now.host_free
    return replace(inputs, hardware=replace(machine, device_free_bytes=device, host_free_bytes=host))


def _numbered(device: str) -> str:
    """The device with its number: torch calls the first one "cuda" as well as "cuda:0"."""
    return device if ":" in device or device == "cpu" else f"{device}:0"
