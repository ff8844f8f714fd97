"""A session of drawing: store, output folder and caches shared by all recipes of a request.

Left out: the machine and the limits to plan with, which are in a request's plan inputs (planning/inputs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.machine.memory import memory_now
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder.features import FeatureCache
from ideogram_app.planning.fallbacks import fallbacks
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.profile import Observation
from ideogram_app.records import Fallback


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

    def ready(self, model: str) -> frozenset[str]:  # recipes that can be loaded
        return frozenset(recipe for recipe in RECIPES if self.store.status(model, recipe).usable)


def with_free_memory(inputs: PlanInputs) -> PlanInputs:
    """The inputs with the memory that is free now."""
    machine, now = inputs.hardware, memory_now(inputs.hardware)
    device = machine.device_free_bytes  # what torch caches on the device can be given out again
    if now.device_free is not None:
        device = now.device_free + (now.device_ours or 0)
    host = machine.host_free_bytes if now.host_free is None else now.host_free
    return replace(inputs, hardware=replace(machine, device_free_bytes=device, host_free_bytes=host))
