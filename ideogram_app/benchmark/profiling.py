"""Profile of one step by torch's profiler: the share of its time in gemm, attention and other kernels.

    gemm        products of matrices, whoever wrote them, the summing of their parts included
    attention   fused attention
    other       norms, rotations, rounding, decoding, copies: what should hide behind the two above

On CUDA, ROCm and XPU the times are those of kernels, on a processor those of operators without what they call. There
the profiler keeps 10 to 40 KB for every operator, shapes included, and Q4_K decoded in runs that fit a cache takes some
100 000 of them for one block of the published model. So a short look shows how fast they come, and no more are recorded
than fit. Such a step begins with its blocks, which are all alike, so its first seconds stand for the whole.

The first rule that fits a name counts; what none names is `other`, so an unknown kernel never looks like useful work.
On a processor shapes distinguish a rotation from a product of the model, and callers what attention calls.

Left out: Apple's devices, which torch's profiler does not see; timelines, which torch exports itself; attention written
out in products (torch's math fallback), whose kernels cannot be told from others on a device. Code that torch.compile
generates for a processor is one operator, and counts as other with all that was fused into it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ideogram_app.benchmark.limits import TimeUp, time_limit
from ideogram_app.benchmark.report import Families
from ideogram_app.machine.meter import synchronize

ACTIVITIES = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
PROFILE_SECONDS = 0.1
MOST_OPERATORS = 30_000  # at 40 KB, 1.2 GB
GEMM, ATTENTION, OTHER = "gemm", "attention", "other"
# Inductor names pointwise kernels after everything around them, `triton_poi_fused_mm_mul_3`: they are neither.
RULES = (
    (OTHER, r"^triton_(poi|red|per|for)_"),
    (
        ATTENTION,
        r"scaled_dot_product|flash_fwd|flash_fprop|flash_attn|flash_attention|fmha|sdpa|efficient_attention|mem_eff"
        r"|attn_fwd|attention_kernel|^_?attention",
    ),
    (
        GEMM,
        r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|wgmma|imma_|hmma|s16816|matmul"
        r"|^triton_tem_|^triton_mm|ck_tile.*tile|\bcijk_"  # Inductor's templates; rocBLAS
        r"|(^|::|_)(add|b|baddb)?mm(_out|_for_cpu|$)|mkldnn_linear|qlinear|linear_pointwise|linear_unary",
    ),
)
# A group of 256 is rotated by two matrices of 16 x 16 (quantization/rotation.py); no matrix of a model is that small.
ROTATION_SIDE = 16


@dataclass(frozen=True)
class Profile:
    """What a step's time went into."""

    families: Families | None = None
    kernel_seconds: float | None = None  # None on a processor
    first_seconds: float | None = None  # that were profiled; None for the whole step


def profile_step(step: Callable[[], object], device: torch.device) -> Profile:
    """Run one step under the profiler; without families where it sees nothing of the device.

    On a processor the step may be broken off, and called again.
    """
    if device.type not in ACTIVITIES:
        return Profile()
    if device.type != "cpu":
        events, _ = _recorded(step, device)
        times = list(_kernels(events))
        return Profile(shares(times), sum(time for _, time in times) / 1e6)
    events, whole = _recorded(step, device, PROFILE_SECONDS)
    if whole:
        return Profile(shares(_operators(events)))
    seconds = PROFILE_SECONDS * MOST_OPERATORS / max(1, len(events))
    events, whole = _recorded(step, device, seconds)
    return Profile(shares(_operators(events)), first_seconds=None if whole else seconds)


def _recorded(step: Callable[[], object], device: torch.device, seconds: float | None = None) -> tuple[list[Any], bool]:
    """The profiler's events of a step, and whether it came to its end within the seconds."""
    whole = True
    with profile(activities=[ACTIVITIES[device.type]], record_shapes=device.type == "cpu", acc_events=True) as session:
        try:
            with nullcontext() if seconds is None else time_limit(seconds):
                step()
        except TimeUp:
            whole = False
        synchronize(device)
    return list(session.events() or []), whole


def _operators(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """(family, microseconds) of each operator; what attention calls is attention."""
    for event in events:
        if event.device_type.name == "CPU":
            found = ATTENTION if _inside_attention(event) else family(event.name, event.input_shapes or ())
            yield found, event.self_cpu_time_total


def _kernels(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """(family, microseconds) of each kernel; annotations span kernels and would count them twice."""
    for event in events:
        if event.device_type.name != "CPU" and not getattr(event, "is_user_annotation", False):
            yield family(event.name), event.time_range.elapsed_us()


def _inside_attention(event: Any) -> bool:
    while event is not None:
        if family(event.name) == ATTENTION:
            return True
        event = event.cpu_parent
    return False


def family(name: str, shapes: Sequence[Sequence[int]] = ()) -> str:
    """gemm, attention or other, from the name of an operator or kernel and the shapes of its tensors, where known."""
    lowered = name.lower()
    for found, rule in RULES:
        if re.search(rule, lowered):
            rotation = any(len(shape) > 1 and max(shape[-2:]) <= ROTATION_SIDE for shape in shapes)
            return OTHER if found == GEMM and rotation else found
    return OTHER


def shares(times: Iterable[tuple[str, float]]) -> Families | None:
    """Each family's share of the whole, from (family, time); None where no time was spent."""
    totals = dict.fromkeys((GEMM, ATTENTION, OTHER), 0.0)
    for name, time in times:
        totals[name] += time
    whole = sum(totals.values())
    return Families(**{name: time / whole for name, time in totals.items()}) if whole else None
