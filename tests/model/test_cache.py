"""What stays loaded: the same thing for the same question, and nothing at all of what came before."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from ideogram_app.catalog.presets import PRESETS, Preset
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import DeviceError
from ideogram_app.generation.captions import parse_prompt
from ideogram_app.machine.meter import trim
from ideogram_app.model.cache import LoadedKey, ModelCache
from ideogram_app.model.loader import Homes, Loaded, load_transformers
from ideogram_app.model.transformer.layers import weight_bytes
from ideogram_app.prepare.transformers import prepare
from ideogram_app.records import Request
from ideogram_app.studio.local_backend import LocalBackend
from tests.plan_by_name import planned

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RECIPES = ("reference", "int8-w8a8-rotated", "gguf-q4_k", "gguf-q8_0", "fp8")
HOMES = (Homes.on(CPU), Homes((CPU, CPU), (6, 3)), Homes((CPU, CPU), (3, 0), from_disk=True))
GROWTH_ALLOWED = 20e6  # bytes over 40 switches: one pair of transformers that stayed is 9 to 44 MB
SWITCHES = 50


@pytest.fixture(scope="module")
def store(prepared_miniature: Store) -> Store:
    """The miniature in every recipe."""
    return prepared_miniature


def key(store: Store, recipe: str, homes: Homes = HOMES[0]) -> LoadedKey:
    version = store.version("miniature", recipe)
    return LoadedKey("miniature", recipe, version, torch.float32, homes, arithmetic="", compiled=False)


def take(cache: ModelCache, store: Store, recipe: str, homes: Homes = HOMES[0]) -> Loaded:
    return cache.transformers(
        key(store, recipe, homes), lambda: load_transformers(store, "miniature", recipe, homes, torch.float32)
    )


def held_by_this_process() -> int:
    gc.collect()
    trim()
    return int(psutil.Process().memory_info().rss)


def test_memory_does_not_grow_over_fifty_switches_between_recipes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty pictures by the page's own way, each with another recipe than the one before, in as few steps as count."""
    monkeypatch.setitem(PRESETS, "two", Preset("two", 2, (7.0, 3.0), mu=0.5, std=1.75))
    backend = LocalBackend(store.root)
    machine, caption = backend.detect(), parse_prompt("a red circle on a yellow background").caption
    threads, sizes = threading.active_count(), []
    for switch, recipe in enumerate(itertools.islice(itertools.cycle(RECIPES), SWITCHES)):
        request = Request("miniature", caption, (recipe,), "two", 64, 64)
        events = backend.compare(planned(request, machine), tmp_path)
        (result,) = [event.result for event in events if event.result]
        assert result.error is None and result.engaged == recipe and not result.warm
        if switch % 10 == 9:  # every time with the same recipe loaded
            sizes.append(held_by_this_process())
    backend.unload()
    assert threading.active_count() <= threads + 1  # torch's own pool may have come up
    assert max(sizes) - sizes[0] < GROWTH_ALLOWED, sizes


def test_switches_between_recipes_and_homes_leave_nothing_behind(store: Store) -> None:
    cache, ghosts, threads = ModelCache(), [], threading.active_count()
    for homes, recipe in itertools.product(HOMES, RECIPES):
        loaded = take(cache, store, recipe, homes)
        ghosts.append(weakref.ref(loaded.conditional.trunk))
        del loaded
    cache.unload()
    gc.collect()
    assert [ghost for ghost in ghosts if ghost() is not None] == []
    assert threading.active_count() == threads, "no reader of files is left behind"


def test_the_same_question_gets_the_same_transformers_and_another_gets_others(store: Store) -> None:
    cache = ModelCache()
    first = take(cache, store, "gguf-q4_k")
    assert take(cache, store, "gguf-q4_k") is first
    assert take(cache, store, "gguf-q4_k", HOMES[1]) is not first, "they live elsewhere"
    assert cache.key == key(store, "gguf-q4_k", HOMES[1])


def test_a_recipe_that_was_made_anew_is_loaded_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    list(prepare(store, "miniature", "gguf-q8_0"))
    before = key(store, "gguf-q8_0")
    file = next(store.path("miniature", "gguf-q8_0").rglob("*.gguf"))
    os.utime(file, ns=(1, 1))
    assert key(store, "gguf-q8_0") != before


def test_the_old_ones_are_gone_before_the_new_ones_come(store: Store) -> None:
    cache = ModelCache()
    ghost = weakref.ref(take(cache, store, "fp8").conditional)

    def load() -> Loaded:
        assert ghost() is None and cache.key is None
        return load_transformers(store, "miniature", "gguf-q4_k", CPU, torch.float32)

    cache.transformers(key(store, "gguf-q4_k"), load)


def test_what_could_not_be_loaded_is_not_cached(store: Store) -> None:
    cache = ModelCache()
    take(cache, store, "fp8")

    def fail() -> Loaded:
        raise MemoryError

    with pytest.raises(MemoryError):
        cache.transformers(key(store, "gguf-q4_k"), fail)
    assert cache.key is None and cache.host_bytes == 0


@pytest.mark.parametrize("homes", HOMES, ids=["resident", "streamed", "disk"])
def test_host_bytes_are_those_of_the_tensors_in_host_memory(store: Store, homes: Homes) -> None:
    cache = ModelCache()
    loaded = take(cache, store, "gguf-q8_0", homes)
    whole = take(ModelCache(), store, "gguf-q8_0")
    expected = sum(weight_bytes(module, on_host=True) for module in whole.modules)
    if homes.from_disk:
        assert cache.host_bytes < 0.85 * expected, "three of nine blocks lie in their file"
    else:
        assert cache.host_bytes == expected
    assert loaded.weight_bytes == whole.weight_bytes


def test_an_encoder_stays_until_another_is_asked_for() -> None:
    cache = ModelCache()
    first = cache.encoder("a", lambda: nn.Linear(10, 10))
    assert cache.encoder("a", lambda: nn.Linear(10, 10)) is first
    assert cache.host_bytes == 440
    ghost = weakref.ref(first)
    del first
    cache.encoder("b", lambda: nn.Linear(5, 5))
    assert ghost() is None and cache.host_bytes == 120
    cache.unload()
    assert cache.host_bytes == 0


def test_what_could_not_be_freed_is_not_cached_for_another_try(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, encoder = ModelCache(), nn.Linear(3, 3)
    ghost = weakref.ref(take(cache, store, "fp8").conditional)
    cache.encoder("a", lambda: encoder)

    def fail(loaded: Loaded) -> None:
        raise DeviceError("The driver did not give locked RAM back")

    monkeypatch.setattr(Loaded, "close", fail)
    with pytest.raises(DeviceError):
        cache.unload()
    gc.collect()
    assert (cache.key, cache.host_bytes, ghost()) == (None, 0, None)
    cache.unload()
