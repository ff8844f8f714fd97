"""Write tests/golden/reasons.txt: what the planner says, to which machine, under which code.

    python tools/golden_reasons.py

The machines are those of tests/machines.py as they are, and then the few that it takes to hear every other sentence of
ideogram_app/catalog/reasons.py. The tests assert codes and numbers; this file alone holds the texts, so that a change
of words is one command and one diff to read (tests/catalog/test_reasons.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.reasons import Reason  # noqa: E402
from ideogram_app.machine.capabilities import REMEDIES  # noqa: E402
from ideogram_app.machine.hardware import DeviceUser, Hardware  # noqa: E402
from ideogram_app.planning.fallbacks import fallbacks  # noqa: E402
from ideogram_app.planning.inputs import PlanInputs  # noqa: E402
from ideogram_app.planning.oom import OutOfMemory  # noqa: E402
from ideogram_app.planning.planner import Plan, plan  # noqa: E402
from ideogram_app.planning.profile import MachineProfile, MeasuredRates  # noqa: E402
from ideogram_app.records import Fallback  # noqa: E402
from tests.machines import (  # noqa: E402
    GB,
    GTX_1060,
    INT8,
    MACHINES,
    PROCESSOR,
    Q4_K,
    RTX_2080_TI,
    RTX_3060,
    RTX_3090,
    RTX_4060,
    RTX_4060_TI,
    RTX_4090,
    RTX_5090,
    RX_9070_XT,
    apple,
    geforce,
    label,
    machine,
)

GOLDEN = ROOT / "tests" / "golden" / "reasons.txt"
HEAD = """\
What the planner says: machine (and wishes) -> plan; then + reasons, - what was passed over, > the suggestion,
* what is offered when memory ran out, each as code: text.
Made by `python tools/golden_reasons.py`; tests/catalog/test_reasons.py holds it to the code.
"""

UNKNOWN = {"torch_supports_device": False, "torch": "2.13.0+cu130"}
KNOWN = MachineProfile(MeasuredRates(60.0, 240.0, 12e9, 7e9), {"ideogram-4/w8a8": (0.4,), "miniature/w8a8": (0.3,)})
NO_COMPILER = "Triton cannot start: it needs a C compiler. This helps: sudo apt install gcc"
SLOW_LINK = MachineProfile(MeasuredRates(link=3e9))
RADEON = machine("AMD Radeon RX 7900 XTX", (11, 0), 24, kind="rocm", device_count=2)
# what the machine is told besides, the machine, and how the plan is asked for
CASES: list[tuple[str, Hardware, dict[str, Any]]] = [
    ("torch has no kernels", replace(GTX_1060, **UNKNOWN), {}),
    ("torch has no kernels", replace(RTX_3090, **UNKNOWN), {}),
    ("torch has no kernels", replace(RTX_5090, **UNKNOWN), {}),
    ("torch has no kernels", replace(RX_9070_XT, **UNKNOWN), {}),
    ("torch has no kernels", replace(GTX_1060, **UNKNOWN), {"model": "miniature"}),
    ("a driver without its PyTorch", replace(PROCESSOR, problem="The driver lists an RTX 3090."), {}),
    ("the miniature", PROCESSOR, {"model": "miniature"}),
    ("the miniature, drawn before", PROCESSOR, {"model": "miniature", "known": KNOWN}),
    ("the miniature without RAM", replace(PROCESSOR, host_free_bytes=GB), {"model": "miniature"}),
    ("measured, drawn before", RTX_4060, {"known": KNOWN}),
    ("a laptop", geforce("RTX 4060 Laptop GPU", (8, 9), 8), {}),
    ("no compiler for Triton", replace(RTX_3060, triton_problem=NO_COMPILER), {}),
    ("Windows", replace(geforce("RTX 2060", (7, 5), 6), os="Windows 11"), {}),
    ("others at work", replace(RTX_3090, device_free_bytes=15 * GB, device_users=(DeviceUser("chrome", 9 * GB),)), {}),
    ("a reserve, a short caption", RTX_3060, {"reserve_bytes": GB, "text_tokens": 100}),
    ("a large picture", RTX_3090, {"width": 2048, "height": 2048}),
    ("a limit, a slow link", RTX_4090, {"limit_bytes": 8 * GB, "known": SLOW_LINK}),
    ("a limit, a slow link, INT8", RTX_4090, {"recipe": INT8, "limit_bytes": 8 * GB, "known": SLOW_LINK}),
    ("a slow disk", geforce("RTX 3060", (8, 6), 12, 16), {"known": MachineProfile(MeasuredRates(disk=0.5e9))}),
    ("a full disk", replace(RTX_3090, disk_free_bytes=30 * GB), {}),
    ("a disk for one recipe, INT8", replace(RTX_3090, disk_free_bytes=53 * GB), {"recipe": "int8-w8a8"}),
    ("INT8 without units", GTX_1060, {"recipe": "int8-w8a8"}),
    ("little RAM", replace(RTX_4060, host_free_bytes=round(6.5 * GB)), {}),
    ("no RAM", replace(RTX_4060, host_free_bytes=2 * GB), {}),
    ("no RAM", replace(GTX_1060, host_free_bytes=2 * GB), {}),
    ("too small", geforce("GT 1030", (6, 1), 2), {}),
    ("two devices, streamed", replace(RTX_4060_TI, device_count=2, devices_free_bytes=(5 * GB, 14 * GB)), {}),
    ("two devices without times", RADEON, {}),
    ("two devices without times, one full", replace(RADEON, devices_free_bytes=(22 * GB, 5 * GB)), {}),
    (
        "two devices of two kinds",
        replace(
            RTX_4090,
            device_count=2,
            devices_free_bytes=(22 * GB, 11 * GB),
            device_names=("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3060"),
        ),
        {},
    ),
    (
        "two devices of two generations",
        replace(
            RTX_3090,
            device_count=2,
            devices_free_bytes=(22 * GB, 10 * GB),
            device_names=("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 2080 Ti"),
        ),
        {},
    ),
    (
        "a second device that torch has no kernels for",
        replace(
            RTX_3060,
            device_count=2,
            devices_free_bytes=(11 * GB, 30 * GB),
            device_names=("NVIDIA GeForce RTX 3060", "Tesla V100-SXM2-32GB"),
            device_capabilities=((8, 6), (7, 0)),
            devices_supported=(True, False),
        ),
        {},
    ),
    (
        "a second device of unknown speed",
        replace(RADEON, device_names=("AMD Radeon RX 7900 XTX", "AMD Radeon RX 7800 XT")),
        {},
    ),
    *(
        (f"a device that cannot be used: {kind}", replace(PROCESSOR, problem="It is not used.", problem_kind=kind), {})
        for kind in REMEDIES
        if kind
    ),
    ("Turing without tensor cores", machine("NVIDIA T1000 8GB", (7, 5), 8), {}),
    ("more device memory than is free", replace(RX_9070_XT, device_memory_bytes=32 * 2**30), {}),
    ("Q4_K", RTX_2080_TI, {"recipe": Q4_K}),
    ("the reference", apple(128), {"recipe": "reference"}),
]


# what ran out, and of which picture, recipe and side: the ways to go on are golden too
SHORTAGES: list[tuple[str, Hardware, str, int, OutOfMemory]] = [
    ("out of device memory while drawing", RTX_3090, INT8, 1024, OutOfMemory("device", 2 * GB, "denoise")),
    ("out of device memory while decoding", RTX_3090, Q4_K, 2048, OutOfMemory("device", 4 * GB, "decode")),
]


def cases() -> Iterator[tuple[str, Plan]]:
    """Every plan of the file, by its title."""
    for hardware in MACHINES:
        yield label(hardware), plan(PlanInputs.of(hardware, "ideogram-4"))
    for title, hardware, wishes in CASES:
        yield f"{label(hardware)} ({title})", plan(PlanInputs.of(hardware, **{"model": "ideogram-4"} | wishes))


def ladders() -> Iterator[tuple[str, tuple[Fallback, ...]]]:
    """What is offered after every shortage of the file, by its title; no recipe but the drawn one is prepared."""
    for title, hardware, recipe, side, shortage in SHORTAGES:
        inputs = PlanInputs.of(hardware, "ideogram-4", side, side, recipe=recipe)
        yield f"{label(hardware)} ({title})", fallbacks(inputs, plan(inputs), shortage, (recipe,))


def said() -> set[str]:
    """Every row of `SENTENCES` that the file holds."""
    reasons = [rung.reason for _, ladder in ladders() for rung in ladder]
    for _, decided in cases():
        reasons += [*decided.reasons, *(row.reason for row in decided.rejected), decided.suggestion]
    return {row for each in reasons if each for row in each.code.split("+")}


def rendered(decided: Plan) -> list[str]:
    """A plan's lines."""
    lines = [f"  + {_line(each)}" for each in decided.reasons]
    lines += [f"  - {row.recipe}, {row.residency or 'nowhere'}: {_line(row.reason)}" for row in decided.rejected]
    return lines + ([f"  > {_line(decided.suggestion)}"] if decided.suggestion else [])


def golden() -> str:
    """The whole file."""
    blocks = [HEAD]
    for title, decided in cases():
        home = f"{decided.recipe}, {decided.residency}" if decided.fits else "nothing fits"
        blocks.append("\n".join([f"{title} -> {home}", *rendered(decided), ""]))
    for title, ladder in ladders():
        offers = [f"  * {rung.title}: {_line(rung.reason)}" for rung in ladder]
        blocks.append("\n".join([f"{title} -> offers", *offers, ""]))
    return "\n".join(blocks)


def _line(reason: Reason) -> str:
    return f"{reason.code}: {reason.text}"


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden(), encoding="utf-8")
    print(f"{GOLDEN.relative_to(ROOT)} written")
