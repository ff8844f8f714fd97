"""Attention-head kernel in Triton: q/k norms and rotary embedding, in place in qkv.

    a token's row of qkv:  | H heads of q | H heads of k | H heads of v |      each of D numbers

    (x1, x2) = the two halves of a head, normed        x1 cos - x2 sin, x2 cos + x1 sin

The arithmetic is that of `kernels.plain.heads`, in float32 and rounded once. A program takes HEADS neighbouring heads
of one token, q or k, so a token's angles come from memory once and from a cache after that; v is never touched. The
results are views of qkv with axes (H, M, D), which attention takes as they are. Left out: copies to other layouts, and
angles between even and odd numbers of a head, which other models turn.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ideogram_app.errors import RequestError
from ideogram_app.kernels.fused.signature import Compilable

# Four heads of 256 are 16 numbers for each thread of two warps, and divide the 36 of q and k without a rest.
HEADS = 4
HEADS_WARPS = 2
HEADS_STAGES = 1  # of the software pipeline around loops: there are none


@triton.jit
def load_half(ptr: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)  # zeros for heads that are not there


@triton.jit
def heads_kernel(
    qkv_ptr: tl.tensor,
    row_stride: tl.tensor,
    norm_q_ptr: tl.tensor,
    norm_k_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    epsilon: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    TILES: tl.constexpr = (2 * H + HEADS - 1) // HEADS
    HALF: tl.constexpr = D // 2
    token = (tl.program_id(0) // TILES).to(tl.int64)
    head = (tl.program_id(0) % TILES * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = head < 2 * H
    first_ptr = qkv_ptr + token * row_stride + head * D + pair
    first, second = load_half(first_ptr, inside), load_half(first_ptr + HALF, inside)

    # Vectors are read once for each head, from the first-level cache, in the layout of the heads: one copy of them
    # would have to be dealt out to the threads through shared memory.
    every = head * 0 + pair
    weight_ptr = tl.where(head < H, norm_q_ptr, norm_k_ptr) + pair
    inverse = tl.rsqrt(tl.sum(first * first + second * second, 1, keep_dims=True) / D + epsilon)
    first = first * inverse * tl.load(weight_ptr).to(tl.float32)
    second = second * inverse * tl.load(weight_ptr + HALF).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + every)
    sin = tl.load(sin_ptr + token * HALF + every)
    dtype = qkv_ptr.dtype.element_ty
    tl.store(first_ptr, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(first_ptr + HALF, (second * cos + first * sin).to(dtype), mask=inside)


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv: (M, 3 H D), overwritten -> q, k, v, each (H, M, D), views of it.

    norm_q, norm_k: (D,), a power of two; cos, sin: float32 (M, D / 2).

    Raises:
        RequestError: shapes or strides do not fit.
    """
    M, D = qkv.shape[0], norm_q.shape[0]
    H = qkv.shape[1] // (3 * D)
    _check(qkv, (norm_q, norm_k), (cos, sin), (M, H, D))
    tiles = -(-2 * H // HEADS)
    launch = {"H": H, "D": D, "HEADS": HEADS, "num_warps": HEADS_WARPS, "num_stages": HEADS_STAGES}
    heads_kernel[(M * tiles,)](qkv, qkv.stride(0), norm_q, norm_k, cos, sin, epsilon, **launch)
    query, key, value = qkv.unflatten(-1, (3, H, D)).permute(1, 2, 0, 3)
    return query, key, value


def _check(
    qkv: Tensor, norms: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor], sizes: tuple[int, int, int]
) -> None:
    """Refuse what the kernel would read wrongly: it sees addresses, not shapes."""
    M, H, D = sizes
    fits = (
        qkv.shape[1] == 3 * H * D
        and qkv.stride(-1) == 1
        and D & (D - 1) == 0
        and all(norm.shape == (D,) and norm.is_contiguous() for norm in norms)
        and all(angle.shape == (M, D // 2) and angle.is_contiguous() for angle in angles)
    )
    if not fits:
        expected = "qkv (M, 3 H D), two norms (D,) and two angles (M, D / 2), contiguous, D a power of two"
        got = ", ".join(f"{tuple(x.shape)} with strides {x.stride()}" for x in (qkv, *norms, *angles))
        raise RequestError("The heads kernel was given tensors that do not fit", expected=expected, got=got)


def signatures() -> Iterator[Compilable]:
    """The real model's 18 heads of 256, for the compiler."""
    for dtype in ("bf16", "fp16"):
        floats = dict.fromkeys(("norm_q_ptr", "norm_k_ptr", "cos_ptr", "sin_ptr"), "*fp32")
        signature = {"qkv_ptr": f"*{dtype}", "row_stride": "i32", **floats, "epsilon": "fp32"}
        constants = {"H": 18, "D": 256, "HEADS": HEADS}
        name = f"heads_kernel, {dtype}"
        yield Compilable(name, heads_kernel, signature, constants, warps=HEADS_WARPS, stages=HEADS_STAGES)
