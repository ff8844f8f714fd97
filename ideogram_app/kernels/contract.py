"""The kernels' interface: one signature for each operation of a block, whoever implements it.

A transformer block is these calls and the attention between them. Between two of its matrices a vector passes through
exactly one kernel, which hands the next matrix what that one reads:

    dense      (M, K) in the computing type
    int8       INT8 rows with one scale each
    rotated    the same after `quantization.rotation`, for weights that were rotated

M is the number of tokens, one picture at a time, so there is no batch axis. Left out: training, masks, dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

InputFormat = Literal["dense", "int8", "rotated"]


@dataclass(frozen=True)
class QuantizedActivations:
    """Rounded activations. values: int8 (M, K); scale: float32 (M, 1); `values * scale` is what was rounded."""

    values: Tensor
    scale: Tensor


Operand = Tensor | QuantizedActivations


@dataclass(frozen=True)
class Kernels:
    """One implementation of everything between two matrices, and of the packed products themselves.

    Statistics, modulation and rotation are computed in float32 whatever the computing type; a dense result is rounded
    to it once, at the end. Vectors (K,) and scales are float32, everything else is of the computing type.

    Attributes:
        name: for reports.
        norm: (x (M, K), vector (K,), epsilon, input_format) -> operand: root-mean-square norm times a vector.
        add_norm: (hidden (M, K), update (M, K), gate (K,), vector (K,), epsilon, input_format) -> (hidden', operand):
            hidden' = hidden + norm(update) * gate, rounded; then the norm of hidden' times the vector.
        add: (hidden, update, gate, epsilon) -> hidden'.
        swiglu: (gate_up (M, 2 F), input_format) -> operand (M, F): silu of the first half of each row times the second.
        quantize: (x (M, K), input_format) -> operand; x itself where `input_format` is dense.
        heads: (qkv (M, 3 H D), norm_q (D,), norm_k (D,), cos (M, D / 2), sin (M, D / 2), epsilon) -> q, k, v, each
            (H, M, D), strided as it comes: q and k normed per head and turned by their angles. May overwrite qkv.
        weight: int8 (N, K) -> what `matmul` wants in its place; made once, when a layer is filled.
        matmul: (rows, weight, scale (N,), bias (N,) or None, dtype) -> (M, N): the product summed exactly in INT32,
            times both scales, plus the bias, in float32, rounded to dtype. A weight that serves once, scratch of
            `decode_int8`, is given as it is.
        decode_int8: (packed Q4_K (N, bytes), scale (N,), rotated) -> int8 (N, K): weights, rotated if asked for,
            divided by the scale of their row and rounded. The result may be scratch that the next call overwrites.
        decode: (packed Q4_K (N, bytes), dtype) -> (N, K). The result may be scratch that the next call overwrites.
        release_scratch: frees such scratch; the next call allocates it again.
    """

    name: str
    norm: Callable[[Tensor, Tensor, float, InputFormat], Operand]
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float, InputFormat], tuple[Tensor, Operand]]
    add: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, InputFormat], Operand]
    quantize: Callable[[Tensor, InputFormat], Operand]
    heads: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    weight: Callable[[Tensor], Any]
    matmul: Callable[[QuantizedActivations, Any, Tensor, Tensor | None, torch.dtype], Tensor]
    decode_int8: Callable[[Tensor, Tensor, bool], Tensor]
    decode: Callable[[Tensor, torch.dtype], Tensor]
    release_scratch: Callable[[], None] = lambda: None
