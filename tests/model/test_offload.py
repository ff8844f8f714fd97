"""Offloaded blocks: the same numbers to the last bit, never more of them on the device than the budget allows.

Devices are simulated: one that refuses to allocate beyond a budget, one that copies as late as it may, one that notes
in which order things happen. Nothing here needs a GPU; what a GPU does with streams and locked memory is `-m gpu`.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from small_model import NAME, random_tensors, write_branch
from torch import Tensor

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import CheckpointError, DeviceError
from ideogram_app.generation.draw import Provenance, SharedInputs, draw
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import make_noise, schedule, times
from ideogram_app.machine.copies import NOT_PINNED, BlockingCopyStream, Event
from ideogram_app.model import loader
from ideogram_app.model.components import find_components
from ideogram_app.model.loader import Homes, Loaded, load_transformers
from ideogram_app.model.offload.offload import OffloadHooks, offload
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.planning.streaming import spread
from ideogram_app.prepare.transformers import prepare
from ideogram_app.records import Request
from tests.late_copies import Late

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DEEP = Branch(34, 64, 4, 256, 256, 13 * 64)  # as deep as the published model
BESIDE = replace(DEEP, num_layers=8)  # the transformer without text, shorter to be made sooner
STORAGES = ("reference", "fp8", "int8-w8a8-rotated", "gguf-q8_0", "gguf-q4_k")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A replica of 34 and 8 layers in a recipe of each storage."""
    folder = tmp_path_factory.mktemp("deep")
    for number, (name, branch) in enumerate(zip(BRANCHES, (DEEP, BESIDE), strict=True)):
        write_branch(folder / "source" / name, branch, random_tensors(branch, number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, NAME, replace(MODELS[NAME], conditional=DEEP, unconditional=BESIDE))
        store = Store(folder / "data")
        for recipe in STORAGES:
            list(prepare(store, NAME, recipe, folder / "source"))
        yield store


Resident = Callable[[str], Loaded]


@pytest.fixture(scope="module")
def resident(deep: Store) -> Resident:
    """A recipe with all blocks resident, loaded once."""
    return cache(lambda recipe: load(deep, recipe))


def load(store: Store, recipe: str, homes: Homes | torch.device = CPU, **named: str) -> Loaded:
    return load_transformers(store, NAME, recipe, homes, torch.float32, **named)


def latents(loaded: Loaded, steps: int = 2, savings: tuple[str, ...] = ()) -> Tensor:
    """What so many steps of a 96 x 96 picture come to."""
    features = torch.randn(1, 9, DEEP.llm_features_dim, generator=torch.Generator().manual_seed(1))
    sigmas = schedule(PRESETS["turbo-12"], 96, 96, 1.0)
    velocity = GuidedModel(loaded, features, 6, 6, times(sigmas)[:steps], savings)
    x = make_noise(3, 96, 96)
    with torch.inference_mode():
        for step in range(steps):
            x = x + 0.1 * velocity(x, step, 3.0)
    return x


class OutOfBudget(RuntimeError):
    pass


class Budget(BlockingCopyStream):
    """A device that holds so many bytes and no more."""

    def __init__(self, limit: int, device: torch.device = CPU) -> None:
        super().__init__(device, self._allocate)
        self.limit, self.most = limit, 0
        self._living: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        held = sum(len(tensor) for tensor in self._living) + size
        if held > self.limit:
            raise OutOfBudget(f"{held} of {self.limit}")
        self.most = max(self.most, held)
        memory = torch.empty(size, dtype=torch.uint8)
        self._living.add(memory)
        return memory

    @property
    def held(self) -> int:
        return sum(len(tensor) for tensor in self._living)


def block_bytes(loaded: Loaded) -> int:
    """Of the largest block, as a slot holds it."""
    return max(
        PackedBlock(block, BlockingCopyStream(CPU).pinned_buffer).size for block in loaded.conditional.trunk.blocks
    )


@pytest.mark.parametrize("recipe", STORAGES)
@pytest.mark.parametrize("from_disk", [False, True], ids=["from memory", "from disk"])
def test_34_layers_under_a_budget_of_3_blocks_draw_the_same_latents(
    deep: Store, resident: Resident, recipe: str, from_disk: bool
) -> None:
    expected, plain = latents(resident(recipe)), load(deep, recipe, kernels="plain")
    weights, size = plain.weight_bytes, block_bytes(plain)
    budget = Budget(3 * size)
    homes = Homes((CPU, CPU), (34, 8), from_disk, slots=3, copies={CPU: budget})
    offloaded = load(deep, recipe, homes)
    assert torch.equal(latents(offloaded), expected)
    assert budget.most == 3 * size, "both transformers share three slots"
    assert offloaded.weight_bytes == weights
    offloaded.close()
    gc.collect()
    assert budget.held == 0


@pytest.mark.parametrize("from_disk", [False, True], ids=["from memory", "from disk"])
@pytest.mark.parametrize("savings", [(), *((name,) for name in SPEEDUPS)], ids=str)
def test_copies_as_late_as_can_be_are_waited_for_whatever_is_left_out(
    deep: Store, resident: Resident, from_disk: bool, savings: tuple[str, ...]
) -> None:
    expected = latents(resident("gguf-q8_0"), 5, savings)
    homes = Homes((CPU, CPU), (34, 5), from_disk, copies={CPU: Late()})
    offloaded = load(deep, "gguf-q8_0", homes)
    assert torch.equal(latents(offloaded, 5, savings), expected)
    offloaded.close()


@pytest.mark.parametrize("offloaded", [(0, 0), (1, 0), (0, 8), (8, 3), (17, 4), (33, 8)], ids=str)
def test_any_split_draws_the_same(deep: Store, resident: Resident, offloaded: tuple[int, int]) -> None:
    expected = latents(resident("int8-w8a8-rotated"))
    split = load(deep, "int8-w8a8-rotated", Homes((CPU, CPU), offloaded))
    assert torch.equal(latents(split), expected)


def test_an_offloaded_w4a8_block_has_the_scales_that_were_computed_when_it_was_loaded(deep: Store) -> None:
    expected = latents(load(deep, "gguf-q4_k", arithmetic="w4a8"))
    for from_disk in (False, True):
        homes = Homes((CPU, CPU), (34, 8), from_disk)
        assert torch.equal(latents(load(deep, "gguf-q4_k", homes, arithmetic="w4a8")), expected)


def test_two_devices_have_a_ring_each_and_draw_the_same(deep: Store, resident: Resident) -> None:
    """Two budgets stand for two devices: what one transformer needs is not asked of the other's."""
    first, second = torch.device("cpu", 0), torch.device("cpu", 1)
    expected, size = latents(resident("gguf-q8_0")), block_bytes(load(deep, "gguf-q8_0"))
    budgets = {first: Budget(2 * size, first), second: Budget(2 * size, second)}
    loaded = load(deep, "gguf-q8_0", Homes((first, second), (34, 8), copies=budgets))
    assert loaded.devices == (first, second)
    assert torch.equal(latents(loaded), expected)
    assert [budget.most for budget in budgets.values()] == [2 * size, 2 * size]


def test_weights_read_from_disk_are_not_kept_in_memory(deep: Store) -> None:
    from_memory = load(deep, "gguf-q4_k", Homes((CPU, CPU), (34, 8)))
    from_disk = load(deep, "gguf-q4_k", Homes((CPU, CPU), (34, 8), from_disk=True))
    kept = [
        sum(block.held.nbytes for hooks in loaded.offload._on.values() for block in hooks._blocks)
        for loaded in (from_memory, from_disk)
    ]
    assert kept[1] < 0.05 * kept[0]


def test_a_file_cut_short_while_it_is_drawn_from_is_named(deep: Store, tmp_path: Path) -> None:
    loaded = load(deep, "gguf-q4_k", Homes((CPU, CPU), (34, 8), from_disk=True))
    for block in loaded.offload.on(CPU)._blocks:
        moved = [tuple(replace(span, start=10**9) for span in item.spans) for item in block.items]
        block.items = [replace(item, spans=spans) for item, spans in zip(block.items, moved, strict=True)]
    with pytest.raises(CheckpointError, match=r"ended inside .*gguf|\.gguf ended"):
        latents(loaded)


def test_the_reader_of_a_file_does_not_overwrite_what_is_still_being_sent(deep: Store, resident: Resident) -> None:
    """`Late` sends from the two buffers only when it is waited for; a third block would overwrite the first."""
    expected = latents(resident("reference"))
    loaded = load(deep, "reference", Homes((CPU, CPU), (34, 8), True, slots=4, copies={CPU: Late()}))
    assert torch.equal(latents(loaded), expected)


def test_a_block_away_has_shapes_and_no_numbers_where_it_lies_in_a_file(deep: Store) -> None:
    loaded = load(deep, "gguf-q4_k", Homes((CPU, CPU), (34, 0), from_disk=True))
    last = loaded.conditional.trunk.blocks[33]
    assert last.qkv.weight.is_meta and not last.norm_q.is_meta
    loaded.close()
    assert all(tensor.is_meta for tensor in last.buffers())


def test_a_failure_inside_a_block_leaves_the_ring_usable(deep: Store, resident: Resident) -> None:
    loaded = load(deep, "gguf-q8_0", Homes((CPU, CPU), (34, 8)))
    expected = latents(resident("gguf-q8_0"))

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    hook = loaded.conditional.trunk.blocks[5].qkv.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        latents(loaded)
    hook.remove()
    assert torch.equal(latents(loaded), expected)


def test_diffusers_own_transformer_travels_too() -> None:
    from diffusers import Ideogram4Transformer2DModel
    from small_model import velocity

    torch.manual_seed(0)
    shape = Branch(3, 64, 4, 256, 256, 13 * 64)
    whole = Ideogram4Transformer2DModel.from_config(shape.config()).eval()
    expected = velocity(whole)
    hooks = OffloadHooks(CPU)
    offload(whole, list(whole.layers), spread(2, 3), hooks)
    assert torch.equal(velocity(whole), expected)
    assert hooks.ring and hooks.ring.copies >= 2
    hooks.close()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["int8-w8a8-rotated", "gguf-q4_k"])
@pytest.mark.parametrize("from_disk", [False, True], ids=["from memory", "from disk"])
def test_a_gpu_draws_the_same_latents_streamed_as_resident(deep: Store, recipe: str, from_disk: bool) -> None:
    device = torch.device("cuda:0")

    def drawn(homes: Homes) -> Tensor:
        loaded = load_transformers(deep, NAME, recipe, homes, torch.bfloat16)
        features = torch.randn(1, 9, DEEP.llm_features_dim, generator=torch.Generator().manual_seed(1)).to(device)
        sigmas = schedule(PRESETS["turbo-12"], 96, 96, 1.0)
        velocity = GuidedModel(loaded, features, 6, 6, times(sigmas))
        x = make_noise(3, 96, 96).to(device)
        with torch.inference_mode():
            for step in range(4):
                x = x + 0.1 * velocity(x, step, 3.0)
        answer = x.cpu()
        loaded.close()
        return answer

    expected = drawn(Homes.on(device))
    for offloaded in ((34, 8), (17, 4), (5, 0)):
        assert torch.equal(drawn(Homes((device, device), offloaded, from_disk)), expected)


def test_where_one_thread_may_copy_no_other_does(deep: Store, resident: Resident) -> None:
    """Two threads that use Metal's stream end the process."""
    threads: set[int] = set()

    class Alone(BlockingCopyStream):
        def __init__(self) -> None:
            super().__init__(CPU)
            self.in_place = self.threads = False

        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            threads.add(threading.get_ident())
            return super().copy_async(source, target, after)

    loaded = load(deep, "gguf-q4_k", Homes((CPU, CPU), (34, 8), True, copies={CPU: Alone()}))
    assert torch.equal(latents(loaded), latents(resident("gguf-q4_k")))
    assert threads == {threading.get_ident()}
    assert not BlockingCopyStream(torch.device("mps")).threads and BlockingCopyStream(CPU).threads


def test_all_is_given_back_even_where_some_of_it_fails(deep: Store) -> None:
    class Broken(BlockingCopyStream):
        closed = 0

        def close(self) -> None:
            Broken.closed += 1
            raise DeviceError("The driver did not give locked RAM back")

    first, second = torch.device("cpu", 0), torch.device("cpu", 1)
    loaded = load(deep, "gguf-q8_0", Homes((first, second), (3, 3), copies={first: Broken(CPU), second: Broken(CPU)}))
    with pytest.raises(DeviceError):
        loaded.close()
    assert Broken.closed == 2
    assert all(tensor.is_meta for module in loaded.modules for tensor in module.trunk.blocks[-1].buffers())


def test_what_stopped_loading_is_told_and_not_what_closing_came_to(
    deep: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(BlockingCopyStream):
        def close(self) -> None:
            raise DeviceError("The driver did not give locked RAM back")

    monkeypatch.setattr(OffloadHooks, "start", _out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="too small"):
        load(deep, "gguf-q8_0", Homes((CPU, CPU), (3, 3), copies={CPU: Broken(CPU)}))


def _out_of_memory(hooks: OffloadHooks) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory: the device is too small")


def test_memory_that_only_loading_could_use_is_given_back_before_slots_are_made(
    deep: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    start = OffloadHooks.start
    monkeypatch.setattr(loader, "empty_cache", lambda device: order.append(f"released {device}"))
    monkeypatch.setattr(OffloadHooks, "start", lambda hooks: (order.append("slots"), start(hooks))[1])
    load(deep, "gguf-q8_0", Homes((CPU, CPU), (3, 3))).close()
    assert order == ["released cpu", "slots"]


def test_memory_that_could_not_be_pinned_is_told_with_the_picture(deep: Store, tmp_path: Path) -> None:
    class Refusing(BlockingCopyStream):
        def pinned_buffer(self, size: int) -> Tensor:
            self.notes.append(NOT_PINNED)  # at every block
            return super().pinned_buffer(size)

    homes = Homes((CPU, CPU), (3, 3), copies={CPU: Refusing(CPU)})
    features = torch.randn(1, 9, DEEP.llm_features_dim, generator=torch.Generator().manual_seed(1))
    vae = find_components("miniature").vae(CPU, torch.float32)
    shared = SharedInputs(features, make_noise(0, 64, 64), 0.0, vae, 1.0)
    terms = Provenance(given_up=("Something before.",))
    for homes_now, told in ((homes, ("Something before.", NOT_PINNED)), (Homes.on(CPU), ("Something before.",))):
        load_now = partial(load, deep, "gguf-q8_0", homes_now)
        request = Request(NAME, "", preset="turbo-12", width=64, height=64)
        *_, last = draw(request, "gguf-q8_0", load_now, shared, tmp_path, terms)
        assert last.result and last.result.given_up == told
