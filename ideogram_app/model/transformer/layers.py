"""Quantized Linear layers, one class per storage (FP8, INT8, GGUF), and their merging.

    dense           DenseLinear       weight in the computing type
    fp8             Fp8Linear         float8 weight, widened at every use
    int8, convrot   Int8Linear        INT8 x INT8 -> INT32; convrot's inputs are rotated as they come
    gguf            GgufLinear        blocks decoded at every use: W4A16 for Q4_K
    gguf, Q4_K      Int8GgufLinear    blocks decoded to one layer's INT8 at every use: W4A8

`input_format` (`kernels.contract.InputFormat`) says what a layer wants its input as, so that the kernel before it can
hand over just that: two layers that read the same are merged and their input is rounded once. A layer takes an ordinary
tensor too and is then a drop-in for `torch.nn.Linear`.

Packed weights and their scales are buffers that follow `.to(device)` and ignore `.to(dtype)`: a change of type would
silently unpack, or ruin, them. The bias is an ordinary parameter. Left out: training, and keeping decoded weights;
torchao's INT8 and diffusers' GGUF do the same through tensor subclasses, at some fifty launches a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.errors import CheckpointError
from ideogram_app.kernels import dense
from ideogram_app.kernels.contract import InputFormat, Kernels, Operand, QuantizedActivations
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.kernels.processor import held_bytes
from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rotation import rotate
from ideogram_app.quantization.rows import dequantize_rows

if TYPE_CHECKING:
    from typing_extensions import Self

# Q4_K weights decoded at once for their rows' scales: up to five float32 copies of them, 40 MB, whatever the matrix.
SCALED_AT_ONCE = 2**21
W4A8 = "w4a8"  # the arithmetic that decodes Q4_K to INT8; anything else decodes to the computing type


class DenseLinear(nn.Linear):
    """`weight` (rows, columns) in the computing type."""

    input_format: InputFormat = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return dense.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """Base of the packed layers, (..., columns) -> (..., rows): sizes, bias, and buffers whose type never changes."""

    bias: nn.Parameter | None
    input_format: InputFormat = "dense"

    def __init__(self, rows: int, columns: int, bias: Tensor | None, **buffers: Tensor | None) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.in_features, self.out_features = columns, rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if bias is not None:
            _expect("bias", bias, (rows,))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every `.to`, `.half`, `.cuda` passes here: take the new device, keep the old type."""

        def as_bytes(tensor: Tensor) -> Tensor:  # not every device lets float8 in (quantization/fp8_codes.py)
            is_float8 = tensor.dtype == torch.float8_e4m3fn
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if is_float8 else fn(tensor)

        before = dict(self._buffers)
        super()._apply(as_bytes, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Fp8Linear(PackedLinear):
    """`weight` float8_e4m3fn (rows, columns) with one float32 `scale` a row."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        rows, columns = weight.shape
        super().__init__(rows, columns, bias, weight=weight, scale=scale.float())
        _expect("scale", scale, (rows,))
        if weight.dtype != torch.float8_e4m3fn:
            raise CheckpointError("This is no FP8 weight", expected="torch.float8_e4m3fn", got=str(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return dense.linear(x, dequantize_rows(self.weight, self.scale, x.dtype), self.bias)


class GgufLinear(PackedLinear):
    """`weight` uint8 (rows, bytes of a row), as `k_quants.encode` makes them and GGUF files hold them."""

    weight: Tensor

    def __init__(
        self,
        packed: Tensor,
        gguf_type: str,
        rows: int,
        columns: int,
        bias: Tensor | None = None,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__(rows, columns, bias, weight=packed)
        _expect(f"packed {gguf_type} weight", packed, (rows, k_quants.packed_columns(columns, gguf_type)))
        self.gguf_type, self.kernels = gguf_type, kernels

    def forward(self, x: Tensor) -> Tensor:
        if self.gguf_type == "Q4_K":
            return dense.linear(x, self.kernels.decode(self.weight, x.dtype), self.bias)
        return dense.linear(x, k_quants.decode(self.weight, self.gguf_type, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gguf_type={self.gguf_type}"


class RoundingLinear(PackedLinear):
    """Base of the layers with INT8 inputs: they take rows that a kernel rounded, or round a tensor themselves.

    The result is of `dtype`; where the input is a tensor, of that tensor's.
    """

    scale: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rotated: bool,
        kernels: Kernels,
    ) -> None:
        super().__init__(*shape, bias, scale=scale.float())
        _expect("scale", scale, (shape[0],))
        self.dtype, self.kernels = dtype, kernels
        self.input_format = "rotated" if rotated else "int8"

    def forward(self, x: Operand) -> Tensor:
        """Rows (M, columns) -> (M, rows), or a tensor (..., columns) -> (..., rows)."""
        if isinstance(x, QuantizedActivations):
            return self.kernels.matmul(x, self.operand(), self.scale, self.bias, self.dtype)
        rows = self.kernels.quantize(x.reshape(-1, x.shape[-1]), self.input_format)
        assert isinstance(rows, QuantizedActivations)
        y = self.kernels.matmul(rows, self.operand(), self.scale, self.bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def operand(self) -> Any:
        """The weight as `Kernels.matmul` takes it."""
        raise NotImplementedError


class Int8Linear(RoundingLinear):
    """`weight` int8 (rows, columns) with one float32 `scale` a row, as `int8.quantize_rows` makes them.

    `rotated` weights hold W R (`int8.quantize_rows(rotate(weight))`); inputs then become x R before they are rounded.
    A processor keeps the weight in an order of its own (`Kernels.weight`), in place of the buffer.
    """

    weight: Tensor | None

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        rotated: bool = False,
        kernels: Kernels = PLAIN,
    ) -> None:
        if values.dtype != torch.int8:
            raise CheckpointError("This is no INT8 weight", expected="torch.int8", got=str(values.dtype))
        rows, columns = values.shape
        super().__init__((rows, columns), scale, bias, dtype, rotated, kernels)
        own = kernels.weight(values)
        self.register_buffer("weight", values if own is values else None)
        self.own = None if own is values else own

    def operand(self) -> Any:
        return self.weight if self.own is None else self.own


class Int8GgufLinear(RoundingLinear):
    """`weight` Q4_K bytes, decoded into INT8 scratch at every use: half INT8's memory, on INT8 units.

    A row's scale is what rounds it best, its largest weight / 127; it is computed once. Rotated, because inputs are
    rounded too and their outliers would cost more than Q4_K itself; a group of the rotation is a block of the format.
    """

    weight: Tensor

    def __init__(
        self,
        packed: Tensor,
        rows: int,
        columns: int,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        rotated: bool = True,
        kernels: Kernels = PLAIN,
    ) -> None:
        _expect("packed Q4_K weight", packed, (rows, k_quants.packed_columns(columns, "Q4_K")))
        super().__init__((rows, columns), row_scales(packed, rotated), bias, dtype, rotated, kernels)
        self.register_buffer("weight", packed)

    def operand(self) -> Any:
        return self.kernels.decode_int8(self.weight, self.scale, self.input_format == "rotated")


class SideBySide(nn.Module):
    """Layers of one input in different storages: run apart, their outputs joined (M, sum of rows)."""

    input_format: InputFormat = "dense"

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


Layer = DenseLinear | PackedLinear | SideBySide
Stored = Tensor | PackedWeight


def linear(
    weight: Stored, bias: Tensor | None, dtype: torch.dtype, kernels: Kernels = PLAIN, arithmetic: str = ""
) -> DenseLinear | PackedLinear:
    """The layer of a storage around a weight, for a computing type; arithmetic: `W4A8`, or "" for the storage's own."""
    if isinstance(weight, Tensor):
        return DenseLinear(weight.to(dtype), bias)
    rows = weight.values.shape[0]
    if weight.storage == "gguf":
        columns = k_quants.unpacked_columns(weight.values.shape[1], weight.gguf_type)
        if arithmetic == W4A8 and weight.gguf_type == "Q4_K":
            return Int8GgufLinear(weight.values, rows, columns, bias, dtype, True, kernels)
        return GgufLinear(weight.values, weight.gguf_type, rows, columns, bias, kernels)
    assert weight.scale is not None
    if weight.storage == "fp8":
        return Fp8Linear(weight.values, weight.scale, bias)
    return Int8Linear(weight.values, weight.scale, bias, dtype, weight.rotated, kernels)


def merged(weights: Sequence[Stored], dtype: torch.dtype, kernels: Kernels = PLAIN, arithmetic: str = "") -> Layer:
    """One layer for weights that read the same input, rows of one below those of another; none has a bias.

    Where a recipe protects some of them, equal neighbours are merged and the rest stands beside them.
    """
    runs: list[list[Stored]] = []
    for weight in weights:
        if runs and _kind(runs[-1][0]) == _kind(weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    layers = [linear(_joined(run), None, dtype, kernels, arithmetic) for run in runs]
    return layers[0] if len(layers) == 1 else SideBySide(layers)


def row_scales(packed: Tensor, rotated: bool) -> Tensor:
    """packed Q4_K (N, bytes) -> float32 (N,): the largest magnitude of each decoded row, rotated if asked for, / 127.

    Raises:
        CheckpointError: these are not packed rows.
    """
    columns = k_quants.unpacked_columns(packed.shape[1], "Q4_K")
    scales = []
    for part in packed.split(max(1, SCALED_AT_ONCE // columns)):
        values = k_quants.decode(part, "Q4_K")
        values = rotate(values) if rotated else values
        scales.append(values.abs().amax(-1) / int8.WEIGHT_LEVELS)
    return torch.cat(scales).clamp_(min=int8.SMALLEST_WEIGHT_SCALE)


def weight_bytes(module: nn.Module, on_host: bool = False) -> int:
    """Bytes of a module's parameters and buffers as they are held, each counted once; of those in host memory alone."""
    tensors = (*module.parameters(), *module.buffers())
    own = (layer.own for layer in module.modules() if isinstance(layer, Int8Linear) and layer.own is not None)
    return sum(x.nbytes for x in tensors if not on_host or x.device.type == "cpu") + sum(map(held_bytes, own))


def _kind(weight: Stored) -> tuple[str, str, bool]:
    if isinstance(weight, Tensor):
        return "dense", "", False
    return weight.storage, weight.gguf_type, weight.rotated


def _joined(weights: Sequence[Stored]) -> Stored:
    """Weights of one kind, their rows one below another."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    values = torch.cat([weight.values.view(torch.uint8) for weight in packed]).view(first.values.dtype)
    scales = [weight.scale for weight in packed if weight.scale is not None]
    return PackedWeight(first.storage, values, torch.cat(scales) if scales else None, first.gguf_type, first.rotated)


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"The {what} does not fit its layer", expected=str(shape), got=str(tuple(tensor.shape)))
