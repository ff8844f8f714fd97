"""Kernels that need no Triton: runs of rows make what plain torch makes, to the bit, whatever the length of a run."""

from __future__ import annotations

import pytest
import torch
from exact_cpu import cpu_multiplies_exactly
from torch import Tensor

from ideogram_app.kernels import plain, runs, torch_products
from ideogram_app.kernels.choice import new_kernels
from ideogram_app.kernels.contract import InputFormat, Operand, QuantizedActivations
from ideogram_app.quantization import int8, k_quants

EPSILON = 1e-5
FORMATS: tuple[InputFormat, ...] = ("dense", "int8", "rotated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT_INT_MM = pytest.mark.skipif(not cpu_multiplies_exactly(), reason="torch._int_mm saturates on this CPU")


@pytest.fixture(autouse=True, params=[1, 700, 2**24], ids=["a row a run", "two rows a run", "one run"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of runs, in numbers."""
    monkeypatch.setattr(runs, "WIDENED_AT_ONCE", request.param)
    monkeypatch.setattr(runs, "DECODED_AT_ONCE", request.param)
    monkeypatch.setattr(torch_products, "WIDENED_AT_ONCE", request.param)
    monkeypatch.setattr(torch_products, "INT32_ROWS", 3)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(got: Operand, truth: Operand) -> None:
    if isinstance(got, QuantizedActivations):
        assert isinstance(truth, QuantizedActivations)
        assert torch.equal(got.values, truth.values) and torch.equal(got.scale, truth.scale)
    else:
        assert isinstance(truth, Tensor) and got.dtype == truth.dtype and torch.equal(got, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("input_format", FORMATS)
def test_row_operations_are_those_of_plain_torch(dtype: torch.dtype, input_format: InputFormat) -> None:
    x, update = gaussian(5, 256, dtype=dtype), gaussian(5, 256, seed=1, dtype=dtype)
    vector, gate = gaussian(256, seed=2), gaussian(256, seed=3)
    wide = gaussian(5, 512, seed=4, dtype=dtype)
    assert_same(runs.norm(x, vector, EPSILON, input_format), plain.norm(x, vector, EPSILON, input_format))
    assert_same(runs.swiglu(wide, input_format), plain.swiglu(wide, input_format))
    assert_same(runs.quantize(x, input_format), plain.quantize(x, input_format))
    hidden, operand = plain.add_norm(x, update, gate, vector, EPSILON, input_format)
    made, read = runs.add_norm(x.clone(), update, gate, vector, EPSILON, input_format)
    assert torch.equal(made, hidden)
    assert_same(read, operand)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_turned_where_they_stand(dtype: torch.dtype) -> None:
    qkv, norm_q, norm_k = gaussian(5, 3 * 2 * 32, dtype=dtype), gaussian(32, seed=1), gaussian(32, seed=2)
    cos, sin = gaussian(5, 16, seed=3), gaussian(5, 16, seed=4)
    truth = plain.heads(qkv.clone(), norm_q, norm_k, cos, sin, EPSILON)
    made = runs.heads(qkv, norm_q, norm_k, cos, sin, EPSILON)
    assert all(torch.equal(one, other) for one, other in zip(made, truth, strict=True))
    assert {each.untyped_storage().data_ptr() for each in made} == {qkv.untyped_storage().data_ptr()}


@pytest.mark.parametrize("rotated", [False, True])
def test_q4_k_becomes_the_same_int8(rotated: bool) -> None:
    packed, scale = k_quants.encode(gaussian(5, 256), "Q4_K"), gaussian(5, seed=1).abs() + 0.01
    assert torch.equal(runs.decode_int8(packed, scale, rotated), plain.decode_int8(packed, scale, rotated))


@pytest.mark.parametrize("name", ["plain", pytest.param("torch", marks=EXACT_INT_MM)])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_summed_exactly(name: str, rows: int, biased: bool) -> None:
    x = QuantizedActivations(*int8.quantize_tokens(gaussian(rows, 2048)))
    values, scale = int8.quantize_rows(gaussian(48, 2048, seed=1))
    bias = gaussian(48, seed=2) if biased else None
    for dtype in DTYPES:
        made = new_kernels(name).matmul(x, values, scale, bias, dtype)
        assert_same(made, plain.matmul(x, values, scale, bias, dtype))


def test_a_product_that_is_not_there_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(left: Tensor, right: Tensor) -> Tensor:
        raise RuntimeError("_int_mm is only supported on SM 7.5 and newer")

    torch_products.int_mm_problem.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert "does not run" in torch_products.int_mm_problem(torch.device("cpu"))
    torch_products.int_mm_problem.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: torch.zeros(left.shape[0], right.shape[1]).int())
    assert "not exact" in torch_products.int_mm_problem(torch.device("cpu"))
    torch_products.int_mm_problem.cache_clear()
