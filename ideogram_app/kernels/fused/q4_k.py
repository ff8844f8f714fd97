"""Q4_K dequantization in Triton: to INT8 with a scale a row (W4A8) or to the computing type (W4A16).

A packed matrix is a chain of blocks, 256 weights in 144 bytes (drawn in `quantization.k_quants`), and a row is a whole
number of them. Programs share out the chain and know rows only to look up a scale, so one binary serves every shape.

    decode_kernel    16 blocks a program, each 64 x 32 bits of nibbles under eight scales; bits of `k_quants.decode`
    rotate_kernel    16 blocks a program, eight threads a block, 32 weights a thread

A block is also a group of the rotation: H256 = H4 (x) H4 (x) H4 (x) H4 acts on each of the four base-4 digits of a
weight's index, 64 a + 16 b + 4 c + d, and H4 x is half the sum of four numbers minus those numbers in reversed order:
seven additions and an exact halving for four results. So nothing is left for matrix units to do: a thread holds all b
and c of a block for one d and half of a, applies two of the factors in registers, trades its 32 numbers once with its
seven neighbours for all a and d, and applies the other two. Everything is float32. Products with H16 on matrix units
would need each number as a sum of two of 16 bits for an error of 2^-16, and compile to more instructions (for sm_86
38 a weight, with barriers, against 28) and on sm_75 to no matrix instruction at all.

Without rotation INT8 values equal those of `kernels.plain` bit for bit; with it sums are taken in another order, and
a value next to a tie may round to the other side (none of 5.5 million Gaussian weights did). Launches forbid to
contract a product and a sum into one rounding, which the compiler would otherwise do. Not yet run on a GPU: the
interpreter runs this code in the tests, and `offline.py` compiles it. Left out: products that read Q4_K themselves.
llama.cpp's do, and with a thousand tokens and more they reach a fifth of a card's INT8 peak; writing a layer out once
takes its memory's time, 0.2 ms of a 3090 for the largest.
"""

# ruff: noqa: RUF005 (Triton lets a tuple grow by adding another, and knows no unpacking)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.kernels.fused.blocks import WHOLE_NUMBER
from ideogram_app.kernels.fused.signature import Compilable
from ideogram_app.quantization import k_quants

BLOCK_WORDS = tl.constexpr(36)  # of four bytes in a block: one with both steps, three of scales, 32 of nibbles
BLOCK_WEIGHTS = tl.constexpr(256)
# Registers (ptxas): 32 to 64 a thread, so 32 warps fit a multiprocessor, all there may be on sm_75.
BLOCKS, WARPS = 16, 4  # of a program; rotating takes eight threads a block
LAUNCH = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def _six_bits(word: tl.tensor, upper: tl.tensor) -> tl.tuple:
    """Scales and minima of four sub-blocks, bytes of a word each: of the last four where `upper`, else the first."""
    first, second, third = tl.load(word + 1), tl.load(word + 2), tl.load(word + 3)
    scales = tl.where(upper, (third & 0x0F0F0F0F) | (first >> 2 & 0x30303030), first & 0x3F3F3F3F)
    minima = tl.where(upper, (third >> 4 & 0x0F0F0F0F) | (second >> 2 & 0x30303030), second & 0x3F3F3F3F)
    return scales, minima


@triton.jit
def _steps(word: tl.tensor) -> tl.tuple:
    """d and dmin of a block in float32."""
    half = word.to(tl.pointer_type(tl.float16))
    return tl.load(half).to(tl.float32), tl.load(half + 1).to(tl.float32)


@triton.jit
def _rounded(y: tl.tensor) -> tl.tensor:
    """The nearest of -127..127, halves to even, in the lowest byte of an int32."""
    y = tl.minimum(tl.maximum(y, -127.0), 127.0) + WHOLE_NUMBER
    return y.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["blocks", "row_blocks"])
def decode_kernel(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    row_blocks: tl.tensor,
    BLOCKS: tl.constexpr,
    TO_INT8: tl.constexpr,
) -> None:
    """Packed words to weights of the type of `out_ptr`, or to int8 after a division by the scale of their row."""
    first = tl.program_id(0) * BLOCKS
    packed_ptr += first.to(tl.int64) * BLOCK_WORDS
    out_ptr += first.to(tl.int64) * BLOCK_WEIGHTS
    block = tl.arange(0, BLOCKS)
    safe = tl.minimum(block, blocks - first - 1)  # past the last block it is read again, and stored by none
    word = packed_ptr + safe[:, None] * BLOCK_WORDS
    sub = tl.arange(0, 8)[None, :]
    step, floor_step = _steps(word)  # (BLOCKS, 1)
    scales, minima = _six_bits(word, sub >= 4)
    slope = step * (scales >> 8 * (sub % 4) & 255).to(tl.float32)  # (BLOCKS, 8)
    floor = floor_step * (minima >> 8 * (sub % 4) & 255).to(tl.float32)

    # Bytes 32 * pair + k hold weights 64 * pair + k and, in the upper halves, 64 * pair + 32 + k.
    byte = 16 + 32 * tl.arange(0, 4)[None, :, None] + tl.arange(0, 32)[None, None, :]
    nibbles = tl.load(packed_ptr.to(tl.pointer_type(tl.uint8)) + safe[:, None, None] * (4 * BLOCK_WORDS) + byte).to(
        tl.int32
    )
    quants = nibbles[:, :, None, :] >> (4 * tl.arange(0, 2))[None, None, :, None] & 15
    weights = quants.to(tl.float32) * slope.reshape(BLOCKS, 4, 2, 1) - floor.reshape(BLOCKS, 4, 2, 1)
    weights = weights.reshape(BLOCKS, BLOCK_WEIGHTS)
    if TO_INT8:
        inverse = tl.div_rn(1.0, tl.load(scale_ptr + (first + safe) // row_blocks))
        weights = _rounded(weights * inverse[:, None])
    inside = (block < blocks - first)[:, None]
    pointers = out_ptr + block[:, None] * BLOCK_WEIGHTS + tl.arange(0, BLOCK_WEIGHTS)[None, :]
    tl.store(pointers, weights.to(out_ptr.dtype.element_ty), mask=inside)


@triton.constexpr_function
def _at(index: int, apart: int, digit: int) -> int:
    """`index` with that base-4 digit which counts `apart` set to `digit`."""
    return index + (digit - index // apart % 4) * apart


@triton.jit
def _times_h4(x: tl.tuple, APART: tl.constexpr) -> tl.tuple:
    """H4 along one base-4 digit of the place in a tuple of 32 numbers."""
    y: tl.tuple = ()
    for i in tl.static_range(32):
        first = x[_at(i, APART, 0)] + x[_at(i, APART, 1)]
        second = x[_at(i, APART, 2)] + x[_at(i, APART, 3)]
        y = y + ((first + second) * 0.5 - x[_at(i, APART, 3 - i // APART % 4)],)
    return y


@triton.jit
def joined(x: tl.tuple) -> tl.tensor:
    """32 tensors (threads,) as one (threads, 32)."""
    THREADS: tl.constexpr = x[0].shape[0]
    for level in tl.static_range(5):  # the highest bit of the place in the tuple first
        pairs: tl.tuple = ()
        for i in tl.static_range(16 >> level):
            pairs = pairs + (tl.join(x[i], x[i + (16 >> level)]),)
        x = pairs
    return x[0].reshape(THREADS, 32)


@triton.jit
def parted(x: tl.tensor) -> tl.tuple:
    """The inverse of `joined`."""
    THREADS: tl.constexpr = x.shape[0]
    parts: tl.tuple = (x.reshape(THREADS, 2, 2, 2, 2, 2),)
    for level in tl.static_range(5):
        even: tl.tuple = ()
        odd: tl.tuple = ()
        for i in tl.static_range(1 << level):
            first, second = tl.split(parts[i])
            even, odd = even + (first,), odd + (second,)
        parts = even + odd
    return parts


@triton.jit(do_not_specialize=["blocks", "row_blocks"])
def rotate_kernel(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    blocks: tl.tensor,
    row_blocks: tl.tensor,
    THREADS: tl.constexpr,
) -> None:
    """Packed words to words of int8: decoded, rotated, divided by the scale of their row.

    Bits of a weight's index, highest first: a1 a0 b1 b0 c1 c0 d1 d0. b1 says which half of a byte, a and b1 which
    sub-block.
    """
    thread = tl.arange(0, THREADS)
    first = tl.program_id(0) * (THREADS // 8)
    block = thread // 8
    safe = tl.minimum(block, blocks - first - 1)
    word = packed_ptr + first.to(tl.int64) * BLOCK_WORDS + safe * BLOCK_WORDS
    upper, d = thread // 4 % 2, thread % 4  # a1, and the byte of a word
    inverse = tl.div_rn(1.0, tl.load(scale_ptr + (first + safe) // row_blocks))
    step, floor_step = _steps(word)
    scales, minima = _six_bits(word, upper == 1)
    x: tl.tuple = ()
    for sub in tl.static_range(4):  # a0 b1
        slope = step * (scales >> 8 * sub & 255).to(tl.float32)
        floor = floor_step * (minima >> 8 * sub & 255).to(tl.float32)
        for k in tl.static_range(8):  # b0 c1 c0
            nibbles = tl.load(word + 4 + 16 * upper + 8 * (sub // 2) + k) >> 8 * d
            x = x + ((nibbles >> 4 * (sub % 2) & 15).to(tl.float32) * slope - floor,)
    x = _times_h4(_times_h4(x, 1), 4)  # c, b

    #               0        1  2  3   4   5   6
    # from thread   block    a1 d  in registers   a0 b1 b0 c
    # to   thread   block    b0 c  in registers   a1 a0 b1 d
    traded = joined(x).reshape(THREADS // 8, 2, 4, 2, 2, 2, 4).permute(0, 5, 6, 1, 3, 4, 2)
    x = parted(traded.reshape(THREADS, 32))
    x = _times_h4(_times_h4(x, 1), 8)  # d, a

    inside = block < blocks - first
    out_ptr += first.to(tl.int64) * (BLOCK_WEIGHTS // 4) + block * (BLOCK_WEIGHTS // 4) + thread % 8
    for i in tl.static_range(8):  # a1 a0 b1
        four = _rounded(x[4 * i + 3] * inverse) << 24
        for j in tl.static_range(3):
            four |= (_rounded(x[4 * i + j] * inverse) & 255) << 8 * j
        tl.store(out_ptr + 8 * i, four, mask=inside)


def decode_into(packed: Tensor, out: Tensor) -> Tensor:
    """Q4_K (N, bytes) to `out` (N, K) of a floating type: `k_quants.decode` bit for bit. Returns `out`.

    Raises:
        CheckpointError: not packed rows, or they do not begin at a multiple of four bytes.
        RequestError: `out` is of another shape, or not contiguous.
    """
    blocks, row_blocks = _blocks(packed, out)
    words = packed.view(torch.int32)
    decode_kernel[(triton.cdiv(blocks, BLOCKS),)](words, words, out, blocks, row_blocks, BLOCKS, False, **LAUNCH)
    return out


def decode_int8_into(packed: Tensor, scale: Tensor, rotated: bool, out: Tensor) -> Tensor:
    """Q4_K (N, bytes) and scales (N,) float32 to `out` int8 (N, K), which it returns; errors of `decode_into`."""
    blocks, row_blocks = _blocks(packed, out)
    if out.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != packed.shape[:1]:
        raise RequestError(
            "These rows cannot be decoded to INT8",
            expected=f"int8 memory and {packed.shape[0]} float32 scales",
            got=f"{out.dtype} memory and {scale.dtype} {tuple(scale.shape)}",
        )
    words, grid = packed.view(torch.int32), (triton.cdiv(blocks, BLOCKS),)
    if rotated:
        rotate_kernel[grid](words, scale, out.view(torch.int32), blocks, row_blocks, 8 * BLOCKS, **LAUNCH)
    else:
        decode_kernel[grid](words, scale, out, blocks, row_blocks, BLOCKS, True, **LAUNCH)
    return out


@dataclass
class Scratch:
    """Scratch for one decoded layer a device, of one set of `Kernels`, which have its methods.

    It grows to the largest layer that came, and every call overwrites what the last one left. Calls on one stream
    follow each other, so the product that reads a layer is done before the next is written; several streams need a
    `Scratch` each. (24576, 4608), the largest of the blocks, takes 113 MB as INT8 and 226 MB in 16 bits.
    """

    _held: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        return decode_into(packed, self.memory(_shape(packed), dtype, packed.device))

    def decode_int8(self, packed: Tensor, scale: Tensor, rotated: bool) -> Tensor:
        return decode_int8_into(packed, scale, rotated, self.memory(_shape(packed), torch.int8, packed.device))

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor that the next call of any method takes back."""
        size = prod(shape) * dtype.itemsize
        held = self._held.get(device)
        if held is None or held.numel() < size:
            self._held.pop(device, None)
            del held  # before more is asked for, so that both are never there together
            held = self._held[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return held[:size].view(dtype).view(shape)

    def release(self) -> None:
        self._held.clear()


def signatures() -> Iterator[Compilable]:
    """Every binary that decoding needs: shapes are arguments, so these are few."""
    common = {"packed_ptr": "*i32", "scale_ptr": "*fp32", "blocks": "i32", "row_blocks": "i32"}
    for kind in ("bf16", "fp16", "fp32", "i8"):
        signature = {**common, "scale_ptr": "*fp32" if kind == "i8" else "*i32", "out_ptr": f"*{kind}"}
        constants = {"BLOCKS": BLOCKS, "TO_INT8": kind == "i8"}
        name = f"decode Q4_K, {kind}"
        yield Compilable(name, decode_kernel, signature, constants, warps=WARPS, stages=1, fuses=False)
    constants = {"THREADS": 8 * BLOCKS}
    signature = {**common, "out_ptr": "*i32"}
    name = "decode Q4_K, i8, rotated"
    yield Compilable(name, rotate_kernel, signature, constants, warps=WARPS, stages=1, fuses=False)


def _shape(packed: Tensor) -> tuple[int, int]:
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise CheckpointError(
            "These are not packed Q4_K rows", expected="a matrix of uint8", got=f"{packed.dtype} {tuple(packed.shape)}"
        )
    return packed.shape[0], k_quants.unpacked_columns(packed.shape[1], "Q4_K")


def _blocks(packed: Tensor, out: Tensor) -> tuple[int, int]:
    """Blocks of a matrix and of one of its rows, once kernels may read and write it."""
    shape = _shape(packed)
    if not packed.is_contiguous() or packed.data_ptr() % 4:
        raise CheckpointError(
            "These packed rows cannot be read four bytes at a time",
            expected="contiguous memory from a multiple of 4 on",
            got=f"strides {packed.stride()} from {packed.data_ptr() % 4} past one",
            do="Copy them into a tensor of their own",
        )
    if out.shape != shape or not out.is_contiguous() or out.device != packed.device:
        raise RequestError(
            "There is no room for the decoded rows",
            expected=f"a contiguous {shape} on {packed.device}",
            got=f"{tuple(out.shape)} with strides {out.stride()} on {out.device}",
        )
    return packed.numel() // (4 * BLOCK_WORDS.value), shape[1] // BLOCK_WEIGHTS.value
