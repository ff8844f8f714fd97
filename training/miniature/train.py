"""Makes assets/miniature: `python -m training.miniature.train --work runs/miniature`.

Stages, each saved in the work folder and skipped when its file is there, so that a killed run goes on where it was:

    autoencoder      the VAE, on drawn scenes
    latents          every training scene encoded, every caption tokenized
    conditional      text encoder and conditional transformer together, by wall-clock budget, saved every two minutes
    unconditional    the second transformer, started from three layers of the first, on pictures alone
    export           the pipeline in diffusers' layout, bf16

The loss is flow matching's: noise and data are mixed at a level sigma, the network predicts data - noise. Levels are
drawn where a caption matters: at 128 x 128 the loss with the right and with a wrong caption is the same below sigma
0.5, so logit(sigma) ~ N(2.4, 1.5).

Left out: a weight average (the rate decays to 2 % instead), data augmentation, several devices.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy
import torch
import typer
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ideogram_app.checkpoints.prepared.manifest import write_sums
from ideogram_app.files import bytes_taken, replacing
from ideogram_app.model.text_encoder.features import tokenize
from ideogram_app.text import gb
from training.miniature import blueprint, scenes
from training.miniature.autoencoder import encode, normalise, set_statistics, train_autoencoder
from training.miniature.network import TextFeatures, Velocity, padding_bias
from training.miniature.optimizer import MatrixOptimizer, warm_up_and_decay
from training.miniature.tokenizer import build_tokenizer

GRID = scenes.SIDE // scenes.CELL  # 8 x 8 image tokens
BATCH = 64
TEXT_WIDTHS = (32, 48)  # captions are padded to one of these: two compiled graphs
LEVEL_MEAN, LEVEL_DEVIATION = 2.4, 1.5  # of logit(sigma)
# Kinds of caption and how often each is trained on.
FORMS = ("json", "plain", "wrapped", "json-partial", "plain-partial", "wrapped-partial")
FORM_WEIGHTS = (0.22, 0.13, 0.09, 0.10, 0.23, 0.23)
# The timestep reaches the network in its own type and is multiplied by 1e4; in bf16 everything above this frequency is
# rounding noise (1e4 x 2^-9 x 2.5e-3 = 0.05 radians), so those inputs keep weight zero.
HIGHEST_TIME_FREQUENCY = 2.5e-3
SAVE_EVERY = 120.0  # seconds


def say(text: str) -> None:
    """One line of progress with the time of day, at once."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def training_scenes(count: int) -> list[scenes.Scene]:
    """Distinct scenes that are not held out, the same on every run."""
    rng = random.Random(0)
    found: dict[scenes.Scene, None] = {}
    while len(found) < count:
        scene = scenes.sample_scene(rng)
        if not scenes.is_held_out(scene):
            found[scene] = None
    return list(found)


def draw_all(chosen: list[scenes.Scene]) -> Tensor:
    """uint8 (N, 3, 128, 128)."""
    stacked = numpy.stack([numpy.asarray(scenes.draw(scene)) for scene in chosen])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def caption_of(scene: scenes.Scene, form: str, rng: random.Random) -> str:
    """The scene said in one of `FORMS`."""
    kind, _, partial = form.partition("-")
    said = scenes.blur(scene, rng) if partial else scene
    return {"json": scenes.to_json, "plain": scenes.to_plain, "wrapped": scenes.to_wrapped}[kind](said)


class Captions:
    """Captions of many scenes, tokenized, in two groups by length. Rows: (scene index, length, padded ids)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chosen: list[scenes.Scene], per_scene: int) -> None:
        rng = random.Random(1)
        groups: dict[int, list[tuple[int, int, list[int]]]] = {width: [] for width in TEXT_WIDTHS}
        for index, scene in enumerate(chosen):
            for form in rng.choices(FORMS, FORM_WEIGHTS, k=per_scene):
                ids = tokenize(tokenizer, caption_of(scene, form, rng))[0].tolist()
                width = next(width for width in TEXT_WIDTHS if len(ids) <= width)
                groups[width].append((index, len(ids), ids + [0] * (width - len(ids))))
        self.groups = [
            (torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows]))
            for rows in groups.values()
        ]

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Endless (scene indices, lengths, ids), each from one group, groups in proportion to their captions."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor([float(len(group[0])) for group in self.groups])
        while True:
            index, length, ids = self.groups[int(torch.multinomial(weights, 1, generator=generator))]
            rows = torch.randint(len(index), (size,), generator=generator)
            yield index[rows], length[rows], ids[rows]


def add_noise(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy latents, time, target velocity) at random levels. data: (B, tokens, 128)."""
    sigma = torch.sigmoid(LEVEL_MEAN + LEVEL_DEVIATION * torch.randn(len(data)))
    noise = torch.randn_like(data)
    level = sigma[:, None, None]
    time_ = 1 - sigma
    rounded = torch.rand(len(data)) < 0.5  # the pipeline may run in bf16, and then time arrives rounded
    time_ = torch.where(rounded, time_.bfloat16().float(), time_)
    return (1 - level) * data + level * noise, time_, data - noise


def slow_time_mask(transformer: Ideogram4Transformer2DModel) -> Tensor:
    """(1, hidden) with 1 for the sinusoids slow enough to be exact in bf16; order is sines, then cosines."""
    half = transformer.hidden_size // 2
    frequency = 1e-4 ** (torch.arange(half) / (half - 1))
    return (frequency <= HIGHEST_TIME_FREQUENCY).float().repeat(2)[None]


class Conditional(nn.Module):
    """Text encoder and conditional transformer as one function from a batch to its loss."""

    def __init__(self, encoder: nn.Module, transformer: Ideogram4Transformer2DModel) -> None:
        super().__init__()
        self.text = TextFeatures(encoder)
        self.velocity = nn.ModuleDict({str(width): Velocity(transformer, GRID, width) for width in TEXT_WIDTHS})

    def forward(self, ids: Tensor, length: Tensor, noisy: Tensor, time_: Tensor, target: Tensor) -> Tensor:
        width = ids.shape[1]
        bias = padding_bias(length, width, torch.bfloat16)
        bias = torch.cat((bias, bias.new_zeros(len(ids), 1, 1, GRID * GRID)), -1)
        predicted = self.velocity[str(width)](noisy, time_, self.text(ids), bias)
        return (predicted.float() - target).square().mean()


class Unconditional(nn.Module):
    """The unconditional transformer as a function from a batch to its loss."""

    def __init__(self, transformer: Ideogram4Transformer2DModel) -> None:
        super().__init__()
        self.velocity = Velocity(transformer, GRID, 0)

    def forward(self, noisy: Tensor, time_: Tensor, target: Tensor) -> Tensor:
        bias = torch.zeros(len(noisy), 1, 1, GRID * GRID, dtype=torch.bfloat16)
        return (self.velocity(noisy, time_, None, bias).float() - target).square().mean()


def run_budget(
    name: str,
    model: nn.Module,
    transformer: Ideogram4Transformer2DModel,
    optimizer: MatrixOptimizer,
    batches: Iterator[tuple[Tensor, ...]],
    minutes: float,
    path: Path,
    fast: bool,
) -> None:
    """Train for a wall-clock budget, counted over restarts, and leave `path` only when it is spent."""
    partial = path.with_suffix(".partial")
    mask, spent, step = slow_time_mask(transformer), 0.0, 0
    with torch.no_grad():
        transformer.t_embedding.mlp_in.weight *= mask
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    torch.manual_seed(1000 + step)
    loss_of = torch.compile(model, dynamic=False) if fast else model
    smooth, last_saved, clock = 0.0, time.monotonic(), time.monotonic()
    while spent < minutes * 60:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(*next(batches))
        loss.backward()
        transformer.t_embedding.mlp_in.weight.grad *= mask
        optimizer.step(warm_up_and_decay(spent / (minutes * 60)))
        smooth = loss.item() if smooth == 0 else 0.99 * smooth + 0.01 * loss.item()
        step += 1
        now = time.monotonic()
        spent, clock = spent + min(now - clock, 5.0), now  # a compilation counts as five seconds of training
        if step % 100 == 0:
            say(f"{name} step {step}, {spent / 60:.1f} of {minutes:.0f} minutes: loss {smooth:.4f}")
        if now - last_saved > SAVE_EVERY:
            _save(
                partial,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "spent": spent, "step": step},
            )
            last_saved = now
    _save(path, model.state_dict())
    partial.unlink(missing_ok=True)


def _save(path: Path, state: object) -> None:
    with replacing(path) as draft:
        torch.save(state, draft)


def autoencoder_stage(work: Path, pictures: int, steps: int) -> None:
    """Stage one: the VAE and the statistics of its latents."""
    if (work / "autoencoder.pt").exists():
        return
    torch.manual_seed(0)
    autoencoder = blueprint.build_autoencoder()
    drawn = draw_all(training_scenes(pictures))
    train_autoencoder(autoencoder, drawn, steps, say)
    autoencoder.eval()
    set_statistics(autoencoder, encode(autoencoder, drawn[:2000]))
    _save(work / "autoencoder.pt", autoencoder.state_dict())


def latents_stage(work: Path, count: int) -> tuple[Tensor, Captions, PreTrainedTokenizerFast]:
    """Stage two: normalised latents of every training scene, and its captions."""
    tokenizer = build_tokenizer()
    chosen = training_scenes(count)
    path = work / f"latents-{count}.pt"
    if not path.exists():
        autoencoder = blueprint.build_autoencoder().eval()
        autoencoder.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True))
        packed = []
        for start in range(0, count, 2000):
            drawn = draw_all(chosen[start : start + 2000])
            packed.append(normalise(autoencoder, encode(autoencoder, drawn)).bfloat16())
            say(f"encoded {start + len(drawn)} of {count} scenes")
        _save(path, torch.cat(packed))
    return torch.load(path, weights_only=True), Captions(tokenizer, chosen, per_scene=4), tokenizer


def conditional_stage(
    work: Path, latents: Tensor, captions: Captions, vocabulary: int, minutes: float, fast: bool
) -> Conditional:
    """Stage three: text encoder and conditional transformer."""
    torch.manual_seed(0)
    model = Conditional(blueprint.build_text_encoder(vocabulary), blueprint.build_transformers()[0])
    path = work / "conditional.pt"
    if not path.exists():
        used = {f"text.language.layers.{layer}." for layer in blueprint.TRAINED_LAYERS} | {"embed_tokens"}
        named = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not name.startswith("text.") or any(part in name for part in used)
        ]
        plain = ("embed_tokens", "embed_image_indicator", "final_layer.linear")
        optimizer = MatrixOptimizer(named, rate=2e-3, plain=plain)

        def batches() -> Iterator[tuple[Tensor, ...]]:
            for index, length, ids in captions.batches(BATCH, int(time.time())):
                yield ids, length, *add_noise(latents[index].float())

        run_budget("conditional", model, _transformer(model), optimizer, batches(), minutes, path, fast)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def unconditional_stage(
    work: Path, latents: Tensor, conditional: Conditional, minutes: float, fast: bool
) -> Unconditional:
    """Stage four: the second transformer, from layers of the first."""
    transformer = blueprint.build_transformers()[1]
    first = _transformer(conditional).state_dict()
    for target, source in enumerate(blueprint.UNCONDITIONAL_START):
        for name in [name for name in first if name.startswith(f"layers.{source}.")]:
            first[f"start.{target}.{name.split('.', 2)[2]}"] = first[name]
    start = {name.replace("start.", "layers."): value for name, value in first.items() if name.startswith("start.")}
    start |= {name: value for name, value in first.items() if not name.startswith(("layers.", "start."))}
    transformer.load_state_dict(start)
    model = Unconditional(transformer)
    path = work / "unconditional.pt"
    if not path.exists():
        unused = ("llm_cond_", "embed_image_indicator")
        named = [(name, value) for name, value in model.named_parameters() if not any(part in name for part in unused)]
        optimizer = MatrixOptimizer(named, rate=1e-3, plain=("final_layer.linear",))

        def batches() -> Iterator[tuple[Tensor, ...]]:
            while True:
                yield add_noise(latents[torch.randint(len(latents), (2 * BATCH,))].float())

        run_budget("unconditional", model, transformer, optimizer, batches(), minutes, path, fast)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def export(work: Path, out: Path, encoder: nn.Module, first: nn.Module, second: nn.Module, tokenizer: object) -> None:
    """Stage five: the pipeline in diffusers' own layout, bf16."""
    autoencoder = blueprint.build_autoencoder()
    autoencoder.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True))
    parts = [module.eval().bfloat16() for module in (autoencoder, encoder, first, second)]
    parts[0].bn.float()  # the latents' statistics stay exact: 512 bytes
    pipeline = Ideogram4Pipeline(blueprint.build_scheduler(), parts[0], parts[1], tokenizer, parts[2], parts[3])
    pipeline.save_pretrained(out)
    write_sums(out)
    say(f"wrote {out}, {gb(bytes_taken(out))}")


def main(
    work: Annotated[Path, typer.Option(help="Where stages are kept between runs.")] = Path("runs/miniature"),
    out: Annotated[Path, typer.Option(help="Where the pipeline goes.")] = Path("assets/miniature"),
    pictures: Annotated[int, typer.Option(help="Training scenes.")] = 30_000,
    autoencoder_steps: int = 900,
    conditional_minutes: float = 66,
    unconditional_minutes: float = 10,
    threads: int = 2,
    fast: Annotated[
        bool, typer.Option(help="Compile the training step: a minute once, then 2.4 times as fast.")
    ] = True,
) -> None:
    """Train the miniature and write it; a killed run goes on where it was."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    autoencoder_stage(work, min(pictures, 8000), autoencoder_steps)
    latents, captions, tokenizer = latents_stage(work, pictures)
    conditional = conditional_stage(work, latents, captions, len(tokenizer), conditional_minutes, fast)
    unconditional = unconditional_stage(work, latents, conditional, unconditional_minutes, fast)
    encoder = blueprint.build_text_encoder(len(tokenizer))
    encoder.language_model.load_state_dict(conditional.text.language.state_dict())
    export(work, out, encoder, _transformer(conditional), unconditional.velocity.net, tokenizer)
    say(json.dumps({"minutes": round((time.monotonic() - started) / 60, 1), "pictures": pictures}))


def _transformer(model: Conditional) -> Ideogram4Transformer2DModel:
    """The one transformer that both text widths share."""
    net: Ideogram4Transformer2DModel = model.velocity[str(TEXT_WIDTHS[0])].net
    return net


if __name__ == "__main__":
    typer.run(main)
