"""The ledger of memory against cases whose answer is known and against real tensors; the allocator against rules."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from small_model import SMALL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.counting.allocator import Allocator, fits, reserved_bytes
from benchmarks.counting.counted import DEVICE, Case, FakeBranch, count_picture, pretended
from benchmarks.counting.ledger import Ledger, attention_on
from ideogram_app.benchmark.shapes import Workload, find_shape
from ideogram_app.benchmark.weights import RandomBranch, Tiles
from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.kernels.choice import fused_kernels
from ideogram_app.kernels.contract import QuantizedActivations
from ideogram_app.model.transformer.assemble import BranchWeights, Placement, assemble
from ideogram_app.model.transformer.layers import weight_bytes
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MIB = 2**20
WORKLOAD = Workload("layers=2", find_shape("layers=2"), 512, 512, 20, 2048, 4, "bfloat16")


def peak(ledger: Ledger, work: Callable[[], object], device: torch.device = CPU) -> int:
    with ledger.phase("work"):
        work()
    return ledger.peaks["work"].get(device, 0)


def test_a_view_is_not_counted_again() -> None:
    with Ledger() as ledger:
        x = torch.empty(256, 256)
        views = x.t(), x[3:], x.view(-1), x.unflatten(0, (2, 128)), x.detach(), x.expand(4, 256, 256)
        assert ledger.live[CPU] == 256 * 256 * 4 and len(views) == 6


def test_memory_leaves_with_the_last_view_of_it() -> None:
    with Ledger() as ledger:
        x = torch.empty(256, 256)
        part = x[:1]
        del x
        assert ledger.live[CPU] == 256 * 256 * 4
        del part
        assert ledger.live[CPU] == 0


def test_a_peak_inside_a_sequence_is_seen() -> None:
    def work() -> Tensor:
        x = torch.empty(1024)
        y = x + 1  # 2 of 4 KiB
        z = torch.cat((x, y))  # and one of 8: the peak
        del x, y
        return z[:1].clone()

    with Ledger() as ledger:
        assert peak(ledger, work) == 16 * 1024
        assert ledger.live[CPU] == 0


def test_in_place_operations_cost_nothing() -> None:
    with Ledger() as ledger:
        x = torch.ones(1024)
        assert peak(ledger, lambda: x.add_(1).mul_(2)) == 4096


def test_sizes_are_those_of_the_allocator() -> None:
    with Ledger() as ledger:
        small, empty = torch.empty(1), torch.empty(0)
        assert ledger.live[CPU] == 512 and small.numel() + empty.numel() == 1


def test_phases_may_hold_others_and_begin_with_what_is_there() -> None:
    with Ledger() as ledger, ledger.phase("outer"):
        x = torch.empty(1024)
        with ledger.phase("inner"):
            torch.empty(1024)
        del x
    assert ledger.peaks["outer"][CPU] == ledger.peaks["inner"][CPU] == 8192


def test_events_tell_of_every_beginning_and_end_in_order() -> None:
    with Ledger() as ledger:
        x = torch.empty(1024)
        y = torch.empty(512)
        del x
        del y
    (first, _, size), (second, _, other), *ends = ledger.events
    assert (size, other) == (4096, 2048) and [(number, left) for number, _, left in ends] == [(first, 0), (second, 0)]


def test_fake_tensors_take_what_real_ones_take() -> None:
    def block(make: Callable[..., Tensor]) -> Tensor:
        x, weight, bias = make(300, 256), make(512, 256), make(512)
        y = functional.silu(functional.linear(x, weight, bias)).view(300, 2, 256).transpose(0, 1)
        mixed = functional.scaled_dot_product_attention(y[None], y[None], y[None])[0].transpose(0, 1).flatten(1)
        normed = functional.layer_norm(mixed, (512,))
        return torch.cat((normed[:, :256] * 2.0, x)).float().mean(-1)

    real, fake = Ledger(), Ledger()
    with real:
        real_peak = peak(real, lambda: block(torch.randn))
    with FakeTensorMode(), fake:
        fake_peak = peak(fake, lambda: block(torch.empty))
    assert real_peak == fake_peak > 300 * 512 * 4 * 2


@pytest.mark.parametrize("name", ["reference", "fp8", "int8-w8a8-rotated", "gguf-q8_0"])
def test_a_fake_branch_holds_the_bytes_of_a_real_one(name: str) -> None:
    def held(weights: BranchWeights, branch: Branch) -> int:
        placement = Placement(torch.bfloat16, CPU, CPU)
        return weight_bytes(assemble(weights, branch, branch.config(), placement, sees_text=True))

    recipe, branch = RECIPES[name], SMALL[0]
    with FakeTensorMode():
        fake = held(FakeBranch(branch, recipe, torch.bfloat16), branch)
    assert fake == held(RandomBranch(branch, recipe, Tiles(CPU, torch.bfloat16)), branch)


GROWTH = """
import sys, torch, psutil
from benchmarks.counting.ledger import Ledger
torch.set_num_threads(1)
process, ledger = psutil.Process(), Ledger()
with Ledger():  # what torch loads when it is first looked on
    torch.cat((torch.ones(8, 8) + 1.0, torch.ones(8, 8)))
start = process.memory_info().rss
with ledger, ledger.phase("work"):
    x = torch.ones(4096, 4096)
    y = x + 1.0
    z = torch.cat((x, y))
    grown = process.memory_info().rss - start
print(grown, ledger.peaks["work"][torch.device("cpu")])
"""


def test_resident_memory_of_a_process_grows_by_what_the_ledger_says() -> None:
    command = [sys.executable, "-c", GROWTH]
    answer = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    grown, counted = map(int, answer.stdout.split())
    # 268 MB of tensors; pages of the interpreter and of libraries come and go beside them
    assert counted == 4 * 4096**2 * 4 and abs(grown - counted) < 0.1 * counted


def test_a_pretended_card_launches_nothing_and_makes_what_kernels_would() -> None:
    kernels, ledger = fused_kernels("triton"), Ledger(attention_on((8, 6)))
    with pretended(ledger), torch.inference_mode():
        x = torch.empty(64, 512, dtype=torch.bfloat16, device=DEVICE)
        rows = kernels.norm(x, torch.empty(512, device=DEVICE), 1e-5, "rotated")
        assert (
            isinstance(rows, QuantizedActivations) and rows.values.shape == (64, 512) and rows.values.device == DEVICE
        )
        before = ledger.live[DEVICE]
        weight, scale = torch.empty(1024, 512, dtype=torch.int8, device=DEVICE), torch.empty(1024, device=DEVICE)
        y = kernels.matmul(rows, weight, scale, None, torch.bfloat16)
        assert ledger.live[DEVICE] - before == 1024 * 512 + 4096 + 64 * 1024 * 2 and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "head", "dtype", "beside"),
    [
        ((8, 6), 256, torch.bfloat16, 18 * 1000 * 4),  # FlashAttention: one float32 a row
        ((8, 6), 512, torch.bfloat16, 18 * 1000 * 512 * 4),  # no FlashAttention: sums in float32
        ((7, 5), 256, torch.float16, 18 * 1000 * 256 * 4),
        ((7, 5), 128, torch.float16, 0),
    ],
)
def test_attention_takes_what_its_kernel_takes_and_never_the_scores(
    capability: tuple[int, int], head: int, dtype: torch.dtype, beside: int
) -> None:
    ledger = Ledger(attention_on(capability))
    with pretended(ledger, capability), torch.inference_mode():
        x = torch.empty(1, 18, 1000, head, dtype=dtype, device=DEVICE)
        before = ledger.live[DEVICE]
        highest = peak(ledger, lambda: functional.scaled_dot_product_attention(x, x, x), DEVICE)
    result = 18 * 1000 * head * dtype.itemsize
    assert highest - before == pytest.approx(result + beside, abs=2048)  # rounded up, with a seed


def test_a_picture_is_counted_phase_by_phase_and_nothing_of_it_stays_but_the_weights() -> None:
    counted = count_picture(Case(WORKLOAD, RECIPES["int8-w8a8-rotated"]))
    assert list(counted.phases) == ["load", "prepare", "step", "preview", "decode"]
    assert all(most > counted.kept for most in counted.phases.values())
    assert counted.peak <= counted.least <= counted.reserved < 2 * counted.peak


def test_one_block_more_is_the_only_thing_that_depth_adds_to_a_step() -> None:
    two = count_picture(Case(WORKLOAD, RECIPES["int8-w8a8-rotated"], decodes=False))
    deeper = replace(WORKLOAD, model=find_shape("layers=3"))
    three = count_picture(Case(deeper, RECIPES["int8-w8a8-rotated"], decodes=False))
    vectors = 2 * WORKLOAD.steps * 4 * 4608 * 4  # of the norms of one block in each branch
    assert three.phases["step"] - two.phases["step"] == three.kept - two.kept + vectors


def test_the_published_depth_is_counted_too() -> None:
    workload = replace(WORKLOAD, model=MODELS["ideogram-4"])
    counted = count_picture(Case(workload, RECIPES["int8-w8a8-rotated"], decodes=False))
    assert counted.kept == pytest.approx(17.34e9, rel=1e-3)


# Rules of CUDACachingAllocator, by hand.


def allocated(*sizes: int) -> Allocator:
    allocator = Allocator()
    for size in sizes:
        allocator.allocate(size)
    return allocator


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ((1,), 2 * MIB),
        ((MIB, MIB), 2 * MIB),
        ((MIB, MIB, 1), 4 * MIB),
        ((MIB + 1,), 20 * MIB),
        ((MIB + 1,) * 9, 20 * MIB),
        ((9 * MIB, 9 * MIB, MIB + 1), 20 * MIB),  # a rest of 2 MiB is cut off and used
        ((10 * MIB,), 10 * MIB),
        ((11 * MIB,), 12 * MIB),
        ((11 * MIB, MIB + 1), 32 * MIB),  # a rest of 1 MiB stays with its block
    ],
)
def test_segments_are_as_large_as_cudas(sizes: tuple[int, ...], reserved: int) -> None:
    assert allocated(*sizes).reserved == reserved


def test_free_neighbours_become_one_block() -> None:
    allocator = Allocator()
    blocks = [allocator.allocate(4 * MIB) for _ in range(5)]
    for index in (0, 2, 1, 4, 3):
        allocator.free(blocks[index])
    allocator.allocate(19 * MIB)
    assert allocator.reserved == 20 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = Allocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(30 * MIB).place == small.place


def test_a_limit_is_kept_by_giving_back_what_is_cached() -> None:
    def events() -> Iterator[tuple[int, int]]:
        yield from ((0, 30 * MIB), (0, 0), (1, 40 * MIB))

    assert reserved_bytes(events()) == 70 * MIB
    assert fits(tuple(events()), 40 * MIB) and not fits(tuple(events()), 38 * MIB)
    assert reserved_bytes(events(), limit=40 * MIB) == 40 * MIB


def test_an_emptied_cache_keeps_segments_that_are_in_use() -> None:
    allocator = Allocator()
    first, second = allocator.allocate(4 * MIB), allocator.allocate(4 * MIB)
    other = allocator.allocate(30 * MIB)
    allocator.free(first)
    allocator.free(other)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB and not second.is_free
