"""A Linear layer per storage, each a drop-in for `torch.nn.Linear`.

    dense    torch.nn.Linear                      weight in the computing type
    fp8      Fp8Linear                            float8 weight, widened at every use
    int8     Int8Linear                           INT8 x INT8 -> INT32, by torchao
    convrot  RotatedInt8Linear                    the same between a rotated weight and an input rotated as it comes
    gguf     GgufLinear                           K-quant bytes, decoded at every use

The computing type is that of the input. Packed weights and their scales are buffers that follow `.to(device)` and
ignore `.to(dtype)`: a change of type would silently unpack, or ruin, them. The bias is an ordinary parameter. So
`model.to("cuda", torch.bfloat16)` does the right thing for all of them.

Left out: training, and keeping decoded weights; diffusers' GGUF layer does the same through a tensor subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ideogram_app.errors import CheckpointError
from ideogram_app.quantization import fp8, int8, k_quants
from ideogram_app.quantization.rotation import rotate

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedLinear(nn.Module):
    """What the packed layers share: sizes, the bias, and buffers whose type never changes."""

    bias: nn.Parameter | None

    def __init__(self, rows: int, columns: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if bias is not None:
            _expect("bias", bias, (rows,))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every `.to`, `.half`, `.cuda` passes here: take the new device, keep the old type."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
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
        super().__init__(rows, columns, bias)
        _expect("scale", scale, (rows,))
        if weight.dtype != torch.float8_e4m3fn:
            raise CheckpointError("This is no FP8 weight", expected="torch.float8_e4m3fn", got=str(weight.dtype))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        return fp8.linear(x, self.weight, self.scale, self.bias)


class GgufLinear(PackedLinear):
    """`weight` uint8 (rows, bytes of a row), as `k_quants.encode` makes them and GGUF files hold them."""

    weight: Tensor

    def __init__(self, packed: Tensor, gguf_type: str, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__(rows, columns, bias)
        _expect(f"packed {gguf_type} weight", packed, (rows, k_quants.packed_columns(columns, gguf_type)))
        self.gguf_type = gguf_type
        self.register_buffer("weight", packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        return nn.functional.linear(x, k_quants.decode(self.weight, self.gguf_type, x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gguf_type={self.gguf_type}"


class Int8Linear(nn.Linear):
    """`weight` is a torchao `Int8Tensor`: inputs are rounded per token and multiplied in INT8.

    On a CPU that cannot multiply INT8 exactly the reference of int8.py takes torchao's place: slower, same numbers.

    Args:
        values: int8 (rows, columns); scale: float32 (rows,); as `int8.quantize_rows` makes them.
        dtype: what the weight claims to be; the computing type is that of the input all the same.
    """

    def __init__(
        self, values: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        # torchao takes seconds to import and is needed for this storage alone.
        from torchao.quantization import Int8Tensor, PerRow
        from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

        rows, columns = values.shape
        super().__init__(columns, rows, bias=False, device="meta")
        _expect("scale", scale, (rows,))
        if values.dtype != torch.int8:
            raise CheckpointError("This is no INT8 weight", expected="torch.int8", got=str(values.dtype))
        per_token = QuantizeTensorToInt8Kwargs(granularity=PerRow())
        weight = Int8Tensor(values, scale.float().unsqueeze(-1), [1, columns], dtype, act_quant_kwargs=per_token)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            _expect("bias", bias, (rows,))
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._exact_on_cpu = int8.cpu_multiplies_exactly()

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        if x.device.type == "cpu" and not self._exact_on_cpu:
            weight: Any = self.weight
            return int8.linear(x, weight.qdata, weight.scale.squeeze(-1), self.bias)
        return super().forward(x)


class RotatedInt8Linear(Int8Linear):
    """`weight` holds W R in int8 (`int8.quantize_rows(rotate(weight))`); inputs become x R before they are rounded.

    The rotation runs in float32 and is rounded to the computing type, by at most 2^-9 of each value in bfloat16: half
    of what the following step of 1/127.5 of a token's largest value may change, and on typical values far less. Left
    out: rotating once for layers that share an input (q, k and v; w1 and w3).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        return super().forward(rotate(x).to(x.dtype))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are held, each counted once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return sum(_held_bytes(tensor) for tensor in tensors)


def _held_bytes(tensor: Any) -> int:
    """Of a plain tensor, or of the tensors inside a subclass such as `Int8Tensor`."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_held_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())


def _expect(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"The {what} does not fit its layer", expected=str(shape), got=str(tuple(tensor.shape)))
