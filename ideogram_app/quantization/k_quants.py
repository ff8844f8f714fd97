"""GGUF block formats Q4_K, Q5_K, Q6_K and Q8_0 (K-quants): encode floats to bytes, decode bytes to floats.

`encode(weight, "Q4_K")` turns a matrix into uint8 rows, `decode(packed, "Q4_K")` turns them back. Every row is a chain
of blocks of fixed size; a block holds its own scales, so rows can be cut, moved and read alone.

    Q8_0: 32 weights in 34 bytes, 8.5 bits each           w = d * q                       q in -128..127
        [d fp16][32 x int8]

    Q6_K: 256 weights in 210 bytes, 6.5625 bits each      w = d * sc[i / 16] * (q - 32)   q in 0..63
        [128 ql][64 qh][16 x int8 sc][d fp16]
        For each half of 128 weights, 64 bytes of ql and 32 of qh, k = 0..31:
            ql[k]       hhhhllll    low 4 bits of weights k      (l) and 64 + k (h)
            ql[32 + k]  hhhhllll    low 4 bits of weights 32 + k (l) and 96 + k (h)
            qh[k]       ddccbbaa    high 2 bits of weights k, 32 + k, 64 + k, 96 + k

    Q4_K: 256 weights in 144 bytes, 4.5 bits each         w = d * sc[j] * q - dmin * m[j]   q in 0..15, j = i / 32
        [d fp16][dmin fp16][12 bytes of sc and m][128 qs]
            qs[32 * p + k]  hhhhllll    weights 64 * p + k (l) and 64 * p + 32 + k (h), p = 0..3
        Eight 6-bit sc (A to H) and eight 6-bit m (a to h); A and E share a column, the lowest bit stands right:
            bytes 0-3   EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD    sc 0-3, over it the upper 2 bits of sc 4-7
            bytes 4-7   eeaaaaaa ffbbbbbb ggcccccc hhdddddd    m 0-3, over it the upper 2 bits of m 4-7
            bytes 8-11  eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH    lower 4 bits of sc 4-7 and of m 4-7

    Q5_K: 256 weights in 176 bytes, 5.5 bits each         as Q4_K, q in 0..31
        [d fp16][dmin fp16][12 bytes of sc and m][32 qh][128 qs]
            qh[k]  hgfedcba    bit j is the fifth bit of weight 32 * j + k

`decode` agrees with gguf-py bit for bit in float32: fp16 scales are widened first, products are rounded in the order
of the formulas above, and a narrower `dtype` is rounded to once, at the end. gguf-py (NumPy) decodes all of these but
encodes only Q8_0; llama.cpp encodes all in C. `k_search.py` looks for the scales; `k_fast/` finds the same ones sooner
where there is Numba. Left out: the other twenty GGML types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.quantization.k_search import TORCH, Search, safe_ratio
from ideogram_app.quantization.rows import row_runs

# Weights handled at once. On a CPU small enough for the caches, large enough to hide the cost of a launch (Q4_K on one
# thread, Mweights/s: 2.8 with 2^15, 5.9 with 2^17, 8.1 with 2^20); elsewhere launches cost more. Encoding holds about
# eight float32 temporaries: 32 MB for 2^20.
CHUNK_ON_CPU, CHUNK_ELSEWHERE = 2**20, 2**21
# For a search in Python's threads: 120 blocks, fewer than the 32768 numbers from which torch wakes threads of its own.
# Those wait for each other and for the next operation by spinning: with another program on two cores, Q4_K fell from
# 66 to 9 Mweights/s.
CHUNK_IN_THREADS, CHUNKS_A_TURN = 120 * 256, 8
# Numba compiles for ten seconds when it first meets a format on a machine. Smaller matrices take torch 0.1 s, and the
# miniature, which has no larger ones, less than that compilation altogether.
WORTH_COMPILING = 2**20
# fp16 scales end at 65504, so the tightest format (Q4_K: 63 * 65504) ends near 4e6. No trained weight comes near this.
LARGEST_WEIGHT = 1e6
# A column that calibration saw silent is not silent for ever; least importance, as a share of the mean.
LEAST_IMPORTANCE = 1e-6


@dataclass(frozen=True)
class BlockFormat:
    """One GGML type: a block of `weights` weights takes `size` bytes."""

    weights: int
    size: int
    # float32 (blocks, weights), importance like it or None, search -> uint8 (blocks, size)
    pack: Callable[[Tensor, Tensor | None, Search], Tensor]
    unpack: Callable[[Tensor], Tensor]  # the inverse


def encode(weight: Tensor, gguf_type: str, importance: Tensor | None = None, search: Search | None = None) -> Tensor:
    """Pack a matrix, block by block along its rows: uint8 (rows, bytes of a row) on the same device.

    Args:
        weight: (rows, columns) of any floating type.
        importance: (columns,) of any floating type: the mean square of each column's input, up to a common factor. The
            K-quants then keep the error of the layer's output small instead of that of its weights; Q8_0, which has
            nothing to choose, ignores it.
        search: an implementation of the search for scales; all find the same bytes. None: the fastest one.

    Raises:
        RequestError: an unknown type, not a matrix of floats, a row that is not a whole number of blocks, or an
            importance of another length, not finite or below zero.
        CheckpointError: NaN, infinity or a magnitude beyond `LARGEST_WEIGHT` among the weights.
    """
    form = find_format(gguf_type)
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise RequestError("This cannot be packed", expected="a matrix of floats", got=got)
    rows, columns = weight.shape
    packed = torch.empty(rows, packed_columns(columns, gguf_type), dtype=torch.uint8, device=weight.device)
    search = search or fastest_search(weight.device, weight.numel())
    pattern = None if importance is None else _pattern(importance, columns, form.weights, weight.device)
    blocks, targets = weight.reshape(-1, form.weights), packed.view(-1, form.size)

    def pack(part: slice) -> None:
        values = blocks[part].float().contiguous()
        _check_weights(values, gguf_type, first=part.start * form.weights, columns=columns)
        weighing = None
        if pattern is not None:  # a row of the matrix begins every len(pattern) blocks
            weighing = pattern[torch.arange(part.start, part.stop, device=weight.device) % len(pattern)]
        targets[part] = form.pack(values, weighing, search)

    if search.threaded:
        _in_threads(pack, list(row_runs(blocks.shape, CHUNK_IN_THREADS)))
    else:
        for part in row_runs(blocks.shape, _chunk(weight.device)):
            pack(part)
    return packed


def fastest_search(device: torch.device, weights: int) -> Search:
    """`k_fast` for many weights on a CPU that has Numba, else plain torch; the bytes are the same."""
    return _compiled_search() if device.type == "cpu" and weights >= WORTH_COMPILING else TORCH


@functools.cache
def _compiled_search() -> Search:
    try:  # Numba takes a second to import, and few visitors of the page ever pack
        from ideogram_app.quantization.k_fast import NUMBA
    except ImportError:  # not installed, or not made for this NumPy
        return TORCH
    return NUMBA


def decode(packed: Tensor, gguf_type: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `encode`: uint8 (rows, bytes of a row) to (rows, columns) on the same device.

    Computed in float32 and rounded to `dtype` once.

    Raises:
        RequestError: an unknown type.
        CheckpointError: not uint8, not a matrix, or a row that is not a whole number of blocks.
    """
    form = find_format(gguf_type)
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        got = f"{packed.dtype} {tuple(packed.shape)}"
        raise CheckpointError(f"These are not packed {gguf_type} rows", expected="a matrix of uint8", got=got)
    columns = unpacked_columns(packed.shape[1], gguf_type)
    weight = torch.empty(len(packed), columns, dtype=dtype, device=packed.device)
    blocks, targets = packed.reshape(-1, form.size), weight.view(-1, form.weights)
    for part in row_runs(targets.shape, _chunk(packed.device)):
        targets[part] = form.unpack(blocks[part])
    return weight


def find_format(gguf_type: str) -> BlockFormat:
    """The format of that name; RequestError, with those that exist, where there is none."""
    if gguf_type not in FORMATS:
        raise RequestError(f"Unknown GGUF type {gguf_type!r}", expected=" or ".join(FORMATS))
    return FORMATS[gguf_type]


def packed_columns(columns: int, gguf_type: str) -> int:
    """Bytes of a packed row of so many weights; RequestError where it is not a whole number of blocks."""
    form = find_format(gguf_type)
    if columns % form.weights:
        said, expected = f"Rows of {columns} weights cannot be packed as {gguf_type}", form.weights
        raise RequestError(said, expected=f"a multiple of its block size, {expected}", got=f"a row size of {columns}")
    return columns // form.weights * form.size


def unpacked_columns(row_bytes: int, gguf_type: str) -> int:
    """Weights in a packed row of so many bytes; CheckpointError where it is not a whole number of blocks."""
    form = find_format(gguf_type)
    if row_bytes % form.size:
        expected = f"a multiple of its block size, {form.size} bytes"
        got = f"a row size of {row_bytes} bytes"
        raise CheckpointError(f"Rows of {row_bytes} bytes are not {gguf_type}", expected=expected, got=got)
    return row_bytes // form.size * form.weights


def _chunk(device: torch.device) -> int:
    return CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ELSEWHERE


def _in_threads(pack: Callable[[slice], None], parts: list[slice]) -> None:
    """All parts, in as many threads as torch would use, a few at a turn; raises what the first of them raised."""

    def pack_some(first: int) -> None:
        for part in parts[first : first + CHUNKS_A_TURN]:
            pack(part)

    turns = range(0, len(parts), CHUNKS_A_TURN)
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(turns)))) as pool:
        list(pool.map(pack_some, turns))  # a result that is asked for brings what its thread raised


def _pattern(importance: Tensor, columns: int, weights: int, device: torch.device) -> Tensor:
    """Importance with mean 1 and no zeros, block by block of a row: float32 (blocks of a row, weights of a block)."""
    if importance.shape != (columns,) or not bool((importance.isfinite() & (importance >= 0)).all()):
        raise RequestError(
            "These columns cannot be weighed",
            expected=f"{columns} finite numbers, none below zero",
            got=f"{tuple(importance.shape)}, {int((~(importance >= 0)).sum())} of them negative or NaN",
        )
    importance = importance.to(device, torch.float64)
    share = importance / importance.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return share.clamp(min=LEAST_IMPORTANCE).float().view(-1, weights)


def _check_weights(values: Tensor, gguf_type: str, first: int, columns: int) -> None:
    """Refuse weights no format here can hold; `first` is the flat index of `values[0, 0]` in its matrix."""
    lowest, highest = torch.aminmax(values)  # NaN if one of them is
    if not (lowest >= -LARGEST_WEIGHT and highest <= LARGEST_WEIGHT):
        bad = ~(values.abs() <= LARGEST_WEIGHT)
        index = int(bad.flatten().nonzero()[0])
        row, column = divmod(first + index, columns)
        raise CheckpointError(
            f"A weight cannot be packed as {gguf_type}",
            expected=f"finite numbers of magnitude up to {LARGEST_WEIGHT:g}",
            got=f"{values.flatten()[index].item()} at row {row}, column {column}",
            do="The source is damaged or was widened wrongly; fetch it again",
        )


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of every block, widened: float32 (blocks, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _bytes(values: Tensor) -> Tensor:
    """Numbers as the bytes that hold them: (blocks, n) -> uint8 (blocks, n * itemsize)."""
    return values.contiguous().view(torch.uint8)


def _pack_q8_0(values: Tensor, importance: Tensor | None, search: Search) -> Tensor:
    # The format's own rounding: quants relative to the scale before it becomes fp16, halves away from zero.
    scale = values.abs().amax(-1, keepdim=True) / 127  # (blocks, 1)
    scaled = values * safe_ratio(torch.ones_like(scale), scale)
    magnitude, whole = scaled.abs(), scaled.abs().floor()
    quants = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    return torch.cat((_bytes(scale.half()), _bytes(quants.to(torch.int8))), -1)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _pack_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight 6-bit scales and eight 6-bit minima, each uint8 (blocks, 8), into 12 bytes."""
    (low_scales, high_scales), (low_minima, high_minima) = scales.split(4, -1), minima.split(4, -1)
    first, second = low_scales | (high_scales >> 4 << 6), low_minima | (high_minima >> 4 << 6)
    return torch.cat((first, second, (high_scales & 15) | ((high_minima & 15) << 4)), -1)


def _unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = packed.split(4, -1)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), -1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), -1)
    return scales, minima


def _pack_affine(values: Tensor, importance: Tensor | None, search: Search, levels: int) -> tuple[Tensor, Tensor]:
    """What Q4_K and Q5_K share: their first 16 bytes, and quants 0..levels as uint8 (blocks, 8, 32)."""
    weighing = None if importance is None else importance.view(-1, 8, 32)
    fit = search.affine(values.view(-1, 8, 32), levels, weighing)
    head = torch.cat((_bytes(fit.step.half()), _bytes(fit.floor_step.half())), -1)
    scales = _pack_scales(fit.scales.to(torch.uint8), fit.minima.to(torch.uint8))
    return torch.cat((head, scales), -1), fit.quants.to(torch.uint8)


def _unpack_affine(blocks: Tensor, quants: Tensor) -> Tensor:
    """`d * sc * q - dmin * m` for quants uint8 (blocks, 8, 32) under the first 16 bytes of `blocks`."""
    scales, minima = _unpack_scales(blocks[:, 4:16])
    slope = _half(blocks, 0) * scales.float()  # (blocks, 8)
    floor = _half(blocks, 2) * minima.float()
    return quants.float().mul_(slope.unsqueeze(-1)).sub_(floor.unsqueeze(-1)).flatten(1)


def _pack_nibbles(quants: Tensor) -> Tensor:
    """Quants 0..15 uint8 (blocks, 8, 32) -> (blocks, 128): runs of 32 in pairs, the second in the high nibbles."""
    pairs = quants.view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    pairs = packed.unflatten(1, (4, 1, 32))
    return torch.cat((pairs & 15, pairs >> 4), 2).view(-1, 8, 32)


def _pack_q4_k(values: Tensor, importance: Tensor | None, search: Search) -> Tensor:
    head, quants = _pack_affine(values, importance, search, levels=15)
    return torch.cat((head, _pack_nibbles(quants)), -1)


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    return _unpack_affine(blocks, _unpack_nibbles(blocks[:, 16:]))


def _bit_numbers(device: torch.device) -> Tensor:
    """0..7 as uint8 (8, 1): one per run of 32 weights."""
    return torch.arange(8, dtype=torch.uint8, device=device).unsqueeze(-1)


def _pack_q5_k(values: Tensor, importance: Tensor | None, search: Search) -> Tensor:
    head, quants = _pack_affine(values, importance, search, levels=31)
    fifth = ((quants >> 4) << _bit_numbers(values.device)).sum(1, dtype=torch.uint8)  # (blocks, 32)
    return torch.cat((head, fifth, _pack_nibbles(quants & 15)), -1)


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    fifth = (blocks[:, 16:48].unsqueeze(1) >> _bit_numbers(blocks.device)) & 1  # (blocks, 8, 32)
    return _unpack_affine(blocks, _unpack_nibbles(blocks[:, 48:]) | (fifth << 4))


def _pack_q6_k(values: Tensor, importance: Tensor | None, search: Search) -> Tensor:
    weighing = None if importance is None else importance.view(-1, 16, 16)
    fit = search.symmetric(values.view(-1, 16, 16), 32, weighing)
    quants = (fit.quants + 32).to(torch.uint8).view(-1, 2, 4, 32)  # halves, quarters of a half, weights
    first, second, third, fourth = quants.unbind(2)  # each (blocks, 2, 32)
    low = torch.cat(((first & 15) | ((third & 15) << 4), (second & 15) | ((fourth & 15) << 4)), -1)
    high = (first >> 4) | (second >> 4 << 2) | (third >> 4 << 4) | (fourth >> 4 << 6)
    scales = _bytes(fit.scales.to(torch.int8))
    return torch.cat((low.flatten(1), high.flatten(1), scales, _bytes(fit.step.half())), -1)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].unflatten(1, (2, 1, 2, 32))
    low = torch.cat((low & 15, low >> 4), 2).view(-1, 2, 4, 32)
    high = blocks[:, 128:192].unflatten(1, (2, 32))  # (blocks, 2, 32)
    high = torch.stack([high << 4 & 48, high << 2 & 48, high & 48, high >> 2 & 48], 2)
    slope = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # (blocks, 16)
    quants = (low | high).float().sub_(32).view(-1, 16, 16)
    return quants.mul_(slope.unsqueeze(-1)).flatten(1)


FORMATS: dict[str, BlockFormat] = {
    "Q4_K": BlockFormat(256, 144, _pack_q4_k, _unpack_q4_k),
    "Q5_K": BlockFormat(256, 176, _pack_q5_k, _unpack_q5_k),
    "Q6_K": BlockFormat(256, 210, _pack_q6_k, _unpack_q6_k),
    "Q8_0": BlockFormat(32, 34, _pack_q8_0, _unpack_q8_0),
}
