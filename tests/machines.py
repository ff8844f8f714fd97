"""Machines as they are sold, with what each should run and why, and how a test asks a plan for what it says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ideogram_app.catalog.reasons import Reason
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.policy import PREFERRED_RECIPES

GIB = 2**30
GB = 10**9


def machine(name: str, capability: tuple[int, int] | None, gib: float, ram: int = 32, **known: Any) -> Hardware:
    """A desktop with this card: 93 % of it free, three quarters of its RAM, a large disk, unless said otherwise."""
    usual: dict[str, Any] = {
        "kind": "cuda",
        "device_memory_bytes": int(gib * GIB),
        "device_free_bytes": int(gib * GIB * 0.93),
        "host_memory_bytes": ram * GIB,
        "host_free_bytes": int(ram * GIB * 0.75),
        "disk_free_bytes": 500 * GB,
    }
    return Hardware(name=name, compute_capability=capability, **(usual | known))


def geforce(name: str, capability: tuple[int, int], gib: float, ram: int = 32, **known: Any) -> Hardware:
    return machine(f"NVIDIA GeForce {name}", capability, gib, ram, **known)


def apple(memory: int) -> Hardware:
    """A Mac of so many GiB: macOS lets the GPU use three quarters of it, and four fifths are free."""
    free = int(memory * GIB * 0.8)
    return machine("Apple M3", None, memory * 0.75, memory, kind="mps", host_free_bytes=free)


GTX_1060 = geforce("GTX 1060 6GB", (6, 1), 6)
GTX_1660 = geforce("GTX 1660", (7, 5), 6, 16)
RTX_2080_TI = geforce("RTX 2080 Ti", (7, 5), 11)
RTX_3060 = geforce("RTX 3060", (8, 6), 12)
RTX_3090 = geforce("RTX 3090", (8, 6), 24)
RTX_4060 = geforce("RTX 4060", (8, 9), 8)
RTX_4060_TI = geforce("RTX 4060 Ti", (8, 9), 16)
RTX_4090 = geforce("RTX 4090", (8, 9), 24, 64)
RTX_5090 = geforce("RTX 5090", (12, 0), 32, 64)
H100 = machine("NVIDIA H100 80GB HBM3", (9, 0), 80, 256)
RX_9070_XT = machine("AMD Radeon RX 9070 XT", (12, 0), 16, kind="rocm")
PROCESSOR = Hardware(name="AMD Ryzen 9", cpu_cores=16, host_free_bytes=200 * GB, disk_free_bytes=500 * GB)

INT8, Q4_K = PREFERRED_RECIPES
# machine, recipe, residency, computing type, code of the first reason
TABLE: list[tuple[Hardware, str | None, str | None, str, str]] = [
    # Too old for INT8, however much RAM there is.
    (GTX_1060, Q4_K, "streamed", "float32", "not_taken+int8_before_turing"),
    (GTX_1660, Q4_K, "disk", "float32", "not_taken+int8_gtx_16"),
    (geforce("GTX 1660 SUPER", (7, 5), 6, 64), Q4_K, "streamed", "float32", "not_taken+int8_gtx_16"),
    (machine("Tesla V100-SXM2-32GB", (7, 0), 32, 64), Q4_K, "resident", "float32", "not_taken+int8_before_turing"),
    # Six and eight GB: most of INT8 is on the road, for which 16 GB of RAM are too few.
    (geforce("RTX 2060", (7, 5), 6, 16), Q4_K, "streamed", "bfloat16", "not_taken+disk_unmeasured"),
    (geforce("RTX 2060", (7, 5), 6, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 3060 Laptop GPU", (8, 6), 6, 16), Q4_K, "streamed", "bfloat16", "not_taken+disk_unmeasured"),
    (geforce("RTX 3060 Laptop GPU", (8, 6), 6, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 4060", (8, 9), 8, 16), Q4_K, "streamed", "bfloat16", "not_taken+disk_unmeasured"),
    (RTX_4060, INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 4060", (8, 9), 8, 64), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 4060 Laptop GPU", (8, 9), 8, 16), Q4_K, "streamed", "bfloat16", "not_taken+disk_unmeasured"),
    (geforce("RTX 4060 Laptop GPU", (8, 9), 8, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 5060", (12, 0), 8, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    # Ten to twelve: half of it.
    (geforce("RTX 3080", (8, 6), 10, 16), Q4_K, "streamed", "bfloat16", "not_taken+disk_unmeasured"),
    (geforce("RTX 3080", (8, 6), 10, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (RTX_2080_TI, INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 2060", (7, 5), 12, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 3060", (8, 6), 12, 16), Q4_K, "streamed", "bfloat16", "not_taken+disk_unmeasured"),
    (RTX_3060, INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 4070", (8, 9), 12, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 5070", (12, 0), 12, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    # Sixteen and twenty: a quarter of it and less, for which 16 GB of RAM do.
    (geforce("RTX 4060 Ti", (8, 9), 16, 16), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (RTX_4060_TI, INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (geforce("RTX 5060 Ti", (12, 0), 16, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (machine("Tesla T4", (7, 5), 16, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (machine("NVIDIA RTX A4000", (8, 6), 16, 32), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    (machine("NVIDIA RTX 4000 Ada Generation", (8, 9), 20), INT8, "streamed", "bfloat16", "streamed+copies_hidden"),
    # From 24 GB on everything stays, and RAM hardly matters.
    (geforce("RTX 3090", (8, 6), 24, 16), INT8, "resident", "bfloat16", "resident"),
    (RTX_3090, INT8, "resident", "bfloat16", "resident"),
    (RTX_4090, INT8, "resident", "bfloat16", "resident"),
    (RTX_5090, INT8, "resident", "bfloat16", "resident"),
    (machine("NVIDIA L4", (8, 9), 24, 64), INT8, "resident", "bfloat16", "resident"),
    (machine("Quadro RTX 8000", (7, 5), 48, 64), INT8, "resident", "bfloat16", "resident"),
    (machine("NVIDIA L40S", (8, 9), 48, 64), INT8, "resident", "bfloat16", "resident"),
    (
        machine("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 96, 128),
        INT8,
        "resident",
        "bfloat16",
        "resident",
    ),
    (machine("NVIDIA A100-PCIE-40GB", (8, 0), 40, 64), INT8, "resident", "bfloat16", "resident"),
    (machine("NVIDIA A100-SXM4-80GB", (8, 0), 80, 256), INT8, "resident", "bfloat16", "resident"),
    (H100, INT8, "resident", "bfloat16", "resident"),
    (machine("NVIDIA H200", (9, 0), 140, 256), INT8, "resident", "bfloat16", "resident"),
    (machine("NVIDIA B200", (10, 0), 180, 256), INT8, "resident", "bfloat16", "resident"),
    # Two devices: one transformer each, also where one would do.
    (replace(RTX_4060_TI, device_count=2), INT8, "resident", "bfloat16", "resident_pair_timed"),
    (replace(RTX_3090, device_count=2), INT8, "resident", "bfloat16", "resident_pair_timed"),
    # Devices of which nobody has published a time.
    (machine("AMD Radeon RX 6800 XT", (10, 3), 16, kind="rocm"), Q4_K, "resident", "bfloat16", "not_taken+int8_rdna_2"),
    (machine("AMD Radeon RX 7900 XTX", (11, 0), 24, kind="rocm"), INT8, "resident", "bfloat16", "resident"),
    (RX_9070_XT, Q4_K, "resident", "bfloat16", "not_taken+too_much_travels"),
    (machine("Intel Arc A770", None, 16, kind="xpu"), Q4_K, "resident", "bfloat16", "not_taken+int8_intel"),
    (machine("Intel Arc B580", None, 12, kind="xpu"), Q4_K, "streamed", "bfloat16", "not_taken+int8_intel"),
    (apple(8), None, None, "bfloat16", "no_room_streamed"),
    (apple(16), Q4_K, "disk", "bfloat16", "not_taken+int8_apple"),
    (apple(32), Q4_K, "resident", "bfloat16", "not_taken+int8_apple"),
    (apple(36), Q4_K, "resident", "bfloat16", "not_taken+int8_apple"),
    (apple(128), Q4_K, "resident", "bfloat16", "not_taken+int8_apple"),
    (PROCESSOR, None, None, "float32", "no_gpu"),
]
MACHINES = [row[0] for row in TABLE]


def label(value: Any) -> str:
    """A machine's name in a test's."""
    if not isinstance(value, Hardware):
        return ""
    memory, ram = (round((size or 0) / GIB) for size in (value.device_memory_bytes, value.host_memory_bytes))
    return f"{value.device_count}x{value.name.removeprefix('NVIDIA ')}-{memory}-ram{ram}"


def said(reasons: Iterable[Reason], row: str) -> Reason | None:
    """The first reason that a row of `SENTENCES` is part of; None where nobody says it."""
    return next((each for each in reasons if row in each.code.split("+")), None)
