"""Scale search for K-quants: the steps, scales and minima that make a block closest to its weights.

A block of 256 weights stores one fp16 step for its sub-blocks' small integer scales, so three roundings depend on each
other: step, scales, quants. Rounding them one after another leaves error on the table; this file looks for a good
triple in two movements, the same for all formats:

1. Every sub-block alone: round its weights on several candidate grids, wider and narrower than its range, fit the grid
   to the quants by least squares, keep the grid of least squared error. (llama.cpp begins alike.)
2. All together, a few rounds: try each sub-block's integer scale and minimum one up and one down, with fresh quants;
   then fit the block's fp16 steps to all quants by least squares. The best round wins, so a round never harms.

Relative RMSE, Gaussian and Student-t5 weights: Q4_K 6.97 and 8.07 % (llama.cpp's algorithm: 7.14 and 8.29), Q5_K 3.42
and 3.97, Q6_K 1.65 and 2.00 %. `benchmarks/k_quants.py` measures them.

`importance`, the mean square of the input that meets each weight, weighs every square in both movements; without it
all columns count alike, where llama.cpp favours large weights. Sums are taken by adding halves, never in an order that
a backend chooses, so that bytes do not hang on threads or on the width of vectors, and `k_fast/` can follow this file
operation by operation. Left out: llama.cpp's own blend of importance with the size of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Grids tried for a sub-block: so many levels more than the format has are laid over its range. With 2.8 fewer the grid
# is coarser and reaches past the range, with 0.8 more it is finer and clips a little.
AFFINE_CANDIDATES = tuple(0.18 * step - 2.8 for step in range(21))
# Coarser still with a scale that can be nudged and no minimum: Q6_K, the same weights, 1.670 and 2.029 % with nine
# from -3 to 1, 1.650 and 2.002 % with eleven from -9 to 1.
SYMMETRIC_CANDIDATES = tuple(step - 9.0 for step in range(11))
# How far each round nudges the scales. Q4_K, Gaussian and Student-t5 weights, relative RMSE in %, on 4 million each:
#   11 candidates, (1, 1, 1)    6.980  8.087        21 candidates, (2, 1, 1)    6.971  8.074
#   11 candidates, (2, 1, 1)    6.976  8.081        41 candidates, (2, 2, 2)    6.967  8.070
AFFINE_REACHES, SYMMETRIC_REACHES = (2, 1, 1), (1, 1)
LARGEST_HALF = 65504.0
LARGEST_6_BITS = 63
SIXTY_THIRD = 1 / 63  # as a factor, because CUDA would turn a division by a Python number into one, and a CPU would not
# Below it a range counts as zero: fp16 steps end at 6e-8, and levels / range must stay finite.
SMALLEST_RANGE = 1e-30
# A least-squares determinant lies between 0 and a product of squares (Cauchy-Schwarz); closer to 0 than this share of
# it, it is rounding alone. Quants that differ at all reach 3e-5 (31 fives of bits against one, in 32) without
# importance, where the sums are exact.
LEAST_SPREAD = 1e-5
LEAST_JOINT_SPREAD = 1e-4
Sums = tuple[Tensor, Tensor, Tensor]  # of three terms over every sub-block, each (blocks, sub-blocks)


@dataclass(frozen=True)
class AffineFit:
    """`step * scales * quants - floor_step * minima` for every weight of a block."""

    step: Tensor  # (blocks, 1), as floor_step exactly representable in fp16, never negative
    floor_step: Tensor
    scales: Tensor  # (blocks, 8), as minima whole numbers 0..63
    minima: Tensor
    quants: Tensor  # (blocks, 8, 32), whole numbers 0..levels


@dataclass(frozen=True)
class SymmetricFit:
    """`step * scales * quants` for every weight of a block."""

    step: Tensor  # (blocks, 1), exactly representable in fp16
    scales: Tensor  # (blocks, 16), whole numbers -128..127
    quants: Tensor  # (blocks, 16, 16), whole numbers from minus half the range to below it


@dataclass(frozen=True)
class Search:
    """One implementation of both fits.

    Attributes:
        threaded: whether it is called from several Python threads at once, with few blocks each; else once with many,
            where torch's own threads share the work.
        affine: x (blocks, 8, 32), levels, importance like x or None -> AffineFit.
        symmetric: x (blocks, 16, 16), half range, importance like x or None -> SymmetricFit.
    """

    name: str
    threaded: bool
    affine: Callable[[Tensor, int, Tensor | None], AffineFit]
    symmetric: Callable[[Tensor, int, Tensor | None], SymmetricFit]


def safe_ratio(above: Tensor, below: Tensor) -> Tensor:
    """`above / below`, and 0 where `below` is (nearly) 0, so that empty blocks give zeros and never NaN."""
    usable = below.abs() >= SMALLEST_RANGE
    return torch.where(usable, above / torch.where(usable, below, 1.0), 0.0)


def round_to_half(values: Tensor) -> Tensor:
    """The nearest fp16 numbers, widened again; no zero is negative."""
    return values.clamp(-LARGEST_HALF, LARGEST_HALF).half().float() + 0.0


def round_up_to_half(values: Tensor) -> Tensor:
    """The nearest fp16 numbers of no smaller magnitude: a step that lets the largest scale fit its bits.

    Rounding to nearest would turn steps of tiny weights, below 3e-8, into zero.
    """
    magnitude = values.abs().clamp(max=LARGEST_HALF)
    half = magnitude.half()
    bits = half.view(torch.int16) + (half.float() < magnitude).to(torch.int16)  # the next number has the next bits
    return bits.view(torch.float16).float().copysign(values) + 0.0


def fold(values: Tensor) -> Tensor:
    """Sums over the last dimension, a power of two, by adding its second half to its first until one is left."""
    while values.shape[-1] > 1:
        first, second = values.chunk(2, -1)
        values = first + second
    return values.squeeze(-1)


def fit_affine(x: Tensor, levels: int, importance: Tensor | None = None) -> AffineFit:
    """Q4_K (15 levels) and Q5_K (31): x (blocks, 8, 32) float32, finite; importance like x, positive."""
    totals = _totals(x, importance)
    slopes, floors = _search_affine(x, levels, importance, totals)  # each (blocks, 8)
    step = round_up_to_half(slopes.amax(-1, keepdim=True) * SIXTY_THIRD)
    floor_step = round_up_to_half(floors.amax(-1, keepdim=True) * SIXTY_THIRD)
    minima = _six_bits(safe_ratio(floors, floor_step))
    scales = _six_bits(safe_ratio(slopes, step))

    best = [step, floor_step, scales, minima]
    least = torch.full_like(step, torch.inf)  # (blocks, 1)
    for reach in AFFINE_REACHES:
        scales, minima, errors = _nudge_affine(x, step, floor_step, scales, minima, levels, reach, importance, totals)
        total = fold(errors).unsqueeze(-1)
        better = total < least
        least = torch.where(better, total, least)
        found = [step, floor_step, scales, minima]
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        quants = _affine_quants(x, step * scales, floor_step * minima, levels)
        step, floor_step = _refit_steps(_moments(quants, x, importance), scales, minima, step, floor_step, totals)

    step, floor_step, scales, minima = best
    quants = _affine_quants(x, step * scales, floor_step * minima, levels)
    return AffineFit(step, floor_step, scales, minima, quants)


def fit_symmetric(x: Tensor, half_range: int, importance: Tensor | None = None) -> SymmetricFit:
    """Q6_K (half range 32): x (blocks, 16, 16) float32, finite; importance like x, positive."""
    slopes = _search_symmetric(x, half_range, importance)  # (blocks, 16)
    largest = slopes.gather(-1, slopes.abs().argmax(-1, keepdim=True))  # with its sign
    step = round_up_to_half(largest * -(2**-7))  # int8 reaches further on the negative side
    scales = safe_ratio(slopes, step).round().clamp(-128, 127)

    best_step, best_scales, least = step, scales, torch.full_like(step, torch.inf)
    for reach in SYMMETRIC_REACHES:
        scales, errors = _nudge_symmetric(x, step, scales, half_range, reach, importance)
        total = fold(errors).unsqueeze(-1)
        better = total < least
        least = torch.where(better, total, least)
        best_step = torch.where(better, step, best_step)
        best_scales = torch.where(better, scales, best_scales)
        _, sum_qq, sum_qx = _moments(_symmetric_quants(x, step * scales, half_range), x, importance)
        fitted = safe_ratio(fold(scales * sum_qx), fold(scales * scales * sum_qq))
        step = round_to_half(fitted.unsqueeze(-1))
    return SymmetricFit(best_step, best_scales, _symmetric_quants(x, best_step * best_scales, half_range))


TORCH = Search("torch", False, fit_affine, fit_symmetric)


def _weigh(values: Tensor, importance: Tensor | None) -> Tensor:
    return values if importance is None else values * importance


def _moments(q: Tensor, x: Tensor, importance: Tensor | None) -> Sums:
    """Weighed sums of q, q * q and q * x over every sub-block (blocks, n, m)."""
    weighed = _weigh(q, importance)
    return fold(weighed), fold(weighed * q), fold(weighed * x)


def _totals(x: Tensor, importance: Tensor | None) -> Sums:
    """Weighed sums of 1, x and x * x over every sub-block."""
    sum_w = torch.full_like(x[..., 0], x.shape[-1]) if importance is None else fold(importance)
    weighed = _weigh(x, importance)
    return sum_w, fold(weighed), fold(weighed * x)


def _search_affine(x: Tensor, levels: int, importance: Tensor | None, totals: Sums) -> tuple[Tensor, Tensor]:
    """The best grid `slope * q - floor`, q 0..levels, floor >= 0, of every sub-block x (..., n): two tensors (...)."""
    sum_w, sum_x, sum_xx = totals
    low = x.amin(-1).clamp(max=0)
    span = x.amax(-1).clamp(min=0) - low
    shifted = x - low.unsqueeze(-1)
    slope, offset = span * (1 / levels), low  # stands where all weights are equal and no fit is possible
    least = torch.full_like(slope, torch.inf)
    for extra in AFFINE_CANDIDATES:
        inverse = safe_ratio(torch.full_like(span, levels + extra), span)
        q = (shifted * inverse.unsqueeze(-1)).round_().clamp_(0, levels)
        sum_q, sum_qq, sum_qx = _moments(q, x, importance)
        # Least squares for x = a * q + b; where that wants b > 0, which the format lacks, for x = a * q.
        determinant = sum_w * sum_qq - sum_q * sum_q
        a = safe_ratio(sum_w * sum_qx - sum_x * sum_q, determinant)
        b = safe_ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
        a = torch.where(b > 0, safe_ratio(sum_qx, sum_qq), a)
        b = b.clamp(max=0)
        error = sum_xx + a * a * sum_qq + sum_w * b * b + 2 * (a * b * sum_q - a * sum_qx - b * sum_x)
        better = (error < least) & (determinant > LEAST_SPREAD * sum_w * sum_qq)
        least = torch.where(better, error, least)
        slope, offset = torch.where(better, a, slope), torch.where(better, b, offset)
    return slope, -offset


def _search_symmetric(x: Tensor, half_range: int, importance: Tensor | None) -> Tensor:
    """The best grid `slope * q`, q from -half_range to half_range - 1, of every sub-block x (..., n): slopes (...)."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # (..., 1), with its sign
    slope = torch.zeros_like(extreme.squeeze(-1))
    most = torch.full_like(slope, -torch.inf)
    for extra in SYMMETRIC_CANDIDATES:
        inverse = safe_ratio(torch.full_like(extreme, -(half_range + extra)), extreme)
        q = (x * inverse).round_().clamp_(-half_range, half_range - 1)
        _, sum_qq, sum_qx = _moments(q, x, importance)
        fitted = safe_ratio(sum_qx, sum_qq)
        explained = fitted * sum_qx  # least squared error is most squares explained
        better = explained > most
        most = torch.where(better, explained, most)
        slope = torch.where(better, fitted, slope)
    return slope


def _nudge_affine(
    x: Tensor,
    step: Tensor,
    floor_step: Tensor,
    scales: Tensor,
    minima: Tensor,
    levels: int,
    reach: int,
    importance: Tensor | None,
    totals: Sums,
) -> Sums:
    """Scales up to `reach` lower and higher, each with minima around its best: scales, minima, errors (blocks, 8)."""
    sum_w, sum_x, _ = totals
    best_scales, best_minima, least = scales, minima, torch.full_like(scales, torch.inf)
    for up in range(-reach, reach + 1):
        tried_scales = _six_bits(scales + up)
        slopes = step * tried_scales
        quants = _affine_quants(x, slopes, floor_step * minima, levels)
        sum_q = fold(_weigh(quants, importance))
        ideal = _six_bits(safe_ratio((slopes * sum_q - sum_x) / sum_w, floor_step))
        for shift in (-1, 0, 1):
            tried_minima = _six_bits(ideal + shift)
            floors = floor_step * tried_minima
            quants = _affine_quants(x, slopes, floors, levels)
            made = quants.mul_(slopes.unsqueeze(-1)).sub_(floors.unsqueeze(-1))
            errors = fold(_weigh(made.sub_(x).square_(), importance))
            better = errors < least
            least = torch.where(better, errors, least)
            best_scales = torch.where(better, tried_scales, best_scales)
            best_minima = torch.where(better, tried_minima, best_minima)
    return best_scales, best_minima, least


def _nudge_symmetric(
    x: Tensor, step: Tensor, scales: Tensor, half_range: int, reach: int, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Try every scale up to `reach` down and up: scales and their squared errors, each (blocks, 16)."""
    best, least = scales, torch.full_like(scales, torch.inf)
    for up in range(-reach, reach + 1):
        tried = (scales + up).clamp(-128, 127)
        slopes = step * tried
        made = _symmetric_quants(x, slopes, half_range).mul_(slopes.unsqueeze(-1))
        errors = fold(_weigh(made.sub_(x).square_(), importance))
        better = errors < least
        least = torch.where(better, errors, least)
        best = torch.where(better, tried, best)
    return best, least


def _refit_steps(
    moments: Sums, scales: Tensor, minima: Tensor, step: Tensor, floor_step: Tensor, totals: Sums
) -> tuple[Tensor, Tensor]:
    """Least squares for x = step * (scales * quants) - floor_step * minima over a whole block, rounded to fp16."""
    (sum_q, sum_qq, sum_qx), (sum_w, sum_x, _) = moments, totals
    qq, qm, qx = fold(scales * scales * sum_qq), fold(scales * sum_q * minima), fold(scales * sum_qx)
    mm, mx = fold(minima * minima * sum_w), fold(minima * sum_x)
    determinant = qq * mm - qm * qm
    # Near 0 both steps explain the same weights; then keep them.
    solvable = (determinant > LEAST_JOINT_SPREAD * qq * mm).unsqueeze(-1)
    new_step = safe_ratio(mm * qx - qm * mx, determinant).clamp(min=0).unsqueeze(-1)
    new_floor = safe_ratio(qm * qx - qq * mx, determinant).clamp(min=0).unsqueeze(-1)
    step, floor_step = torch.where(solvable, new_step, step), torch.where(solvable, new_floor, floor_step)
    return round_to_half(step), round_to_half(floor_step)


def _six_bits(values: Tensor) -> Tensor:
    return values.round().clamp(0, LARGEST_6_BITS)


def _affine_quants(x: Tensor, slopes: Tensor, floors: Tensor, levels: int) -> Tensor:
    """The nearest grid points: slopes and floors (blocks, 8) -> quants (blocks, 8, 32)."""
    inverse = safe_ratio(torch.ones_like(slopes), slopes).unsqueeze(-1)
    return (x + floors.unsqueeze(-1)).mul_(inverse).round_().clamp_(0, levels)


def _symmetric_quants(x: Tensor, slopes: Tensor, half_range: int) -> Tensor:
    """The nearest grid points: slopes (blocks, 16) -> quants (blocks, 16, 16)."""
    inverse = safe_ratio(torch.ones_like(slopes), slopes).unsqueeze(-1)
    return (x * inverse).round_().clamp_(-half_range, half_range - 1)
