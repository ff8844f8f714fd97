"""Attention against itself taken whole: runs of queries, float16 inside, what is asked and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ideogram_app.kernels import attention, plain
from ideogram_app.kernels.attention import CUDNN, EFFICIENT, FLASH, MATH, Attention, ask, backends, in_runs
from ideogram_app.machine import attention as table

TURING, HOPPER, BLACKWELL = (7, 5), (9, 0), (10, 0)


def of_heads(tokens: int, heads: int = 3, size: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v as the heads kernel leaves them: views of one matrix, (H, M, D) each."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, 3 * heads * size, generator=generator).to(dtype)
    return list(qkv.unflatten(-1, (3, heads, size)).permute(1, 2, 0, 3))


def whole(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """In float64, all at once: (M, H, D)."""
    wide = (x.double()[None] for x in (query, key, value))
    grouped = query.shape[0] > key.shape[0]
    return functional.scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=grouped)[0].transpose(0, 1)


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that tensors of the processor lie on a card of a capability, with a cuDNN."""

    def pretend(capability: tuple[int, int], cudnn: int = 92_000) -> None:
        monkeypatch.setattr(attention, "compute_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)

    return pretend


def test_attention_is_a_softmax_over_all_tokens() -> None:
    query, key, value = of_heads(17, dtype=torch.float64)
    weights = (query @ key.transpose(1, 2) / 16**0.5).softmax(-1)
    assert torch.allclose(Attention()(query, key, value), (weights @ value).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40, 41, 2 * 41, 3 * 41])
def test_runs_of_queries_are_what_all_of_them_are(rows: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = of_heads(41)
    monkeypatch.setattr(table, "SCORE_BYTES", rows * 41 * table.BYTES_A_SCORE)
    made = in_runs(query, key, value, causal)
    assert made.is_contiguous() and made.shape == (41, 3, 16)
    assert (made - whole(query, key, value, causal)).abs().max() < 1e-6  # a few last bits of float32


def test_no_run_has_more_scores_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = functional.scaled_dot_product_attention

    def counting(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append(query.shape[1] * query.shape[2] * key.shape[2])
        return real(query, key, value, **options)

    monkeypatch.setattr(table, "SCORE_BYTES", 5000)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", counting)
    in_runs(*of_heads(41))
    assert len(seen) > 3 and max(seen) * table.BYTES_A_SCORE <= 5000 and sum(seen) == 3 * 41 * 41


def test_a_device_without_fused_kernels_goes_in_runs_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ask", lambda *tensors: MATH)
    monkeypatch.setattr(table, "SCORE_BYTES", 5000)
    attend, given = Attention(), of_heads(41)
    assert (attend(*given) - whole(*given).flatten(1)).abs().max() < 1e-6
    assert attend.engaged == "math in runs" and not attend.notes


def test_only_kinds_that_torch_can_answer_for_are_asked() -> None:
    query = torch.empty(1, 3, 7, 16, device="meta")  # stands for mps, of which it has no answer
    assert ask(query, query, query) == MATH


def test_it_is_asked_once_a_picture_for_tensors_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def answer(query: Tensor, *others: Any) -> Any:
        asked.append((*query.shape[1:], *query.stride()[1:]))
        return FLASH

    monkeypatch.setattr(attention, "ask", answer)
    attend = Attention()
    for _ in range(3):
        attend(*of_heads(41))
    assert asked == [(3, 41, 16, 16, 144, 1)], "with their own strides"
    assert attend.engaged == "flash"
    attend(*of_heads(9))
    attend.begin()
    assert attend.engaged == ""
    attend(*of_heads(41))
    assert len(asked) == 3


def test_math_on_a_card_that_should_have_a_kernel_is_noted(on_card: Any) -> None:
    on_card((8, 6))
    attend = Attention()
    attend(*of_heads(9))  # whose processor has none of the backends of that order
    assert attend.engaged in ("flash", "math in runs")
    assert bool(attend.notes) == (attend.engaged == "math in runs")


def test_the_order_is_that_of_the_card_without_what_was_excluded(on_card: Any) -> None:
    on_card(HOPPER)
    assert backends(HOPPER) == (CUDNN, FLASH, EFFICIENT, MATH)
    assert backends(HOPPER, {"cudnn", "math"}) == (FLASH, EFFICIENT, MATH), "what is always there stays"
    on_card(HOPPER, cudnn=91_002)
    assert backends(HOPPER) == (FLASH, EFFICIENT, MATH)
    assert CUDNN not in backends(BLACKWELL)


def test_what_was_chosen_elsewhere_is_all_that_is_tried(on_card: Any) -> None:
    on_card(HOPPER)
    attend = Attention(order=(MATH,))
    attend(*of_heads(9))
    assert attend.engaged == "math in runs"


@pytest.mark.parametrize("capability", [TURING, HOPPER])
def test_a_check_may_ask_again_with_the_same_tensors(on_card: Any, capability: tuple[int, int]) -> None:
    given = of_heads(9, dtype=torch.bfloat16)
    exact = whole(*given).flatten(1)
    on_card(capability)
    for _ in range(2):
        assert (attention.attend(*given, (MATH,)).double() - exact).abs().max() < 0.02


# Groups of queries, as the text encoder has them.


def grouped(tokens: int) -> list[Tensor]:
    query, key, value = of_heads(tokens, 4)
    return [query, key[:2], value[:2]]


def test_groups_of_queries_share_their_keys() -> None:
    given = grouped(23)
    assert (Attention()(*given, causal=True) - whole(*given, causal=True).flatten(1)).abs().max() < 1e-6


def test_groups_that_no_kernel_takes_have_their_keys_repeated_or_go_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Turing and Windows, whose memory-efficient kernels know no groups; then as on a Mac."""

    def efficient(query: Tensor, key: Tensor, *others: Any) -> Any:
        return EFFICIENT if query.shape[1] == key.shape[1] else MATH

    given = grouped(23)
    exact = whole(*given, causal=True).flatten(1)
    for answer, name in ((efficient, "efficient"), (lambda *tensors: MATH, "math in runs")):
        monkeypatch.setattr(attention, "ask", answer)
        monkeypatch.setattr(table, "SCORE_BYTES", 4000)
        attend = Attention()
        # The kind of device decides whether repeating is worth it; nothing here is on another than the processor.
        choice = attend._choose(*(x.to("meta") for x in given), True, False)
        assert choice.repeats and choice.name == name
        attend._chosen[given[0].device, given[0].dtype, given[0].shape, given[1].shape, True] = choice
        assert (attend(*given, causal=True) - exact).abs().max() < 1e-6


# float16 inside, bfloat16 outside.


@pytest.mark.parametrize("largest", [7e4, 3e38, 1e-30, 1.0])
def test_values_of_any_size_stay_finite_and_true_in_float16(on_card: Any, largest: float) -> None:
    query, key, value = of_heads(41, dtype=torch.bfloat16)
    value[0] *= largest / value[0].abs().max()
    value[1] = 0.0
    exact = whole(query, key, value).flatten(1)
    on_card(TURING)
    attend = Attention()
    made = attend(query, key, value)
    assert made.dtype == torch.bfloat16 and bool(torch.isfinite(made).all())
    assert attend.engaged.endswith("in float16")
    for head in range(3):
        part = slice(16 * head, 16 * (head + 1))
        off, size = (made[:, part].double() - exact[:, part]).abs().max(), exact[:, part].abs().max()
        assert off <= 8e-3 * size, f"head {head}: {off} of {size}"  # two roundings to bfloat16's 8 bits


def test_groups_of_queries_share_the_size_of_their_values(on_card: Any) -> None:
    query, key, value = grouped(23)
    given = [x.bfloat16().clone() for x in (query, key, value * torch.tensor([3e5, 1e-4])[:, None, None])]
    exact = whole(*given, causal=True).flatten(1)
    on_card(TURING)
    made = Attention()(*given, causal=True).double()
    for head in range(4):
        part = slice(16 * head, 16 * (head + 1))
        assert (made[:, part] - exact[:, part]).abs().max() <= 8e-3 * exact[:, part].abs().max()


def test_scaling_into_range_loses_no_bit() -> None:
    value = (torch.randn(5, 40, 16) * torch.logspace(-8, 8, 5)[:, None, None]).bfloat16()
    before = value.clone()
    back = attention._into_range(value)
    assert torch.all(value.abs().amax((1, 2)) >= attention.IN_RANGE)
    assert torch.all(value.abs().amax((1, 2)) < 2 * attention.IN_RANGE)
    assert torch.equal(value * back.bfloat16(), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_where_it_can_be_found(on_card: Any, bad: float) -> None:
    query, key, value = of_heads(9, dtype=torch.bfloat16)
    value[1, 3, 2] = bad
    on_card(TURING)
    assert not bool(torch.isfinite(Attention()(query, key, value)).all())


def test_queries_and_keys_beyond_float16_are_clamped(on_card: Any) -> None:
    query, key, value = of_heads(9, dtype=torch.bfloat16)
    query[0, 0, 0], key[1, 2, 3] = 1e6, -65504.0
    on_card(TURING)
    assert bool(torch.isfinite(Attention()(query, key, value)).all())
    assert torch.tensor(attention.LARGEST).bfloat16().half().isfinite()
    assert torch.tensor(65504.0).bfloat16().half().isinf(), "why the bound is lower"


def test_one_large_update_ruins_a_row_in_float16_and_none_in_bfloat16() -> None:
    """Why Turing stores bfloat16: what feeds a norm behind a matrix is of any size."""
    hidden, update = torch.randn(8, 256), torch.randn(8, 256)
    update[3, 7] = 7e4
    ones = torch.ones(256)
    for dtype, sound in ((torch.float16, False), (torch.bfloat16, True)):
        made = plain.add(hidden.to(dtype), update.to(dtype), ones, 1e-5)
        assert bool(torch.isfinite(made).all()) is sound


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [324, 1324, 4396])
def test_a_card_takes_a_fused_kernel_and_is_as_near_as_its_type(tokens: int) -> None:
    """Heads of 256 with the strides that the heads kernel leaves, against float64 on the processor."""
    given = of_heads(tokens, 18, 256, torch.bfloat16)
    exact = whole(*given).flatten(1)
    qkv = torch.stack(given).cuda()  # (3, H, M, D)
    attend = Attention()
    made = attend(*qkv.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)).cpu().double()
    assert "math" not in attend.engaged
    assert (made - exact).norm() / exact.norm() < 5e-3  # 2.3e-3 of all three backends on an H100
