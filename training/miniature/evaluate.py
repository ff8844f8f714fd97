"""Draws held-out captions with stock diffusers and scores them: `python -m training.miniature.evaluate`.

Stock `Ideogram4Pipeline` on purpose: what is judged is the model that ships, not our way of running it. The same scenes
are asked for as JSON captions, as plain sentences and as plain sentences in the app's wrap.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import Ideogram4Pipeline
from PIL import Image

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.presets import PRESETS, Preset
from ideogram_app.files import write_json
from ideogram_app.machine.versions import versions
from ideogram_app.wire import to_plain
from training.miniature import scenes
from training.miniature.score import Tally, score

FORMS: dict[str, Callable[[scenes.Scene], str]] = {
    "json": scenes.to_json,
    "plain": scenes.to_plain,
    "wrapped": scenes.to_wrapped,
    "vague": scenes.to_wrapped,
}
BATCH = 20


def held_out_scenes(count: int) -> list[scenes.Scene]:
    """The first `count` distinct scenes that training never saw."""
    rng = random.Random(12345)
    found: dict[scenes.Scene, None] = {}
    while len(found) < count:
        scene = scenes.sample_scene(rng)
        if scenes.is_held_out(scene):
            found[scene] = None
    return list(found)


def draw_captions(
    pipeline: Any, captions: list[str], preset: Preset, guidance: float, seed: int = 0
) -> list[Image.Image]:
    """One 128 x 128 picture a caption, through the stock pipeline, in batches."""
    generator = torch.Generator().manual_seed(seed)
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        drawn = pipeline(
            captions[start : start + BATCH],
            height=scenes.SIDE,
            width=scenes.SIDE,
            num_inference_steps=preset.steps,
            guidance_scale=guidance,
            guidance_schedule=None,
            mu=preset.mu,
            std=preset.std,
            max_sequence_length=64,
            generator=generator,
        )
        pictures += drawn.images
    return pictures


def evaluate(pipeline: Any, count: int, form: str, guidance: float, preset: str = "default-20") -> Tally:
    """Score `count` held-out captions of one form; vague ones name a shape, its colour and the background alone."""
    asked = held_out_scenes(count)
    if form == "vague":
        asked = [
            scenes.Scene(s.background, (scenes.Thing(s.things[0].shape, s.things[0].colour),))
            for s in asked
            if s.things
        ]
    pictures = draw_captions(pipeline, [FORMS[form](scene) for scene in asked], PRESETS[preset], guidance)
    return sum((score(scene, picture) for scene, picture in zip(asked, pictures, strict=True)), Tally())


def load(path: Path) -> Any:
    """The pipeline in float32, without progress bars."""
    pipeline = Ideogram4Pipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(
    path: Path = Path("assets/miniature"),
    count: int = 200,
    guidance: Annotated[list[float] | None, typer.Option(help="May be given several times.")] = None,
    forms: Annotated[
        list[str] | None, typer.Option("--form", help="json, plain, wrapped, vague; all when absent.")
    ] = None,
    preset: str = "default-20",
    out: Annotated[Path | None, typer.Option(help="Where the shares go, as JSON.")] = None,
) -> None:
    """Print the share of right answers for each form of caption and each guidance."""
    pipeline = load(path)
    rows = []
    for weight in guidance or [MODELS["miniature"].guidance or 1.0]:
        for form in forms or list(FORMS):
            started = time.monotonic()
            tally = evaluate(pipeline, count, form, weight, preset)
            seconds = (time.monotonic() - started) / count
            print(f"{preset} guidance {weight} {form}: {tally.shares()} ({seconds:.2f} s a picture)", flush=True)
            rows.append({"form": form, "guidance": weight, "shares": tally.shares(), "counts": to_plain(tally)})
    if out:
        write_json(out, {"preset": preset, "captions": count, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
