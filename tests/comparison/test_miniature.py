"""The shipped miniature, through stock diffusers: it draws what is asked for, and guidance and seeds do something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.checkpoints.prepared.manifest import verify_sums
from training.miniature.evaluate import draw_captions, evaluate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GUIDANCE = MODELS["miniature"].guidance or 1.0


def drawn(stock: Any, caption: str, seed: int = 0, guidance: float = GUIDANCE) -> Image.Image:
    return draw_captions(stock, [caption], PRESETS["turbo-12"], guidance, seed)[0]


def test_it_is_the_architecture_that_the_planner_counts_with(stock: Any) -> None:
    for module, branch in zip(
        (stock.transformer, stock.unconditional_transformer), MODELS["miniature"].branches, strict=True
    ):
        counted = Branch(**{name: module.config[name] for name in Branch.__dataclass_fields__})
        assert counted == branch
        assert sum(parameter.numel() for parameter in module.parameters()) == branch.parameters()
    assert len(stock.text_encoder.language_model.layers) == 36


def test_it_is_small_enough_to_ship() -> None:
    size = sum(file.stat().st_size for file in (ROOT / "assets" / "miniature").rglob("*") if file.is_file())
    assert size < 30_000_000


def test_its_files_are_the_ones_that_were_written() -> None:
    parts = ("text_encoder", "tokenizer", "vae", "transformer", "unconditional_transformer")
    verify_sums(ROOT / "assets" / "miniature", parts)
    recorded = json.loads((ROOT / "assets" / "miniature" / "sha256.json").read_text(encoding="utf-8"))
    assert sorted({name.split("/")[0] for name in recorded}) == sorted(parts)


@pytest.mark.parametrize(("form", "count", "allowance"), [("json", 30, 0), ("plain", 15, 10), ("wrapped", 15, 10)])
def test_it_draws_what_held_out_captions_ask_for(stock: Any, form: str, count: int, allowance: int) -> None:
    """Few captions and twelve steps: bars are a little below those of the full evaluation (benchmarks/results)."""
    shares = evaluate(stock, count, form, GUIDANCE, "turbo-12").shares()
    bars = {"background": 93, "colour": 88, "place": 88, "shape": 84, "letters": 80}
    assert all(shares[name] >= bar - allowance for name, bar in bars.items()), shares


def test_a_vague_caption_gives_different_pictures_for_different_seeds(stock: Any) -> None:
    pictures = [numpy.asarray(drawn(stock, "a red circle", seed)).astype(int) for seed in range(4)]
    differences = [numpy.abs(first - second).mean() for first in pictures for second in pictures if first is not second]
    assert max(differences) > 10


def test_guidance_changes_the_picture(stock: Any) -> None:
    weak, strong = (drawn(stock, "a blue square on a white background", guidance=weight) for weight in (1.0, 3.0))
    assert numpy.abs(numpy.asarray(weak).astype(int) - numpy.asarray(strong).astype(int)).max() > 8
