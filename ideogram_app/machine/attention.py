"""Attention of a device, without torch: the order in which PyTorch's backends are tried, and runs where none is fused.

A fused backend never holds the scores, one for each head and pair of tokens: 20 GB of them in float32 at 2048 x 2048.
MATH, which PyTorch takes where it has nothing else, holds them twice; so queries come to it in runs of so many rows
that scores stay within `SCORE_BYTES`. The table says what is tried and what a plan counts with; what really runs is
asked of PyTorch once a picture (kernels/attention.py).

Left out: libraries that must be compiled for a card (FlashAttention 2 and 3, SageAttention), and attention in INT8.
"""

from __future__ import annotations

from ideogram_app.machine.hardware import Hardware

CUDNN, FLASH, EFFICIENT, MATH = "cudnn", "flash", "efficient", "math"
# PyTorch's own guard (`check_prefer_cudnn_attention`): older ones read and write past the end where the length is no
# multiple of 128 (pytorch #169849, #171627). As torch.backends.cudnn.version() has it.
UNSAFE_CUDNN = 91_500
Capability = tuple[int, int]
# From capability, up to capability, whether a safe cuDNN is needed, order; the first row that fits is taken. On Hopper
# cuDNN takes half of Flash's time for heads of 256 (0.54 ms of 1.15 at 4396 tokens, an H100 with torch 2.11); on
# Blackwell data centre parts it is known to return wrong numbers (pytorch #193893), and nowhere else has it heads of
# 256. FLASH needs sm_80 and has such heads on all later cards (sdp_utils.cpp).
ORDERS: tuple[tuple[Capability, Capability, bool, tuple[str, ...]], ...] = (
    ((9, 0), (10, 0), True, (CUDNN, FLASH, EFFICIENT, MATH)),
    ((8, 0), (99, 0), False, (FLASH, EFFICIENT, MATH)),
    ((0, 0), (8, 0), False, (EFFICIENT, MATH)),
)
SCORE_BYTES = 2**27  # of scores at once, whatever becomes of them
# MATH of 16-bit tensors computes in float32: scores and their softmax, 8 bytes; MPS rounds both sides of them besides
# (PyTorch's Attention.mm). One limit for all devices, also far below the 4 GiB at which MPSGraph aborts the process
# (pytorch #149261).
BYTES_A_SCORE = 12
WIDE_COPIES = 5  # float32 copies of a run's q, k and v that MATH makes: each once, q and k scaled once more


def order(capability: Capability | None, cudnn: int | None) -> tuple[str, ...]:
    """The backends to try on a card, best first; none is named for devices that are not NVIDIA's.

    Args:
        cudnn: its version as PyTorch has it; None where there is none.
    """
    if capability is None:
        return ()
    safe = cudnn is not None and cudnn > UNSAFE_CUDNN
    return next(row for least, below, guarded, row in ORDERS if least <= capability < below and (safe or not guarded))


def expected(hardware: Hardware) -> str:
    """What a plan counts with: FLASH where nothing is held beside the result, EFFICIENT, or MATH in runs.

    PyTorch's Windows wheels are built without FLASH (CMakeLists.txt: USE_FLASH_ATTENTION, NOT MSVC). AMD's kernels are
    there for data centre parts, gfx9; whether Intel's are for heads of 256 nobody has seen, so the larger is counted.
    """
    if hardware.kind == "cpu":
        return FLASH
    if hardware.kind == "rocm":
        return FLASH if hardware.compute_capability and hardware.compute_capability[0] == 9 else MATH
    if hardware.kind != "cuda":
        return MATH
    tried = order(hardware.compute_capability or (8, 0), None)
    return EFFICIENT if FLASH not in tried or hardware.os.startswith("Windows") else FLASH


def score_runs(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """How many heads, and how many queries of each, have their scores at once: as many whole heads as fit, or a run of
    queries of one."""
    fitting = SCORE_BYTES // (BYTES_A_SCORE * keys)  # rows of scores
    if fitting >= queries:
        return min(heads, fitting // queries), queries
    return 1, max(1, fitting)


def run_bytes(heads: int, tokens: int, head_size: int) -> int:
    """Bytes of one run of `score_runs` where every token sees every other, beside its result."""
    together, rows = score_runs(heads, tokens, tokens)
    copies = WIDE_COPIES * tokens * head_size * 4
    return together * (rows * tokens * BYTES_A_SCORE + copies)
