"""Reference kernels in plain torch: what the fast ones are judged by, and what runs elsewhere.

Written for reading; `quantization/` holds the arithmetic. Left out: speed on a GPU, where each of these is 5 to 20
launches that pass over memory again and again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ideogram_app.kernels.contract import InputFormat, Kernels, Operand, QuantizedActivations
from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rotation import rotate


def norm(x: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat) -> Operand:
    """x: (M, K) -> x / rms(x) * vector, in `input_format`."""
    return _operand(_normed(x, epsilon) * vector, x.dtype, input_format)


def add_norm(
    hidden: Tensor, update: Tensor, gate: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat
) -> tuple[Tensor, Operand]:
    """`add`, then the `norm` of its result: the end of one half of a block and the beginning of the next."""
    hidden = add(hidden, update, gate, epsilon)
    return hidden, norm(hidden, vector, epsilon, input_format)


def add(hidden: Tensor, update: Tensor, gate: Tensor, epsilon: float) -> Tensor:
    """hidden + update / rms(update) * gate, (M, K)."""
    return (hidden.float() + _normed(update, epsilon) * gate).to(hidden.dtype)


def swiglu(gate_up: Tensor, input_format: InputFormat) -> Operand:
    """gate_up: (M, 2 F) -> silu(first half) * second half, (M, F)."""
    gate, up = gate_up.float().chunk(2, -1)
    return _operand(functional.silu(gate) * up, gate_up.dtype, input_format)


def quantize(x: Tensor, input_format: InputFormat) -> Operand:
    """x: (M, K), in `input_format`."""
    return x if input_format == "dense" else _operand(x.float(), x.dtype, input_format)


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv: (M, 3 H D) -> q, k, v, each (H, M, D); rotary angles pair the first half of a head with the second."""
    query, key, value = qkv.unflatten(-1, (3, -1, norm_q.shape[0])).permute(1, 2, 0, 3)  # each (H, M, D)

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        first, second = (_normed(x, epsilon) * weight).chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(qkv.dtype)

    return turned(query, norm_q), turned(key, norm_k), value


def weight(values: Tensor) -> Tensor:
    """int8 (N, K) as it is: in row order."""
    return values


def matmul(x: QuantizedActivations, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """INT8 (M, K) times INT8 (N, K), summed exactly."""
    return epilogue(int8.int32_product(x.values, values), x.scale, scale, bias, dtype)


def epilogue(sums: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """INT32 sums (M, N) to numbers: times row_scale (M, 1) and scale (N,), plus bias (N,)."""
    y = sums.float() * row_scale * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def decode_int8(packed: Tensor, scale: Tensor, rotated: bool) -> Tensor:
    """Q4_K (N, bytes) and one scale a row (N,) -> int8 (N, K)."""
    values = k_quants.decode(packed, "Q4_K")
    values = rotate(values) if rotated else values
    return (values * (1.0 / scale)[:, None]).round_().clamp_(-127, 127).to(torch.int8)


def decode(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Q4_K (N, bytes) -> (N, K)."""
    return k_quants.decode(packed, "Q4_K", dtype)


def _normed(x: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) along the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def _operand(x: Tensor, dtype: torch.dtype, input_format: InputFormat) -> Operand:
    """float32 (M, K) in an input format, `dtype` where that is dense."""
    if input_format == "dense":
        return x.to(dtype)
    return QuantizedActivations(*int8.quantize_tokens(rotate(x) if input_format == "rotated" else x))


PLAIN = Kernels(
    name="plain",
    norm=norm,
    add_norm=add_norm,
    add=add,
    swiglu=swiglu,
    quantize=quantize,
    heads=heads,
    weight=weight,
    matmul=matmul,
    decode_int8=decode_int8,
    decode=decode,
)
