"""What stands between two matrices of a block, each one launch: norms with modulation, residuals, SwiGLU, rounding.

The arithmetic and the signatures are those of `kernels.plain`; the pieces are in `blocks.py`. One program is one token:
it reads each input once, keeps the row in registers and writes what the next matrix reads. What is compiled depends on
the width K, the type, and what the next matrix reads; the number of tokens is the grid alone, so another prompt length
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
from ideogram_app.kernels.fused.blocks import load, load_row, normed, shape_of, store_dense, store_operand, with_chunk
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
    READS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + token * row_stride, K, BLOCK, CHUNKS)
    y = normed(x, vector_ptr, epsilon, K, BLOCK, CHUNKS)
    store_operand(y, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, READS)


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
    READS: tl.constexpr,
) -> None:
    """`READS` None: nothing but the sum is wanted."""
    token = tl.program_id(0).to(tl.int64)
    hidden_ptr += token * hidden_stride
    update = load_row(update_ptr + token * update_stride, K, BLOCK, CHUNKS)
    step = normed(update, gate_ptr, epsilon, K, BLOCK, CHUNKS)
    hidden = ()
    for i in tl.static_range(CHUNKS):
        total = load(hidden_ptr, i * BLOCK, K, BLOCK) + step[i]
        # Rounded before the norm: it is the norm of what is kept.
        hidden = with_chunk(hidden, total.to(hidden_ptr.dtype.element_ty).to(tl.float32))
    store_dense(hidden, hidden_ptr, K, BLOCK, CHUNKS)
    if READS is not None:
        y = normed(hidden, vector_ptr, epsilon, K, BLOCK, CHUNKS)
        store_operand(y, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, READS)


@triton.jit
def swiglu_kernel(
    arms_ptr: tl.tensor,
    row_stride: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    READS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    arms_ptr += token * row_stride
    y = ()
    for i in tl.static_range(CHUNKS):
        gate = load(arms_ptr, i * BLOCK, K, BLOCK)
        up = load(arms_ptr + K, i * BLOCK, K, BLOCK)
        y = with_chunk(y, gate * tl.sigmoid(gate) * up)
    store_operand(y, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, READS)


@triton.jit
def rows_kernel(
    x_ptr: tl.tensor,
    row_stride: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    READS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr + token * row_stride, K, BLOCK, CHUNKS)
    store_operand(x, out_ptr, scale_ptr, token, K, BLOCK, CHUNKS, READS)


def norm(x: Tensor, vector: Tensor, epsilon: float, reads: InputFormat) -> Operand:
    """x: (M, K) -> x / rms(x) * vector, as `reads` wants it.

    Raises:
        RequestError: shapes or strides do not fit; of every function here.
    """
    M, K = x.shape
    _check(K, reads, (x,), (vector,))
    out, scale = _room(x, K, reads)
    norm_kernel[(M,)](x, x.stride(0), vector, out, scale, epsilon, READS=reads, **_launch(K))
    return _operand(out, scale)


def add_norm(
    hidden: Tensor, update: Tensor, gate: Tensor, vector: Tensor, epsilon: float, reads: InputFormat
) -> tuple[Tensor, Operand]:
    """The end of one half of a block and the beginning of the next: hidden' = hidden + update / rms(update) * gate.

    `hidden` (M, K) is overwritten and returned: a program reads and writes its own row alone, and nobody wants the old
    one. `update` is (M, K), `gate` and `vector` are (K,).
    """
    _check(hidden.shape[1], reads, (hidden, update), (gate, vector))
    out, scale = _room(hidden, hidden.shape[1], reads)
    _add_norm(hidden, update, gate, vector, out, scale, epsilon, reads)
    return hidden, _operand(out, scale)


def add(hidden: Tensor, update: Tensor, gate: Tensor, epsilon: float) -> Tensor:
    """hidden + update / rms(update) * gate, (M, K); `hidden` is overwritten and returned."""
    _check(hidden.shape[1], "dense", (hidden, update), (gate,))
    _add_norm(hidden, update, gate, None, None, None, epsilon, None)
    return hidden


def swiglu(gate_up: Tensor, reads: InputFormat) -> Operand:
    """arms: (M, 2 F) -> silu(first half) * second half, (M, F)."""
    M, K = gate_up.shape[0], gate_up.shape[1] // 2
    _check(K, reads, (gate_up,))
    out, scale = _room(gate_up, K, reads)
    swiglu_kernel[(M,)](gate_up, gate_up.stride(0), out, scale, READS=reads, **_launch(K))
    return _operand(out, scale)


def rows(x: Tensor, reads: InputFormat) -> Operand:
    """x: (M, K), as `reads` wants it; x itself where that is dense."""
    if reads == "dense":
        return x
    M, K = x.shape
    _check(K, reads, (x,))
    out, scale = _room(x, K, reads)
    rows_kernel[(M,)](x, x.stride(0), out, scale, READS=reads, **_launch(K))
    return _operand(out, scale)


def _add_norm(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor,
    vector: Tensor | None,
    out: Tensor | None,
    scale: Tensor | None,
    epsilon: float,
    reads: InputFormat | None,
) -> None:
    """One launch for both sums; what is not wanted is None."""
    M, K = hidden.shape
    strides = hidden.stride(0), update.stride(0)
    add_norm_kernel[(M,)](
        hidden, strides[0], update, strides[1], gate, vector, out, scale, epsilon, READS=reads, **_launch(K)
    )


def _launch(columns: int) -> dict[str, int]:
    """What every kernel here is launched with."""
    shape = shape_of(columns)
    constants = {"K": columns, "BLOCK": shape.block, "CHUNKS": shape.chunks}
    return constants | {"num_warps": shape.warps, "num_stages": STAGES}


def _room(x: Tensor, columns: int, reads: InputFormat) -> tuple[Tensor, Tensor | None]:
    """Memory for the rows of an operand, and for their scales unless it is dense."""
    if reads == "dense":
        return x.new_empty(len(x), columns), None
    return x.new_empty(len(x), columns, dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)


def _operand(out: Tensor, scale: Tensor | None) -> Operand:
    return out if scale is None else QuantizedActivations(out, scale)


def _check(columns: int, reads: InputFormat, tensors: tuple[Tensor, ...], vectors: tuple[Tensor, ...] = ()) -> None:
    """Refuse what a kernel would read wrongly: it sees addresses, not shapes."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1 or any(tuple(vector.shape) != (columns,) for vector in vectors):
        got = ", ".join(str(tuple(tensor.shape)) for tensor in (*tensors, *vectors))
        raise RequestError("A row kernel was given shapes that differ", expected=f"rows of {columns}", got=got)
    if any(tensor.stride(-1) != 1 for tensor in (*tensors, *vectors)):
        got = ", ".join(str(tensor.stride()) for tensor in (*tensors, *vectors))
        raise RequestError("A row kernel reads contiguous rows", expected="a last stride of 1", got=f"strides {got}")
    if reads == "rotated" and columns % GROUP:
        raise RequestError("These rows cannot be rotated", expected=f"a multiple of {GROUP}", got=str(columns))


HIDDEN, INNER = 4608, 12288  # the widths of rows: of a token, and inside the MLP
TYPES = ("bf16", "fp16")


def signatures() -> Iterator[Compilable]:
    """Every variant that the real model launches, for the compiler."""
    for dtype in TYPES:
        for reads in ("dense", "int8", "rotated"):
            yield _row(norm_kernel, HIDDEN, dtype, reads)
            yield _row(add_norm_kernel, HIDDEN, dtype, reads)
            yield _row(swiglu_kernel, INNER, dtype, reads)
        for columns, reads in ((HIDDEN, "int8"), (HIDDEN, "rotated"), (INNER, "int8"), (INNER, "rotated")):
            yield _row(rows_kernel, columns, dtype, reads)
        yield _row(add_norm_kernel, HIDDEN, dtype, None)


def _row(kernel: Any, columns: int, dtype: str, reads: str | None) -> Compilable:
    """A kernel at one width; arguments are told apart by their names."""
    absent = {None: ("vector_ptr", "out_ptr", "scale_ptr"), "dense": ("scale_ptr",)}.get(reads, ())
    types = {
        "vector_ptr": "*fp32",
        "gate_ptr": "*fp32",
        "scale_ptr": "*fp32",
        "epsilon": "fp32",
        "out_ptr": f"*{dtype}" if reads == "dense" else "*i8",
    }
    launch = _launch(columns)
    warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
    constants = launch | {"READS": reads} | dict.fromkeys(absent)
    signature = {
        name: types.get(name, "i32" if name.endswith("stride") else f"*{dtype}")
        for name in kernel.arg_names
        if name not in constants
    }
    name = f"{kernel.__name__}, {reads or 'sum alone'}, {dtype}, {columns}"
    return Compilable(name, kernel, signature, constants, warps, stages)
