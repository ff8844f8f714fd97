"""What each choice beside the recipe gains and costs, in one run and interleaved: `python benchmarks/choices.py`.

Savings, presets and the arithmetic of Q4_K, on held-out captions of the miniature, every second one vague, each with a
seed of its own. For each caption all rows are drawn one after another, in an order that turns from caption to caption,
so that a drift of the machine's speed meets all of them alike. Told are the time of a picture's steps, how many blocks
ran, the distance to the whole picture of the reference at the same preset, and what `training/miniature/score.py` says
of the pictures. Prints a table, writes one JSON file.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.models import MODELS  # noqa: E402
from ideogram_app.catalog.presets import PRESETS, find_preset, guidance_for  # noqa: E402
from ideogram_app.catalog.speedups import SPEEDUPS  # noqa: E402
from ideogram_app.checkpoints.prepared.store import Store  # noqa: E402
from ideogram_app.comparison.metrics import psnr  # noqa: E402
from ideogram_app.generation.guidance import GuidedModel  # noqa: E402
from ideogram_app.generation.sampler import decode, denoise, make_noise, schedule, times  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.model.components import Components, load_components  # noqa: E402
from ideogram_app.model.loader import Loaded, load_transformers  # noqa: E402
from ideogram_app.model.text_encoder.features import encode  # noqa: E402
from ideogram_app.prepare.transformers import prepare  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402
from training.miniature import scenes  # noqa: E402
from training.miniature.evaluate import held_out_scenes  # noqa: E402
from training.miniature.score import Tally, score  # noqa: E402

MODEL, CELLS, CPU = MODELS["miniature"], scenes.SIDE // 16, torch.device("cpu")


@dataclass
class Row:
    """One way to draw, and what came of it."""

    name: str
    preset: str = "default-20"
    savings: tuple[str, ...] = ()
    recipe: str = "reference"
    arithmetic: str = ""
    seconds: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def told(self, whole: Row) -> dict[str, Any]:
        """Medians; times and block counts as shares of the whole picture's at `default-20`."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, whole.seconds, strict=True)]
        return {
            "name": self.name,
            "preset": self.preset,
            "savings": self.savings,
            "recipe": self.recipe,
            "arithmetic": self.arithmetic,
            "ms_a_picture": 1000 * statistics.median(self.seconds),
            "time": statistics.median(ratios),
            "blocks": sum(self.blocks) / sum(whole.blocks),
            "psnr": statistics.median(self.distance) if self.distance else None,
            "psnr_worst": min(self.distance) if self.distance else None,
            "shares": self.tally.shares(),
        }


def rows() -> list[Row]:
    """Whole pictures at every preset, then everything that is left out or rounded at `default-20`."""
    whole = [Row(name, name) for name in ("default-20", *(name for name in PRESETS if name != "default-20"))]
    saved = [Row(name, savings=(name,)) for name in SPEEDUPS]
    quartered = [Row(f"gguf-q4_k, {kind}", recipe="gguf-q4_k", arithmetic=kind) for kind in ("w4a16", "w4a8")]
    return [*whole, *saved, *quartered]


def main(
    pictures: Annotated[int, typer.Option(help="Held-out captions, each with a seed of its own.")] = 60,
    out: Path = Path("benchmarks/results/choices.json"),
    threads: int = 1,
) -> None:
    """Measure and write."""
    torch.set_num_threads(threads)
    parts, made = load_components(MODEL.name, CPU, torch.float32), rows()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        list(prepare(store, MODEL.name, "gguf-q4_k"))
        loaded = {(row.recipe, row.arithmetic): _load(store, row) for row in made}
        hardware = to_plain(detect(Path(folder)))
    for number, (scene, caption) in enumerate(captions(pictures)):
        features = encode(parts.tokenizer, parts.text_encoder, caption)
        drawn = {}
        for row in made[number % len(made) :] + made[: number % len(made)]:
            drawn[row.name] = draw(row, loaded[row.recipe, row.arithmetic], parts, features, number)
            row.tally += score(scene, drawn[row.name])
        for row in made:
            if row.name != row.preset:
                row.distance.append(psnr(drawn[row.name], drawn[row.preset]))
        print(f"caption {number + 1} of {pictures}", file=sys.stderr)
    report = {
        "hardware": hardware,
        "versions": versions(),
        "commit": commit(),
        "model": MODEL.name,
        "pictures": pictures,
        "rows": [row.told(made[0]) for row in made],
    }
    for row in report["rows"]:
        print(f"{row['name']:24} {row['time']:5.2f} of the time, {row['blocks']:5.2f} of the blocks  {row['shares']}")
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": report["rows"]}))


def captions(count: int) -> Iterator[tuple[scenes.Scene, str]]:
    """Held-out scenes and how they are asked for: every second one says only a shape, its colour and the background."""
    for number, scene in enumerate(held_out_scenes(count)):
        if number % 2 and scene.things:
            scene = scenes.Scene(scene.background, (scenes.Thing(scene.things[0].shape, scene.things[0].colour),))
        yield scene, scenes.to_wrapped(scene)


def draw(row: Row, loaded: Loaded, parts: Components, features: Tensor, seed: int) -> Image.Image:
    """One picture; its time and the number of blocks that ran are noted in the row."""
    preset = find_preset(row.preset)
    sigmas = schedule(preset, scenes.SIDE, scenes.SIDE, parts.shift)
    ran = [0]

    def count(*_: Any) -> None:
        ran[0] += 1

    handles = [block.register_forward_pre_hook(count) for module in loaded.modules for block in module.trunk.blocks]
    velocity = GuidedModel(loaded, features, CELLS, CELLS, times(sigmas), row.savings)
    start = time.perf_counter()
    guidance = guidance_for(preset, MODEL)
    *_, last = denoise(velocity, make_noise(seed, scenes.SIDE, scenes.SIDE), sigmas, guidance)
    row.seconds.append(time.perf_counter() - start)
    for handle in handles:
        handle.remove()
    row.blocks.append(ran[0])
    return decode(parts.vae, last.latents, CELLS, CELLS)


def _load(store: Store, row: Row) -> Loaded:
    return load_transformers(store, MODEL.name, row.recipe, CPU, torch.float32, arithmetic=row.arithmetic)


if __name__ == "__main__":
    typer.run(main)
