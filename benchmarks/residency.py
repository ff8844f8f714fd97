"""What it costs to keep blocks elsewhere: `python benchmarks/residency.py`, on a machine at rest.

    resident   all blocks in host memory
    disk       all blocks read from the recipe's file in every step, through two places

A pair of transformers of the published widths and a few layers is written with random weights, packed, and drawn with
for a few steps on the processor, every run in a process of its own, ways taking turns. Counted are seconds of a step
(the median after the first), the bytes that travelled, and the process's highest resident memory, which the operating
system reports and no spike escapes. `warm` leaves the file in the system's cache; `cold` has it forgotten before every
run. On a GPU benchmarks/memory.py measures the same beside predicted peaks.

Prints a table, writes one JSON file. Left out: copies from RAM to a device, which a processor has not.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.benchmark.weights import Tiles  # noqa: E402
from ideogram_app.catalog.models import MODELS, Branch  # noqa: E402
from ideogram_app.catalog.presets import PRESETS  # noqa: E402
from ideogram_app.catalog.sources import BRANCHES  # noqa: E402
from ideogram_app.checkpoints.prepared.store import Store  # noqa: E402
from ideogram_app.generation.guidance import GuidedModel  # noqa: E402
from ideogram_app.generation.sampler import denoise, make_noise, schedule, times  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.model.loader import Homes, load_transformers  # noqa: E402
from ideogram_app.prepare.transformers import prepare  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

NAME, CPU = "ideogram-4", torch.device("cpu")
WAYS = ("resident", "disk warm", "disk cold")
TEXT_TOKENS = 60
KB = 1024  # of ru_maxrss on Linux


def main(
    layers: Annotated[int, typer.Option(help="Of each transformer.")] = 4,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 256,
    steps: Annotated[int, typer.Option(help="Of each run, the first of which is not counted.")] = 4,
    rounds: int = 3,
    recipes: str = "int8-w8a8-rotated,gguf-q4_k",
    out: Path = Path("benchmarks/results/residency-cpu.json"),
    way: Annotated[str, typer.Option(hidden=True)] = "",
    data: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure and write."""
    few = replace(MODELS[NAME].conditional, num_layers=layers)
    MODELS[NAME] = replace(MODELS[NAME], conditional=few, unconditional=few)
    if way:
        print(json.dumps(run_once(way, recipes, data, layers, size, steps)))
        return
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        store = made(Path(folder), few, recipes.split(","))
        found = measure(store, recipes.split(","), ["--layers", layers, "--size", size, "--steps", steps], rounds)
    report = {
        "hardware": to_plain(detect(ROOT)),
        "versions": versions(),
        "commit": commit(),
        "layers": layers,
        "size": size,
        "rounds": rounds,
        "rows": [row(recipe, way, runs) for (recipe, way), runs in found.items()],
    }
    for made_row in report["rows"]:
        print("{recipe:18s} {way:10s} {seconds_per_step:6.2f} s/step  peak {peak_gb:5.2f} GB".format(**made_row))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def made(folder: Path, branch: Branch, recipes: list[str]) -> Store:
    """Random weights of both transformers, packed; the source is gone afterwards."""
    tiles, store = Tiles(CPU, torch.bfloat16), Store(folder / "data")
    for name in BRANCHES:
        tensors = {key: tiles.dense(shape, key).contiguous() for key, shape in branch.shapes().items()}
        (folder / "source" / name).mkdir(parents=True)
        save_file(tensors, folder / "source" / name / "diffusion_pytorch_model.safetensors")
        (folder / "source" / name / "config.json").write_text(json.dumps(branch.config()))
        del tensors
    for recipe in recipes:
        print(f"packing {recipe} ...", file=sys.stderr)
        list(prepare(store, NAME, recipe, folder / "source"))
    return store


def measure(
    store: Store, recipes: list[str], settings: list[Any], rounds: int
) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Every recipe in every way, in turns."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for recipe in recipes:
            for way in WAYS:
                if way == "disk cold":
                    forget(store.path(NAME, recipe))
                command = [sys.executable, __file__, "--way", way, "--data", store.root, "--recipes", recipe, *settings]
                output = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
                found.setdefault((recipe, way), []).append(json.loads(output.stdout))
    return found


def run_once(way: str, recipe: str, data: Path, layers: int, size: int, steps: int) -> dict[str, float]:
    """Seconds of a step, and the most memory this process held."""
    homes = Homes.on(CPU) if way == "resident" else Homes((CPU, CPU), (layers, layers), from_disk=True)
    loaded = load_transformers(Store(data), NAME, recipe, homes, torch.bfloat16)
    features = torch.randn(1, TEXT_TOKENS, MODELS[NAME].conditional.llm_features_dim)
    preset = replace(PRESETS["turbo-12"], steps=steps, guidance=PRESETS["turbo-12"].guidance[:steps])
    sigmas = schedule(preset, size, size, 1.0)
    velocity = GuidedModel(loaded, features, size // 16, size // 16, times(sigmas))
    seconds, began = [], time.perf_counter()
    for _ in denoise(velocity, make_noise(0, size, size), sigmas, preset.guidance):
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KB
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": peak, "weight_bytes": loaded.weight_bytes}


def forget(folder: Path) -> None:
    """Have the system drop what it keeps of a folder's files."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("This system cannot be told to forget a file; measure on Linux")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row(recipe: str, way: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds; spread is (largest - smallest) / median."""
    seconds = [run["seconds"] for run in runs]
    return {
        "recipe": recipe,
        "way": way,
        "seconds_per_step": statistics.median(seconds),
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "peak_gb": statistics.median(run["peak_bytes"] for run in runs) / 1e9,
        "weights_gb": runs[0]["weight_bytes"] / 1e9,
    }


if __name__ == "__main__":
    typer.run(main)
