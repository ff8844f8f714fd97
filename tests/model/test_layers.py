"""Packed Linears stand in for torch's own, inside diffusers' transformer too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from exact_cpu import cpu_multiplies_exactly
from torch import Tensor, nn

from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.model.transformer.layers import (
    DenseLinear,
    Fp8Linear,
    GgufLinear,
    Int8GgufLinear,
    Int8Linear,
    SideBySide,
    linear,
    merged,
    weight_bytes,
)
from ideogram_app.quantization import fp8, int8, k_quants
from ideogram_app.quantization.rotation import hadamard, rotate

ROWS, COLUMNS = 48, 256


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pack_gguf(weight: Tensor, bias: Tensor | None, gguf_type: str) -> GgufLinear:
    rows, columns = weight.shape
    return GgufLinear(k_quants.encode(weight, gguf_type), gguf_type, rows, columns, bias)


PACKERS: dict[str, Callable[[Tensor, Tensor | None], nn.Module]] = {
    "fp8": lambda weight, bias: Fp8Linear(*fp8.quantize_rows(weight), bias),
    "int8": lambda weight, bias: Int8Linear(*int8.quantize_rows(weight), bias),
    "convrot": lambda weight, bias: Int8Linear(*int8.quantize_rows(rotate(weight)), bias, rotated=True),
    "Q4_K": lambda weight, bias: pack_gguf(weight, bias, "Q4_K"),
    "Q4_K in INT8": lambda weight, bias: Int8GgufLinear(k_quants.encode(weight, "Q4_K"), *weight.shape, bias),
    "Q5_K": lambda weight, bias: pack_gguf(weight, bias, "Q5_K"),
    "Q6_K": lambda weight, bias: pack_gguf(weight, bias, "Q6_K"),
    "Q8_0": lambda weight, bias: pack_gguf(weight, bias, "Q8_0"),
}
# Relative error of the output against the dense layer: that of the weights, and for INT8 of the activations.
BARS = {"fp8": 0.03, "int8": 0.015, "convrot": 0.015, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02, "Q8_0": 0.007}
BARS["Q4_K in INT8"] = 0.085


def make(storage: str, bias: bool = True) -> nn.Module:
    return PACKERS[storage](gaussian(ROWS, COLUMNS), gaussian(ROWS, seed=1) if bias else None)


@pytest.mark.parametrize("storage", PACKERS)
@pytest.mark.parametrize("lead", [(1,), (2, 7), (1, 33)])
def test_the_output_is_close_to_the_dense_layers(storage: str, lead: tuple[int, ...]) -> None:
    x = gaussian(*lead, COLUMNS, seed=2)
    exact = nn.functional.linear(x, gaussian(ROWS, COLUMNS))
    y = make(storage, bias=False)(x)
    assert y.shape == (*lead, ROWS)
    assert (y - exact).norm() < BARS[storage] * exact.norm()
    with_bias = make(storage)(x)
    assert torch.allclose(with_bias, y + gaussian(ROWS, seed=1), atol=1e-4)  # outputs reach 50; float32 sums differ


@pytest.mark.parametrize("storage", PACKERS)
def test_the_computing_type_is_that_of_the_input(storage: str) -> None:
    x = gaussian(2, 7, COLUMNS, seed=2)
    exact = make(storage)(x)
    layer = make(storage).to(torch.bfloat16)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 0.02 * exact.norm()


def test_gguf_weights_are_those_gguf_reads() -> None:
    layer = pack_gguf(gaussian(ROWS, COLUMNS), None, "Q4_K")
    theirs = gguf.dequantize(layer.weight.numpy(), gguf.GGMLQuantizationType.Q4_K)
    x = gaussian(3, COLUMNS, seed=2)
    assert torch.equal(layer(x), nn.functional.linear(x, torch.from_numpy(theirs)))


@pytest.mark.parametrize("lead", [(1,), (2, 7), (1, 33)])
def test_int8_layers_equal_the_reference_to_the_last_bit(lead: tuple[int, ...]) -> None:
    values, scale = int8.quantize_rows(gaussian(ROWS, COLUMNS))
    x, bias = gaussian(*lead, COLUMNS, seed=2), gaussian(ROWS, seed=1)
    assert torch.equal(Int8Linear(values, scale, bias)(x), int8.linear(x, values, scale, bias))


@pytest.mark.skipif(not cpu_multiplies_exactly(), reason="torch._int_mm, and so torchao, saturates on this CPU")
def test_int8_layers_equal_torchaos_to_the_last_bit() -> None:
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    values, scale = int8.quantize_rows(gaussian(ROWS, COLUMNS))
    x, bias = gaussian(2, 21, COLUMNS, seed=2), gaussian(ROWS, seed=1)
    per_token = QuantizeTensorToInt8Kwargs(granularity=PerRow())
    theirs = Int8Tensor(values, scale.unsqueeze(-1), [1, COLUMNS], torch.float32, act_quant_kwargs=per_token)
    assert torch.equal(Int8Linear(values, scale, bias)(x), nn.functional.linear(x, theirs, bias))


@pytest.mark.parametrize("storage", ["int8", "convrot", "Q4_K in INT8"])
def test_rows_that_a_kernel_rounded_give_what_the_tensor_gives(storage: str) -> None:
    layer: Any = make(storage)
    x = gaussian(33, COLUMNS, seed=2)
    assert torch.equal(layer(PLAIN.quantize(x, layer.input_format)), layer(x))


def test_merged_layers_are_the_layers_one_below_another() -> None:
    weights = [gaussian(ROWS, COLUMNS, seed=seed) for seed in (1, 2, 3)]
    x = gaussian(33, COLUMNS, seed=4)
    for pack in (dense, rounded, quartered):
        stored = [pack(weight) for weight in weights]
        apart = torch.cat([linear(weight, None, torch.float32)(x) for weight in stored], -1)
        whole = merged(stored, torch.float32)
        assert not isinstance(whole, SideBySide) and torch.allclose(whole(x), apart, rtol=0, atol=1e-4)


def test_layers_in_different_storages_stand_side_by_side() -> None:
    weights = [gaussian(ROWS, COLUMNS, seed=seed) for seed in (1, 2, 3)]
    x = gaussian(33, COLUMNS, seed=4)
    stored = [dense(weights[0]), rounded(weights[1]), rounded(weights[2])]
    whole = merged(stored, torch.float32)
    assert isinstance(whole, SideBySide) and [type(layer) for layer in whole.layers] == [DenseLinear, Int8Linear]
    assert whole.input_format == "dense"
    apart = torch.cat([linear(weight, None, torch.float32)(x) for weight in stored], -1)
    assert torch.allclose(whole(x), apart, rtol=0, atol=1e-4)


def dense(weight: Tensor) -> Tensor:
    return weight


def rounded(weight: Tensor) -> PackedWeight:
    return PackedWeight("int8", *int8.quantize_rows(weight))


def quartered(weight: Tensor) -> PackedWeight:
    return PackedWeight("gguf", k_quants.encode(weight, "Q4_K"), gguf_type="Q4_K")


@pytest.mark.parametrize("columns", [256, 768])
def test_rotated_layers_compute_what_convrot_writes_down(columns: int) -> None:
    weight, x = gaussian(ROWS, columns).double(), gaussian(5, columns, seed=2).double()
    whole = torch.block_diag(*[hadamard(256, torch.float64)] * (columns // 256))
    turned, seen = weight @ whole, x @ whole
    row_scale, token_scale = turned.abs().amax(1) / 127, seen.abs().amax(1) / 127.5
    values = (turned / row_scale[:, None]).round().clamp(-127, 127)
    tokens = (seen / token_scale[:, None]).round().clamp(-128, 127)
    expected = (tokens @ values.T) * token_scale[:, None] * row_scale
    y = PACKERS["convrot"](weight.float(), None)(x.float())
    assert (y - expected).norm() < 1e-3 * expected.norm()  # a value on the edge between two may fall either way


def test_rotation_takes_away_what_outlier_channels_cost() -> None:
    x = gaussian(64, 1024, seed=2)
    x[:, [5, 300, 801]] *= 30  # 0.3 % of the channels
    weight = gaussian(ROWS, 1024)
    exact = nn.functional.linear(x, weight)
    plain, turned = (
        float((PACKERS[storage](weight, None)(x) - exact).norm() / exact.norm()) for storage in ("int8", "convrot")
    )
    assert turned < 0.016 < 0.04 < plain


@pytest.mark.parametrize("storage", PACKERS)
@pytest.mark.parametrize("change", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_change_of_type_changes_the_bias_and_no_packed_bit(storage: str, change: Callable[[nn.Module], Any]) -> None:
    layer = make(storage)
    before = inner_tensors(layer)
    changed = change(layer)
    assert changed.bias.dtype in (torch.bfloat16, torch.float16, torch.float64)
    for old, new in zip(before, inner_tensors(changed), strict=True):
        assert old.dtype == new.dtype and torch.equal(old.view(torch.uint8), new.view(torch.uint8))


@pytest.mark.parametrize("storage", PACKERS)
def test_a_change_of_device_takes_everything_along(storage: str) -> None:
    layer = make(storage).to("meta", torch.bfloat16)
    assert all(tensor.device.type == "meta" for tensor in [*inner_tensors(layer), layer.bias])
    assert [tensor.dtype for tensor in inner_tensors(layer)] == [
        tensor.dtype for tensor in inner_tensors(make(storage))
    ]


def inner_tensors(layer: Any) -> list[Tensor]:
    """The packed weight and its scales."""
    return [buffer.detach() for buffer in layer.buffers()]


def test_bytes_are_counted_as_held() -> None:
    weights, biases = ROWS * COLUMNS, ROWS * 4
    assert weight_bytes(nn.Linear(COLUMNS, ROWS)) == weights * 4 + biases
    assert weight_bytes(make("fp8")) == weights + ROWS * 4 + biases
    assert weight_bytes(make("int8")) == weights + ROWS * 4 + biases
    assert weight_bytes(make("convrot")) == weights + ROWS * 4 + biases
    assert weight_bytes(make("Q4_K")) == weights * 144 // 256 + biases
    assert weight_bytes(make("Q4_K in INT8")) == weights * 144 // 256 + ROWS * 4 + biases
    assert weight_bytes(make("Q8_0", bias=False)) == weights * 34 // 32


def test_a_shared_weight_is_counted_once() -> None:
    layer = nn.Linear(8, 8, bias=False)
    assert weight_bytes(nn.Sequential(layer, layer)) == 8 * 8 * 4


@pytest.mark.parametrize("storage", PACKERS)
def test_state_survives_saving_and_loading(storage: str) -> None:
    x = gaussian(3, COLUMNS, seed=2)
    there = make(storage)
    here = PACKERS[storage](torch.ones(ROWS, COLUMNS), torch.ones(ROWS))
    here.load_state_dict(there.state_dict(), assign=True)
    assert torch.equal(here(x), there(x))


def test_tensors_that_do_not_fit_are_refused_with_both_shapes() -> None:
    values, scale = fp8.quantize_rows(gaussian(ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match=r"scale.*\(48,\).*\(47,\)"):
        Fp8Linear(values, scale[1:])
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        Fp8Linear(values.float(), scale)
    with pytest.raises(CheckpointError, match=r"Q4_K weight.*\(48, 144\).*\(47, 144\)"):
        GgufLinear(torch.zeros(47, 144, dtype=torch.uint8), "Q4_K", ROWS, COLUMNS)
    with pytest.raises(RequestError, match="block size"):
        GgufLinear(torch.zeros(47, 144, dtype=torch.uint8), "Q4_K", ROWS, 200)
    with pytest.raises(CheckpointError, match=r"torch\.int8"):
        Int8Linear(values.float(), scale)


def tiny_transformer() -> Any:  # diffusers' lazy imports hide that it is a torch module
    torch.manual_seed(0)
    model: Any = Ideogram4Transformer2DModel(
        in_channels=128,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        intermediate_size=256,
        adaln_dim=256,
        llm_features_dim=256,
        mrope_section=(4, 4, 4),
    )
    return model.eval()


def run(model: nn.Module) -> Tensor:
    text, image = 4, 4
    indicator = torch.tensor([[3] * text + [2] * image])  # text tokens, then image tokens
    return model(
        hidden_states=gaussian(1, text + image, 128),
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=gaussian(1, text + image, 256, seed=1),
        position_ids=torch.arange(text + image).view(1, -1, 1).expand(1, -1, 3),
        segment_ids=torch.ones(1, text + image, dtype=torch.long),
        indicator=indicator,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("storage", PACKERS)
def test_a_transformer_of_diffusers_runs_on_packed_blocks(storage: str) -> None:
    model = tiny_transformer()
    dense, dense_bytes = run(model), weight_bytes(model)
    for name, layer in list(model.named_modules()):
        if name.startswith("layers.") and isinstance(layer, nn.Linear):
            bias = None if layer.bias is None else layer.bias.detach()
            model.set_submodule(name, PACKERS[storage](layer.weight.detach(), bias))
    packed = run(model)
    assert model.dtype == torch.float32
    assert (packed - dense).norm() < 2 * BARS[storage] * dense.norm()
    assert weight_bytes(model) < 0.75 * dense_bytes
