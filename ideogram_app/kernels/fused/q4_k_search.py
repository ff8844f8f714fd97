"""The search for Q4_K and Q5_K scales on a GPU, in one launch: `fit_affine` of `quantization.k_search`, byte for byte.

One thread is one sub-block: its 32 weights stay in registers from the first candidate to the quants, where plain torch
passes over memory for each of 3459 operations. Sums over a sub-block are sums of registers in the order of
`k_search.fold`; only those over the eight sub-blocks of a block, a few a round, cross threads. Names and
order of operations are those of `k_search.py`: read it first.

Every operation is IEEE's: divisions are `div_rn`, roundings to fp16 are to nearest, and the launch forbids to contract
a product and a sum, so a GPU has no freedom to find other bytes than a CPU. Not yet run on one: the interpreter runs
this code in the tests, which also read the compiled text. Left out: Q6_K, which runs in plain torch here, and packing
into bytes, which is a few cheap torch operations.
"""

# ruff: noqa: RUF005 (Triton lets a tuple grow by adding another, and knows no unpacking)

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideogram_app.kernels.fused.blocks import WHOLE_NUMBER
from ideogram_app.kernels.fused.q4_k import joined, parted
from ideogram_app.kernels.fused.signature import Compilable
from ideogram_app.quantization import k_search
from ideogram_app.quantization.k_search import AFFINE_CANDIDATES, AFFINE_REACHES, AffineFit, Search

SUBS = tl.constexpr(8)  # sub-blocks of a block
WEIGHTS = tl.constexpr(32)  # weights of a sub-block
CANDIDATES, ROUNDS = tl.constexpr(len(AFFINE_CANDIDATES)), tl.constexpr(len(AFFINE_REACHES))
LARGEST_HALF, SIX_BITS = tl.constexpr(k_search.LARGEST_HALF), tl.constexpr(float(k_search.LARGEST_6_BITS))
SMALLEST, PER_SIX_BITS = tl.constexpr(k_search.SMALLEST_RANGE), tl.constexpr(k_search.SIXTY_THIRD)
SPREAD, JOINT_SPREAD = tl.constexpr(k_search.LEAST_SPREAD), tl.constexpr(k_search.LEAST_JOINT_SPREAD)
INFINITY = tl.constexpr(float("inf"))

# Of a program: 16 blocks. ptxas takes 128 registers a thread, with importance 168, and spills none, so that 16 or 12
# warps share a multiprocessor; sums of 32 terms at once instead of fours took all 255 and spilled.
THREADS, WARPS = 128, 4


@triton.jit
def _ratio(above: tl.tensor, below: tl.tensor) -> tl.tensor:
    usable = tl.abs(below) >= SMALLEST
    return tl.where(usable, tl.div_rn(above, tl.where(usable, below, 1.0)), 0.0)


@triton.jit
def _whole(value: tl.tensor, highest: tl.constexpr) -> tl.tensor:
    """Bounded by 0 and `highest` and rounded: torch rounds first, which between whole bounds is the same."""
    return (tl.minimum(tl.maximum(value, 0.0), highest) + WHOLE_NUMBER) - WHOLE_NUMBER


@triton.jit
def _round_to_half(value: tl.tensor) -> tl.tensor:
    value = tl.minimum(tl.maximum(value, -LARGEST_HALF), LARGEST_HALF)
    return value.to(tl.float16).to(tl.float32) + 0.0


@triton.jit
def _round_up_to_half(value: tl.tensor) -> tl.tensor:
    magnitude = tl.minimum(tl.abs(value), LARGEST_HALF)
    half = magnitude.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True) + (half.to(tl.float32) < magnitude).to(tl.int16)
    rounded = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(value < 0.0, -rounded, rounded) + 0.0


@triton.jit
def _fold_4(terms: tl.tuple) -> tl.tensor:
    return (terms[0] + terms[2]) + (terms[1] + terms[3])


@triton.jit
def _fold_8(terms: tl.tuple) -> tl.tensor:
    """Eight tensors, the second half added to the first until one is left."""
    even = (terms[0] + terms[4]) + (terms[2] + terms[6])
    odd = (terms[1] + terms[5]) + (terms[3] + terms[7])
    return even + odd


@triton.jit
def _over_block(values: tl.tensor) -> tl.tensor:
    """`k_search.fold` over the eight sub-blocks of every block, for each of them: (threads,) -> (threads,).

    A thread adds what its partner has; both get the same, because a sum of two does not depend on their order.
    """
    thread = tl.arange(0, values.shape[0])
    for level in tl.static_range(3):
        values += tl.gather(values, thread ^ (4 >> level), 0)
    return values


@triton.jit
def _largest_of_block(values: tl.tensor) -> tl.tensor:
    thread = tl.arange(0, values.shape[0])
    for level in tl.static_range(3):
        values = tl.maximum(values, tl.gather(values, thread ^ (4 >> level), 0))
    return values


@triton.jit
def _totals(x: tl.tuple, w: tl.tuple) -> tl.tuple:
    """Weighed sums of 1, x and x * x over every sub-block. By fours, because 32 terms of three sums do not all fit into
    registers."""
    sum_w: tl.tuple = ()
    sum_x: tl.tuple = ()
    sum_xx: tl.tuple = ()
    for i in tl.static_range(8):
        of_w: tl.tuple = ()
        of_x: tl.tuple = ()
        of_xx: tl.tuple = ()
        for k in tl.static_range(i, WEIGHTS, 8):
            weighed = x[k] * w[k]
            of_w, of_x, of_xx = of_w + (w[k],), of_x + (weighed,), of_xx + (weighed * x[k],)
        sum_w, sum_x, sum_xx = sum_w + (_fold_4(of_w),), sum_x + (_fold_4(of_x),), sum_xx + (_fold_4(of_xx),)
    return _fold_8(sum_w), _fold_8(sum_x), _fold_8(sum_xx)


@triton.jit
def _moments(x: tl.tuple, w: tl.tuple, shift: tl.tensor, inverse: tl.tensor, LEVELS: tl.constexpr) -> tl.tuple:
    """Weighed sums of q, q * q and q * x over every sub-block, for the quants of a grid."""
    sum_q: tl.tuple = ()
    sum_qq: tl.tuple = ()
    sum_qx: tl.tuple = ()
    for i in tl.static_range(8):
        of_q: tl.tuple = ()
        of_qq: tl.tuple = ()
        of_qx: tl.tuple = ()
        for k in tl.static_range(i, WEIGHTS, 8):
            q = _whole((x[k] + shift) * inverse, LEVELS)
            weighed = q * w[k]
            of_q, of_qq, of_qx = of_q + (weighed,), of_qq + (weighed * q,), of_qx + (weighed * x[k],)
        sum_q, sum_qq, sum_qx = sum_q + (_fold_4(of_q),), sum_qq + (_fold_4(of_qq),), sum_qx + (_fold_4(of_qx),)
    return _fold_8(sum_q), _fold_8(sum_qq), _fold_8(sum_qx)


@triton.jit
def _error(
    x: tl.tuple, w: tl.tuple, slope: tl.tensor, floor: tl.tensor, inverse: tl.tensor, LEVELS: tl.constexpr
) -> tl.tensor:
    """The weighed squared error of a grid over every sub-block."""
    sums: tl.tuple = ()
    for i in tl.static_range(8):
        terms: tl.tuple = ()
        for k in tl.static_range(i, WEIGHTS, 8):
            wrong = _whole((x[k] + floor) * inverse, LEVELS) * slope - floor - x[k]
            terms = terms + (wrong * wrong * w[k],)
        sums = sums + (_fold_4(terms),)
    return _fold_8(sums)


@triton.jit
def _search(x: tl.tuple, w: tl.tuple, totals: tl.tuple, candidates_ptr: tl.tensor, LEVELS: tl.constexpr) -> tl.tuple:
    """The best grid `slope * q - floor` of every sub-block, alone."""
    sum_w, sum_x, sum_xx = totals
    low, high = tl.minimum(x[0], 0.0), tl.maximum(x[0], 0.0)
    for k in tl.static_range(1, WEIGHTS):
        low, high = tl.minimum(low, x[k]), tl.maximum(high, x[k])
    span = high - low
    slope, offset = span * (1 / LEVELS), low
    least = tl.full(low.shape, INFINITY, tl.float32)
    for c in range(CANDIDATES):
        inverse = _ratio(tl.load(candidates_ptr + c), span)
        sum_q, sum_qq, sum_qx = _moments(x, w, -low, inverse, LEVELS)
        determinant = sum_w * sum_qq - sum_q * sum_q
        a = _ratio(sum_w * sum_qx - sum_x * sum_q, determinant)
        b = _ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
        a = tl.where(b > 0.0, _ratio(sum_qx, sum_qq), a)
        b = tl.minimum(b, 0.0)
        error = sum_xx + a * a * sum_qq + sum_w * b * b + 2.0 * (a * b * sum_q - a * sum_qx - b * sum_x)
        better = (error < least) & (determinant > sum_w * SPREAD * sum_qq)
        least = tl.where(better, error, least)
        slope, offset = tl.where(better, a, slope), tl.where(better, b, offset)
    return slope, -offset


@triton.jit
def _nudge(
    x: tl.tuple, w: tl.tuple, totals: tl.tuple, grid: tl.tuple, reach: tl.tensor, LEVELS: tl.constexpr
) -> tl.tuple:
    """Scales up to `reach` lower and higher, each with minima around its best: scales, minima, errors."""
    sum_w, sum_x, _ = totals
    step, floor_step, scale, minimum = grid
    best_scale, best_minimum = scale, minimum
    least = tl.full(scale.shape, INFINITY, tl.float32)
    for up in range(-reach, reach + 1):
        tried_scale = _whole(scale + up, SIX_BITS)
        slope = step * tried_scale
        inverse = _ratio(1.0, slope)
        sum_q, _, _ = _moments(x, w, floor_step * minimum, inverse, LEVELS)
        ideal = tl.div_rn(slope * sum_q - sum_x, sum_w)
        ideal = _whole(_ratio(ideal, floor_step), SIX_BITS)
        for shift in range(-1, 2):
            tried_minimum = _whole(ideal + shift, SIX_BITS)
            error = _error(x, w, slope, floor_step * tried_minimum, inverse, LEVELS)
            better = error < least
            least = tl.where(better, error, least)
            best_scale = tl.where(better, tried_scale, best_scale)
            best_minimum = tl.where(better, tried_minimum, best_minimum)
    return best_scale, best_minimum, least


@triton.jit
def _refit(x: tl.tuple, w: tl.tuple, totals: tl.tuple, grid: tl.tuple, LEVELS: tl.constexpr) -> tl.tuple:
    """Least squares for both steps of every block, rounded to fp16."""
    sum_w, sum_x, _ = totals
    step, floor_step, scale, minimum = grid
    sum_q, sum_qq, sum_qx = _moments(x, w, floor_step * minimum, _ratio(1.0, step * scale), LEVELS)
    qq = _over_block(scale * scale * sum_qq)
    qm = _over_block(scale * sum_q * minimum)
    mm = _over_block(minimum * minimum * sum_w)
    qx = _over_block(scale * sum_qx)
    mx = _over_block(minimum * sum_x)
    determinant = qq * mm - qm * qm
    solvable = determinant > qq * JOINT_SPREAD * mm
    new_step = tl.maximum(_ratio(mm * qx - qm * mx, determinant), 0.0)
    new_floor_step = tl.maximum(_ratio(qm * qx - qq * mx, determinant), 0.0)
    step = _round_to_half(tl.where(solvable, new_step, step))
    return step, _round_to_half(tl.where(solvable, new_floor_step, floor_step))


@triton.jit
def _load(ptr: tl.tensor, sub: tl.tensor, subs: tl.tensor, other: tl.constexpr) -> tl.tuple:
    """A sub-block a thread, `other` past the last: float32 (subs, 32) -> 32 tensors (threads,)."""
    pointers = ptr + sub[:, None] * WEIGHTS + tl.arange(0, WEIGHTS)[None, :]
    return parted(tl.load(pointers, mask=(sub < subs)[:, None], other=other))


@triton.jit(do_not_specialize=["subs"])
def fit_kernel(
    blocks_ptr: tl.tensor,
    importance_ptr: tl.tensor,
    candidates_ptr: tl.tensor,
    reaches_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    minima_ptr: tl.tensor,
    quants_ptr: tl.tensor,
    subs: tl.tensor,
    LEVELS: tl.constexpr,
    WEIGHED: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """blocks and importance: float32 (subs, 32); steps: float32 (subs / 8, 2); scales, minima: uint8 (subs,); quants:
    uint8 (subs, 32)."""
    sub = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    x = _load(blocks_ptr, sub, subs, 0.0)
    w = parted(tl.full((THREADS, WEIGHTS), 1.0, tl.float32))  # a product with 1 becomes no instruction
    if WEIGHED:
        w = _load(importance_ptr, sub, subs, 1.0)
    totals = _totals(x, w)
    slope, floor = _search(x, w, totals, candidates_ptr, LEVELS)
    step = _round_up_to_half(_largest_of_block(slope) * PER_SIX_BITS)
    floor_step = _round_up_to_half(_largest_of_block(floor) * PER_SIX_BITS)
    scale, minimum = _whole(_ratio(slope, step), SIX_BITS), _whole(_ratio(floor, floor_step), SIX_BITS)

    best_step, best_floor_step, best_scale, best_minimum = step, floor_step, scale, minimum
    least = tl.full(step.shape, INFINITY, tl.float32)
    for turn in range(ROUNDS):
        reach = tl.load(reaches_ptr + turn)
        scale, minimum, errors = _nudge(x, w, totals, (step, floor_step, scale, minimum), reach, LEVELS)
        total = _over_block(errors)
        better = total < least
        least = tl.where(better, total, least)
        best_step, best_floor_step = tl.where(better, step, best_step), tl.where(better, floor_step, best_floor_step)
        best_scale, best_minimum = tl.where(better, scale, best_scale), tl.where(better, minimum, best_minimum)
        step, floor_step = _refit(x, w, totals, (step, floor_step, scale, minimum), LEVELS)

    inside = sub < subs
    first = inside & (sub % SUBS == 0)
    tl.store(steps_ptr + sub // SUBS * 2, best_step, mask=first)
    tl.store(steps_ptr + sub // SUBS * 2 + 1, best_floor_step, mask=first)
    tl.store(scales_ptr + sub, best_scale.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(minima_ptr + sub, best_minimum.to(tl.int32).to(tl.uint8), mask=inside)
    floor, inverse = best_floor_step * best_minimum, _ratio(1.0, best_step * best_scale)
    quants: tl.tuple = ()
    for k in tl.static_range(WEIGHTS):
        quants = quants + (_whole((x[k] + floor) * inverse, LEVELS).to(tl.int32).to(tl.uint8),)
    pointers = quants_ptr + sub[:, None] * WEIGHTS + tl.arange(0, WEIGHTS)[None, :]
    tl.store(pointers, joined(quants), mask=inside[:, None])


def fit_affine(x: Tensor, levels: int, importance: Tensor | None = None) -> AffineFit:
    """`k_search.fit_affine` for tensors of a GPU; scales, minima and quants come as uint8."""
    blocks, subs = len(x), len(x) * SUBS.value
    steps = torch.empty(blocks, 2, dtype=torch.float32, device=x.device)
    scales, minima = torch.empty(2, blocks, SUBS.value, dtype=torch.uint8, device=x.device)
    quants = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    values = x.contiguous()
    weighing = values if importance is None else importance.contiguous()
    fit_kernel[(triton.cdiv(subs, THREADS),)](
        values,
        weighing,
        *_tables(levels, x.device),
        steps,
        scales,
        minima,
        quants,
        subs,
        LEVELS=levels,
        WEIGHED=importance is not None,
        THREADS=THREADS,
        num_warps=WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
    step, floor_step = steps.split(1, -1)
    return AffineFit(step, floor_step, scales, minima, quants)


def fused_search() -> Search:
    """What `k_quants.encode` takes for weights on a GPU; Q6_K is left to plain torch."""
    return Search("triton", False, fit_affine, k_search.fit_symmetric)


def signatures() -> Iterator[Compilable]:
    """Q4_K and Q5_K, with importance and without."""
    types = {"reaches_ptr": "*i32", "scales_ptr": "*u8", "minima_ptr": "*u8", "quants_ptr": "*u8", "subs": "i32"}
    for name, levels in (("Q4_K", 15), ("Q5_K", 31)):
        for weighed in (False, True):
            constants = {"LEVELS": levels, "WEIGHED": weighed, "THREADS": THREADS}
            signature = {n: types.get(n, "*fp32") for n in fit_kernel.arg_names if n not in constants}
            title = f"search {name}{', importance' if weighed else ''}"
            yield Compilable(title, fit_kernel, signature, constants, WARPS, 1, fuses=False)


@cache
def _tables(levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels laid over a range by each candidate, and how far each round nudges: kept, some hundred bytes."""
    candidates = torch.tensor([levels + extra for extra in AFFINE_CANDIDATES], dtype=torch.float32, device=device)
    return candidates, torch.tensor(AFFINE_REACHES, dtype=torch.int32, device=device)
