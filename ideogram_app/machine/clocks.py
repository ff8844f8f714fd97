"""Clocks, power and temperature of the first NVIDIA card now, and what holds its clocks down: NVML's own words.

What a time is worth depends on them: a laptop that is hot or a card with a lowered power limit is slower than its name
says. Left out: other makers' cards, sampling over a run, and everything where pynvml is not installed (an extra): None.
"""

from __future__ import annotations

from dataclasses import dataclass

# NVML's bits of what lowers clocks (nvml.h, nvmlClocksThrottleReason*), in words. Idle and what an application asked
# for are no hindrance, and sync boost concerns servers.
HINDRANCES = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Clocks:
    """The card at one moment; megahertz, watts, degrees Celsius. None: the driver does not say."""

    sm_mhz: int | None = None
    highest_sm_mhz: int | None = None
    watts: float | None = None
    limit_watts: float | None = None
    default_limit_watts: float | None = None
    celsius: int | None = None
    held_down_by: tuple[str, ...] = ()


def hindrances(bits: int) -> tuple[str, ...]:
    """What those bits say."""
    return tuple(word for bit, word in HINDRANCES.items() if bits & bit)


def read_clocks() -> Clocks | None:
    """Of the first card; None where there is no NVML, no card, or no answer."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None

    def ask(question: str, *more: int) -> int | None:
        try:
            return int(getattr(pynvml, question)(card, *more))
        except (pynvml.NVMLError, AttributeError):
            return None  # an older driver, or a question that this card does not answer

    def in_watts(milliwatts: int | None) -> float | None:
        return None if milliwatts is None else milliwatts / 1000

    return Clocks(
        sm_mhz=ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
        highest_sm_mhz=ask("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM),
        watts=in_watts(ask("nvmlDeviceGetPowerUsage")),
        limit_watts=in_watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
        default_limit_watts=in_watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        celsius=ask("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
        held_down_by=hindrances(ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0),
    )
