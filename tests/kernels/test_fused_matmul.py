"""INT8 products of Triton's kernels against plain torch, in Triton's interpreter; the same on a GPU where there is one.

Sums of INT8 products are exact and both sides round the same three float32 operations, so results are equal to the
last bit. One exception is the interpreter's: it cuts float32 to bfloat16 where GPUs round, so there the truth is cut.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from exact_cpu import cpu_multiplies_exactly
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from ideogram_app.errors import DeviceError
from ideogram_app.kernels import plain
from ideogram_app.kernels.choice import fused_kernels
from ideogram_app.kernels.contract import QuantizedActivations
from ideogram_app.kernels.fused import matmul, tiles
from ideogram_app.quantization.rows import INT32_ROWS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
EXACT_INT_MM = pytest.mark.skipif(not cpu_multiplies_exactly(), reason="torch._int_mm saturates on this CPU")
CARDS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
WIDTHS = [(13824, 4608), (4608, 4608), (24576, 4608), (4608, 12288)]  # (N, K) of the real model


def operands(
    m: int, n: int, k: int, device: str = "cpu", seed: int = 0
) -> tuple[QuantizedActivations, Tensor, Tensor, Tensor]:
    """Rows, weight, scale and bias, every INT8 value as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    row_scale = torch.rand(m, 1, generator=generator) * 1e-3
    scale = torch.rand(n, generator=generator) * 1e-3
    bias = torch.randn(n, generator=generator)
    return (
        QuantizedActivations(x.to(device), row_scale.to(device)),
        weight.to(device),
        scale.to(device),
        bias.to(device),
    )


def truth(x: QuantizedActivations, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `plain.matmul` says, with the interpreter's bfloat16 on a CPU."""
    return as_there(plain.matmul(x, weight, scale, bias, torch.float32), dtype)


def as_there(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 as kernels on that device make `dtype` of it."""
    if dtype == torch.bfloat16 and exact.device.type == "cpu":
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)  # the upper 16 bits
    return exact.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_equals_plain_torch_in_every_type(device: str, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, scale, bias = operands(100, 208, 320, device)
    y = matmul.matmul(x, weight, scale, bias if has_bias else None, dtype)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, truth(x, weight, scale, bias if has_bias else None, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [1, 17, 63, 64, 65, 100, 129, 513])
def test_any_number_of_rows_may_be_multiplied(device: str, m: int) -> None:
    x, weight, scale, bias = operands(m, 96, 144, device)
    y = matmul.matmul(x, weight, scale, bias, torch.float32)
    assert torch.equal(y, truth(x, weight, scale, bias, torch.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), [(16, 16), (256, 832), (272, 768), (832, 256), (96, 2304), (48, 1008)])
def test_widths_need_not_be_multiples_of_the_tile(device: str, n: int, k: int) -> None:
    x, weight, scale, bias = operands(33, n, k, device)
    y = matmul.matmul(x, weight, scale, bias, torch.float32)
    assert torch.equal(y, truth(x, weight, scale, bias, torch.float32))


EVERY_TILE = sorted({choice.tile for card in CARDS for choice in tiles.choices_of(card)}, key=str)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", EVERY_TILE, ids=str)
def test_every_tile_of_the_table_makes_the_same_product(device: str, tile: tiles.Tile) -> None:
    # More tiles of rows than a group has, the last group lower than the others, ragged on all three edges.
    x, weight, scale, bias = operands(tile.block_m * 9 + 5, tile.block_n + 16, tile.block_k + 32, device)
    y = matmul.matmul_with(tile, x, weight, scale, bias, torch.float32)
    assert torch.equal(y, truth(x, weight, scale, bias, torch.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_sums_there_can_be_are_exact(device: str) -> None:
    k = 12288
    signs = torch.tensor([[-128], [127], [-128], [127]], dtype=torch.int8, device=device)
    x = QuantizedActivations(signs.repeat(1, k), torch.ones(4, 1, device=device))
    weight = torch.full((16, k), -128, dtype=torch.int8, device=device)
    weight[1::2] = 127
    sums = matmul.matmul(x, weight, torch.ones(16, device=device), None, torch.float32)
    products = signs.double() * weight[:, 0].double()
    assert torch.equal(sums.double(), (products * k).float().double())
    assert sums.abs().max() == 128 * 128 * k < 2**31


@pytest.mark.parametrize("device", DEVICES)
def test_every_bit_of_a_long_sum_counts(device: str) -> None:
    """A step of one at the end of 12287 products that nearly cancel: float32 accumulation would lose it."""
    k = 12288
    x = QuantizedActivations(torch.full((2, k), 127, dtype=torch.int8, device=device), torch.ones(2, 1, device=device))
    weight = torch.full((16, k), 127, dtype=torch.int8, device=device)
    weight[:, k // 2 :] = -127
    weight[:, -1] = -126
    x.values[1, -1] = 0
    sums = matmul.matmul(x, weight, torch.ones(16, device=device), None, torch.float32)
    assert torch.equal(sums, torch.tensor([[127.0], [127.0 * 127]], device=device).expand(2, 16))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", [matmul.matmul, matmul.int_mm], ids=["matmul", "int_mm"])
def test_rows_of_zeros_stay_zeros_or_become_the_bias(device: str, run: object) -> None:
    assert callable(run)
    x, weight, scale, bias = operands(20, 48, 64, device)
    silent = QuantizedActivations(torch.zeros_like(x.values), x.scale)
    assert not run(silent, weight, scale, None, torch.float32).any()
    assert torch.equal(run(silent, weight, scale, bias, torch.float32), bias.expand(20, -1))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_independent_of_their_neighbours(device: str) -> None:
    x, weight, scale, bias = operands(70, 64, 128, device)
    whole = matmul.matmul(x, weight, scale, bias, torch.float32)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 40)):
        part = QuantizedActivations(x.values[rows], x.scale[rows])
        assert torch.equal(matmul.matmul(part, weight, scale, bias, torch.float32), whole[rows])


def test_the_weight_is_taken_as_it_is() -> None:
    weight = operands(1, 32, 64)[1]
    assert fused_kernels("triton").weight(weight) is weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 16), (5, 1040), (18, 2048)])
def test_the_epilogue_equals_plain_torch(device: str, dtype: torch.dtype, has_bias: bool, m: int, n: int) -> None:
    x, _, scale, bias = operands(m, n, 16, device)
    generator = torch.Generator().manual_seed(1)
    sums = torch.randint(-(2**31), 2**31 - 1, (m, n), dtype=torch.int32, generator=generator).to(device)
    scale = scale * 1e-3  # within the range of float16
    y = matmul.epilogue(sums, x.scale, scale, bias if has_bias else None, dtype)
    exact = plain.epilogue(sums, x.scale, scale, bias if has_bias else None, torch.float32)
    assert torch.equal(y, as_there(exact, dtype))


@EXACT_INT_MM
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [1, 16, 17, INT32_ROWS, INT32_ROWS + 3])
def test_torchs_product_with_the_epilogue_equals_plain_torch(device: str, m: int) -> None:
    x, weight, scale, bias = operands(m, 48, 64, device)
    for dtype, added in itertools.product(TYPES, (None, bias)):
        y = matmul.int_mm(x, weight, scale, added, dtype)
        assert torch.equal(y, plain.matmul(x, weight, scale, added, dtype))


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("n", "k"), WIDTHS)
def test_prompts_of_every_length_share_one_tile(card: tiles.Capability, n: int, k: int) -> None:
    lengths = range(2304, 20000, 7)
    assert len({tiles.tile_for(card, m, n) for m in lengths}) == 1
    assert len({tiles.tile_for(card, m, n) for m in range(1, 2304)}) <= 4


@pytest.mark.parametrize("card", CARDS)
def test_tables_of_tiles_end_in_a_row_for_everything(card: tiles.Capability) -> None:
    choices = tiles.choices_of(card)
    assert choices[-1].rows == choices[-1].columns == tiles.UNBOUNDED
    assert [choice.rows for choice in choices] == sorted(choice.rows for choice in choices)


@pytest.mark.parametrize("m", [1, 300, 4396])
def test_unlisted_cards_get_the_tiles_that_fit_99_kilobytes(m: int) -> None:
    assert tiles.tile_for((13, 7), m, 4608) == tiles.tile_for((8, 6), m, 4608)


def refusing(monkeypatch: pytest.MonkeyPatch, most: int) -> list[tiles.Tile]:
    """A card that gives a program so many bytes of shared memory; the tiles that were tried."""
    tried: list[tiles.Tile] = []
    launch = matmul.matmul_with

    def launched(tile: tiles.Tile, *given: Any) -> torch.Tensor:
        tried.append(tile)
        if tile.shared_bytes > most:
            raise OutOfResources(tile.shared_bytes, most, "shared memory")
        return launch(tile, *given)

    monkeypatch.setattr(matmul, "matmul_with", launched)
    return tried


@pytest.mark.parametrize(("most", "tries"), [(2**17, 1), (65536, 2), (10_000, 5)])
def test_a_card_without_room_for_a_tile_gets_a_smaller_one_and_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, most: int, tries: int
) -> None:
    tried = refusing(monkeypatch, most)
    x, weight, scale, bias = operands(70, 16, 32)
    monkeypatch.setattr(matmul, "tile_for", lambda *_: tiles.COMMON_TILES[-1].tile)
    product = matmul.Matmul()
    for _ in range(2):
        assert torch.equal(
            product(x, weight, scale, bias, torch.float32), plain.matmul(x, weight, scale, bias, torch.float32)
        )
    assert len(tried) == len(set(tried)) + 1  # the one that fits, again
    assert [tile.shared_bytes for tile in tried[:-1]] == sorted(
        (tile.shared_bytes for tile in tried[:-1]), reverse=True
    )
    assert len(tried) == tries + 1


def test_a_card_that_refuses_every_tile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, 0)
    with pytest.raises(OutOfResources):
        matmul.matmul(*operands(70, 16, 32), torch.float32)


@pytest.mark.parametrize("capability", [(9, 0), (9, 4), (10, 3), (11, 0), (12, 0)])
@pytest.mark.parametrize(("m", "n"), [(1, 4608), (300, 4608), (2048, 24576), (4396, 24576)])
def test_amds_tiles_fit_its_64_kilobytes(capability: tiles.Capability, m: int, n: int) -> None:
    tile = tiles.tile_for(capability, m, n, amd=True)
    assert tile.shared_bytes <= 65536 and 64 * tile.warps <= 1024


def test_turing_has_no_tile() -> None:
    assert not tiles.multiplies_int8((7, 5)) and tiles.multiplies_int8((8, 0))
    with pytest.raises(DeviceError, match=r"Expected compute capability 8\.0.*Got 7\.5"):
        tiles.tile_for((7, 5), 4096, 4608)
    names = [compilable.name for compilable in matmul.signatures((7, 5))]
    assert names == ["epilogue, bf16", "epilogue, fp16"]
