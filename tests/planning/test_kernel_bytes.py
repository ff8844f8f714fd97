"""What kernels without Triton hold for a moment, counted operation by operation on tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.counting.counted import DEVICE, pretended
from benchmarks.counting.ledger import Ledger
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.kernels.choice import new_kernels
from ideogram_app.kernels.contract import InputFormat, QuantizedActivations
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning import kernel_bytes
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import plan
from ideogram_app.quantization.k_quants import packed_columns

HIDDEN, INNER, HEAD = 4608, 12288, 256
FORMATS: tuple[InputFormat, ...] = ("dense", "int8", "rotated")
ROUNDING = 8192  # tensors are counted in whole 512 bytes; scales and sums of rows are not predicted
BF16, F32, I8 = torch.bfloat16, torch.float32, torch.int8


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    counted = Ledger()
    with pretended(counted), torch.inference_mode():
        yield counted


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def temporaries(ledger: Ledger, make: Callable[..., Any], *given: Any) -> int:
    """The most that was alive beside the arguments and the result; the larger of before and after is those."""
    before = ledger.live[DEVICE]
    with ledger.phase("operation"):
        made = make(*given)
    after = ledger.live[DEVICE]
    assert made is not None
    return ledger.peaks["operation"][DEVICE] - max(before, after)


def assert_counted(expected: int, found: int) -> None:
    assert found <= expected + ROUNDING and expected <= 1.03 * found + ROUNDING


@pytest.mark.parametrize("tokens", [300, 4396])
@pytest.mark.parametrize("input_format", FORMATS)
def test_row_operations(ledger: Ledger, tokens: int, input_format: InputFormat) -> None:
    kernels = new_kernels("torch")
    x, vector, gate_up = empty(tokens, HIDDEN), empty(HIDDEN, dtype=F32), empty(tokens, 2 * INNER)
    found = temporaries(ledger, kernels.norm, x, vector, 1e-5, input_format)
    assert_counted(kernel_bytes.operand_bytes("torch", input_format, tokens, HIDDEN), found)
    found = temporaries(ledger, kernels.swiglu, gate_up, input_format)
    assert_counted(kernel_bytes.swiglu_bytes("torch", input_format, tokens, INNER), found)


@pytest.mark.parametrize("tokens", [300, 4396])
def test_the_residual_and_the_heads(ledger: Ledger, tokens: int) -> None:
    kernels, x, vector = new_kernels("torch"), empty(tokens, HIDDEN), empty(HIDDEN, dtype=F32)
    assert_counted(
        kernel_bytes.add_bytes("torch", tokens, HIDDEN), temporaries(ledger, kernels.add, x, x, vector, 1e-5)
    )
    norm, angles, qkv = empty(HEAD, dtype=F32), empty(tokens, HEAD // 2, dtype=F32), empty(tokens, 3 * HIDDEN)
    found = temporaries(ledger, kernels.heads, qkv, norm, norm, angles, angles, 1e-5)
    assert_counted(kernel_bytes.heads_bytes("torch", tokens, HIDDEN), found)


@pytest.mark.parametrize("name", ["torch", "plain"])
@pytest.mark.parametrize(("rows", "columns"), [(2 * INNER, HIDDEN), (HIDDEN, INNER)])
@pytest.mark.parametrize("biased", [False, True])
def test_products(ledger: Ledger, name: str, rows: int, columns: int, biased: bool) -> None:
    tokens = 4396
    x = QuantizedActivations(empty(tokens, columns, dtype=I8), empty(tokens, 1, dtype=F32))
    bias = empty(rows) if biased else None
    weight, scale = empty(rows, columns, dtype=I8), empty(rows, dtype=F32)
    found = temporaries(ledger, new_kernels(name).matmul, x, weight, scale, bias, BF16)
    assert_counted(kernel_bytes.product_bytes(name, tokens, rows, biased), found)


@pytest.mark.slow
def test_a_matrix_of_q4_k_is_never_widened_as_a_whole(ledger: Ledger) -> None:
    packed, scale = empty(2 * INNER, packed_columns(HIDDEN, "Q4_K"), dtype=torch.uint8), empty(2 * INNER, dtype=F32)
    found = temporaries(ledger, new_kernels("torch").decode_int8, packed, scale, True)
    assert_counted(kernel_bytes.decoding_bytes("torch", 2 * INNER * HIDDEN), found)
    assert found < 2 * INNER * HIDDEN  # a byte a weight


@pytest.mark.parametrize("kernels", ["triton", "processor"])
def test_fused_kernels_hold_nothing(kernels: str) -> None:
    assert kernel_bytes.product_bytes(kernels, 4396, HIDDEN) == kernel_bytes.add_bytes(kernels, 4396, HIDDEN) == 0
    assert kernel_bytes.operand_bytes(kernels, "rotated", 4396, HIDDEN) == 0


@pytest.mark.parametrize("os", ["Windows 11", "Linux 6.8"])
def test_a_plan_counts_the_kernels_that_will_run_and_says_why_they_do(os: str) -> None:
    said = "Triton is not installed. This helps: pip install triton"
    card = Hardware(
        kind="cuda",
        name="NVIDIA GeForce RTX 3060",
        compute_capability=(8, 6),
        device_memory_bytes=12_884_901_888,
        device_free_bytes=12_000_000_000,
        host_memory_bytes=32_000_000_000,
        host_free_bytes=26_000_000_000,
        disk_free_bytes=500_000_000_000,
        os=os,
        torch_supports_device=True,
    )
    recipe = find_recipe("int8-w8a8-rotated")
    with_triton, without = (PlanInputs.of(replace(card, triton_problem=why), "ideogram-4") for why in ("", said))
    assert without.measure(recipe).workspace > with_triton.measure(recipe).workspace + 10**8
    said_so = next(reason for reason in plan(without).reasons if reason.code == "no_triton")
    assert said in said_so.text
    assert "no_triton" not in [reason.code for reason in plan(with_triton).reasons]
