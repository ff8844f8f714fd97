"""K-quants: gguf-py is the independent reader, and errors stay under measured bars."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.quantization import k_quants

TYPES = tuple(k_quants.FORMATS)
# Byte offsets of the fp16 numbers in a block, from the description of the formats.
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,)}


def read_with_gguf(packed: Tensor, gguf_type: str) -> np.ndarray:
    return gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[gguf_type])


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def student(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (rows, columns)).astype(np.float32)) * 0.02


def random_blocks(gguf_type: str, rows: int, blocks: int, seed: int = 0) -> Tensor:
    """Any bytes at all, except that the fp16 scales are finite."""
    rng = np.random.default_rng(seed)
    size = k_quants.FORMATS[gguf_type].size
    packed = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for offset in HALVES[gguf_type]:
        packed[..., offset + 1] &= 0b10111111  # the exponent's top bit off: magnitude below 2, so no infinity or NaN
    return torch.from_numpy(packed.reshape(rows, blocks * size))


def relative_error(weight: Tensor, gguf_type: str) -> float:
    made = read_with_gguf(k_quants.encode(weight, gguf_type), gguf_type)
    return float(np.linalg.norm(made - weight.numpy()) / np.linalg.norm(weight.numpy()))


@pytest.mark.parametrize("gguf_type", TYPES)
def test_block_sizes_are_those_of_gguf(gguf_type: str) -> None:
    form = k_quants.FORMATS[gguf_type]
    assert (form.weights, form.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[gguf_type]]


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decoding_any_bytes_equals_gguf_bit_for_bit(gguf_type: str, seed: int) -> None:
    packed = random_blocks(gguf_type, rows=7, blocks=9, seed=seed)
    ours = k_quants.decode(packed, gguf_type).numpy()
    assert np.array_equal(ours.view(np.int32), read_with_gguf(packed, gguf_type).view(np.int32))


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_result_is_the_float32_result_rounded_once(gguf_type: str, dtype: torch.dtype) -> None:
    packed = random_blocks(gguf_type, rows=3, blocks=4)
    assert torch.equal(k_quants.decode(packed, gguf_type, dtype), k_quants.decode(packed, gguf_type).to(dtype))


@pytest.mark.parametrize("gguf_type", TYPES)
def test_more_than_one_chunk_decodes_and_encodes_like_its_rows(gguf_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(6, 512)
    whole = k_quants.encode(weight, gguf_type)
    monkeypatch.setattr(k_quants, "CHUNK_ON_CPU", 768)
    assert torch.equal(k_quants.encode(weight, gguf_type), whole)
    rows = torch.cat([k_quants.decode(row.unsqueeze(0), gguf_type) for row in whole])
    assert torch.equal(k_quants.decode(whole, gguf_type), rows)


# Relative RMSE. Q4_K: llama.cpp's algorithm reaches 7.14 and 8.29 %.
BARS = {
    "Q4_K": (0.0700, 0.0814),
    "Q5_K": (0.0345, 0.0402),
    "Q6_K": (0.0167, 0.0204),
    "Q8_0": (0.0055, 0.0070),
}


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_stays_under_the_bar(gguf_type: str, seed: int) -> None:
    assert relative_error(gaussian(256, 1024, seed), gguf_type) < BARS[gguf_type][0]
    assert relative_error(student(256, 1024, seed), gguf_type) < BARS[gguf_type][1]


@pytest.mark.parametrize("distribution", [gaussian, student])
def test_q8_0_bytes_equal_those_of_gguf(distribution: Callable[[int, int], Tensor]) -> None:
    weight = distribution(64, 512)
    weight[3, :32] = 0
    weight[4, :32] = torch.arange(32) * 0.5 - 8  # halves, which this format rounds away from zero
    ours = k_quants.encode(weight, "Q8_0").numpy()
    assert np.array_equal(ours, gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("gguf_type", TYPES)
def test_encoding_what_was_decoded_loses_almost_nothing(gguf_type: str) -> None:
    once = k_quants.decode(k_quants.encode(gaussian(8, 1024), gguf_type), gguf_type)
    twice = k_quants.decode(k_quants.encode(once, gguf_type), gguf_type)
    assert (twice - once).norm() < 0.3 * BARS[gguf_type][0] * once.norm()


@pytest.mark.parametrize("gguf_type", TYPES)
def test_zeros_stay_zeros(gguf_type: str) -> None:
    weight = torch.zeros(2, 512)
    weight[0, :256] = gaussian(1, 256)
    made = k_quants.decode(k_quants.encode(weight, gguf_type), gguf_type)
    assert torch.equal(made[1], torch.zeros(512)) and torch.equal(made[0, 256:], torch.zeros(256))


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("value", [0.37, -0.37, 1e-3, -250.0, 1e6, -1e6])
def test_a_constant_block_is_held(gguf_type: str, value: float) -> None:
    made = k_quants.decode(k_quants.encode(torch.full((1, 256), value), gguf_type), gguf_type)
    assert torch.allclose(made, torch.full((1, 256), value), rtol=0.01)


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("outlier", [1e3, -1e3, 1e6, -1e6])
def test_a_huge_outlier_is_held_and_spoils_only_its_block(gguf_type: str, outlier: float) -> None:
    weight = gaussian(1, 1024)
    alone = k_quants.decode(k_quants.encode(weight, gguf_type), gguf_type)
    weight[0, 300] = outlier
    made = k_quants.decode(k_quants.encode(weight, gguf_type), gguf_type)
    assert torch.isfinite(made).all()
    assert abs(float(made[0, 300]) / outlier - 1) < 0.04
    assert torch.equal(made[0, :256], alone[0, :256]) and torch.equal(made[0, 512:], alone[0, 512:])


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-7, 1e-20, 1e-38, 1e-42])
def test_tiny_weights_give_tiny_weights_and_never_nan(gguf_type: str, scale: float) -> None:
    weight = gaussian(2, 512) * 50 * scale
    made = k_quants.decode(k_quants.encode(weight, gguf_type), gguf_type)
    assert torch.isfinite(made).all()
    # Half a step of the smallest fp16 number, 6e-8; Q8_0 rounds its only scale, 1/127 of the peak, to nearest.
    unavoidable = 4e-6 if gguf_type == "Q8_0" else 1e-7
    assert (made - weight).abs().max() <= max(0.1 * float(weight.abs().max()), unavoidable)


@pytest.mark.parametrize("gguf_type", TYPES)
def test_blocks_of_few_values_are_held(gguf_type: str) -> None:
    weight = torch.zeros(3, 256)
    weight[0, 17] = 0.5  # one weight
    weight[1, ::2] = -0.25  # two values
    weight[2] = torch.arange(256) % 2 * 2.0 - 1  # signs
    made = k_quants.decode(k_quants.encode(weight, gguf_type), gguf_type)
    assert (made - weight).norm() < 0.05 * weight.norm()


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_sources_encode_like_their_float32_values(gguf_type: str, dtype: torch.dtype) -> None:
    weight = gaussian(4, 512).to(dtype)
    assert torch.equal(k_quants.encode(weight, gguf_type), k_quants.encode(weight.float(), gguf_type))


@pytest.mark.parametrize("gguf_type", TYPES)
def test_a_transposed_source_encodes_like_its_copy(gguf_type: str) -> None:
    weight = gaussian(256, 512).t()
    assert torch.equal(k_quants.encode(weight, gguf_type), k_quants.encode(weight.contiguous(), gguf_type))


@pytest.mark.parametrize("gguf_type", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_no_block_can_hold_are_refused_with_their_place(gguf_type: str, bad: float) -> None:
    weight = gaussian(4, 512)
    weight[2, 300] = bad
    with pytest.raises(CheckpointError, match="row 2, column 300"):
        k_quants.encode(weight, gguf_type)


@pytest.mark.parametrize("gguf_type", TYPES)
def test_rows_of_broken_blocks_are_refused_with_both_sizes(gguf_type: str) -> None:
    form = k_quants.FORMATS[gguf_type]
    with pytest.raises(RequestError, match=f"block size, {form.weights}.*row size of 272"):
        k_quants.encode(torch.zeros(2, 272), gguf_type)
    with pytest.raises(CheckpointError, match=f"block size, {form.size} bytes"):
        k_quants.decode(torch.zeros(2, form.size + 1, dtype=torch.uint8), gguf_type)


def test_what_is_no_matrix_of_floats_or_bytes_is_refused() -> None:
    with pytest.raises(RequestError, match="matrix of floats"):
        k_quants.encode(torch.zeros(256), "Q4_K")
    with pytest.raises(RequestError, match="matrix of floats"):
        k_quants.encode(torch.zeros(1, 256, dtype=torch.int8), "Q4_K")
    with pytest.raises(CheckpointError, match="matrix of uint8"):
        k_quants.decode(torch.zeros(1, 144), "Q4_K")


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match="Q4_K or Q5_K or Q6_K or Q8_0"):
        k_quants.encode(torch.zeros(1, 256), "Q3_K")


@pytest.mark.parametrize("gguf_type", TYPES)
def test_no_rows_are_no_bytes(gguf_type: str) -> None:
    packed = k_quants.encode(torch.zeros(0, 512), gguf_type)
    assert packed.shape[0] == 0 and k_quants.decode(packed, gguf_type).shape == (0, 512)
