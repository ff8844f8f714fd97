"""Every recipe on one model, measured in one run and interleaved: `python benchmarks/compare_recipes.py`.

Whole comparisons are repeated, so that each round visits every recipe once and a drift of the machine's speed meets all
of them alike; the first round warms up and is not counted. Prints a table, writes one JSON file.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.recipes import RECIPES  # noqa: E402
from ideogram_app.cli.output import describe_result  # noqa: E402
from ideogram_app.generation.captions import parse_prompt  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.planning.inputs import PlanInputs  # noqa: E402
from ideogram_app.planning.planned_request import plan_request  # noqa: E402
from ideogram_app.records import Request, Result  # noqa: E402
from ideogram_app.studio.local_backend import LocalBackend  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

PROMPT = "a large red circle at the top left and the word HELLO in black letters on a yellow background"


def main(
    model: str = "miniature",
    preset: str = "default-20",
    side: int = 128,
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one that warms up.")] = 5,
    out: Path = Path("benchmarks/results/miniature-recipes-cpu.json"),
) -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        backend = LocalBackend(Path(folder))
        hardware = detect(Path(folder))
        for recipe in RECIPES:
            if backend.status(model, recipe).state == "missing":
                list(backend.prepare(model, recipe))
        caption = parse_prompt(PROMPT).caption
        tokens = backend.tokens(model, caption)
        found: dict[str, list[Result]] = {recipe: [] for recipe in RECIPES}
        for turn in range(rounds + 1):
            request = Request(model, caption, tuple(RECIPES), preset, side, side, seed=turn)
            planned = plan_request(request, PlanInputs.of_request(request, hardware), tokens)
            for event in backend.compare(planned, Path(folder) / str(turn)):
                if event.result and turn:
                    found[event.result.recipe].append(event.result)
                    print(f"round {turn}  {describe_result(event.result)}", flush=True)
    report = {
        "hardware": to_plain(hardware),
        "versions": versions(),
        "commit": commit(),
        "model": model,
        "preset": preset,
        "size": [side, side],
        "compute_dtype": planned.encoding.compute_dtype,
        "rounds": rounds,
        "rows": [row(recipe, results) for recipe, results in found.items()],
    }
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": report["rows"]}))


def row(recipe: str, results: list[Result]) -> dict[str, Any]:
    """Medians over the rounds; spread is (largest - smallest) / median of the time a step."""
    steps = [1000 * (result.seconds_per_step or 0) for result in results]

    def median(name: str) -> float | None:
        values = [getattr(result, name) for result in results if getattr(result, name) is not None]
        return statistics.median(values) if values else None

    return {
        "name": f"ours-{recipe}",
        "recipe": recipe,
        "ms_per_step": statistics.median(steps),
        "spread": (max(steps) - min(steps)) / statistics.median(steps),
        "load_seconds": statistics.median(result.seconds.load for result in results),
        "weight_bytes": results[0].weight_bytes,
        "peak_memory_bytes": median("peak_memory_bytes"),
        "psnr": median("psnr"),
        "ssim": median("ssim"),
        "errors": [result.error for result in results if result.error],
    }


if __name__ == "__main__":
    typer.run(main)
