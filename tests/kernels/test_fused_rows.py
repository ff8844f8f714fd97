"""The Triton row kernels against their twins in plain torch: in Triton's interpreter here, on a GPU with `-m gpu`."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ideogram_app.errors import RequestError
from ideogram_app.kernels import plain
from ideogram_app.kernels.contract import InputFormat, Operand, QuantizedActivations
from ideogram_app.quantization import int8
from ideogram_app.quantization.rotation import GROUP, hadamard

pytest.importorskip("triton")

from ideogram_app.kernels.fused import heads as fused_heads
from ideogram_app.kernels.fused import rows as fused
from ideogram_app.kernels.fused.blocks import MOST_THREADS, WARP, shape_of

# The interpreter's NumPy warns where a GPU is silent: exp(1000) in the sigmoid of -1000, which is 0 as it should be.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]

EPSILON = 1e-5
# What two orders of the same float32 additions and a dozen other roundings can differ by, relative: 16 * 2^-24.
CLOSE = 2.0**-20
# Four steps of a rotation round about four times each, against numbers of at most the norm of a group, which is at most
# 16 times the largest rotated number: 2^4 * 2^-24 * 2^4; and as much for the truth.
CLOSE_ROTATED = 2.0**-15
INPUT_FORMATS: tuple[InputFormat, ...] = ("dense", "int8", "rotated")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_format = pytest.mark.parametrize("input_format", INPUT_FORMATS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU tensors need Triton's interpreter")
    return str(request.param)


def tokens(M: int, K: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Gaussian rows with one channel a thousand times louder; where there are several, the second is silent."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(seed))
    x[0, K // 3] *= 1000
    x[1:2] = 0
    return x.to(device, dtype)


def vector(K: int, device: str, seed: int = 7) -> Tensor:
    return (torch.rand(K, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5).to(device)


def assert_read(got: Operand, exact: Tensor, dtype: torch.dtype, input_format: InputFormat) -> None:
    """Whether an operand is `exact`, a float32 (M, K), as a matrix reads it."""
    if input_format == "dense":
        assert isinstance(got, Tensor) and got.dtype == dtype
        assert_one_place(got, exact)
        return
    assert isinstance(got, QuantizedActivations) and got.values.dtype == torch.int8 and got.scale.dtype == torch.float32
    truth, close = exact.double(), CLOSE
    if input_format == "rotated":
        truth = (truth.unflatten(-1, (-1, GROUP)) @ hadamard(dtype=torch.float64).to(exact.device)).flatten(-2)
        close = CLOSE_ROTATED
    scale = (truth.abs().amax(-1, keepdim=True) / 127.5).clamp(min=int8.SMALLEST_ACTIVATION_SCALE)
    assert got.values.shape == exact.shape and got.scale.shape == scale.shape
    torch.testing.assert_close(got.scale.double(), scale, rtol=close, atol=0)
    # A whole number within half a step of the truth is the right one; two are only where the truth lies between them.
    assert (got.values - truth / scale).abs().max() <= 0.5 + 127.5 * close
    silent = ~exact.any(-1)
    assert not got.values[silent].any()


def assert_one_place(got: Tensor, exact: Tensor) -> None:
    """Equal up to one unit in the last place: the interpreter cuts bfloat16 off where a GPU rounds. Sums that cancel
    are held to what was summed."""
    places = 8 if got.dtype == torch.float32 else 1
    loudest = exact.abs().max().item()
    rtol = places * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.float(), exact.to(got.dtype).float(), rtol=rtol, atol=CLOSE * loudest)


SHAPES = [(1, 256), (17, 256), (3, 768), (2, 4608), (2, 12288)]
shapes = pytest.mark.parametrize(("M", "K"), SHAPES)


@shapes
@dtypes
@every_format
def test_a_norm_is_that_of_plain_torch(
    M: int, K: int, dtype: torch.dtype, input_format: InputFormat, device: str
) -> None:
    x, scale = tokens(M, K, dtype, device), vector(K, device)
    got = fused.norm(x, scale, EPSILON, input_format)
    exact = plain.norm(x.float(), scale, EPSILON, "dense")
    assert_read(got, exact, dtype, input_format)


@pytest.mark.parametrize(("M", "K"), [(1, 256), (3, 768), (2, 4608)])
@dtypes
@every_format
def test_a_residual_and_the_norm_after_it_are_those_of_plain_torch(
    M: int, K: int, dtype: torch.dtype, input_format: InputFormat, device: str
) -> None:
    hidden, update = tokens(M, K, dtype, device), tokens(M, K, dtype, device, seed=1).roll(1, 0)
    gate, scale = vector(K, device), vector(K, device, seed=8)
    expected = plain.add(hidden.float(), update.float(), gate, EPSILON)
    got, operand = fused.add_norm(hidden, update, gate, scale, EPSILON, input_format)
    assert_one_place(got, expected)
    exact = plain.norm(got.float(), scale, EPSILON, "dense")  # the norm of what was kept
    assert_read(operand, exact, dtype, input_format)


@dtypes
def test_a_residual_alone_is_that_of_plain_torch(dtype: torch.dtype, device: str) -> None:
    hidden, update, gate = tokens(5, 256, dtype, device), tokens(5, 256, dtype, device, 1), vector(256, device)
    expected = plain.add(hidden.float(), update.float(), gate, EPSILON)
    assert_one_place(fused.add(hidden, update, gate, EPSILON), expected)


def test_residuals_are_added_in_place(device: str) -> None:
    hidden, update = (tokens(3, 256, torch.float32, device, seed) for seed in (0, 1))
    gate = vector(256, device)
    assert fused.add(hidden, update, gate, EPSILON) is hidden
    assert fused.add_norm(hidden, update, gate, gate, EPSILON, "int8")[0] is hidden


@pytest.mark.parametrize(("M", "K"), [(1, 256), (3, 768), (2, 12288)])
@dtypes
@every_format
def test_swiglu_is_that_of_plain_torch(
    M: int, K: int, dtype: torch.dtype, input_format: InputFormat, device: str
) -> None:
    gate, up = tokens(M, K, dtype, device).roll(3, 1), tokens(M, K, dtype, device, seed=1)
    gate_up = torch.cat((gate, up), 1)
    got = fused.swiglu(gate_up, input_format)
    exact = plain.swiglu(gate_up.float(), "dense")
    assert_read(got, exact, dtype, input_format)


@shapes
@dtypes
def test_rows_are_rounded_to_the_last_bit_as_in_plain_torch(M: int, K: int, dtype: torch.dtype, device: str) -> None:
    x = tokens(M, K, dtype, device)
    got = fused.quantize(x, "int8")
    values, scale = int8.quantize_tokens(x.cpu())  # CUDA's torch divides by a number as IEEE 754 does not
    assert isinstance(got, QuantizedActivations)
    assert torch.equal(got.values.cpu(), values) and torch.equal(got.scale.cpu(), scale)


@shapes
@dtypes
def test_rows_are_rotated_before_they_are_rounded(M: int, K: int, dtype: torch.dtype, device: str) -> None:
    x = tokens(M, K, dtype, device)
    assert_read(fused.quantize(x, "rotated"), x.float(), dtype, "rotated")


def test_dense_rows_are_what_they_were(device: str) -> None:
    x = tokens(3, 256, torch.bfloat16, device)
    assert fused.quantize(x, "dense") is x


def test_ties_go_to_the_even_number_and_the_largest_stays_in_range(device: str) -> None:
    halves = torch.arange(-255, 256, device=device)[None].float() / 2  # -127.5 to 127.5: the scale is 1
    got = fused.quantize(halves, "int8")
    assert isinstance(got, QuantizedActivations)
    assert torch.equal(got.values, halves.round().clamp(-128, 127).to(torch.int8))
    assert got.values[0, 0] == -128 and got.values[0, -1] == 127 and got.scale == 1


def test_one_loud_channel_lands_in_every_number_of_its_group_with_the_right_sign(device: str) -> None:
    for channel in (0, 7, 100, 255):
        x = torch.zeros(1, 2 * GROUP, device=device)
        x[0, GROUP + channel] = 16.0
        got = fused.quantize(x, "rotated")
        assert isinstance(got, QuantizedActivations)
        assert not got.values[:, :GROUP].any()
        assert torch.equal(got.values[0, GROUP:].sign().float().cpu(), hadamard()[channel].sign())


@pytest.mark.parametrize("K", [80, 1000, 4624])
@pytest.mark.parametrize("input_format", ["dense", "int8"])
def test_rows_need_not_be_whole_groups_unless_they_are_rotated(K: int, input_format: InputFormat, device: str) -> None:
    x, scale = tokens(2, K, torch.float16, device), vector(K, device)
    exact = plain.norm(x.float(), scale, EPSILON, "dense")
    assert_read(fused.norm(x, scale, EPSILON, input_format), exact, torch.float16, input_format)
    with pytest.raises(RequestError, match=rf"multiple of 256.*{K}"):
        fused.norm(x, scale, EPSILON, "rotated")


def test_rows_may_lie_apart_and_what_lies_between_is_left_alone(device: str) -> None:
    wide = tokens(3, 1024, torch.float32, device)
    before, x = wide.clone(), wide[:, 256:512]
    gate = vector(256, device)
    update = tokens(3, 512, torch.float32, device, 1)[:, 256:]
    assert_read(fused.norm(x, gate, EPSILON, "rotated"), plain.norm(x, gate, EPSILON, "dense"), x.dtype, "rotated")
    assert_read(fused.quantize(x, "int8"), x, x.dtype, "int8")
    assert_read(fused.swiglu(x, "dense"), plain.swiglu(x, "dense"), x.dtype, "dense")
    expected = plain.add(x, update, gate, EPSILON)
    assert_one_place(fused.add(x, update, gate, EPSILON), expected)
    assert torch.equal(wide[:, :256], before[:, :256]) and torch.equal(wide[:, 512:], before[:, 512:])


@pytest.mark.parametrize(("M", "H", "D"), [(1, 4, 64), (7, 3, 64), (3, 18, 256)])
@dtypes
def test_heads_are_normed_and_turned_as_in_plain_torch_inside_qkv(
    M: int, H: int, D: int, dtype: torch.dtype, device: str
) -> None:
    qkv = tokens(M, 3 * H * D, dtype, device)
    norms = vector(D, device), vector(D, device, 8)
    angles = torch.randn(M, D // 2, generator=torch.Generator().manual_seed(2)).to(device)
    expected = plain.heads(qkv.float(), *norms, angles.cos(), angles.sin(), EPSILON)
    got = fused_heads.heads(qkv, *norms, angles.cos(), angles.sin(), EPSILON)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == (H, M, D) and ours.stride(-1) == 1
        assert ours.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
        assert_one_place(ours, theirs)
    assert torch.equal(got[2].float(), expected[2])


def test_heads_may_be_rows_that_lie_apart(device: str) -> None:
    D, H = 64, 2
    wide = tokens(3, 4 * H * D, torch.float32, device)
    before, qkv = wide.clone(), wide[:, : 3 * H * D]
    angles, norm = torch.randn(3, D // 2).to(device), vector(D, device)
    expected = plain.heads(qkv, norm, norm, angles.cos(), angles.sin(), EPSILON)
    for ours, theirs in zip(
        fused_heads.heads(qkv, norm, norm, angles.cos(), angles.sin(), EPSILON), expected, strict=True
    ):
        assert_one_place(ours, theirs)
    assert torch.equal(wide[:, 3 * H * D :], before[:, 3 * H * D :])


def refused() -> list[tuple[str, Callable[[], object]]]:
    x, norm, angle = torch.zeros(2, 384), torch.ones(64), torch.ones(2, 32)
    return [
        ("shapes that differ", lambda: fused.norm(x, torch.ones(2), EPSILON, "dense")),
        ("shapes that differ", lambda: fused.add(x, x[:1], torch.ones(384), EPSILON)),
        ("last stride of 1", lambda: fused.quantize(x.t(), "int8")),
        ("cannot be rotated", lambda: fused.swiglu(x, "rotated")),
        ("do not fit", lambda: fused_heads.heads(x[:, 1:], norm, norm, angle, angle, EPSILON)),
        ("do not fit", lambda: fused_heads.heads(x, norm, norm, angle[:1], angle, EPSILON)),
    ]


@pytest.mark.parametrize(("sentence", "call"), refused())
def test_what_a_kernel_would_read_wrongly_is_refused(sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(RequestError, match=sentence):
        call()


@pytest.mark.parametrize("K", [16, 256, 768, 1024, 4608, 12288, 53248])
def test_a_program_holds_its_row_and_less_than_a_chunk_more(K: int) -> None:
    shape = shape_of(K)
    assert 0 <= shape.block * shape.chunks - K < shape.block
    assert shape.chunks <= 6 or shape.warps * WARP == MOST_THREADS
    assert shape.block == 256 * shape.warps


@pytest.mark.parametrize("K", [16, 256, 4608, 12288, 53248])
@pytest.mark.parametrize("threads", [32, 64])
def test_no_program_has_more_threads_than_a_card_gives_it(K: int, threads: int) -> None:
    shape = shape_of(K, threads)
    assert shape.warps * threads <= MOST_THREADS
    assert 0 <= shape.block * shape.chunks - K < shape.block and shape.block % GROUP == 0


@pytest.mark.parametrize("row", [*fused.signatures(), *fused_heads.signatures()], ids=lambda row: row.name)
def test_a_kernel_is_described_whole_and_is_not_told_how_many_rows_there_are(row: fused.Compilable) -> None:
    assert {*row.signature, *row.constants} == {*row.function.arg_names}
    assert not {*row.signature} & {*row.constants}
    assert all(name.endswith("stride") for name, kind in row.signature.items() if kind == "i32")
