"""One step under torch's profiler: the share of its time in each family.

On CUDA, ROCm and XPU the times are those of kernels, on a processor those of operators without what they call. There
the profiler keeps 10 to 40 KB for every operator, shapes included, and Q4_K decoded in runs that fit a cache takes some
100 000 of them for one block of the published model. So a short look tells how fast they come, and no more are recorded
than fit. Such a step begins with its blocks, which are all alike, so its first seconds stand for the whole.

Left out: Apple's devices, which torch's profiler does not see; timelines, which torch exports itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ideogram_app.benchmark.families import ATTENTION, family, shares
from ideogram_app.benchmark.limits import TimeUp, time_limit
from ideogram_app.benchmark.report import Families
from ideogram_app.machine.meter import synchronize

ACTIVITIES = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
PROFILE_SECONDS = 0.1
MOST_OPERATORS = 30_000  # at 40 KB, 1.2 GB


@dataclass(frozen=True)
class Profile:
    """What a step's time went into.

    Attributes:
        kernel_seconds: in kernels; None on a processor.
        first_seconds: of the step that were profiled; None for all of it.
    """

    families: Families | None = None
    kernel_seconds: float | None = None
    first_seconds: float | None = None


def profile_step(step: Callable[[], object], device: torch.device) -> Profile:
    """Run one step under the profiler; without families where it sees nothing of the device.

    Args:
        step: may be broken off and called again.
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
            if seconds is None:
                step()
            else:
                with time_limit(seconds):
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
