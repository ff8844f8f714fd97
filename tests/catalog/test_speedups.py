"""What may be left out: which transformer runs when, and that what is reused is what was computed before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counting.ledger import Ledger
from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.speedups import (
    LEAVE,
    REUSE,
    RUN,
    SPEEDUPS,
    cached_bytes,
    check_speedups,
    threshold,
    unconditional,
)
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import RequestError
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import denoise, make_noise, schedule, times
from ideogram_app.model.loader import Loaded, load_transformers

pytestmark = pytest.mark.slow

PRESET, GUIDANCE = PRESETS["default-20"], 1.5
SIGMAS = schedule(PRESET, 128, 128, 18.0)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load_transformers(Store(tmp_path_factory.mktemp("data")), "miniature", "reference", "cpu", torch.float32)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(1, 21, 832, generator=torch.Generator().manual_seed(2))


def walk(loaded: Loaded, features: Tensor, *savings: str) -> Tensor:
    velocity = GuidedModel(loaded, features, 8, 8, times(SIGMAS), savings)
    *_, last = denoise(velocity, make_noise(4, 128, 128), SIGMAS, (GUIDANCE,) * PRESET.steps)
    return last.latents


def counted(loaded: Loaded, features: Tensor, *savings: str) -> tuple[int, int, int]:
    """Calls of the first block of both transformers, and of the last block of the conditional one."""
    calls = {"first": 0, "other": 0, "last": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    blocks, others = loaded.conditional.trunk.blocks, loaded.unconditional.trunk.blocks
    watched = {"first": blocks[0], "other": others[0], "last": blocks[-1]}
    handles = [block.register_forward_pre_hook(count(name)) for name, block in watched.items()]
    walk(loaded, features, *savings)
    for handle in handles:
        handle.remove()
    return calls["first"], calls["other"], calls["last"]


def test_nothing_is_left_out_unless_it_is_asked_for(loaded: Loaded, features: Tensor) -> None:
    assert counted(loaded, features) == (20, 20, 20)


def test_reused_guidance_runs_the_unconditional_transformer_in_every_second_step(
    loaded: Loaded, features: Tensor
) -> None:
    manners = [unconditional(("reuse-guidance",), step, 20) for step in range(20)]
    assert manners == [RUN, RUN] + [RUN, REUSE] * 9
    assert counted(loaded, features, "reuse-guidance") == (20, 11, 20)


def test_the_end_of_a_schedule_can_run_the_conditional_transformer_alone(loaded: Loaded, features: Tensor) -> None:
    manners = [unconditional(("late-conditional",), step, 20) for step in range(20)]
    assert manners == [RUN] * 12 + [LEAVE] * 8
    assert counted(loaded, features, "late-conditional") == (20, 12, 20)


def test_a_reused_difference_is_that_of_the_step_before(loaded: Loaded, features: Tensor) -> None:
    """At guidance g, a full step gives c + (g - 1)(c - u); the next one adds the same difference to its own c."""
    velocity = GuidedModel(loaded, features, 8, 8, times(SIGMAS), ("reuse-guidance",))
    noise = make_noise(4, 128, 128)
    with torch.inference_mode():
        full, alone = velocity(noise, 2, 7.0), velocity(noise, 2, 1.0)
        reused = velocity(noise, 3, 7.0)
        own = GuidedModel(loaded, features, 8, 8, times(SIGMAS))(noise, 3, 1.0)
    assert torch.allclose(reused, own + (full - alone), atol=1e-4)


def test_without_guidance_the_conditional_alone_is_exact(loaded: Loaded, features: Tensor) -> None:
    noise, steps = make_noise(4, 128, 128), times(SIGMAS)
    with torch.inference_mode():
        left = GuidedModel(loaded, features, 8, 8, steps, ("late-conditional",))(noise, 19, 7.0)
        whole = GuidedModel(loaded, features, 8, 8, steps)(noise, 19, 1.0)
    assert torch.equal(left, whole)


def test_a_first_block_that_did_not_change_spares_the_others(loaded: Loaded, features: Tensor) -> None:
    """The same latents twice: nothing changed, so the second answer is the first, and no other block has run."""
    velocity = GuidedModel(loaded, features, 8, 8, torch.full((20,), 0.5), ("first-block-cache",))
    noise = make_noise(4, 128, 128)
    with torch.inference_mode():
        whole = GuidedModel(loaded, features, 8, 8, torch.full((20,), 0.5))(noise, 6, GUIDANCE)
        first, second = velocity(noise, 6, GUIDANCE), velocity(noise, 7, GUIDANCE)
        other = velocity(make_noise(5, 128, 128), 8, GUIDANCE)
        truth = GuidedModel(loaded, features, 8, 8, torch.full((20,), 0.5))(make_noise(5, 128, 128), 8, GUIDANCE)
    assert torch.allclose(first, whole, atol=1e-5) and torch.allclose(second, first, atol=1e-5)
    assert torch.allclose(other, truth, atol=1e-5)


def test_a_first_block_cache_skips_some_steps_and_never_the_first_ones(loaded: Loaded, features: Tensor) -> None:
    bounds = [threshold(("first-block-cache",), step, 20) for step in range(20)]
    assert bounds == [None] * 2 + [SPEEDUPS["first-block-cache"].threshold] * 17 + [None]
    first, _, last = counted(loaded, features, "first-block-cache")
    assert first == 20 and last < 20


@pytest.mark.parametrize("name", SPEEDUPS)
def test_every_saving_draws_something_near_the_whole_picture(loaded: Loaded, features: Tensor, name: str) -> None:
    whole, left = walk(loaded, features), walk(loaded, features, name)
    assert 0 <= float((left - whole).norm() / whole.norm()) < 0.5


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("teacache",), "first-block-cache"),
        (("reuse-guidance", "reuse-guidance"), "twice"),
        (("reuse-guidance", "late-conditional"), "one of them"),
    ],
)
def test_savings_that_do_not_exist_or_do_not_go_together_are_refused(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        check_speedups(names)


def test_each_transformer_computes_on_its_own_device(loaded: Loaded, features: Tensor, tmp_path: Path) -> None:
    """The second one on a device without memory: it is given its inputs there, and only its answer would come back."""
    meta = torch.device("meta")
    other = load_transformers(Store(tmp_path), "miniature", "reference", "cpu", torch.float32).unconditional
    split = replace(loaded, unconditional=other.to(meta), devices=(torch.device("cpu"), meta))
    seen: list[torch.device] = []
    other.trunk.register_forward_pre_hook(lambda _, given: seen.extend((given[0].device, given[1].cos.device)))
    with torch.inference_mode(), pytest.raises(NotImplementedError, match="meta"):  # its answer has no data to bring
        GuidedModel(split, features, 8, 8, times(SIGMAS))(make_noise(4, 128, 128), 0, GUIDANCE)
    assert seen == [meta, meta]


@pytest.mark.parametrize("side", [256, 512])
def test_what_a_first_block_cache_remembers_is_what_a_plan_counts(loaded: Loaded, side: int) -> None:
    """Peaks of the same steps with and without it, counted storage by storage."""

    def peak(savings: tuple[str, ...]) -> int:
        sigmas = schedule(PRESETS["turbo-12"], side, side, 1.0)
        features = torch.zeros(1, 40, loaded.conditional.conditioner.text_norm.shape[0])
        with Ledger() as ledger:
            velocity = GuidedModel(loaded, features, side // 16, side // 16, times(sigmas)[:4], savings)
            noise = make_noise(0, side, side)
            with ledger.phase("steps"), torch.inference_mode():
                for step in range(4):
                    velocity(noise, step, 3.0)
        return ledger.peaks["steps"][torch.device("cpu")]

    counted = peak(("first-block-cache",)) - peak(())
    expected = cached_bytes(("first-block-cache",), MODELS["miniature"], (side, side), 40, 4)
    assert 0.6 * expected < counted <= expected
    assert cached_bytes(("reuse-guidance",), MODELS["miniature"], (side, side), 40, 4) == 0
