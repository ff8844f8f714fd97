"""Which backends are tried on which card, what a plan counts with, and how long runs of queries are."""

from __future__ import annotations

from typing import Any

import pytest

from ideogram_app.machine.attention import (
    BYTES_A_SCORE,
    CUDNN,
    EFFICIENT,
    FLASH,
    MATH,
    SCORE_BYTES,
    UNSAFE_CUDNN,
    expected,
    order,
    run_bytes,
    score_runs,
)
from ideogram_app.machine.capabilities import attention_type, compute_type, decoder_type, widens_products
from ideogram_app.machine.hardware import Hardware
from tests.machines import apple, geforce, machine

SAFE = UNSAFE_CUDNN + 1
AMPERE_ON = (FLASH, EFFICIENT, MATH)


@pytest.mark.parametrize(
    ("capability", "cudnn", "tried"),
    [
        (None, SAFE, ()),
        ((6, 1), SAFE, (EFFICIENT, MATH)),
        ((7, 5), SAFE, (EFFICIENT, MATH)),
        ((8, 0), SAFE, AMPERE_ON),
        ((8, 9), SAFE, AMPERE_ON),
        ((9, 0), SAFE, (CUDNN, *AMPERE_ON)),
        ((9, 0), UNSAFE_CUDNN, AMPERE_ON),  # of cu126 wheels: 9.10
        ((9, 0), None, AMPERE_ON),
        ((10, 0), SAFE, AMPERE_ON),  # a B200, where cuDNN's numbers are known to be wrong
        ((10, 3), SAFE, AMPERE_ON),
        ((12, 0), SAFE, AMPERE_ON),
    ],
)
def test_each_generation_tries_its_attention_backends_in_order(capability: Any, cudnn: Any, tried: Any) -> None:
    assert order(capability, cudnn) == tried


def on_windows(name: str, capability: tuple[int, int]) -> Hardware:
    return geforce(name, capability, 12, os="Windows 11")


@pytest.mark.parametrize(
    ("hardware", "counted"),
    [
        (geforce("RTX 2080 Ti", (7, 5), 11), EFFICIENT),
        (geforce("RTX 3060", (8, 6), 12), FLASH),
        (on_windows("RTX 3060", (8, 6)), EFFICIENT),  # whose wheels have no FLASH
        (machine("NVIDIA H100 80GB HBM3", (9, 0), 80), FLASH),
        (machine("AMD Instinct MI210", (9, 0), 64, kind="rocm"), FLASH),
        (machine("AMD Radeon RX 6800 XT", (10, 3), 16, kind="rocm"), MATH),
        (machine("Intel Arc B580", None, 12, kind="xpu"), MATH),
        (apple(32), MATH),
        (Hardware(), FLASH),
    ],
)
def test_a_plan_counts_with_what_the_device_will_take(hardware: Hardware, counted: str) -> None:
    assert expected(hardware) == counted


@pytest.mark.parametrize(
    ("hardware", "types", "widens"),
    [
        (geforce("RTX 2080 Ti", (7, 5), 11), ("bfloat16", "float16", "float32"), True),
        (machine("Tesla V100-SXM2-32GB", (7, 0), 32), ("float32", "float32", "float32"), False),
        (geforce("GTX 1060 6GB", (6, 1), 6), ("float32", "float32", "float32"), False),
        (geforce("RTX 3060", (8, 6), 12), ("bfloat16", "bfloat16", "bfloat16"), False),
        (machine("AMD Radeon VII", (9, 0), 16, kind="rocm"), ("bfloat16", "bfloat16", "bfloat16"), False),
        (apple(32), ("bfloat16", "bfloat16", "bfloat16"), False),
        (Hardware(), ("float32", "float32", "float32"), False),
    ],
)
def test_nothing_between_matrices_is_float16(hardware: Hardware, types: tuple[str, str, str], widens: bool) -> None:
    found = compute_type(hardware)[0], attention_type(hardware), decoder_type(hardware)
    assert found == types and widens_products(hardware) == widens


@pytest.mark.parametrize("tokens", [1, 17, 324, 1324, 6144, 18432, 100_000])
@pytest.mark.parametrize("heads", [1, 18, 32])
def test_scores_of_a_run_stay_within_their_bytes(heads: int, tokens: int) -> None:
    together, rows = score_runs(heads, tokens, tokens)
    assert 1 <= together <= heads and 1 <= rows <= tokens
    assert together * rows * tokens * BYTES_A_SCORE <= SCORE_BYTES
    assert together == 1 or rows == tokens, "several heads only where each is whole"


def test_a_large_picture_takes_a_hundredth_of_what_all_its_scores_would() -> None:
    tokens = 18_432  # of 2048 x 2048 pixels with the longest caption
    assert run_bytes(18, tokens, 256) < 0.01 * 18 * tokens**2 * 8
    assert 18 * score_runs(18, tokens, tokens)[1] * tokens * 2 < 2**32 / 10, "MPSGraph aborts at 4 GiB"
