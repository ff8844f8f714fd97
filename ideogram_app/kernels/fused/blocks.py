"""Building blocks of the row kernels in Triton: a row in registers, its norm, rotation and rounding.

A program is one row. It reads the row from memory once, as a tuple of chunks of BLOCK float32 numbers, and everything
up to the store happens on that tuple: no second pass over memory and no scratch. A chunk gives each thread VALUES
neighbours, so a group of GROUP = 256 numbers is one warp with eight numbers a thread, and what happens inside a group
needs neither shared memory nor a barrier (rows of a 16-bit type; float32 is loaded by fours and dealt out anew).

    H4 = F (J / 2 - I)                      J all ones, F the reversal of four numbers
    H256 = F256 (J / 2 - I)^(x)4            so: four times "half the sum of four, minus itself", then reversed

Each of the four steps is a sum over one axis of 4 x 4 x 4 x 4 and a subtraction, all float32, exact up to the rounding
of additions; the reversal costs nothing where the rounded row is stored. The usual way, two products with H16 on
matrix units, needs operands of 16 bits: two of them for each number, a scale that keeps them in range, and several
trips through shared memory. This needs 4.5 exchanges between threads a number, and is the same code for every card.

Left out: rows kept in shared memory, several rows a program, rotations of other groups than 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ideogram_app.quantization import int8, rotation

ROTATION_GROUP = tl.constexpr(rotation.GROUP)
LANES = tl.constexpr(32)  # threads of a warp
VALUES = tl.constexpr(8)  # neighbours a thread: GROUP / LANES, and 16 bytes of a 16-bit type, the widest load there is
ROUNDING_LEVELS = tl.constexpr(int8.ACTIVATION_LEVELS)
SMALLEST_ROW_SCALE = tl.constexpr(int8.SMALLEST_ACTIVATION_SCALE)
# 1.5 * 2^23: added to a float32 of at most 2^22 it leaves the nearest whole number, ties to even, in the low bits, in
# two's complement. PTX has an instruction for that (cvt.rni), but Triton reaches it only through libdevice or inline
# assembly, which the interpreter runs neither of. The clamp before it keeps compilers from fusing product and addition.
WHOLE_NUMBER = tl.constexpr(12582912.0)

# A thread holds at most six chunks, 48 numbers: ptxas then takes 40 to 96 registers on sm_75 to sm_90 and up to 105 on
# sm_100, spills none, and a multiprocessor of sm_86 holds 20 to 40 warps. Rows of 4608 take 4 warps, 12288 take 8. From
# 49152 on, with all the warps a program may have, there are more chunks: 53248 are seven and spill 16 to 60 bytes.
MOST_CHUNKS = 6
MOST_THREADS = 1024  # of a program, on NVIDIA's cards and AMD's
WARP = 32  # threads; of AMD's cards before RDNA (gfx9) 64


@dataclass(frozen=True)
class Shape:
    """How a program holds a row: `chunks` chunks of `block` numbers in `warps` warps."""

    block: int
    chunks: int
    warps: int


def shape_of(columns: int, warp_size: int = WARP) -> Shape:
    """The smallest number of warps, a power of two, that holds a row in six chunks.

    Args:
        warp_size: threads of a warp. Of 64 each warp holds twice as much, and half as many may be had.
    """
    warps, chunk = 1, warp_size * VALUES.value
    while 2 * warps * warp_size <= MOST_THREADS and warps * chunk * MOST_CHUNKS < columns:
        warps *= 2
    return Shape(warps * chunk, -(-columns // (warps * chunk)), warps)


@cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp of a device."""
    if device.type != "cuda" or torch.version.hip is None:
        return WARP
    return int(torch.cuda.get_device_properties(device).warp_size)


@triton.jit
def with_chunk(row: tl.tuple, chunk: tl.tensor) -> tl.tuple:
    return row + (chunk,)  # noqa: RUF005 (the compiler knows no other way to let a tuple grow)


@triton.jit
def load(ptr: tl.tensor, start: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Numbers `start` to `start + BLOCK` of a row of K in float32, zeros past its end."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(ptr + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def load_row(ptr: tl.tensor, K: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr) -> tl.tuple:
    """A row as a tuple of chunks."""
    row = ()
    for i in tl.static_range(CHUNKS):
        row = with_chunk(row, load(ptr, i * BLOCK, K, BLOCK))
    return row


@triton.jit
def store_dense(row: tl.tuple, ptr: tl.tensor, K: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr) -> None:
    """Chunks to memory, rounded to the type that is there."""
    for i in tl.static_range(CHUNKS):
        column = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(ptr + column, row[i].to(ptr.dtype.element_ty), mask=column < K)


@triton.jit
def normed(
    row: tl.tuple, vector_ptr: tl.tensor, epsilon: tl.tensor, K: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
) -> tl.tuple:
    """row / sqrt(mean of squares + epsilon) * vector."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        squares += row[i] * row[i]
    inverse = tl.rsqrt(tl.sum(squares) / K + epsilon)
    product = ()
    for i in tl.static_range(CHUNKS):
        product = with_chunk(product, row[i] * inverse * load(vector_ptr, i * BLOCK, K, BLOCK))
    return product


@triton.jit
def rotated_backwards(x: tl.tensor) -> tl.tensor:
    """A chunk times H256 per group, each group from its last number to its first."""
    GROUPS: tl.constexpr = x.shape[0] // ROTATION_GROUP
    y = tl.reshape(x, (GROUPS, 4, 4, 4, 4))
    for axis in tl.static_range(1, 5):
        y = tl.sum(y, axis, keep_dims=True) * 0.5 - y
    return tl.reshape(y, x.shape)


@triton.jit
def backwards(x: tl.tensor) -> tl.tensor:
    """A chunk of whole numbers as (threads, VALUES), each thread's from its last to its first.

    Of two numbers the other one is their sum minus this one, which compilers see through; `tl.flip` is as fast there,
    but the interpreter needs a tenth of a second for every group of 256.
    """
    THREADS: tl.constexpr = x.shape[0] // VALUES
    y = tl.reshape(x, (THREADS, 2, 2, 2))
    for axis in tl.static_range(1, 4):
        y = tl.sum(y, axis, keep_dims=True) - y
    return tl.reshape(y, (THREADS, VALUES))


@triton.jit
def store_rounded(
    row: tl.tuple,
    ptr: tl.tensor,
    scale_ptr: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROTATED: tl.constexpr,
) -> None:
    """A row rounded as `quantization.int8.quantize_tokens` does, operation for operation, and its scale."""
    turned = ()
    largest = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        x = row[i]
        if ROTATED:
            x = rotated_backwards(x)
        largest = tl.maximum(largest, tl.abs(x))
        turned = with_chunk(turned, x)
    # Both divisions as IEEE 754 rounds them: they are two a row, and a scale off by one bit moves every value.
    scale = tl.maximum(tl.div_rn(tl.max(largest), ROUNDING_LEVELS), SMALLEST_ROW_SCALE)
    tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(CHUNKS):
        values = tl.clamp(turned[i] * inverse, -128.0, 127.0) + WHOLE_NUMBER
        values = values.to(tl.int32, bitcast=True)
        column = i * BLOCK + tl.arange(0, BLOCK)
        if ROTATED:
            # A thread's eight numbers turn round in its registers, the threads of a group by where they store.
            values = backwards(values)
            thread = tl.arange(0, BLOCK // VALUES)
            thread = thread // LANES * LANES + (LANES - 1 - thread % LANES)
            column = i * BLOCK + thread[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
        tl.store(ptr + column, values.to(tl.int8), mask=column < K)  # the low byte


@triton.jit
def store_operand(
    row: tl.tuple,
    ptr: tl.tensor,
    scale_ptr: tl.tensor,
    token: tl.tensor,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INPUT_FORMAT: tl.constexpr,
) -> None:
    """The row of a token as the next matrix reads it, into a contiguous (M, K) and, unless dense, scales (M, 1)."""
    if INPUT_FORMAT == "dense":
        store_dense(row, ptr + token * K, K, BLOCK, CHUNKS)
    else:
        store_rounded(row, ptr + token * K, scale_ptr + token, K, BLOCK, CHUNKS, INPUT_FORMAT == "rotated")
