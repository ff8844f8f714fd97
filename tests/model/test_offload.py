"""Offloaded blocks: the same numbers to the last bit, never more of them on the device than the budget allows.

Devices are simulated: one that refuses to allocate beyond a budget, one that copies as late as it may, one that notes
in which order things happen. Nothing here needs a GPU; what a GPU does with streams and locked memory is `-m gpu`.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from small_model import NAME, random_tensors, write_branch
from torch import Tensor, nn

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import CheckpointError, DeviceError
from ideogram_app.generation.draw import Provenance, SharedInputs, draw
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import make_noise, schedule, times
from ideogram_app.machine import copies as copies_module
from ideogram_app.machine.copies import NOT_PINNED, PORTABLE, AsyncCopyStream, BlockingCopyStream, Event, copy_stream
from ideogram_app.model import loader
from ideogram_app.model.components import find_components
from ideogram_app.model.loader import Homes, Loaded, load_transformers
from ideogram_app.model.offload.offload import OffloadHooks, offload
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.model.offload.ring import Ring
from ideogram_app.planning.streaming import spread
from ideogram_app.prepare.transformers import prepare
from ideogram_app.records import Request

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


class Late(BlockingCopyStream):
    """A device that copies when somebody waits for it and not a moment sooner; it reads nothing in place."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.in_place = False
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._sent = 0
        self._lock = threading.Lock()  # the reader of a file waits too

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        with self._lock:
            self._sent += 1
            self._pending.append((self._sent, source, target))
            return self._sent  # type: ignore[return-value]

    def wait(self, event: Event) -> None:
        with self._lock:
            while self._pending and event is not None and self._pending[0][0] <= event:  # type: ignore[operator]
                _, source, target = self._pending.pop(0)
                target.copy_(source)

    synchronize = wait


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


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_blocks_are_prefetched_in_the_order_of_use(slots: int, count: int) -> None:
    copied: list[Tensor] = []

    class Noting(BlockingCopyStream):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            copied.append(source)
            return super().copy_async(source, target, after)

    copies = Noting(CPU)
    blocks = [PackedBlock(nn.Linear(4, 4), copies.pinned_buffer) for _ in range(count)]
    ring = Ring(copies, slots, blocks)
    assert len(copied) == min(slots, count), "the first ones come before they are asked for"
    for _ in range(3):
        for turn, block in enumerate(blocks):
            before = len(copied)
            ring.take(block)
            assert len(copied) == before, "what is taken in turn is there already"
            ring.release(block)
            if slots < count:
                assert copied[-1] is blocks[(turn + slots) % count].held
    assert ring.copies == (min(slots, count) if slots >= count else slots + 3 * count)


def test_a_slot_is_overwritten_only_behind_the_last_use_of_it() -> None:
    """Every copy is told to wait for an event that was recorded after the block before it was used."""
    log: list[tuple[str, int]] = []

    class Noting(BlockingCopyStream):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            log.append((f"copy after {after}", target.data_ptr()))
            return super().copy_async(source, target, after)

        def event(self) -> Event:
            log.append(("event", 0))
            return len(log)  # type: ignore[return-value]

    copies = Noting(CPU)
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    hooks = OffloadHooks(CPU, 2, copies)
    offload(layers, list(layers), frozenset(range(6)), hooks)
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, __: log.append(("use", layer.weight.data_ptr())), prepend=True)
    hooks.start()
    layers(torch.zeros(1, 4))
    uses: dict[int, int] = {}
    for moment, (what, pointer) in enumerate(log, 1):
        if what == "use":
            uses[pointer] = moment
        last = max((when for used, when in uses.items() if 0 <= used - pointer < 4096), default=0)
        if what.startswith("copy") and last:
            assert int(what.split()[-1]) > last
    assert len(uses) >= 2


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


@pytest.mark.parametrize("threads", [True, False], ids=["by a thread", "by the only one"])
def test_a_block_whose_file_cannot_be_read_is_told_of_where_it_is_taken_and_read_again(threads: bool) -> None:
    class Unreadable(PackedBlock):
        in_memory, readable = False, False

        def fill(self, flat: Tensor) -> None:
            if not self.readable:
                raise CheckpointError("The file ended")
            super().fill(flat)

    copies = Late()
    copies.threads = threads
    layers = [nn.Linear(4, 4) for _ in range(3)]
    weights = [layer.weight.clone() for layer in layers]
    blocks = [Unreadable(layer, copies.pinned_buffer) for layer in layers]
    ring = Ring(copies, 2, blocks)
    for block in blocks:
        with pytest.raises(CheckpointError, match="ended"):
            ring.take(block)
        block.readable = True
        ring.take(block)
        ring.release(block)
    for block, layer, weight in zip(blocks, layers, weights, strict=True):
        ring.take(block)
        assert torch.equal(layer.weight, weight)
        ring.release(block)
    ring.close()


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


@pytest.mark.gpu
def test_locked_memory_is_locked_and_given_back() -> None:
    stream = copy_stream(torch.device("cuda:0"))
    memory = stream.pinned_buffer(3_000_001)
    assert memory.is_pinned() and not stream.notes
    target = stream.device_buffer(len(memory))
    memory.fill_(7)
    stream.synchronize(stream.copy_async(memory, target, None))
    assert bool((target == 7).all())
    stream.close()
    assert not memory.is_pinned()


def test_the_first_copies_wait_for_whatever_had_the_memory_of_a_slot_before() -> None:
    """Memory that was freed may still be read or written by what the device was given before."""
    told: list[Event] = []

    class Noting(BlockingCopyStream):
        def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
            told.append(after)
            return super().copy_async(source, target, after)

        def event(self) -> Event:
            return "a point in its work"  # type: ignore[return-value]

    copies = Noting(CPU)
    Ring(copies, 2, [PackedBlock(nn.Linear(4, 4), copies.pinned_buffer) for _ in range(3)])
    assert told == ["a point in its work"] * 2


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


class Driver:
    """What `torch.cuda.cudart()` gives: it locks memory, or refuses with an error's number."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.locked = answer, list[tuple[int, int, int]]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.locked += [(pointer, size, flags)] if not self.answer else []
        return self.answer

    def cudaHostUnregister(self, pointer: int) -> int:
        self.locked = [row for row in self.locked if row[0] != pointer]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """CUDA as far as an `AsyncCopyStream` touches it to lock memory; streams do nothing."""
    made = Driver()
    monkeypatch.setattr(torch, "Stream", MagicMock())
    monkeypatch.setattr(torch.accelerator, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_locked_memory_is_locked_for_every_device_and_unlocked_once(driver: Driver) -> None:
    streamed = AsyncCopyStream(torch.device("cuda", 1))
    shelves = [streamed.pinned_buffer(size) for size in (5000, 1, 0)]
    assert [(size, flags) for _, size, flags in driver.locked] == [(5000, PORTABLE), (1, PORTABLE)]
    assert [len(shelf) for shelf in shelves] == [5000, 1, 0] and not streamed.notes
    streamed.close()
    streamed.close()
    assert driver.locked == []


def test_a_refusal_to_lock_is_noted_once_and_its_error_is_not_left_for_whoever_computes_next(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[torch.device] = []

    def computed(device: torch.device) -> None:
        left.append(device)
        raise RuntimeError("CUDA error: out of memory")  # of the refusal, told late

    monkeypatch.setattr(copies_module, "_compute_something", computed)
    driver.answer = 2
    device = torch.device("cuda", 0)
    streamed = AsyncCopyStream(device)
    for _ in range(3):
        streamed.pinned_buffer(100).fill_(7)
    assert left == [device] * 3 and streamed.notes == [NOT_PINNED]
    streamed.close()


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
