"""Dense products of what is stored in bfloat16, where there are no units for it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ideogram_app.kernels import dense


@pytest.mark.parametrize("numbers", [1, 40, 100, 2**24])
@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_runs_are_one_product_in_float32_rounded_once(
    shape: tuple[int, ...], numbers: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "WIDENED_AT_ONCE", numbers)
    x, weight = torch.randn(*shape, 12).bfloat16(), torch.randn(9, 12).bfloat16()
    bias = torch.randn(9).bfloat16() if biased else None
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    made = dense.widened_linear(x, weight, bias)
    assert made.shape == (*shape, 9) and made.dtype == torch.bfloat16
    assert torch.all((made.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6)


def test_results_beyond_float16_are_numbers() -> None:
    x, weight = torch.full((2, 64), 300.0).bfloat16(), torch.full((3, 64), 300.0).bfloat16()
    assert bool(torch.isfinite(dense.widened_linear(x, weight)).all())
    assert not bool(torch.isfinite(functional.linear(x.half(), weight.half())).any())


@pytest.mark.parametrize(
    ("capability", "dtype", "widened"),
    [
        ((7, 5), torch.bfloat16, True),
        ((7, 5), torch.float32, False),
        ((8, 6), torch.bfloat16, False),
        (None, torch.bfloat16, False),
    ],
)
def test_only_bfloat16_on_cards_without_its_units_is_widened(
    capability: tuple[int, int] | None, dtype: torch.dtype, widened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(dense, "compute_capability", lambda device: capability)
    monkeypatch.setattr(dense, "widened_linear", lambda x, weight, bias: asked.append(True) or x)
    x = torch.ones(2, 2, dtype=dtype)
    dense.linear(x, x)
    assert bool(asked) == widened
