"""Memory limit: on Windows and WSL torch is kept within the device memory that a plan may use.

    for limit in memory_limits(hardware, inputs.devices, context): limit.apply()

Since 536.40 NVIDIA's drivers for Windows and WSL do not say that device memory ran out: they go on in shared RAM, five
to twenty times slower and in silence (their *CUDA Sysmem Fallback Policy*). torch's allocator then never sees a
refusal, and no fallback begins. With a limit of its own it raises its usual `OutOfMemoryError`, which
planning/oom.py reads ("... allowed").

ComfyUI leaves the policy to the user, who must find it in the driver's panel. Left out: Linux, whose driver refuses by
itself, other vendors, and memory that is allocated past torch: the driver's context, which the limit leaves room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.machine.hardware import Hardware, asked


@dataclass(frozen=True)
class MemoryLimit:
    """What torch may allocate on a device: a fraction of all its memory (0 to 1), in bytes, and why."""

    device: int
    fraction: float
    bytes: int
    reason: Reason = NOTHING

    def apply(self) -> None:
        """Tell torch's allocator, if it listens; of what it holds already nothing is freed."""
        import torch

        # A card that has just been filled refuses; loading onto it will then say so in words.
        asked(lambda: torch.cuda.set_per_process_memory_fraction(self.fraction, self.device), None)


def memory_limits(hardware: Hardware, usable: Sequence[tuple[int, int]], context: int) -> tuple[MemoryLimit, ...]:
    """The limit of every device; none where the driver refuses by itself, or how much memory there is is not known.

    Args:
        usable: number of each device and the bytes of it that may be used, what torch caches included.
        context: bytes of these that a driver takes beside torch's allocator.
    """
    if not hardware.spills:
        return ()
    limits = []
    for device, free in usable:
        totals = hardware.devices_memory_bytes
        total = totals[device] if device < len(totals) else hardware.device_memory_bytes
        if total and free > context:
            most = min(free - context, total)
            limits.append(MemoryLimit(device, most / total, most, reason("kept_within", limit=most)))
    return tuple(limits)
