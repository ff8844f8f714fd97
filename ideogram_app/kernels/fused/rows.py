"""Row kernels in Triton, one launch each: RMS norm with modulation, residual, SwiGLU, quantization.

The arithmetic and the signatures are those of `kernels.plain`; `blocks.py` has the building blocks. One program is one
token: it reads each input once, holds the row in registers and writes what the next matrix reads. What is compiled
depends on the width K, the type and the input format; the number of tokens is the grid alone, so another prompt length
never compiles anything. Inputs may be views whose rows lie apart, as long as a row is contiguous.

Left out: backward passes, batch axes, search for the number of warps (`blocks.shape_of` is a rule with its reason).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideogram_app.errors import RequestError
from ideogram_app.kernels.contract import InputFormat, Operand, QuantizedActivations
from ideogram_app.kernels.fused.blocks import (
    WARP,
    load,
    load_row,
    normed,
    shape_of,
    store_dense,
    store_operand,
    warp_size,
    with_chunk,
)
from ideogram_app.kernels.fused.signature import Compilable
from ideogram_app.quantization.rotation import GROUP

STAGES = 1  # of the software pipeline around loops: there are none, chunks are unrolled


@triton.jit
def norm_kernel(
    x_ptr: tl.tensor,
    row_stride: tl.tensor,
    vector_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    epsilon: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INPUT_FORMAT: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + token * row_stride, K, BLOCK, CHUNKS)
    y = normed(x, vector_ptr, epsilon, K, BLOCK, CHUNKS)
    store_operand(y, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, INPUT_FORMAT)


@triton.jit
def add_norm_kernel(
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    update_ptr: tl.tensor,
    update_stride: tl.tensor,
    gate_ptr: tl.tensor,
    vector_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    epsilon: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INPUT_FORMAT: tl.constexpr,
) -> None:
    """`INPUT_FORMAT` None: nothing but the sum is wanted."""
    token = tl.program_id(0).to(tl.int64)
    hidden_ptr += token * hidden_stride
    update = load_row(update_ptr + token * update_stride, K, BLOCK, CHUNKS)
    step = normed(update, gate_ptr, epsilon, K, BLOCK, CHUNKS)
    hidden = ()
    for i in tl.static_range(CHUNKS):
        total = load(hidden_ptr, i * BLOCK, K, BLOCK) + step[i]
        # Rounded before the norm: it is the norm of what is stored.
        hidden = with_chunk(hidden, total.to(hidden_ptr.dtype.element_ty).to(tl.float32))
    store_dense(hidden, hidden_ptr, K, BLOCK, CHUNKS)
    if INPUT_FORMAT is not None:
        y = normed(hidden, vector_ptr, epsilon, K, BLOCK, CHUNKS)
        store_operand(y, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, INPUT_FORMAT)


@triton.jit
def swiglu_kernel(
    gate_up_ptr: tl.tensor,
    row_stride: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INPUT_FORMAT: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    gate_up_ptr += token * row_stride
    y = ()
    for i in tl.static_range(CHUNKS):
        gate = load(gate_up_ptr, i * BLOCK, K, BLOCK)
        up = load(gate_up_ptr + K, i * BLOCK, K, BLOCK)
        y = with_chunk(y, gate * tl.sigmoid(gate) * up)
    store_operand(y, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, INPUT_FORMAT)


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor,
    row_stride: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INPUT_FORMAT: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + token * row_stride, K, BLOCK, CHUNKS)
    store_operand(x, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, INPUT_FORMAT)


def norm(x: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat) -> Operand:
    """x: (M, K) -> x / rms(x) * vector, in `input_format`.

    Raises:
        RequestError: shapes or strides do not fit; of every function here.
    """
    M, K = x.shape
    out, scale = _output(K, input_format, (x,), (vector,))
    norm_kernel[(M,)](x, x.stride(0), vector, out, scale, epsilon, **_launch(K, input_format, warp_size(x.device)))
    return _operand(out, scale)


def add_norm(
    hidden: Tensor, update: Tensor, gate: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat
) -> tuple[Tensor, Operand]:
    """The end of one half of a block and the beginning of the next: hidden' = hidden + update / rms(update) * gate.

    `hidden` (M, K) is overwritten and returned: a program reads and writes its own row alone, and nobody wants the old
    one. `update` is (M, K), `gate` and `vector` are (K,).
    """
    M, K = hidden.shape
    out, scale = _output(K, input_format, (hidden, update), (gate, vector))
    launch = _launch(K, input_format, warp_size(hidden.device))
    add_norm_kernel[(M,)](
        hidden, hidden.stride(0), update, update.stride(0), gate, vector, out, scale, epsilon, **launch
    )
    return hidden, _operand(out, scale)


def add(hidden: Tensor, update: Tensor, gate: Tensor, epsilon: float) -> Tensor:
    """hidden + update / rms(update) * gate, (M, K); `hidden` is overwritten and returned."""
    M, K = hidden.shape
    _check(K, "dense", (hidden, update), (gate,))
    launch = _launch(K, None, warp_size(hidden.device))
    add_norm_kernel[(M,)](hidden, hidden.stride(0), update, update.stride(0), gate, None, None, None, epsilon, **launch)
    return hidden


def swiglu(gate_up: Tensor, input_format: InputFormat) -> Operand:
    """gate_up: (M, 2 F) -> silu(first half) * second half, (M, F)."""
    M, K = gate_up.shape[0], gate_up.shape[1] // 2
    out, scale = _output(K, input_format, (gate_up,))
    launch = _launch(K, input_format, warp_size(gate_up.device))
    swiglu_kernel[(M,)](gate_up, gate_up.stride(0), out, scale, **launch)
    return _operand(out, scale)


def quantize(x: Tensor, input_format: InputFormat) -> Operand:
    """x: (M, K), in `input_format`; x itself where that is dense."""
    if input_format == "dense":
        return x
    M, K = x.shape
    out, scale = _output(K, input_format, (x,))
    quantize_kernel[(M,)](x, x.stride(0), out, scale, **_launch(K, input_format, warp_size(x.device)))
    return _operand(out, scale)


def _launch(columns: int, input_format: str | None, threads: int) -> dict[str, Any]:
    """What every kernel here is launched with; threads: of a warp."""
    shape = shape_of(columns, threads)
    constants = {"K": columns, "BLOCK": shape.block, "CHUNKS": shape.chunks, "INPUT_FORMAT": input_format}
    return constants | {"num_warps": shape.warps, "num_stages": STAGES}


def _output(
    columns: int, input_format: InputFormat, tensors: tuple[Tensor, ...], vectors: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor | None]:
    """Memory for the rows of an operand, and for their scales unless it is dense, once all inputs are checked."""
    _check(columns, input_format, tensors, vectors)
    x, M = tensors[0], len(tensors[0])
    if input_format == "dense":
        return x.new_empty(M, columns), None
    return x.new_empty(M, columns, dtype=torch.int8), x.new_empty(M, 1, dtype=torch.float32)


def _operand(out: Tensor, scale: Tensor | None) -> Operand:
    return out if scale is None else QuantizedActivations(out, scale)


def _check(columns: int, input_format: InputFormat, tensors: tuple[Tensor, ...], vectors: tuple[Tensor, ...]) -> None:
    """Refuse what a kernel would read wrongly: it sees addresses, not shapes."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1 or any(tuple(vector.shape) != (columns,) for vector in vectors):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (*tensors, *vectors))
        raise RequestError("A row kernel was given shapes that differ", expected=f"rows of {columns}", got=got)
    if any(tensor.stride(-1) != 1 for tensor in (*tensors, *vectors)):
        got = ", ".join(str(tensor.stride()) for tensor in (*tensors, *vectors))
        raise RequestError("A row kernel reads contiguous rows", expected="a last stride of 1", got=f"strides {got}")
    if input_format == "rotated" and columns % GROUP:
        raise RequestError("These rows cannot be rotated", expected=f"a multiple of {GROUP}", got=str(columns))


HIDDEN, INNER = 4608, 12288  # the widths of rows: of a token, and inside the MLP
TYPES = ("bf16", "fp16")


def signatures(threads: int = WARP) -> Iterator[Compilable]:
    """Every variant that the real model launches, for the compiler; threads: of a warp."""
    for dtype in TYPES:
        for input_format in ("dense", "int8", "rotated"):
            yield _row(norm_kernel, HIDDEN, dtype, input_format, threads)
            yield _row(add_norm_kernel, HIDDEN, dtype, input_format, threads)
            yield _row(swiglu_kernel, INNER, dtype, input_format, threads)
        for columns, input_format in ((HIDDEN, "int8"), (HIDDEN, "rotated"), (INNER, "int8"), (INNER, "rotated")):
            yield _row(quantize_kernel, columns, dtype, input_format, threads)
        yield _row(add_norm_kernel, HIDDEN, dtype, None, threads)


def _row(kernel: Any, columns: int, dtype: str, input_format: str | None, threads: int) -> Compilable:
    """A kernel at one width; the names of its arguments say their types."""
    absent = {None: ("vector_ptr", "out_ptr", "scale_ptr"), "dense": ("scale_ptr",)}.get(input_format, ())
    types = {
        "vector_ptr": "*fp32",
        "gate_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "epsilon": "fp32",
        "out_ptr": f"*{dtype}" if input_format == "dense" else "*i8",
    }
    launch = _launch(columns, input_format, threads)
    warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
    constants = launch | dict.fromkeys(absent)
    signature = {
        name: types.get(name, "i32" if name.endswith("stride") else f"*{dtype}")
        for name in kernel.arg_names
        if name not in constants
    }
    name = f"{kernel.__name__}, {input_format or 'sum alone'}, {dtype}, {columns}"
    return Compilable(name, kernel, signature, constants, warps=warps, stages=stages)
