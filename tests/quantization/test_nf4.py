"""NF4 against a decoder written with loops and NumPy, and against what the format's authors state of its tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ideogram_app.errors import RequestError
from ideogram_app.quantization import nf4
from tools.replica_parts import nest

LEVELS = torch.tensor(nf4.NF4_LEVELS)


def slow_decode(packed: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """One weight after the other."""
    weights = []
    for byte in packed.tolist():
        for code in (byte // 16, byte % 16):
            weights.append(np.float32(nf4.NF4_LEVELS[code]) * absmax[len(weights) // 64])
    return np.array(weights, dtype=np.float32)


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, equation 4 and the authors' code: eight of one side, seven of the other, zero, scaled to 1."""
    offset = 0.9677083
    upper = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    lower = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([upper, [0], lower])) / upper.max()
    assert np.abs(expected - np.array(nf4.NF4_LEVELS)).max() < 1e-6


@pytest.mark.parametrize("shape", [(4, 64), (3, 128), (5, 96), (7, 34), (1, 2)])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_decoding_agrees_with_one_weight_after_the_other(shape, nested) -> None:
    packed, widened = nf4.encode(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    scales = nest(widened) if nested else nf4.Scales(widened)
    absmax = scales.absmax.numpy()
    if nested:
        runs, levels = scales.nested_absmax.numpy(), scales.nested_levels.numpy()
        absmax = np.array(
            [levels[byte] * runs[block // 256] + np.float32(scales.offset) for block, byte in enumerate(absmax)]
        )
    expected = slow_decode(packed.numpy(), absmax)
    assert np.array_equal(nf4.decode(packed, scales, LEVELS).numpy(), expected)


def test_the_error_on_gaussian_weights_is_that_of_nf4() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    packed, absmax = nf4.encode(weight)
    got = nf4.decode(packed, nest(absmax), LEVELS).view(512, 1024)
    plain = nf4.decode(packed, nf4.Scales(absmax), LEVELS).view(512, 1024)
    error = float((plain - weight).norm() / weight.norm())
    assert 0.085 < error < 0.095  # 16 levels, blocks of 64
    assert float((got - plain).norm() / weight.norm()) < 0.01  # what nesting adds


def test_levels_and_block_maxima_come_back_exactly() -> None:
    weight = (LEVELS.repeat(64).view(16, 64) * torch.arange(1, 17).unsqueeze(1)).float()
    packed, absmax = nf4.encode(weight)
    assert torch.equal(nf4.decode(packed, nf4.Scales(absmax), LEVELS).view(16, 64), weight)


def test_a_matrix_of_zeros_comes_back_as_zeros() -> None:
    packed, absmax = nf4.encode(torch.zeros(4, 64))
    assert torch.equal(nf4.decode(packed, nest(absmax), LEVELS), torch.zeros(256))


def test_an_odd_number_of_weights_is_refused() -> None:
    with pytest.raises(RequestError, match="even number"):
        nf4.encode(torch.zeros(3, 3))
