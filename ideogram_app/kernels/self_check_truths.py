"""Truths of the self-check: what a kernel must give, in float64 or exact integers on the host, and a judge for each.

A result is right where it is a rounding of a number that float32 arithmetic, in any order, may have arrived at:

    rounded(truth - slack)  <=  got  <=  rounded(truth + slack)          a dense result, in its own type
    |got - truth / scale|   <=  1/2 + slack / scale                      a whole number; its scale within its own slack

A slack is thousands of times smaller than a step of a 16-bit type, so a result that is one step off is wrong, and so is
a single row. Left out: `torch.testing.assert_close`, whose one tolerance for all numbers must let an outlier's step
pass; truths on the device, which would round as it does (CUDA divides by multiplying with a reciprocal).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ideogram_app.kernels.contract import InputFormat, Operand, QuantizedActivations
from ideogram_app.quantization import int8
from ideogram_app.quantization.rotation import GROUP, hadamard

# Relative to the sum of a result's terms. 64 units of float32, for a row's mean, a reciprocal root and an exponential
# by a device's own instructions (2^-22 and better); a step of float16 is 2^-10, of bfloat16 2^-7.
ANY_ORDER = 2.0**-18
FEW_ROUNDINGS = 2.0**-22  # of a product whose sum is exact: its widening, two scales and a bias
SMALLEST = 1e-30  # what underflows, as silu far below zero does, may be zero
SHOWN_ROWS = 4  # of those that differ


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a result, "" where nothing is; error: its largest distance from the truth, as a share of the
    largest number of its row, None where there is no such number."""

    wrong: str
    error: float | None = None


@dataclass(frozen=True)
class Truth:
    """float64 (M, N) each, on the host: the exact numbers, and what float32 arithmetic may be off by."""

    values: Tensor
    slack: Tensor

    @classmethod
    def of(cls, values: Tensor, terms: Tensor | None = None, share: float = ANY_ORDER) -> Truth:
        """terms: the magnitudes that were added up, where those are more than the result."""
        return cls(values, (values if terms is None else terms).abs() * share + SMALLEST)


def normed(x: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) along the last axis, in float64."""
    x = x.cpu().double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def norm_truth(x: Tensor, vector: Tensor, epsilon: float) -> Truth:
    return Truth.of(normed(x, epsilon) * vector.cpu().double())


def add_truth(hidden: Tensor, update: Tensor, gate: Tensor, epsilon: float) -> Truth:
    old, change = hidden.cpu().double(), normed(update, epsilon) * gate.cpu().double()
    return Truth.of(old + change, old.abs() + change.abs())


def swiglu_truth(gate_up: Tensor) -> Truth:
    gate, up = gate_up.cpu().double().chunk(2, -1)
    values = gate * torch.sigmoid(gate) * up
    return Truth.of(values, values * (1 + gate.abs()))  # an exponential is as wrong as its argument is large


def exact_truth(x: Tensor) -> Truth:
    """Of numbers that are only handed on."""
    return Truth.of(x.cpu().double(), share=0.0)


def heads_truth(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Truth, Truth, Truth]:
    """qkv: (M, 3 H D) -> of q, k and v, each (H, M, D)."""
    parts = qkv.cpu().double().unflatten(-1, (3, -1, norm_q.shape[0])).permute(1, 2, 0, 3)
    cosines, sines = cos.cpu().double(), sin.cpu().double()

    def turned(x: Tensor, weight: Tensor) -> Truth:
        first, second = (normed(x, epsilon) * weight.cpu().double()).chunk(2, -1)
        values = torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)
        terms = (first * cosines).abs() + (second * sines).abs(), (second * cosines).abs() + (first * sines).abs()
        return Truth.of(values, torch.cat(terms, -1))

    return turned(parts[0], norm_q), turned(parts[1], norm_k), exact_truth(parts[2])


def product_truth(sums: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, inexact: float = 0.0) -> Truth:
    """sums: exact INT32 (M, N); row_scale: (M, 1); scale, bias: (N,); inexact: what a sum may be off by."""
    scales = row_scale.cpu().double() * scale.cpu().double()
    product, added = sums.cpu().double() * scales, torch.zeros(1).double() if bias is None else bias.cpu().double()
    slack = (product.abs() + added.abs()) * FEW_ROUNDINGS + scales * inexact + SMALLEST
    return Truth(product + added, slack)


def rotated(truth: Truth) -> Truth:
    """Times the block-diagonal Hadamard matrix: every result is a sum of a group's 256 numbers, each +-1/16 of one."""
    turn, groups = hadamard(dtype=torch.float64), truth.values.unflatten(-1, (-1, GROUP))
    share = groups.abs().sum(-1, keepdim=True) * ANY_ORDER + truth.slack.unflatten(-1, (-1, GROUP)).sum(
        -1, keepdim=True
    )
    slack = (share / GROUP**0.5).expand_as(groups)
    return Truth((groups @ turn).flatten(-2), slack.flatten(-2))


def judge_dense(got: Tensor, truth: Truth) -> Verdict:
    """A result in a floating type against its truth."""
    if got.shape != truth.values.shape:
        return Verdict(f"gives {tuple(got.shape)} in place of {tuple(truth.values.shape)}")
    low, high = ((truth.values + sign * truth.slack).to(got.dtype).double() for sign in (-1, 1))
    made = got.detach().cpu().double()
    largest = truth.values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(got.dtype).smallest_normal)
    return _verdict((made < low) | (made > high) | made.isnan(), made, truth.values, largest)


def judge_rounded(got: QuantizedActivations, truth: Truth) -> Verdict:
    """Rounded activations against the numbers that were rounded: each scale first, then the values under it."""
    scale = (truth.values.abs().amax(-1, keepdim=True) / int8.ACTIVATION_LEVELS).clamp_(
        min=int8.SMALLEST_ACTIVATION_SCALE
    )
    allowed = truth.slack.amax(-1, keepdim=True) / int8.ACTIVATION_LEVELS + scale * FEW_ROUNDINGS
    made = got.scale.detach().cpu().double()
    if made.shape != scale.shape:
        return Verdict(f"gives scales {tuple(made.shape)} in place of {tuple(scale.shape)}")
    scales = _verdict(~((made - scale).abs() <= allowed), made, scale)
    if scales.wrong:
        return Verdict(f"scales: {scales.wrong}", scales.error)
    return judge_steps(got.values, truth, made, least=-128)


def judge_steps(values: Tensor, truth: Truth, scale: Tensor, least: int = -127) -> Verdict:
    """int8 (M, N) against truth / scale (M, 1), rounded to `least` .. 127."""
    if values.shape != truth.values.shape or values.dtype != torch.int8:
        return Verdict(f"gives {values.dtype} {tuple(values.shape)} in place of int8 {tuple(truth.values.shape)}")
    exact = (truth.values / scale).clamp_(least, 127)
    made = values.detach().cpu().double()
    off = (made - exact).abs()
    bad = ~(off <= 0.5 + truth.slack / scale + 128 * FEW_ROUNDINGS)
    return _verdict(bad, made, exact, torch.full_like(scale, 128.0))


def judge_operand(got: Operand, truth: Truth, input_format: InputFormat) -> Verdict:
    """What a kernel hands to the next matrix, in the format that was asked for."""
    if input_format == "dense":
        return judge_dense(got, truth) if isinstance(got, Tensor) else Verdict("gives rounded rows, not dense ones")
    if not isinstance(got, QuantizedActivations):
        return Verdict("gives dense rows, not rounded ones")
    return judge_rounded(got, rotated(truth) if input_format == "rotated" else truth)


def judge_close(got: Tensor, truth: Tensor, share: float) -> Verdict:
    """Every row (..., D) within a share of its own length: where a kernel's inner roundings are its own affair."""
    if got.shape != truth.shape:
        return Verdict(f"gives {tuple(got.shape)} in place of {tuple(truth.shape)}")
    made, exact = got.detach().cpu().double().flatten(0, -2), truth.cpu().double().flatten(0, -2)
    distance = (made - exact).norm(dim=-1, keepdim=True) / exact.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
    bad = ~(distance <= share)
    error = float(distance.max())
    wrong = f"{_rows_named(bad)} off by more than {share:.2g} of {'its' if int(bad.sum()) == 1 else 'their'} length"
    return Verdict(wrong if bool(bad.any()) else "", error if error == error else None)


def first_wrong(*verdicts: Callable[[], Verdict]) -> Verdict:
    """The first of several that is not right, else the one with the largest error; a later one is asked only then."""
    found = []
    for ask in verdicts:
        verdict = ask()
        if verdict.wrong:
            return verdict
        found.append(verdict)
    return max(found, key=lambda verdict: verdict.error or 0.0)


def _verdict(bad: Tensor, made: Tensor, exact: Tensor, largest: Tensor | None = None) -> Verdict:
    """bad: bool (..., N); made, exact: float64 of the same shape; largest: what an error is a share of, (..., 1)."""
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) if largest is None else largest
    error = float(((made - exact).abs() / largest).max()) if made.numel() else 0.0
    finite = None if error != error or error == float("inf") else error
    if not bool(bad.any()):
        return Verdict("", finite)
    lost = int((~made.isfinite()).sum())
    said = f"{lost} of them not finite" if lost else f"by up to {error:.2g} of the largest number of a row"
    return Verdict(f"{int(bad.sum())} of {bad.numel()} numbers differ, in {_rows_named(bad)}, {said}", finite)


def _rows_named(bad: Tensor) -> str:
    rows = bad.flatten(0, -2).any(-1).nonzero().flatten().tolist()
    named = ", ".join(map(str, rows[:SHOWN_ROWS]))
    return (
        f"row {named}" if len(rows) == 1 else f"{len(rows)} rows ({named}{', ...' if len(rows) > SHOWN_ROWS else ''})"
    )
