"""How often the 90 % intervals of plans hold: `python benchmarks/intervals.py`, pictures of the miniature on this CPU.

Pictures of mixed sizes, recipes, presets, captions and limits of RAM are drawn one after another, in an order that a
seed makes. Each is planned with what the ones before have taught, in a data folder of its own, and its seconds and peak
are held against the intervals of its plan. A recipe's first picture has no time to be held: nobody published one for
the miniature.

Prints a line for each picture, writes one JSON file. Left out: devices, and downloads, of which the miniature has none.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.planning.inputs import PlanInputs  # noqa: E402
from ideogram_app.planning.intervals import QUANTITIES, Outcome, held, outcomes_of  # noqa: E402
from ideogram_app.planning.planned_request import plan_request  # noqa: E402
from ideogram_app.records import Request  # noqa: E402
from ideogram_app.studio.local_backend import LocalBackend  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

MODEL = "miniature"
CAPTIONS = ROOT / "assets" / "prompts" / "calibration-miniature.jsonl"
RECIPES = ("reference", "int8-w8a8-rotated", "int8-w8a8", "fp8", "gguf-q8_0", "gguf-q4_k")
SIZES = ((64, 64), (128, 128), (192, 128), (256, 192))
PRESETS = ("turbo-12", "default-20")
LIMITS = (None, 2_600_000_000, 4_000_000_000)  # bytes of RAM to plan with


def main(
    pictures: int = 60,
    seed: int = 13,
    out: Path = Path("benchmarks/results/intervals.json"),
) -> None:
    """Draw, compare with the plans, and write."""
    found: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        backend = LocalBackend(Path(folder) / "data")
        hardware = backend.detect()
        for recipe in RECIPES:
            if not backend.status(MODEL, recipe).usable:
                list(backend.prepare(MODEL, recipe))
        for number, request in enumerate(requests(pictures, seed)):
            inputs = PlanInputs.of_request(request, hardware, known=backend.known(hardware))
            planned = plan_request(request, inputs, backend.tokens(MODEL, request.caption))
            (result,) = [event.result for event in backend.compare(planned, Path(folder) / str(number)) if event.result]
            if result.error:
                raise SystemExit(f"{request.recipes[0]} was not drawn: {result.error}")
            seen = outcomes_of(result, MODEL)
            outcomes += seen
            found.append(row(request, seen))
            print(json.dumps(found[-1]), flush=True)
    report = {
        "hardware": to_plain(hardware),
        "versions": versions(),
        "commit": commit(),
        "pictures": pictures,
        "seed": seed,
        "coverage": coverage(outcomes),
        "rows": found,
    }
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["coverage"]))


def requests(pictures: int, seed: int) -> Iterator[Request]:
    """Mixed pictures, every recipe as often as any other."""
    chance = random.Random(seed)
    captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
    recipes = [RECIPES[number % len(RECIPES)] for number in range(pictures)]
    chance.shuffle(recipes)
    for number, recipe in enumerate(recipes):
        (width, height), limit = chance.choice(SIZES), chance.choice(LIMITS)
        caption, preset = chance.choice(captions), chance.choice(PRESETS)
        yield Request(MODEL, caption, (recipe,), preset, width, height, seed=number, host_limit_bytes=limit)


def row(request: Request, seen: Sequence[Outcome]) -> dict[str, Any]:
    """One picture: each number as it was expected, its interval, and what was measured."""
    numbers = {
        each.quantity: {
            "basis": each.basis,
            "expected": each.expected,
            "range": [each.low, each.high],
            "assumed": each.assumed,
            "measured": each.measured,
            "held": each.held,
        }
        for each in seen
    }
    size = [request.width, request.height]
    return {"recipe": request.recipes[0], "size": size, "preset": request.preset, "numbers": numbers}


def coverage(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of each quantity and of all: the share that held, of how many, and how wide ranges were, early and late: medians
    of high less low, over the expected number."""
    counts = held(outcomes)
    rows: dict[str, Any] = {}
    for quantity in (name for name in QUANTITIES if name in counts):
        own = [each for each in outcomes if each.quantity == quantity]
        widths = [(each.high - each.low) / each.expected for each in own]
        half = len(own) // 2
        rows[quantity] = {
            "held": counts[quantity].held,
            "of": counts[quantity].of,
            "share": counts[quantity].held / counts[quantity].of,
            "width_over_expected": {
                "first_half": statistics.median(widths[:half] or widths),
                "second_half": statistics.median(widths[half:]),
            },
        }
    inside = sum(count.held for count in counts.values())
    of = sum(count.of for count in counts.values())
    return {**rows, "all": {"held": inside, "of": of, "share": inside / of}}


if __name__ == "__main__":
    typer.run(main)
