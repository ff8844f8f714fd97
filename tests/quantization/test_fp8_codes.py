"""FP8 without the type: every code against torch's own cast, and layers on a device that refuses float8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.model.loader import Homes, load_transformers
from ideogram_app.model.transformer.layers import Fp8Linear, merged
from ideogram_app.prepare.transformers import prepare
from ideogram_app.quantization import fp8, fp8_codes
from ideogram_app.quantization.rows import dequantize_rows

MOVE_NO_BYTES = ("view", "slice", "detach", "alias", "select", "split", "as_strided", "t")


class Metal(TorchDispatchMode):
    """Float8 on a device as torch 2.13 has it on Metal: views alone; the meta device stands for it."""

    def __torch_dispatch__(
        self,
        op: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = op(*args, **(kwargs or {}))
        touched = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        refused = any(each.dtype == torch.float8_e4m3fn and each.device.type == "meta" for each in touched)
        if refused and op.overloadpacket.__name__ not in MOVE_NO_BYTES:
            raise TypeError(f"Trying to convert Float8_e4m3fn to the MPS backend: {op}")
        return made


def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device has the type, so that the numbers of the other way can be looked at."""
    monkeypatch.setattr(fp8_codes, "WITHOUT_FLOAT8", ("cpu",))


def rows_of_noise(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return fp8.quantize_rows(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


def test_every_code_is_looked_up_as_torch_casts_it_to_the_bit() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    cast = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8_codes.looked_up(codes).view(torch.int32), cast.view(torch.int32))  # both zeros, both NaN


def test_a_table_longer_than_one_look_up_keeps_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_codes, "LOOKED_UP_AT_ONCE", 100)
    codes = torch.randint(0, 256, (7, 31), dtype=torch.uint8)
    cast = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8_codes.looked_up(codes).view(torch.int32), cast.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_same_with_and_without_the_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values, scale = rows_of_noise(24, 64)
    with_type = dequantize_rows(values, scale, dtype)
    everywhere(monkeypatch)
    assert torch.equal(dequantize_rows(values, scale, dtype), with_type)
    again, again_scale = rows_of_noise(24, 64)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8)) and torch.equal(again_scale, scale)


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Metal]:
    monkeypatch.setattr(fp8_codes, "WITHOUT_FLOAT8", ("meta",))
    return Metal


def test_a_layer_goes_to_a_device_without_float8_computes_there_and_returns(metal: Callable[[], Metal]) -> None:
    """As a layer that runs once a picture is staged: there, one product, and back."""
    layer = Fp8Linear(*rows_of_noise(24, 64))
    with metal():
        layer.to("meta")
        made = layer(torch.empty(2, 5, 64, dtype=torch.bfloat16, device="meta"))
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight.device.type == "meta"
    assert made.shape == (2, 5, 24) and made.dtype == torch.bfloat16


def test_merged_matrices_are_moved_joined_and_decoded_there(metal: Callable[[], Metal]) -> None:
    parts = [PackedWeight("fp8", *rows_of_noise(rows, 64)) for rows in (24, 8)]
    with metal():
        layer = merged([part.to("meta") for part in parts], torch.bfloat16)
        made = layer(torch.empty(5, 64, dtype=torch.bfloat16, device="meta"))
        decoded = parts[0].to("meta").decoded()
    assert made.shape == (5, 32) and decoded.shape == (24, 64)


@pytest.mark.slow
def test_a_whole_transformer_is_loaded_where_float8_may_not_be_copied(
    metal: Callable[[], Metal], tmp_path: Path
) -> None:
    store = Store(tmp_path)
    list(prepare(store, "miniature", "fp8"))
    with metal():
        loaded = load_transformers(store, "miniature", "fp8", Homes.on("meta"), torch.bfloat16)
        layers = [layer for layer in loaded.conditional.trunk.modules() if isinstance(layer, Fp8Linear)]
        made = layers[0](torch.empty(3, layers[0].in_features, dtype=torch.bfloat16, device="meta"))
    assert made.shape == (3, layers[0].out_features)
    assert {layer.weight.dtype for layer in layers} == {torch.float8_e4m3fn}
    assert {layer.weight.device.type for layer in layers} == {"meta"}


def test_a_layer_moved_to_another_type_keeps_its_codes() -> None:
    values, scale = rows_of_noise(8, 64)
    layer = Fp8Linear(values, scale).half()
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(layer.weight.view(torch.uint8), values.view(torch.uint8))
