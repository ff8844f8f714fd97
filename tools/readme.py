"""The tables in README.md that are made from the code: `python tools/readme.py` writes them, a test keeps them equal.

Each table stands between two comments, `<!-- made: name -->` and `<!-- end -->`; what is between them is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.architecture import MODELS, Model, weight_bytes  # noqa: E402
from ideogram_app.hardware import Hardware  # noqa: E402
from ideogram_app.planner import plan  # noqa: E402
from ideogram_app.presets import PRESETS  # noqa: E402
from ideogram_app.recipes import RECIPES, Recipe  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
# Cards as they are sold: name, compute capability, device memory in GiB, RAM in GiB.
CARDS = (
    ("GTX 1660", (7, 5), 6, 16),
    ("RTX 2060", (7, 5), 6, 16),
    ("RTX 3060", (8, 6), 12, 32),
    ("RTX 3090", (8, 6), 24, 64),
    ("RTX 4060", (8, 9), 8, 32),
    ("RTX 4060 Ti", (8, 9), 16, 32),
    ("RTX 4090", (8, 9), 24, 64),
    ("RTX 5090", (12, 0), 32, 64),
    ("H100", (9, 0), 80, 256),
)
TAKEN_SHARE = 0.04  # of a card's memory is in use by the desktop before anything starts


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recipe_table() -> str:
    """Every row of recipes.py with the size of both transformers."""
    header = ["recipe", "Ideogram 4", "miniature", "computes in", "what it is"]
    rows = [
        [f"`{r.name}`", _size(r, MODELS["ideogram-4"]), _size(r, MODELS["miniature"]), r.compute, r.summary]
        for r in RECIPES.values()
    ]
    return table(header, rows)


def preset_table() -> str:
    """Every row of presets.py."""
    header = ["preset", "steps", "guidance of Ideogram 4", "guidance of the miniature", "mu", "std"]
    miniature = MODELS["miniature"].guidance
    rows = [
        [
            f"`{p.name}`",
            str(p.steps),
            f"{p.guidance[0]:g}, then {p.guidance[-1]:g}",
            f"{miniature:g}",
            f"{p.mu:g}",
            f"{p.std:g}",
        ]
        for p in PRESETS.values()
    ]
    return table(header, rows)


def card_table() -> str:
    """What the planner decides for cards as they are sold, at 1024 x 1024."""
    rows = []
    for name, capability, memory, ram in CARDS:
        decided = plan(described(name, capability, memory, ram), "ideogram-4")
        recipe = f"`{decided.recipe}`" if decided.recipe else "nothing fits"
        peak = f"{decided.predicted.peak_device_bytes / 1e9:.1f} GB" if decided.fits else "–"
        rows.append([name, f"{memory} GB", recipe, decided.residency or "–", decided.compute_dtype, peak])
    return table(["card", "memory", "plan", "transformers", "computes in", "predicted peak"], rows)


def described(name: str, capability: tuple[int, int], memory: int, ram: int) -> Hardware:
    """A machine with one card, mostly idle."""
    return Hardware(
        kind="cuda",
        name=name,
        compute_capability=capability,
        device_memory_bytes=memory * GIB,
        device_free_bytes=int(memory * GIB * (1 - TAKEN_SHARE)),
        host_memory_bytes=ram * GIB,
        host_free_bytes=int(ram * GIB * 0.8),
        disk_free_bytes=500 * 10**9,
    )


def measured_table() -> str:
    """The miniature's recipes as benchmarks/compare_recipes.py measured them."""
    measured: dict[str, Any] = json.loads((RESULTS / "miniature-recipes-cpu.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['ms_per_step']:.0f} ms",
            f"{row['weight_bytes'] / 1e6:.1f} MB",
            f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
            "–" if row["psnr"] is None else f"{row['psnr']:.1f} dB",
            "–" if row["ssim"] is None else f"{row['ssim']:.4f}",
        ]
        for row in measured["rows"]
    ]
    header = ["recipe", "a step", "weights", "peak memory", "PSNR", "SSIM"]
    return table(header, rows)


def score_table() -> str:
    """How often the miniature draws what a held-out caption asks for, as evaluate.py measured it."""
    measured: dict[str, Any] = json.loads((RESULTS / "miniature-scores.json").read_text(encoding="utf-8"))
    names = ["background", "colour", "shape", "place", "letters", "words", "captions"]
    rows = [
        [row["form"], *(f"{row['shares'][name]:.1f} %" if name in row["shares"] else "–" for name in names)]
        for row in measured["rows"]
    ]
    return table(["captions", *names[:-1], "everything"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "recipes": recipe_table,
    "presets": preset_table,
    "cards": card_table,
    "measured": measured_table,
    "scores": score_table,
}


def filled(text: str) -> str:
    """The text with every table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- made: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def _size(recipe: Recipe, model: Model) -> str:
    total = sum(weight_bytes(branch, recipe) for branch in model.branches)
    return f"{total / 1e9:.1f} GB" if total > 1e9 else f"{total / 1e6:.1f} MB"


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
