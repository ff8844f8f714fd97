"""Q4_K in Triton: gguf-py and NumPy's float64 are the independent readers, `kernels.plain` is the twin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.kernels import plain
from ideogram_app.kernels.fused import q4_k
from ideogram_app.model.transformer import layers
from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rotation import hadamard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(1, 256), (3, 4608), (1, 12288), (17, 256), (5, 1024)]  # 1, 54, 48, 17 and 20 blocks; a program takes 16
# An H4 step adds four numbers, halves and subtracts: three roundings, each 2^-24 of at most the norm of a group, and at
# most twice the error that it was given, so four steps leave 3 * (1 + 2 + 4 + 8) * 2^-24 norms. The norm of a group is
# that of its 256 rotated numbers, at most 16 * 127: 0.0055 in all.
CLOSE = 2.0**-7
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
both = pytest.mark.parametrize("rotated", [False, True], ids=["straight", "rotated"])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU tensors need Triton's interpreter")
    return str(request.param)


def random_bytes(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Any bytes, with steps that are any finite fp16: of both signs, subnormal, up to 65504."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    halves = rng.integers(0, 0x7C00, (rows, columns // 256, 2)) | rng.integers(0, 2, (rows, columns // 256, 2)) << 15
    blocks[..., :4] = halves.astype("<u2").view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def encoded(rows: int, columns: int, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    return k_quants.encode(weight, "Q4_K")


def read_with_gguf(packed: Tensor) -> np.ndarray:
    return gguf.dequantize(packed.cpu().numpy(), gguf.GGMLQuantizationType.Q4_K)


def exactly(packed: Tensor, scale: Tensor, rotated: bool) -> np.ndarray:
    """What is rounded to INT8, from gguf-py's weights on, in float64."""
    weight = read_with_gguf(packed).astype(np.float64)
    if rotated:
        weight = (weight.reshape(len(weight), -1, 256) @ hadamard(256, torch.float64).numpy()).reshape(weight.shape)
    return weight / scale.cpu().double().numpy()[:, None]


@shapes
@pytest.mark.parametrize("draw", [random_bytes, encoded])
def test_float32_weights_are_those_of_gguf_bit_for_bit(draw: object, shape: tuple[int, int], device: str) -> None:
    packed = draw(*shape)  # type: ignore[operator]
    made = q4_k.Scratch().decode(packed.to(device), torch.float32).cpu().numpy()
    assert np.array_equal(made.view(np.int32), read_with_gguf(packed).view(np.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_are_rounded_once(dtype: torch.dtype, device: str) -> None:
    packed = encoded(3, 1024).to(device)
    made, twin = q4_k.Scratch().decode(packed, dtype), plain.decode(packed, dtype)
    apart = (made.view(torch.int16).int() - twin.view(torch.int16).int()).abs().max()
    # Triton's interpreter cuts float32 down to bfloat16 where GPUs round: one unit in the last place.
    assert apart <= (device == "cpu" and dtype == torch.bfloat16)


@shapes
@pytest.mark.parametrize("draw", [random_bytes, encoded])
def test_int8_weights_without_rotation_equal_the_twins(draw: object, shape: tuple[int, int], device: str) -> None:
    packed = draw(*shape).to(device)  # type: ignore[operator]
    scale = layers.row_scales(packed, rotated=False)
    assert torch.equal(q4_k.Scratch().decode_int8(packed, scale, False), plain.decode_int8(packed, scale, False))


@shapes
@pytest.mark.parametrize("draw", [random_bytes, encoded])
def test_rotated_weights_differ_from_the_twins_only_next_to_ties(
    draw: object, shape: tuple[int, int], device: str
) -> None:
    packed = draw(*shape).to(device)  # type: ignore[operator]
    scale = layers.row_scales(packed, rotated=True)
    made = q4_k.Scratch().decode_int8(packed, scale, True).cpu().numpy().astype(int)
    exact, twin = exactly(packed, scale, rotated=True), plain.decode_int8(packed, scale, True).cpu().numpy().astype(int)
    assert np.abs(made - exact).max() <= 0.5 + CLOSE
    assert np.abs(made - twin).max() <= 1
    tied = np.abs(exact - np.floor(exact) - 0.5) <= CLOSE
    assert np.array_equal(made[~tied], twin[~tied])
    assert (made != twin).mean() < 1e-3  # and there are few of them


@both
def test_every_row_reaches_its_last_level(rotated: bool, device: str) -> None:
    packed = encoded(5, 1024).to(device)
    scale = layers.row_scales(packed, rotated)
    made = q4_k.Scratch().decode_int8(packed, scale, rotated)
    assert made.abs().amax(-1).tolist() == [127] * 5


@both
def test_half_the_scale_cuts_at_the_last_level(rotated: bool, device: str) -> None:
    packed = encoded(2, 512).to(device)
    scale = layers.row_scales(packed, rotated) / 2
    made = q4_k.Scratch().decode_int8(packed, scale, rotated).cpu().numpy()
    exact = exactly(packed, scale, rotated)
    assert (np.abs(exact) > 127.5).any()
    assert np.abs(made - exact.clip(-127, 127)).max() <= 0.5 + CLOSE


@both
def test_rows_and_blocks_of_zeros_stay_zeros(rotated: bool, device: str) -> None:
    packed = encoded(3, 512)
    packed[1] = 0
    packed[2, 144:] = 0
    packed = packed.to(device)
    scale = layers.row_scales(packed, rotated)
    made = q4_k.Scratch().decode_int8(packed, scale, rotated)
    assert scale[1] == int8.SMALLEST_WEIGHT_SCALE
    assert not made[1].any() and not made[2, 256:].any()
    assert made[0].any() and made[2, :256].any()


@both
def test_rows_decode_alike_alone_and_together(rotated: bool, device: str) -> None:
    packed = encoded(7, 768).to(device)
    scale = layers.row_scales(packed, rotated)
    whole = q4_k.Scratch().decode_int8(packed, scale, rotated)
    for row in range(7):
        alone = q4_k.Scratch().decode_int8(packed[row : row + 1], scale[row : row + 1], rotated)
        assert torch.equal(alone[0], whole[row])


@both
@pytest.mark.parametrize("draw", [random_bytes, encoded])
def test_scales_are_the_largest_of_each_row(draw: object, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = draw(7, 512)  # type: ignore[operator]
    exact = np.abs(exactly(packed, torch.ones(7), rotated)).max(-1) / 127
    whole = layers.row_scales(packed, rotated)
    # A rotated weight is two sums of 16 products, so off by 32 * 2^-24 of a norm, itself at most 16 largest weights.
    assert np.allclose(whole, exact, rtol=2.0**-15 if rotated else 2.0**-22)
    monkeypatch.setattr(layers, "SCALED_AT_ONCE", 2 * 512)  # runs of 2, 2, 2 and 1 rows
    assert torch.equal(layers.row_scales(packed, rotated), whole)


def test_unrotated_scales_are_those_of_int8() -> None:
    packed = encoded(4, 768)
    _, scale = int8.quantize_rows(k_quants.decode(packed, "Q4_K"))
    assert torch.equal(layers.row_scales(packed, False), scale)


def test_scratch_is_one_room_that_grows(device: str) -> None:
    scratch = q4_k.Scratch()
    small, large = encoded(2, 256).to(device), encoded(4, 512).to(device)
    first = scratch.decode(small, torch.float32)
    scale = layers.row_scales(small, True)
    again = scratch.decode_int8(small, scale, True)
    assert again.data_ptr() == first.data_ptr() and again.shape == first.shape == (2, 256)
    wide = scratch.decode(large, torch.float32)
    assert wide.untyped_storage().nbytes() == 4 * 4 * 512
    narrow = scratch.decode(small, torch.float16)
    assert narrow.data_ptr() == wide.data_ptr() and narrow.is_contiguous()
    scratch.release()
    kept = narrow.clone()
    scratch.decode(large, torch.float16)
    assert torch.equal(narrow, kept)  # what was handed out before is nobody's scratch any more


def test_two_scratches_do_not_share(device: str) -> None:
    packed = encoded(2, 256).to(device)
    first = q4_k.Scratch().decode(packed, torch.float32)
    assert first.data_ptr() != q4_k.Scratch().decode(packed, torch.float32).data_ptr()


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 143, dtype=torch.uint8),
        torch.zeros(2, 144),
        torch.zeros(144, dtype=torch.uint8),
        torch.zeros(2, 288, dtype=torch.uint8)[:, :144],
        torch.zeros(289, dtype=torch.uint8)[1:].view(2, 144),
    ],
    ids=["half a block", "floats", "no matrix", "rows apart", "odd address"],
)
def test_what_is_not_packed_rows_is_refused(packed: Tensor) -> None:
    with pytest.raises(CheckpointError):
        q4_k.Scratch().decode(packed, torch.float32)
    with pytest.raises(CheckpointError):
        q4_k.Scratch().decode_int8(packed, torch.ones(2), True)


def test_room_and_scales_of_another_kind_are_refused() -> None:
    packed, scale = encoded(2, 256), torch.ones(2)
    for out in (torch.empty(2, 512), torch.empty(256, 2).t()):
        with pytest.raises(RequestError, match="no room"):
            q4_k.decode_into(packed, out)
    with pytest.raises(RequestError, match="2 float32 scales"):
        q4_k.decode_int8_into(packed, scale[:1], True, torch.empty(2, 256, dtype=torch.int8))
    with pytest.raises(RequestError, match="2 float32 scales"):
        q4_k.decode_int8_into(packed, scale, True, torch.empty(2, 256))


def test_a_compiled_product_and_sum_are_rounded_twice() -> None:
    """As the truth rounds them, and as they are not where the launch does not ask for it."""
    code = """
from triton import compile
from triton.backends.compiler import GPUTarget
from ideogram_app.kernels.fused import offline, q4_k
for compilable in q4_k.signatures():
    if compilable.name in ("decode Q4_K, fp32", "decode Q4_K, i8"):
        for options in (q4_k.LAUNCH, {**q4_k.LAUNCH, "enable_fp_fusion": True}):
            made = compile(offline.source_of(compilable), target=GPUTarget("cuda", 86, 32), options=options)
            print(made.asm["ptx"].count("fma.rn.f32"), end=" ")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    strict, loose, strict_int8, loose_int8 = map(int, done.stdout.split())
    assert strict == strict_int8 == 0 < min(loose, loose_int8)
