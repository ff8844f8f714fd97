"""Which scales make a K-quant block closest to its weights.

A block of 256 weights stores one fp16 step for its sub-blocks' small integer scales, so three roundings depend on each
other: step, scales, quants. Rounding them one after another leaves error on the table; this file looks for a good
triple in two movements, the same for all formats:

1. Every sub-block alone: round its weights on several candidate grids, wider and narrower than its range, fit the grid
   to the quants by least squares, keep the grid of least squared error. (llama.cpp begins alike.)
2. All together, a few rounds: try each sub-block's integer scale and minimum one up and one down, with fresh quants;
   then fit the block's fp16 steps to all quants by least squares. The best round wins, so a round never harms.

Relative RMSE, Gaussian and Student-t5 weights: Q4_K 6.98 and 8.09 % (llama.cpp's algorithm: 7.14 and 8.29), Q5_K 3.42
and 3.98, Q6_K 1.67 and 2.03 %. Errors are not weighted: without statistics of the activations all columns count alike,
where llama.cpp favours large weights. Left out: importance matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Grids tried for a sub-block: so many levels more than the format has are laid over its range. With 2.4 fewer the grid
# is coarser and reaches past the range, with 0.6 more it is finer and clips a little. Eleven suffice: Q4_K on Gaussian
# weights ends at 6.98 %, with 41 candidates from -3 to 1 at 6.97 %.
AFFINE_CANDIDATES = tuple(0.3 * step - 2.4 for step in range(11))
SYMMETRIC_CANDIDATES = tuple(0.5 * step - 3.0 for step in range(9))
AFFINE_ROUNDS, SYMMETRIC_ROUNDS = 3, 2  # Q4_K on Gaussian weights: 7.01, 6.99, 6.98 %, then standing still
LARGEST_HALF = 65504.0
LARGEST_6_BITS = 63
# Below it a range counts as zero: fp16 steps end at 6e-8, and levels / range must stay finite.
SMALLEST_RANGE = 1e-30


@dataclass(frozen=True)
class AffineFit:
    """`step * scales * quants - floor_step * minima` for every weight of a block.

    Attributes:
        step, floor_step: (blocks, 1), exactly representable in fp16, never negative.
        scales, minima: (blocks, 8), whole numbers 0..63.
        quants: (blocks, 8, 32), whole numbers 0..levels.
    """

    step: Tensor
    floor_step: Tensor
    scales: Tensor
    minima: Tensor
    quants: Tensor


@dataclass(frozen=True)
class SymmetricFit:
    """`step * scales * quants` for every weight of a block.

    Attributes:
        step: (blocks, 1), exactly representable in fp16.
        scales: (blocks, 16), whole numbers -128..127.
        quants: (blocks, 16, 16), whole numbers from minus half the range to below it.
    """

    step: Tensor
    scales: Tensor
    quants: Tensor


def safe_ratio(above: Tensor, below: Tensor) -> Tensor:
    """`above / below`, and 0 where `below` is (nearly) 0, so that empty blocks give zeros and never NaN."""
    usable = below.abs() >= SMALLEST_RANGE
    return torch.where(usable, above / torch.where(usable, below, 1.0), 0.0)


def round_to_half(values: Tensor) -> Tensor:
    """The nearest fp16 numbers, widened again."""
    return values.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def round_up_to_half(values: Tensor) -> Tensor:
    """The nearest fp16 numbers of no smaller magnitude: a step that lets the largest scale fit its bits.

    Rounding to nearest would turn steps of tiny weights, below 3e-8, into zero.
    """
    magnitude = values.abs().clamp(max=LARGEST_HALF)
    half = magnitude.half()
    bits = half.view(torch.int16) + (half.float() < magnitude).to(torch.int16)  # the next number has the next bits
    return bits.view(torch.float16).float().copysign(values)


def fit_affine(x: Tensor, levels: int) -> AffineFit:
    """Q4_K (15 levels) and Q5_K (31): x (blocks, 8, 32) float32, finite."""
    slopes, floors = _search_affine(x, levels)  # each (blocks, 8)
    step = round_up_to_half(slopes.amax(-1, keepdim=True) / LARGEST_6_BITS)
    floor_step = round_up_to_half(floors.amax(-1, keepdim=True) / LARGEST_6_BITS)
    minima = _six_bits(safe_ratio(floors, floor_step))
    scales = _six_bits(safe_ratio(slopes, step))

    best = [step, floor_step, scales, minima]
    least = torch.full_like(step, torch.inf)  # (blocks, 1)
    for _ in range(AFFINE_ROUNDS):
        scales, minima, errors = _nudge_affine(x, step, floor_step, scales, minima, levels)
        total = errors.sum(-1, keepdim=True)
        better = total < least
        least = torch.where(better, total, least)
        found = [step, floor_step, scales, minima]
        best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        quants = _affine_quants(x, step * scales, floor_step * minima, levels)
        step, floor_step = _refit_steps(x, quants, scales, minima, step, floor_step)

    step, floor_step, scales, minima = best
    quants = _affine_quants(x, step * scales, floor_step * minima, levels)
    return AffineFit(step, floor_step, scales, minima, quants)


def fit_symmetric(x: Tensor, half_range: int) -> SymmetricFit:
    """Q6_K (half range 32): x (blocks, 16, 16) float32, finite."""
    slopes = _search_symmetric(x, half_range)  # (blocks, 16)
    largest = slopes.gather(-1, slopes.abs().argmax(-1, keepdim=True))  # with its sign
    step = round_up_to_half(largest / -128)  # int8 reaches further on the negative side
    scales = safe_ratio(slopes, step).round().clamp(-128, 127)

    best_step, best_scales = step, scales
    least = torch.full_like(step, torch.inf)
    for _ in range(SYMMETRIC_ROUNDS):
        scales, errors = _nudge_symmetric(x, step, scales, half_range)
        total = errors.sum(-1, keepdim=True)
        better = total < least
        least = torch.where(better, total, least)
        best_step = torch.where(better, step, best_step)
        best_scales = torch.where(better, scales, best_scales)
        unscaled = scales.unsqueeze(-1) * _symmetric_quants(x, step * scales, half_range)
        fitted = safe_ratio((unscaled * x).sum((-1, -2)), unscaled.square().sum((-1, -2)))
        step = round_to_half(fitted.unsqueeze(-1))
    return SymmetricFit(best_step, best_scales, _symmetric_quants(x, best_step * best_scales, half_range))


def _search_affine(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The best grid `slope * q - floor`, q 0..levels, floor >= 0, of every sub-block x (..., n): two tensors (...)."""
    n = x.shape[-1]
    low = x.amin(-1).clamp(max=0)
    span = x.amax(-1).clamp(min=0) - low
    shifted = x - low.unsqueeze(-1)
    sum_x, sum_xx = x.sum(-1), x.square().sum(-1)
    slope, offset = span / levels, low  # stands where all weights are equal and no fit is possible
    least = torch.full_like(slope, torch.inf)
    for extra in AFFINE_CANDIDATES:
        inverse = safe_ratio(torch.full_like(span, levels + extra), span)
        q = (shifted * inverse.unsqueeze(-1)).round_().clamp_(0, levels)
        sum_q, sum_qq, sum_qx = q.sum(-1), q.square().sum(-1), (q * x).sum(-1)
        # Least squares for x = a * q + b; where that wants b > 0, which the format lacks, for x = a * q.
        determinant = n * sum_qq - sum_q * sum_q  # whole numbers below 2^24: exact
        a = safe_ratio(n * sum_qx - sum_x * sum_q, determinant)
        b = safe_ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
        a = torch.where(b > 0, safe_ratio(sum_qx, sum_qq), a)
        b = b.clamp(max=0)
        error = sum_xx + a * a * sum_qq + n * b * b + 2 * (a * b * sum_q - a * sum_qx - b * sum_x)
        better = (error < least) & (determinant > 0)
        least = torch.where(better, error, least)
        slope, offset = torch.where(better, a, slope), torch.where(better, b, offset)
    return slope, -offset


def _search_symmetric(x: Tensor, half_range: int) -> Tensor:
    """The best grid `slope * q`, q from -half_range to half_range - 1, of every sub-block x (..., n): slopes (...)."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # (..., 1), with its sign
    slope = torch.zeros_like(extreme.squeeze(-1))
    most = torch.full_like(slope, -torch.inf)
    for extra in SYMMETRIC_CANDIDATES:
        inverse = safe_ratio(torch.full_like(extreme, -(half_range + extra)), extreme)
        q = (x * inverse).round_().clamp_(-half_range, half_range - 1)
        sum_qx, sum_qq = (q * x).sum(-1), q.square().sum(-1)
        fitted = safe_ratio(sum_qx, sum_qq)
        explained = fitted * sum_qx  # least squared error is most squares explained
        better = explained > most
        most = torch.where(better, explained, most)
        slope = torch.where(better, fitted, slope)
    return slope


def _nudge_affine(
    x: Tensor, step: Tensor, floor_step: Tensor, scales: Tensor, minima: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Try every scale one down and one up, and around the best minimum for it: scales, minima, errors (blocks, 8)."""
    mean = x.mean(-1)
    best_scales, best_minima, least = scales, minima, torch.full_like(scales, torch.inf)
    for up in (-1, 0, 1):
        tried_scales = _six_bits(scales + up)
        slopes = step * tried_scales
        quants = _affine_quants(x, slopes, floor_step * minima, levels)
        ideal = _six_bits(safe_ratio(slopes * quants.mean(-1) - mean, floor_step))
        for shift in (-1, 0, 1):
            tried_minima = _six_bits(ideal + shift)
            floors = floor_step * tried_minima
            quants = _affine_quants(x, slopes, floors, levels)
            made = quants.mul_(slopes.unsqueeze(-1)).sub_(floors.unsqueeze(-1))
            errors = made.sub_(x).square_().sum(-1)
            better = errors < least
            least = torch.where(better, errors, least)
            best_scales = torch.where(better, tried_scales, best_scales)
            best_minima = torch.where(better, tried_minima, best_minima)
    return best_scales, best_minima, least


def _nudge_symmetric(x: Tensor, step: Tensor, scales: Tensor, half_range: int) -> tuple[Tensor, Tensor]:
    """Try every scale one down and one up: scales and their squared errors, each (blocks, 16)."""
    best, least = scales, torch.full_like(scales, torch.inf)
    for up in (-1, 0, 1):
        tried = (scales + up).clamp(-128, 127)
        slopes = step * tried
        made = _symmetric_quants(x, slopes, half_range).mul_(slopes.unsqueeze(-1))
        errors = made.sub_(x).square_().sum(-1)
        better = errors < least
        least = torch.where(better, errors, least)
        best = torch.where(better, tried, best)
    return best, least


def _refit_steps(
    x: Tensor, quants: Tensor, scales: Tensor, minima: Tensor, step: Tensor, floor_step: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares for x = step * (scales * quants) - floor_step * minima over a whole block, rounded to fp16."""
    unscaled = quants * scales.unsqueeze(-1)  # (blocks, 8, 32)
    qq = unscaled.square().sum((-1, -2))
    qm = (unscaled.sum(-1) * minima).sum(-1)
    mm = minima.square().sum(-1) * x.shape[-1]
    qx = (unscaled * x).sum((-1, -2))
    mx = (minima * x.sum(-1)).sum(-1)
    determinant = qq * mm - qm * qm
    # By Cauchy-Schwarz it lies between 0 and qq * mm. Near 0 both steps explain the same weights; then keep them.
    solvable = (determinant > 1e-4 * qq * mm).unsqueeze(-1)
    new_step = safe_ratio(mm * qx - qm * mx, determinant).clamp(min=0).unsqueeze(-1)
    new_floor = safe_ratio(qm * qx - qq * mx, determinant).clamp(min=0).unsqueeze(-1)
    return (
        round_to_half(torch.where(solvable, new_step, step)),
        round_to_half(torch.where(solvable, new_floor, floor_step)),
    )


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
