"""The rotation: regular, orthogonal, its own inverse, and nothing that NumPy would not compute from the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ideogram_app.errors import RequestError
from ideogram_app.quantization import rotation
from ideogram_app.quantization.rotation import GROUP, hadamard, rotate

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_bits(size: int) -> np.ndarray:
    """Entry by entry: the product of H4 at every base-4 digit of row and column."""
    matrix = np.ones((size, size))
    place = 1
    while place < size:
        digits = np.arange(size) // place % 4
        matrix *= H4[digits[:, None], digits[None, :]]
        place *= 4
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("group", [1, 4, 16, 64, 256])
def test_the_matrix_is_orthogonal_symmetric_and_every_row_sums_to_the_same(group: int) -> None:
    matrix = hadamard(group, torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(group, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(
        matrix.sum(1), torch.ones(group, dtype=torch.float64)
    )  # what "regular" means; Sylvester's is not
    assert np.allclose(matrix.numpy(), by_bits(group))


@pytest.mark.parametrize("group", [4, 16, 64, 256])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_rotating_is_multiplying_by_the_block_diagonal_matrix(group: int, lead: tuple[int, ...]) -> None:
    x = gaussian(*lead, 3 * group)
    whole = np.kron(np.eye(3), by_bits(group))
    turned = rotate(x, group)
    assert turned.shape == x.shape and turned.dtype == torch.float32
    assert np.allclose(turned.numpy(), x.double().numpy() @ whole, atol=1e-5)


def test_rotating_twice_changes_nothing() -> None:
    x = gaussian(7, 1024)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)


def test_a_product_does_not_notice_that_both_sides_were_rotated() -> None:
    x, weight = gaussian(5, 512), gaussian(24, 512)
    assert torch.allclose(rotate(x) @ rotate(weight).T, x @ weight.T, atol=1e-4)


def test_one_loud_channel_is_spread_evenly_over_its_block_alone() -> None:
    x = torch.zeros(2 * GROUP)
    x[GROUP + 7] = 16.0
    turned = rotate(x)
    assert not turned[:GROUP].any()
    assert torch.allclose(turned[GROUP:].abs(), torch.ones(GROUP))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rotated_in_float32(dtype: torch.dtype) -> None:
    x = gaussian(4, 256).to(dtype)
    assert torch.equal(rotate(x), rotate(x.float()))


def test_rows_and_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match=r"multiple of 256.*832"):
        rotate(gaussian(2, 832))
    for group in (2, 128, 200):
        with pytest.raises(RequestError, match="power of 4"):
            rotate(gaussian(2, group), group)


def test_what_was_kept_by_inference_serves_where_gradients_are_wanted() -> None:
    rotation._halves.cache_clear()
    with torch.inference_mode():
        rotate(gaussian(2, 256))
    x = gaussian(2, 256).requires_grad_()
    (rotate(x) ** 2).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, 2 * x, atol=1e-5)  # an orthogonal matrix keeps lengths
