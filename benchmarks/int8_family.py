"""What each idea of the INT8 family is worth: `python benchmarks/int8_family.py`, about ten minutes on one CPU core.

Three tables, one JSON line, one file in results/. *Synthetic*: the relative output error of one Linear of the published
widths, for inputs without outliers, with a few loud channels, and with SwiGLU's long tails. *Layers*: the same for
every kind of Linear of the miniature, on inputs that its reference reads while drawing. *Pictures*: every recipe draws
held-out captions from the same noise as the reference; PSNR, SSIM and the relative error of the latents at the end, and
that of the guided velocity when each step starts from the reference's latents, which no drift of the trajectory blurs.

Recipes are applied in memory, by the very layers and factors that prepared folders use. float32 computes, so that
nothing but INT8 is measured; the row `bf16` says what the computing type alone costs. Left out: time and memory
(compare_recipes.py) and judges of pictures.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from ideogram_app.catalog.models import MODELS, Branch  # noqa: E402
from ideogram_app.catalog.presets import find_preset, guidance_for  # noqa: E402
from ideogram_app.catalog.recipes import ONE_ROW_LAYERS, RECIPES, Recipe  # noqa: E402
from ideogram_app.checkpoints.prepared.store import Store  # noqa: E402
from ideogram_app.comparison.metrics import psnr, ssim  # noqa: E402
from ideogram_app.generation.sampler import decode, denoise, make_noise, schedule, times  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.model.components import Components, load_components  # noqa: E402
from ideogram_app.model.reference_model import ReferenceGuidance, ReferenceModel, load_reference_model  # noqa: E402
from ideogram_app.model.text_encoder.features import encode  # noqa: E402
from ideogram_app.model.transformer.layers import Int8Linear  # noqa: E402
from ideogram_app.planning.weight_bytes import weight_bytes  # noqa: E402
from ideogram_app.prepare.calibration.calibration import Calibration, read_calibration  # noqa: E402
from ideogram_app.prepare.calibration.smoothing import exponents, input_of  # noqa: E402
from ideogram_app.quantization import int8  # noqa: E402
from ideogram_app.quantization.rotation import GROUP, rotate  # noqa: E402
from training.miniature import scenes  # noqa: E402

MODEL = MODELS["miniature"]
SIDE, CELLS = 128, 8  # pixels and tokens a side
WATCHED_STEPS = (0, 7, 13, 19)  # of 20, whose inputs the layer table is made from
DRIFTED_PSNR = 25.0  # dB; below it shapes stand elsewhere, above it edges differ
KINDS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w3", "w2", "llm_cond_proj")


@dataclass(frozen=True)
class Variant:
    """A recipe, and where its protected set comes from: calibration, name, or nowhere."""

    name: str
    recipe: Recipe
    by_name: bool = False

    def effective(self, calibration: Calibration) -> Recipe:
        """The recipe with what it protects."""
        found = None if self.by_name else calibration.protected(self.recipe.packs)
        return self.recipe.protecting(found)


VARIANTS = (
    *(Variant(name, recipe) for name, recipe in RECIPES.items() if recipe.quantizes_activations),
    Variant("int8-w8a8-protected, by name", RECIPES["int8-w8a8-protected"], by_name=True),
    Variant("int8-w8a8, by name", RECIPES["int8-w8a8"], by_name=True),
    Variant(
        "int8-w8a8-rotated, protected",
        replace(RECIPES["int8-w8a8-rotated"], fragile=RECIPES["int8-w8a8"].fragile),
    ),
)


def main(
    pictures: Annotated[int, typer.Option(help="Held-out captions, each with a seed of its own.")] = 24,
    out: Path = Path("benchmarks/results/int8-family.json"),
    threads: int = 1,
) -> None:
    """Measure and write."""
    torch.set_num_threads(threads)
    report: dict[str, Any] = {
        "versions": versions(),
        "commit": commit(),
        "model": MODEL.name,
        "pictures": pictures,
        "preset": "default-20",
        "synthetic": synthetic_rows(),
    }
    show("Relative output error of one Linear, synthetic", report["synthetic"])
    calibration = read_calibration(ROOT / "assets" / "miniature" / "calibration.safetensors", MODEL)
    parts = load_components(MODEL.name, torch.device("cpu"), torch.float32)
    report["layers"] = layer_rows(calibration, parts)
    show("Relative output error by kind of Linear, miniature", report["layers"])
    report["rows"] = picture_rows(calibration, parts, pictures)
    show("Pictures of the miniature against the reference", report["rows"])
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("synthetic", "layers", "rows")}))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table; errors as percentages."""
    print(f"\n{title}")
    names = list(rows[0])
    print("  ".join(f"{name:>{max(10, len(name))}}" for name in names))
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        print("  ".join(f"{cell:>{max(10, len(name))}}" for name, cell in zip(names, cells, strict=True)), flush=True)


# One Linear: inputs x (tokens, columns) and weights (rows, columns) in four ways.


def product(x: Tensor, weight: Tensor, smoothing: Tensor | None = None, rotated: bool = False) -> Tensor:
    """The INT8 product after smoothing (lambda of every channel) or rotation."""
    if smoothing is not None:
        x, weight = x / smoothing, weight * smoothing
    if rotated:
        x, weight = rotate(x), rotate(weight)
    return int8.linear(x, *int8.quantize_rows(weight))


def lambdas(x_maxima: Tensor, weight: Tensor, rounded: bool = True) -> Tensor:
    """SmoothQuant's lambda with alpha 0.5, as the app folds it or as the paper has it."""
    columns = weight.abs().amax(0)
    return torch.exp2(exponents(x_maxima, columns).float()) if rounded else (x_maxima / columns).sqrt()


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def synthetic_rows(seeds: int = 3, tokens: int = 256, rows: int = 384) -> list[dict[str, Any]]:
    """Percent of relative error, mean over seeds; smoothing is calibrated on other tokens than it is measured on."""
    table = []
    for name, columns, make in INPUTS:
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            both = make(2 * tokens, columns, generator)
            calibration, x = both.split(tokens)
            weight = torch.randn(rows, columns, generator=generator)
            maxima, exact = calibration.abs().amax(0), (x.double() @ weight.double().T).float()
            ways = {
                "naive": product(x, weight),
                "smooth, exact lambda": product(x, weight, lambdas(maxima, weight, rounded=False)),
                "smooth, power of two": product(x, weight, lambdas(maxima, weight)),
                "rotated": product(x, weight, rotated=True),
            }
            for way, y in ways.items():
                found.setdefault(way, []).append(100 * error(y, exact))
        means = {way: statistics.mean(values) for way, values in found.items()}
        table.append({"inputs": name, "columns": columns, **means})
    return table


def gaussian(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tokens, columns, generator=generator)


def outlier_channels(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    """0.3 % of the channels are 30 times as loud, the same ones in every token."""
    x = torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[: round(0.003 * columns)]] *= 30
    return x


def swiglu(tokens: int, columns: int, generator: torch.Generator) -> Tensor:
    """What w2 reads: silu(gate) * value of wide normal inputs. Its tails stand in other channels in every token."""
    gate, value = (2 * torch.randn(tokens, columns, generator=generator) for _ in range(2))
    return nn.functional.silu(gate) * value


INPUTS: tuple[tuple[str, int, Callable[[int, int, torch.Generator], Tensor]], ...] = (
    ("gaussian", 4608, gaussian),
    ("0.3 % x 30", 4608, outlier_channels),
    ("0.3 % x 30", 12288, outlier_channels),
    ("swiglu", 12288, swiglu),
)


# The miniature, layer by layer.


def reference(dtype: torch.dtype = torch.float32) -> ReferenceModel:
    """Both transformers as they ship."""
    return load_reference_model(Store(ROOT), MODEL.name, "reference", "cpu", dtype)


def trajectories(parts: Components, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and noise of held-out captions, every second one a vague one."""
    rng, made = random.Random(7), 0
    while made < count:
        scene = scenes.sample_scene(rng)
        if scenes.is_held_out(scene):
            caption = scenes.to_json(scenes.blur(scene, rng) if made % 2 else scene)
            yield encode(parts.tokenizer, parts.text_encoder, caption), make_noise(1000 + made, SIDE, SIDE)
            made += 1


def steps_of(parts: Components) -> tuple[Tensor, tuple[float, ...]]:
    """Noise levels and guidance of the preset."""
    preset = find_preset("default-20")
    return schedule(preset, SIDE, SIDE, parts.shift), guidance_for(preset, MODEL)


def layer_rows(calibration: Calibration, parts: Components, captions: int = 4) -> list[dict[str, Any]]:
    """For every kind of Linear the mean over layers, branches, captions and watched steps, in percent."""
    loaded = reference()
    inputs = watched_inputs(loaded, parts, captions)
    table = []
    for kind in KINDS:
        found: dict[str, list[float]] = {"naive": [], "smooth": [], "rotated": []}
        for (number, name), xs in inputs.items():
            if not name.endswith(kind):
                continue
            weight = loaded.modules[number].get_parameter(f"{name}.weight")
            smoothing = torch.exp2(calibration.branches[number].powers[input_of(name)].float())
            for x in xs:
                exact = x @ weight.T
                found["naive"].append(100 * error(product(x, weight), exact))
                found["smooth"].append(100 * error(product(x, weight, smoothing), exact))
                if x.shape[1] % GROUP == 0:
                    found["rotated"].append(100 * error(product(x, weight, rotated=True), exact))
        table.append(
            {"kind": kind, **{way: statistics.mean(values) if values else "-" for way, values in found.items()}}
        )
    return table


def watched_inputs(loaded: ReferenceModel, parts: Components, captions: int) -> dict[tuple[int, str], list[Tensor]]:
    """(branch, Linear) -> its inputs (tokens, columns) at the watched steps, tokens without a signal left out."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    now = {"step": 0}

    def watch(key: tuple[int, str]) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            x = x[x.any(-1)]
            if now["step"] in WATCHED_STEPS and len(x):
                found.setdefault(key, []).append(x.clone())

        return hook

    handles = [
        module.get_submodule(linear.name).register_forward_pre_hook(watch((number, linear.name)))
        for number, (module, branch) in enumerate(zip(loaded.modules, MODEL.branches, strict=True))
        for linear in branch.linears()
        if not any(fragment in linear.name for fragment in ONE_ROW_LAYERS)
    ]
    sigmas, guidance = steps_of(parts)
    for features, noise in trajectories(parts, captions):
        for step in denoise(walker(loaded, features, sigmas), noise, sigmas, guidance):
            now["step"] = step.index + 1
        now["step"] = 0
    for handle in handles:
        handle.remove()
    return found


# The miniature, picture by picture.


def quantized(variant: Variant, calibration: Calibration) -> ReferenceModel:
    """Both transformers with a recipe applied in memory."""
    loaded, recipe = reference(), variant.effective(calibration)
    for number, (module, branch) in enumerate(zip(loaded.modules, MODEL.branches, strict=True)):
        for name, factors in calibration.scaling(number).items() if recipe.smoothed else ():
            parameter = module.get_parameter(name)
            parameter.data = factors.applied(parameter.data)
        for linear in branch.linears():
            if recipe.packs(linear.name):
                weight = module.get_parameter(f"{linear.name}.weight")
                bias = module.get_parameter(f"{linear.name}.bias").data if linear.bias else None
                packed = int8.quantize_rows(rotate(weight) if recipe.rotated else weight)
                module.set_submodule(linear.name, Int8Linear(*packed, bias, rotated=recipe.rotated))
    return loaded


def picture_rows(calibration: Calibration, parts: Components, count: int) -> list[dict[str, Any]]:
    """Every variant against the reference; medians over the pictures."""
    sigmas, guidance = steps_of(parts)
    starts = list(trajectories(parts, count))
    truth = reference()
    walks = [
        [noise, *(step.latents for step in denoise(walker(truth, features, sigmas), noise, sigmas, guidance))]
        for features, noise in starts
    ]
    velocities = [
        [(after - before) / (sigmas[i] - sigmas[i + 1]) for i, (before, after) in enumerate(pairwise(walk))]
        for walk in walks
    ]
    made: list[tuple[str, ReferenceModel, Recipe]] = [("bf16", reference(torch.bfloat16), RECIPES["reference"])]
    made += [(v.name, quantized(v, calibration), v.effective(calibration)) for v in VARIANTS]
    table = []
    for name, loaded, recipe in made:
        found: dict[str, list[float]] = {"psnr": [], "ssim": [], "latents_percent": [], "velocity_percent": []}
        for (features, noise), walk, expected in zip(starts, walks, velocities, strict=True):
            velocity = walker(loaded, features, sigmas)
            *_, last = denoise(velocity, noise, sigmas, guidance)
            picture, ideal = (decode(parts.vae, latents, CELLS, CELLS) for latents in (last.latents, walk[-1]))
            found["psnr"].append(psnr(picture, ideal))
            found["ssim"].append(ssim(picture, ideal))
            found["latents_percent"].append(100 * error(last.latents, walk[-1]))
            found["velocity_percent"].append(100 * single_step_error(velocity, walk, expected, sigmas, guidance))
        table.append({"recipe": name, "ideogram_4_gb": published_size(recipe), **summary(found)})
    return table


def walker(stock: ReferenceModel, features: Tensor, sigmas: Tensor) -> ReferenceGuidance:
    """The guided velocity of a caption at every noise level."""
    return ReferenceGuidance(stock, features, CELLS, CELLS, times(sigmas))


@torch.inference_mode()
def single_step_error(
    velocity: ReferenceGuidance, walk: list[Tensor], expected: list[Tensor], sigmas: Tensor, guidance: tuple[float, ...]
) -> float:
    """Root mean square over steps of the relative error of the velocity at the reference's own latents."""
    squares = []
    for index, weight in enumerate(guidance):
        got = velocity(walk[index].float(), index, weight)
        squares.append(error(got, expected[index]) ** 2)
    return statistics.mean(squares) ** 0.5


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and how many pictures became another picture: a vague caption leaves the place to the noise."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "drifted": sum(value < DRIFTED_PSNR for value in found["psnr"])}


def published_size(recipe: Recipe) -> float:
    """GB of both published transformers; a protected set found by calibration counts as 17 layers of w2's width."""
    branch: Branch = MODELS["ideogram-4"].conditional
    named = [name for name in recipe.protected if name.startswith("layers.")]
    if named:
        shared = tuple(name for name in recipe.protected if name not in named)
        recipe = replace(recipe, protected=(*shared, *(f"layers.{index}.feed_forward.w2" for index in range(17))))
    return round(2 * weight_bytes(branch, recipe) / 1e9, 1)


if __name__ == "__main__":
    typer.run(main)
