"""What packing the text encoder costs, seen through its features and its pictures: `python benchmarks/encoder.py`.

    miniature    relative error of the features at each tap, and PSNR of pictures when the encoder alone is packed
    full width   two layers as wide as the published encoder's, random heavy-tailed weights: error behind each

The miniature's rows, 64 and 160 wide, are no whole number of Q4_K's blocks, so `encoder-q4_k` falls back to Q8_0 there;
the rows marked `padded` fill them up with zeros to blocks of 256 and stand for what Q4_K itself does. Random weights
are a hard case in one way, as no residual stream outweighs what a layer adds, and an easy one in another: trained ones
have outlier channels. So full width compares recipes; how far real features move, the published weights must tell.
Prints a table and one JSON line, writes one JSON file.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.models import TAPS, find_model  # noqa: E402
from ideogram_app.catalog.presets import find_preset, guidance_for  # noqa: E402
from ideogram_app.catalog.recipes import Recipe  # noqa: E402
from ideogram_app.catalog.text_encoder import (  # noqa: E402
    EMBEDDING_TABLE,
    ENCODER_RECIPES,
    PUBLISHED_ENCODER,
    TextEncoder,
    encoder_bytes,
)
from ideogram_app.checkpoints.prepared.store import Store  # noqa: E402
from ideogram_app.checkpoints.published.local import local_folder  # noqa: E402
from ideogram_app.checkpoints.published.text_encoder import TextEncoderCheckpoint  # noqa: E402
from ideogram_app.comparison.metrics import psnr  # noqa: E402
from ideogram_app.generation.guidance import GuidedModel  # noqa: E402
from ideogram_app.generation.sampler import decode, denoise, make_noise, schedule, times  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.model.components import Components, load_components  # noqa: E402
from ideogram_app.model.loader import Loaded, load_transformers  # noqa: E402
from ideogram_app.model.text_encoder.encoder import CaptionEncoder, EncoderWeights, encoder_from_source  # noqa: E402
from ideogram_app.model.text_encoder.features import features, tokenize  # noqa: E402
from ideogram_app.model.transformer.layers import weight_bytes  # noqa: E402
from ideogram_app.quantization import k_quants  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402
from training.miniature.evaluate import held_out_scenes  # noqa: E402
from training.miniature.scenes import to_json  # noqa: E402

CPU = torch.device("cpu")
DENSE = ENCODER_RECIPES["encoder-dense"]
SIDE, TOKENS_A_SIDE = 128, 8  # of the miniature's pictures
WIDE = TextEncoder(2, 4096, 12288, 32, 8, 128, vocab_size=4096)  # 0.40 billion weights
DEGREES = 5  # of freedom of Student's t, whose tails are heavier than normal ones, as trained weights' are
TOKENS = 64

Case = tuple[str, Recipe, EncoderWeights]


def main(
    pictures: Annotated[int, typer.Option(help="Pictures of each recipe, one caption and seed each.")] = 8,
    preset: str = "default-20",
    out: Path = Path("benchmarks/results/encoder.json"),
) -> None:
    """Measure and write."""
    rows = [*miniature(pictures, preset), *full_width()]
    report = {
        "hardware": to_plain(detect(ROOT)),
        "versions": versions(),
        "commit": commit(),
        "pictures": pictures,
        "preset": preset,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows}))


class Decoded:
    """A source whose matrices were packed in one GGML type and decoded again, rows padded to whole blocks with zeros.

    Attributes:
        table: the type of the embedding table.
    """

    def __init__(self, source: EncoderWeights, kind: str, table: str) -> None:
        self.encoder, self.config, self.source, self.kind, self.table = (
            source.encoder,
            source.config,
            source,
            kind,
            table,
        )

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        weight = self.source.tensor(name, rows)
        if weight.dim() < 2:
            return weight
        kind = self.table if name == f"{EMBEDDING_TABLE}.weight" else self.kind
        columns, block = weight.shape[1], k_quants.find_format(kind).weights
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % block))
        return k_quants.decode(k_quants.encode(padded, kind), kind)[:, :columns]


class Random:
    """Heavy-tailed weights in bfloat16, held in memory; norms near one."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
        self.config: dict[str, Any] = {**vars(encoder), "rms_norm_eps": 1e-6, "rope_parameters": rope}
        generator = numpy.random.default_rng(0)
        self._tensors = {}
        for name, shape in encoder.shapes().items():
            draws = torch.from_numpy(generator.standard_t(DEGREES, shape))
            scaled = 1 + 0.1 * draws if len(shape) == 1 else draws / (shape[1] * DEGREES / (DEGREES - 2)) ** 0.5
            self._tensors[name] = scaled.bfloat16()

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self._tensors[name][rows or slice(None)]


def miniature(pictures: int, preset: str) -> Iterator[dict[str, Any]]:
    """A row a case: features over all captions at once, pictures against those of the dense encoder."""
    parts = load_components("miniature", CPU, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_transformers(Store(Path(folder)), "miniature", "reference", CPU, torch.float32)
    source = TextEncoderCheckpoint(local_folder("miniature") / "text_encoder")
    captions = [tokenize(parts.tokenizer, to_json(scene)) for scene in held_out_scenes(pictures)]
    reference: list[tuple[Tensor, Image.Image]] = []
    for name, recipe, weights in cases(source, ("Q8_0", "Q4_K")):
        row, encoder = built(name, recipe, weights)
        texts = [features(encoder, ids) for ids in captions]
        drawn = [draw(parts, loaded, text, preset, seed) for seed, text in enumerate(texts)]
        reference = reference or list(zip(texts, drawn, strict=True))
        expected = torch.cat([text for text, _ in reference], 1)
        ratios = [psnr(picture, truth) for picture, (_, truth) in zip(drawn, reference, strict=True)]
        yield shown(
            row | {"model": "miniature", "taps": list(encoder_error(expected, torch.cat(texts, 1)))},
            psnr_median=statistics.median(ratios),
            psnr_lowest=min(ratios),
        )


def full_width() -> Iterator[dict[str, Any]]:
    """A row a case: the error behind each of two layers, and what the whole published encoder would take."""
    source = Random(WIDE)
    ids = torch.arange(TOKENS)[None] * 61 % WIDE.vocab_size
    expected: Tensor | None = None
    for name, recipe, weights in cases(source, ("Q4_K",)):
        row, encoder = built(name, recipe, weights)
        got = features(encoder, ids, taps=range(WIDE.num_hidden_layers))
        expected = got if expected is None else expected
        errors = encoder_error(expected, got, WIDE.num_hidden_layers)
        published = encoder_bytes(PUBLISHED_ENCODER, recipe) if weights is source else None
        yield shown(row | {"model": "full width", "taps": list(errors)}, published_bytes=published)


def encoder_error(reference: Tensor, got: Tensor, taps: int = TAPS) -> tuple[float, ...]:
    """How far features are from the reference's, at each tap: |got - reference| / |reference|, as norms.

    Args:
        reference, got: (1, n, taps x hidden), interleaved as model/text_encoder/features.py makes them.
    """
    expected = reference.double().unflatten(-1, (-1, taps))  # (1, n, hidden, taps)
    difference = got.double().unflatten(-1, (-1, taps)) - expected
    return tuple((difference.square().sum((0, 1, 2)) / expected.square().sum((0, 1, 2))).sqrt().tolist())


def cases(source: EncoderWeights, tables: tuple[str, ...]) -> Iterator[Case]:
    """Every recipe, the dense one first; then Q4_K with rows padded, the table in each of these types."""
    for recipe in ENCODER_RECIPES.values():
        yield recipe.name, recipe, source
    for table in tables:
        yield f"padded Q4_K, table {table}", DENSE, Decoded(source, "Q4_K", table)


def built(name: str, recipe: Recipe, weights: EncoderWeights) -> tuple[dict[str, Any], CaptionEncoder]:
    """The encoder of a case, and the beginning of its row."""
    encoder = encoder_from_source(weights, recipe, CPU, torch.float32)
    size = weight_bytes(encoder) if not isinstance(weights, Decoded) else None
    return {"name": name, "recipe": recipe.name, "weight_bytes": size}, encoder


def draw(parts: Components, loaded: Loaded, text: Tensor, preset: str, seed: int) -> Image.Image:
    """The miniature's picture for these text features (1, n, taps x hidden)."""
    steps = find_preset(preset)
    sigmas = schedule(steps, SIDE, SIDE, parts.shift)
    velocity = GuidedModel(loaded, text, TOKENS_A_SIDE, TOKENS_A_SIDE, times(sigmas))
    guidance = guidance_for(steps, find_model("miniature"), None)
    *_, last = denoise(velocity, make_noise(seed, SIDE, SIDE), sigmas, guidance)
    return decode(parts.vae, last.latents, TOKENS_A_SIDE, TOKENS_A_SIDE)


def shown(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The row, printed."""
    worst, size = max(row["taps"]), row["weight_bytes"]
    mean = statistics.mean(row["taps"])
    extra = "  ".join(f"{name} {value:.4g}" for name, value in more.items() if value is not None)
    held = f"{size:>13,} bytes" if size else ""
    print(f"{row['model']:11} {row['name']:24} error {mean:7.4f} mean {worst:7.4f} worst  {held}  {extra}", flush=True)
    return row | more


if __name__ == "__main__":
    typer.run(main)
