"""FP8 rows: torch's own conversion rounds, NumPy recomputes the scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ideogram_app.quantization import fp8, rows
from ideogram_app.quantization.rows import dequantize_rows


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_widened_in_runs_are_those_widened_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values, scale = fp8.quantize_rows(gaussian(37, 64))
    at_once = (values.float() * scale.unsqueeze(-1)).to(dtype)
    monkeypatch.setattr(rows, "WIDENED_AT_ONCE", 5 * 64)
    assert torch.equal(dequantize_rows(values, scale, dtype), at_once)


def e4m3_numbers() -> np.ndarray:
    """Every finite float8_e4m3fn, from its definition: 4 exponent bits with bias 7, 3 of fraction, no infinity."""
    small = [fraction / 8 * 2.0**-6 for fraction in range(8)]
    normal = [(1 + fraction / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for fraction in range(8)]
    return np.array([*small, *normal[:-1]])  # the last pattern is NaN


def test_the_largest_number_is_448() -> None:
    assert fp8.LARGEST == 448 == e4m3_numbers().max()


def test_every_weight_lands_on_its_nearest_number() -> None:
    weight = gaussian(16, 64).double()
    values, scale = fp8.quantize_rows(weight)
    grid = e4m3_numbers()
    scaled = weight.abs().numpy() / scale.unsqueeze(-1).double().numpy()
    nearest = np.abs(scaled[..., None] - grid).min(-1)
    ours = np.abs(values.double().abs().numpy() - scaled)
    assert np.allclose(ours, nearest, atol=1e-4)


def test_scales_are_the_largest_magnitude_over_448() -> None:
    weight = gaussian(32, 64)
    values, scale = fp8.quantize_rows(weight)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (32,)
    assert np.array_equal(scale.numpy(), np.abs(weight.numpy()).max(-1) / np.float32(448))
    assert (values.float().abs().amax(-1) == 448).all()


def test_error_stays_under_the_bar() -> None:
    weight = gaussian(256, 512)
    made = dequantize_rows(*fp8.quantize_rows(weight))
    assert (made - weight).norm() < 0.027 * weight.norm()  # three fraction bits: 2.6 %


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-38, 1e30, -1e38])
def test_extreme_rows_stay_finite(value: float) -> None:
    weight = torch.full((2, 64), value)
    made = dequantize_rows(*fp8.quantize_rows(weight))
    assert torch.allclose(made, weight, rtol=0.01, atol=1e-37)


def test_a_published_matrix_survives_being_read_and_made_again() -> None:
    values, scale = fp8.quantize_rows(gaussian(32, 128))
    again, scale_again = fp8.quantize_rows(dequantize_rows(values, scale))
    assert torch.equal(values.view(torch.uint8), again.view(torch.uint8))
    assert torch.allclose(scale, scale_again, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_multiplies_with_the_widened_weight(dtype: torch.dtype) -> None:
    values, scale = fp8.quantize_rows(gaussian(24, 64))
    x, bias = gaussian(2, 5, 64, seed=1).to(dtype), gaussian(24, seed=2).to(dtype)
    widened = (values.float() * scale.unsqueeze(-1)).to(dtype)
    y = fp8.linear(x, values, scale, bias)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, widened, bias))
