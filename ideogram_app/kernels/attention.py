"""Attention of one picture: the best exact backend that PyTorch has for these tensors, asked for once and named.

    attend = Attention()
    mixed = attend(query, key, value)         (H, M, D) each -> (M, H D)
    attend.engaged                            "flash", "efficient in float16", "math in runs": for the result

Heads of 256 are large for attention kernels, and a mask, even one of ones alone, keeps PyTorch off the fast ones; so
no mask is made where every token sees every other. PyTorch's last resort, MATH, holds the scores of all pairs of tokens
twice; it is never taken in silence: queries come to it in runs (machine/attention.py says how long), and the result
says so. stock diffusers hands over all of them and does not look.

Cards before Ampere have no bfloat16 units and no fused kernel for it: there q, k and v are float16 between this file's
first line and its last. q and k are normed; v is not, so every head of it is brought into range by a power of two,
which loses nothing, and its result brought back: nothing overflows.

Left out: attention in INT8 and FP8, which changes results; which backends there are to try (machine/attention.py).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ideogram_app.machine import attention as table
from ideogram_app.machine.capabilities import type_in_attention
from ideogram_app.machine.hardware import compute_capability

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
BACKENDS = {table.FLASH: FLASH, table.CUDNN: CUDNN, table.EFFICIENT: EFFICIENT, table.MATH: MATH}
NAMES = {backend: name for name, backend in BACKENDS.items()} | {SDPBackend.OVERRIDEABLE: "the device's own"}
ASKED = ("cpu", "cuda", "xpu")  # kinds of devices of which torch can say what it takes; the others have MATH alone
LARGEST = 65280.0  # of bfloat16 within float16, which ends at 65504: what is clamped in bfloat16 must round to less
IN_RANGE = 2.0**14  # the largest of a head of v, or up to twice that: far above what float16 rounds to zero
SMALLEST = 2.0**-100  # keeps IN_RANGE / power of two finite; v of such heads is as good as zero
UNFUSED_NOTE = (
    "PyTorch has no fused attention for this card: queries were taken in runs, which is slower than was planned"
)
Order = tuple[SDPBackend, ...]


@dataclass(frozen=True)
class ChosenBackend:
    """What is done with tensors of one shape."""

    backend: SDPBackend
    order: Order
    narrowed: bool = False  # computed in float16, stored in bfloat16
    repeats: bool = False  # keys and values are repeated, because no fused kernel takes groups of queries

    @property
    def name(self) -> str:
        """For reports."""
        name = NAMES.get(self.backend, str(self.backend))
        return f"{name}{' in runs' if self.backend == MATH else ''}{' in float16' if self.narrowed else ''}"


class Attention:
    """Scaled dot-product attention of one model; asks what runs when it first sees tensors of a shape.

    Args:
        excluded: backends that are not to be tried on this device, by the names of machine/attention.py.
        order: backends to try, best first, whatever the device; those of its table where None.
    """

    def __init__(self, excluded: Collection[str] = (), order: Order | None = None) -> None:
        self.order, self.excluded = order, frozenset(excluded)
        self._chosen: dict[Any, ChosenBackend] = {}

    def begin(self) -> None:
        """Forget: a new picture asks anew."""
        self._chosen.clear()

    @property
    def engaged(self) -> str:
        """What ran since `begin`; "" before anything did."""
        return ", ".join(dict.fromkeys(choice.name for choice in self._chosen.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence where an NVIDIA card, which a plan takes to have a fused kernel, had none."""
        unplanned = any(choice.backend == MATH and choice.order for choice in self._chosen.values())
        return (UNFUSED_NOTE,) if unplanned else ()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """(H, M, D) each, keys and values of as many heads or of a divisor of them -> (M, H D), in their type.

        On cards without bfloat16 units all three are overwritten.
        """
        seen = (query.device, query.dtype, query.shape, key.shape, causal)
        found = self._chosen.get(seen)
        dtype, power = query.dtype, None
        if found.narrowed if found else _narrows(query):
            power = _into_range(value)
            query, key, value = (_in_place(x, torch.float16) for x in (_clamped(query), _clamped(key), value))
        if found is None:
            found = self._chosen[seen] = self._choose(query, key, value, causal, power is not None)
        mixed = _mixed(found, query, key, value, causal, scale)  # (M, H, D)
        if power is not None:
            power = _repeated(power, query.shape[0]).to(dtype)
            mixed = _in_place(mixed, dtype).mul_(power.transpose(0, 1))
        return mixed.flatten(1)  # most backends write (M, H, D), and nothing is copied

    def _choose(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, narrowed: bool) -> ChosenBackend:
        order = self.order
        if order is None:
            order = backends(compute_capability(query.device), self.excluded)
        backend = ask(query[None], key[None], value[None], order, causal)
        grouped = query.shape[0] > key.shape[0]
        if backend == MATH and grouped and query.device.type != "cpu":
            keys, values = (_repeated(x, query.shape[0])[None] for x in (key, value))
            return ChosenBackend(ask(query[None], keys, values, order, causal), order, narrowed, repeats=True)
        return ChosenBackend(backend, order, narrowed)


def attend(query: Tensor, key: Tensor, value: Tensor, order: Order = ()) -> Tensor:
    """(H, M, D) each -> (M, H D), once and by backends of the caller's choice, for checks; nothing is overwritten.

    Raises:
        RuntimeError: none of them takes these; () leaves it to PyTorch.
    """
    parts = (query.clone(), key.clone(), value.clone()) if _narrows(query) else (query, key, value)
    return Attention(order=order)(*parts)


def backends(capability: tuple[int, int] | None, excluded: Collection[str] = ()) -> Order:
    """The backends to try on a card, best first; () leaves it to PyTorch, on devices that are not NVIDIA's."""
    names = table.order(capability, torch.backends.cudnn.version())
    return tuple(BACKENDS[name] for name in names if name == table.MATH or name not in excluded)


def ask(query: Tensor, key: Tensor, value: Tensor, order: Order = (), causal: bool = False) -> SDPBackend:
    """What `scaled_dot_product_attention` takes for these, (1, H, M, D) each, with their type and their strides."""
    if query.device.type not in ASKED:
        return MATH
    grouped = query.shape[1] > key.shape[1]
    with _tried(order):
        return SDPBackend(torch._fused_sdp_choice(query, key, value, None, 0.0, causal, enable_gqa=grouped))


def is_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether scores of these, (1, H, M, D) each, are never held as a whole."""
    return ask(query, key, value) != MATH


def in_runs(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """(H, M, D) each -> (M, H, D) by MATH, the scores of so many heads and queries at a time (`score_runs`)."""
    H, M, D = query.shape
    heads, rows = table.score_runs(H, M, key.shape[1])
    made = query.new_empty(M, H, D)
    for head in range(0, H, heads):
        some = slice(head, head + heads)
        keys, values = key[some].contiguous()[None], value[some].contiguous()[None]
        for start in range(0, M, rows):
            run = query[some, start : start + rows].contiguous()[None]
            end = start + run.shape[2]
            mask = None
            if causal and rows < M:
                mask = torch.ones(end - start, key.shape[1], dtype=torch.bool, device=query.device).tril(start)
            whole = causal and rows >= M
            with sdpa_kernel([MATH]):
                mixed = functional.scaled_dot_product_attention(
                    run, keys, values, attn_mask=mask, is_causal=whole, scale=scale
                )
            made[start:end, some] = mixed[0].transpose(0, 1)
    return made


def _mixed(
    choice: ChosenBackend, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> Tensor:
    """(H, M, D) each -> (M, H, D)."""
    if choice.repeats or choice.backend == MATH:
        key, value = (_repeated(x, query.shape[0]) for x in (key, value))
    if choice.backend == MATH:
        return in_runs(query, key, value, causal, scale)
    grouped = query.shape[0] > key.shape[0]
    with _tried(choice.order):
        mixed = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return mixed[0].transpose(0, 1)


def _tried(order: Order) -> AbstractContextManager[None]:
    return sdpa_kernel(list(order), set_priority=True) if order else nullcontext()


def _narrows(x: Tensor) -> bool:
    name = str(x.dtype).removeprefix("torch.")
    return type_in_attention(name, compute_capability(x.device)) != name


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(groups, M, D) -> (heads, M, D), every group for the queries that share it."""
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)


def _into_range(value: Tensor) -> Tensor:
    """Multiply every head of (H, M, D) by a power of two that brings its largest to `IN_RANGE`, or up to twice that.

    Returns:
        float32 (H, 1, 1): what brings the results back. Values that are not finite stay so.
    """
    largest = torch.linalg.vector_norm(value, float("inf"), dim=(-2, -1), keepdim=True).float()
    power = largest * 0.5 / torch.frexp(largest).mantissa  # exact: a power of two, at most `largest`
    power = torch.where(largest > 0, power, 1.0).clamp(min=SMALLEST)
    value.mul_((IN_RANGE / power).to(value.dtype))
    return power / IN_RANGE


def _clamped(x: Tensor) -> Tensor:
    return x.clamp_(-LARGEST, LARGEST)  # of what is normed nothing is as large: whatever a checkpoint's norms say


def _in_place(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type of the same size, written over x: q, k and v of 1024 x 1024 pixels would be 170 MB once more."""
    return x.view(dtype).copy_(x)
