"""Cards as they are sold, and a mostly idle machine with one, for the pages' tables and for the golden record.

Left out: the program. What is recorded to watch its rebuilding must not depend on how it is built inside.
"""

from __future__ import annotations

from typing import Any

GIB = 2**30
TAKEN_SHARE = 0.04  # of a card's memory is in use by the desktop before anything starts
Card = tuple[str, tuple[int, int], int, int, int]
# Name as the driver has it, compute capability, memory in GiB, RAM in GiB, how many.
CARDS: tuple[Card, ...] = (
    ("GTX 1660", (7, 5), 6, 16, 1),
    ("RTX 2060", (7, 5), 6, 16, 1),
    ("RTX 2060", (7, 5), 6, 32, 1),
    ("RTX 4060 Laptop GPU", (8, 9), 8, 16, 1),
    ("RTX 4060", (8, 9), 8, 32, 1),
    ("RTX 3080", (8, 6), 10, 32, 1),
    ("RTX 3060", (8, 6), 12, 16, 1),
    ("RTX 3060", (8, 6), 12, 32, 1),
    ("RTX 5070", (12, 0), 12, 32, 1),
    ("RTX 4060 Ti", (8, 9), 16, 16, 1),
    ("RTX 4060 Ti", (8, 9), 16, 32, 2),
    ("RTX 3090", (8, 6), 24, 32, 1),
    ("RTX 4090", (8, 9), 24, 64, 1),
    ("RTX 5090", (12, 0), 32, 64, 1),
    ("H100", (9, 0), 80, 256, 1),
)


def described(card: Card) -> dict[str, Any]:
    """The fields of `Hardware` as `doctor --json` prints them; a quarter of the RAM is taken."""
    name, capability, memory, ram, count = card
    return {
        "kind": "cuda",
        "name": name,
        "compute_capability": capability,
        "device_count": count,
        "device_memory_bytes": memory * GIB,
        "device_free_bytes": int(memory * GIB * (1 - TAKEN_SHARE)),
        "host_memory_bytes": ram * GIB,
        "host_free_bytes": int(ram * GIB * 0.75),
        "disk_free_bytes": 500 * 10**9,
    }
