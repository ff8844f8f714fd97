"""INT8: torchao quantizes alike, NumPy multiplies alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_cpu import cpu_multiplies_exactly
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, PerRow, quantize_
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

from ideogram_app.quantization import int8, rows
from ideogram_app.quantization.rows import dequantize_rows

EXACT_CPU = pytest.mark.skipif(not cpu_multiplies_exactly(), reason="torch._int_mm saturates on this CPU")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_widened_in_runs_are_those_widened_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values, scale = int8.quantize_rows(gaussian(37, 64))
    at_once = (values.float() * scale.unsqueeze(-1)).to(dtype)
    monkeypatch.setattr(rows, "WIDENED_AT_ONCE", 5 * 64)
    assert torch.equal(dequantize_rows(values, scale, dtype), at_once)


def test_weights_are_rounded_as_torchao_rounds_them_on_the_same_scales() -> None:
    weight = gaussian(96, 128) * torch.logspace(-4, 1, 96).unsqueeze(-1)
    values, scale = int8.quantize_rows(weight)
    theirs = Int8Tensor.from_hp(weight, PerRow(), scale=scale.unsqueeze(-1))
    assert torch.equal(values, theirs.qdata)
    assert torch.allclose(dequantize_rows(values, scale), theirs.dequantize())


def test_weights_stay_symmetric_and_each_row_reaches_127() -> None:
    weight = gaussian(64, 256)
    values, scale = int8.quantize_rows(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (64,)
    assert torch.equal(values.abs().amax(-1), torch.full((64,), 127, dtype=torch.int8))
    assert torch.equal(int8.quantize_rows(-weight)[0], -values)


def test_weights_differ_from_torchaos_own_scales_by_their_127_and_a_half() -> None:
    weight = gaussian(32, 64)
    theirs = Int8Tensor.from_hp(weight, PerRow())
    assert torch.allclose(int8.quantize_rows(weight)[1] * 127, theirs.scale.squeeze(-1) * 127.5)


def test_rounding_error_is_at_most_half_a_step() -> None:
    weight = gaussian(64, 256)
    values, scale = int8.quantize_rows(weight)
    assert ((dequantize_rows(values, scale) - weight).abs() <= 0.5001 * scale.unsqueeze(-1)).all()
    error = (dequantize_rows(values, scale) - weight).norm() / weight.norm()
    assert error < 0.009  # one step a row of 256 Gaussians


def test_activations_are_quantized_exactly_as_torchao_does() -> None:
    x = gaussian(3, 11, 128) * torch.logspace(-6, 3, 11).unsqueeze(-1)
    x[1, 4] = 0
    values, scale = int8.quantize_tokens(x)
    theirs = Int8Tensor.from_hp(x, PerRow())
    assert torch.equal(values, theirs.qdata)
    assert torch.equal(scale, theirs.scale)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-38, 1e-20])
def test_silent_and_nearly_silent_rows_stay_finite(value: float) -> None:
    weight = torch.full((2, 64), value)
    values, scale = int8.quantize_rows(weight)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.allclose(dequantize_rows(values, scale), weight, rtol=0.01, atol=1e-37)
    y = int8.linear(weight, *int8.quantize_rows(gaussian(8, 64)))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("shape", [(1, 64), (17, 1024), (5, 3000)])
def test_products_are_exact_in_int32_even_at_the_extremes(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    left = rng.integers(-128, 128, shape, dtype=np.int8)
    right = rng.integers(-128, 128, (40, shape[1]), dtype=np.int8)
    left[0], right[0], right[1] = -128, -128, 127
    ours = int8.int32_product(torch.from_numpy(left), torch.from_numpy(right))
    assert ours.dtype == torch.int32
    assert np.array_equal(ours.numpy(), left.astype(np.int64) @ right.astype(np.int64).T)


@EXACT_CPU
def test_linear_equals_torchaos_runtime_to_the_last_bit_in_float32() -> None:
    x, weight, bias = gaussian(2, 7, 256), gaussian(48, 256, seed=1), gaussian(48, seed=2)
    values, scale = int8.quantize_rows(weight)
    act = QuantizeTensorToInt8Kwargs(granularity=PerRow())
    theirs = Int8Tensor(values, scale.unsqueeze(-1), [1, 256], torch.float32, act_quant_kwargs=act)
    assert torch.equal(int8.linear(x, values, scale, bias), torch.nn.functional.linear(x, theirs, bias))


@EXACT_CPU
def test_linear_is_as_close_to_the_truth_as_torchaos_whole_recipe() -> None:
    x, layer = gaussian(33, 256), torch.nn.Linear(256, 64)
    exact = layer(x).detach()
    ours = int8.linear(x, *int8.quantize_rows(layer.weight.detach()), layer.bias.detach())
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(version=2, set_inductor_config=False))
    our_error, their_error = (ours - exact).norm(), (layer(x) - exact).norm()
    assert our_error < 0.02 * exact.norm()
    assert our_error < 1.1 * their_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_answers_in_the_type_and_shape_it_was_asked(dtype: torch.dtype) -> None:
    values, scale = int8.quantize_rows(gaussian(24, 64))
    for lead in ((), (1,), (2, 5)):
        y = int8.linear(gaussian(*lead, 64).to(dtype), values, scale)
        assert y.dtype == dtype and y.shape == (*lead, 24)
