"""Attention of one picture: which exact scaled-dot-product backend runs on which GPU generation.

Heads of 256 are large for attention kernels, and a mask, even one of ones alone, keeps PyTorch off the fast ones; so
no mask is ever made here: every token sees every other. Left out: attention in INT8 and FP8, which changes results, and
libraries that must be compiled for a card (FlashAttention 2 and 3, SageAttention).
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
# Compute capability -> backends in the order in which they are tried. FLASH needs sm_80; its kernels for heads of 256
# exist on all later ones, those with 99 KB of shared memory included (PyTorch's sdp_utils.cpp). cuDNN is ahead of it on
# Hopper and Blackwell datacenter parts in PyTorch's own order of preference. Read in PyTorch's source, not timed here.
ORDER: tuple[tuple[tuple[int, int], tuple[SDPBackend, ...]], ...] = (
    ((9, 0), (CUDNN, FLASH, EFFICIENT, MATH)),
    ((8, 0), (FLASH, EFFICIENT, MATH)),
    ((0, 0), (EFFICIENT, MATH)),
)
CONSUMER_BLACKWELL = (FLASH, EFFICIENT, MATH)  # sm_120 numbers above sm_100 and has Ada's instructions


def backends(capability: tuple[int, int] | None) -> tuple[SDPBackend, ...]:
    """The backends to try on a card, best first; none is named for devices that are not NVIDIA's."""
    if capability is None:
        return ()
    if capability >= (12, 0):
        return CONSUMER_BLACKWELL
    return next(order for least, order in ORDER if capability >= least)


def attend(query: Tensor, key: Tensor, value: Tensor, order: tuple[SDPBackend, ...] = ()) -> Tensor:
    """(H, M, D) each -> (M, H D), by the backends of `order` (see `backends`); PyTorch chooses where there are none."""
    with sdpa_kernel(list(order), set_priority=True) if order else nullcontext():
        mixed = functional.scaled_dot_product_attention(query[None], key[None], value[None])
    return mixed[0].transpose(0, 1).flatten(1)  # most backends write (M, H, D), and nothing is copied
