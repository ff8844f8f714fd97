"""One picture as an iterator: encode, noise, schedule, denoise, decode.

    shared = share(request, device, encoded, ...)        the same text features and noise for every recipe
    for event in draw(request, recipe, load, shared, output):
        ...                                              the last event carries the Result

Whoever iterates owns progress, previews and cancelling: to stop between two steps is not to ask for the next event.
Given the same noise, latents equal stock diffusers' `Ideogram4Pipeline.__call__` (a test holds them together). Against
it: text at its true length instead of padded to 2048, one caption at a time, no prompt enhancement, and time and memory
of every phase in the result.
"""

from __future__ import annotations

import base64
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ideogram_app.catalog.models import LATENT_CHANNELS, PIXELS_PER_TOKEN, check_size, find_model
from ideogram_app.catalog.presets import Preset, find_preset, guidance_for
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.machine.meter import MeasuredPeaks, PhaseMeter, give_back
from ideogram_app.machine.versions import versions
from ideogram_app.model.loader import Loaded
from ideogram_app.planning.activations import PREVIEW_TOKENS
from ideogram_app.records import Event, Request, Result, Seconds
from ideogram_app.wire import to_json

TIMESTEPS = 1000  # diffusers hands sigma x 1000 to its scheduler and divides again; the rounding is part of equality
LOWEST_LOGSNR, HIGHEST_LOGSNR = -15.0, 18.0  # clamps of the published schedule
BASE_PIXELS = 512 * 512  # the size at which a preset's mu holds
PREVIEW_SECONDS = 0.5  # at most one preview in this time, and none of it counts as denoising


@dataclass(frozen=True)
class SharedInputs:
    """What every recipe of one request starts from, and what it ends in.

    Attributes:
        features: (1, n, taps x hidden), on the host; noise: (1, tokens, 128), on the device that draws.
        seconds: that encoding took; next to nothing where the features were kept.
        vae: a decoder of latents; shift: of the noise levels, the scheduler's.
        tile: side in pixels of the tiles in which all of them are decoded, so that pictures can be compared; 0: whole.
        given_up: what was done with less for want of memory while encoding.
        peaks: of memory, while encoding.
    """

    features: Tensor
    noise: Tensor
    seconds: float
    vae: Any
    shift: float
    tile: int = 0
    given_up: tuple[str, ...] = ()
    peaks: MeasuredPeaks = field(default_factory=MeasuredPeaks)


@dataclass(frozen=True)
class Provenance:
    """Under which a picture is drawn; they stand in its result, whose fields of these names they are.

    Attributes:
        warm_bytes: host memory of transformers that were loaded before; None where they are loaded for this picture.
    """

    predicted_device_bytes: int | None = None
    predicted_host_bytes: int | None = None
    residency: str = ""
    planned_residency: str = ""
    given_up: tuple[str, ...] = ()
    warm_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """After one Euler step: the latents, and the clean latents that the velocity points at, both (1, tokens, 128)."""

    index: int
    latents: Tensor
    clean: Tensor


def make_noise(seed: int, width: int, height: int) -> Tensor:
    """Starting noise (1, tokens, 128) in float32, drawn on the CPU so that every device starts from the same."""
    tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    return torch.randn(1, tokens, LATENT_CHANNELS, generator=torch.Generator().manual_seed(seed))


def share(
    request: Request, device: torch.device, encoded: Callable[[], Tensor], vae: Any, shift: float
) -> SharedInputs:
    """Encode the caption and draw the noise.

    Args:
        encoded: makes the caption's features (1, n, taps x hidden), which stay on the host: 436 MB of the longest
            caption, of which a device sees what it needs when it prepares.
        vae, shift: see `SharedInputs`.

    Raises:
        RequestError: the size is off the grid. CaptionError: the caption is too long.
    """
    check_size(request.width, request.height)
    with PhaseMeter(device) as meter, meter.phase("encode"):
        features = encoded().cpu()
    noise = make_noise(request.seed, request.width, request.height).to(device)
    return SharedInputs(features, noise, meter.seconds["encode"], vae, shift, peaks=meter.peaks)


def schedule(preset: Preset, width: int, height: int, shift: float) -> Tensor:
    """Noise levels sigma, from near 1 down to exactly 0, as `steps + 1` float32 values.

    Equally spaced quantiles of a logit-normal distribution whose mean rises with the size of the picture, then the
    scheduler's own `shift` (1.0 for the published model), as diffusers applies it to the levels it is given.
    """
    mean = preset.mu + 0.5 * math.log(width * height / BASE_PIXELS)
    quantiles = torch.linspace(0, 1, preset.steps + 1, dtype=torch.float64)
    level = torch.special.expit(mean + preset.std * torch.special.ndtri(quantiles))
    cleanest, noisiest = (1 / (1 + math.exp(0.5 * bound)) for bound in (LOWEST_LOGSNR, HIGHEST_LOGSNR))
    sigmas = (1.0 - (1.0 - level).clamp(noisiest, cleanest)).flip(0)[:-1].float()  # the clamp is on time, 1 - sigma
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.cat((sigmas, torch.zeros(1)))


class Guided(Protocol):
    """A guided velocity."""

    def __call__(self, latents: Tensor, step: int, guidance: float, /) -> Tensor:
        """latents: (1, tokens, 128) float32 -> the same shape and type."""


def times(sigmas: Tensor) -> Tensor:
    """Noise levels (steps + 1,) -> times (steps,), 0 is noise and 1 is data, rounded as diffusers rounds them."""
    return 1.0 - sigmas[:-1] * TIMESTEPS / TIMESTEPS


def denoise(velocity: Guided, noise: Tensor, sigmas: Tensor, guidance: tuple[float, ...]) -> Iterator[Step]:
    """Euler steps from noise to data, one at a time. sigmas: (steps + 1,); guidance: one value a step."""
    latents = noise.float()
    for index, weight in enumerate(guidance):
        sigma, following = sigmas[index], sigmas[index + 1]
        with torch.inference_mode():
            direction = velocity(latents, index, weight)
            clean = latents + sigma.item() * direction
            latents = latents + (following - sigma).item() * -direction
        yield Step(index, latents, clean)


@torch.inference_mode()
def decode(vae: Any, latents: Tensor, rows: int, columns: int) -> Image.Image:
    """Latents (1, rows x columns, 128), on any device, to a picture of 16 pixels a token."""
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(latents)
    packed = latents * deviation + vae.bn.running_mean.to(latents)
    patches = packed.view(1, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)  # patch row, patch column, channel
    grid = patches.reshape(1, -1, rows * 2, columns * 2)
    decoded = vae.decode(grid.to(vae.bn.running_mean.device, vae.dtype), return_dict=False)[0]
    pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy(), "RGB")


def preview(vae: Any, clean: Tensor, rows: int, columns: int) -> str:
    """A small PNG of the picture so far, base64; large grids are averaged down before decoding."""
    fold = math.ceil(max(rows, columns) / PREVIEW_TOKENS)
    if fold > 1:
        grid = clean.view(1, rows, columns, -1).permute(0, 3, 1, 2)
        rows, columns = max(1, rows // fold), max(1, columns // fold)
        grid = torch.nn.functional.adaptive_avg_pool2d(grid, (rows, columns))
        clean = grid.permute(0, 2, 3, 1).flatten(1, 2)
    buffer = io.BytesIO()
    decode(vae, clean, rows, columns).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def draw(
    request: Request,
    recipe: str,
    load: Callable[[], Loaded],
    shared: SharedInputs,
    output: Path,
    terms: Provenance = Provenance(),
) -> Iterator[Event]:
    """Draw one picture with one recipe and save it as a PNG in `output`.

    Args:
        load: gives both transformers in their places; called once, inside the measurement.
        terms: what the result says of how it came about.

    Yields:
        Events of the phases load, denoise and decode; the last is `result`.
    """
    preset = find_preset(request.preset)
    guidance = guidance_for(preset, find_model(request.model), request.guidance)
    rows, columns = request.height // PIXELS_PER_TOKEN, request.width // PIXELS_PER_TOKEN
    yield Event("load", recipe)
    with PhaseMeter(shared.noise.device, terms.warm_bytes or 0) as meter:
        with meter.phase("load"):
            loaded = load()
        sigmas = schedule(preset, request.width, request.height, shared.shift)
        with meter.phase("prepare"):
            velocity = GuidedModel(loaded, shared.features, rows, columns, times(sigmas), request.savings)
        steps = denoise(velocity, shared.noise, sigmas, guidance)
        step_seconds: list[float] = []
        last_preview = time.monotonic()
        yield Event("denoise", recipe, 0, preset.steps)
        while len(step_seconds) < preset.steps:
            with meter.phase(f"step {len(step_seconds)}"):
                step = next(steps)
            step_seconds.append(meter.seconds[f"step {step.index}"])
            picture = None
            if time.monotonic() - last_preview > PREVIEW_SECONDS and step.index + 1 < preset.steps:
                picture, last_preview = preview(shared.vae, step.clean, rows, columns), time.monotonic()
            yield _progress(recipe, step_seconds, preset.steps, picture)
        yield Event("decode", recipe)
        with meter.phase("let go"):
            # Nothing of the transformers' work is there when the decoder wants room, and latents come back once it is
            # given back: as a small part of an allocator's large segment they would keep all of that.
            latents = step.latents.cpu()
            del velocity, steps, step
            loaded.rest()
            if shared.noise.device.type != "cpu":
                give_back(shared.noise.device)
        with meter.phase("decode"):
            image = decode(shared.vae, latents, rows, columns)
    encode_seconds = shared.seconds + meter.seconds["prepare"]  # a recipe's own projection is part of reading text
    peaks = meter.peaks.with_those_of(shared.peaks)
    result = _result(request, recipe, loaded, guidance, meter, peaks, step_seconds, encode_seconds, terms)
    yield Event("result", recipe, result=save(image, result, output))


def save(image: Image.Image, result: Result, output: Path) -> Result:
    """Write the PNG, with the result inside it as text, in one rename; returns the result with its path."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{result.recipe}.png"
    result = replace(result, image=str(path))
    notes = PngInfo()
    notes.add_itxt("ideogram_app", to_json(replace(result, image=path.name), indent=None))
    draft = path.with_suffix(".png.partial")
    image.save(draft, "PNG", pnginfo=notes)
    draft.replace(path)
    return result


def _progress(recipe: str, step_seconds: list[float], steps: int, picture: str | None) -> Event:
    """Time left is told from the steps after the first, which pays for allocations and caches."""
    typical = statistics.median(step_seconds[1:] or step_seconds)
    left = typical * (steps - len(step_seconds))
    return Event("denoise", recipe, len(step_seconds), steps, 1 / typical, left, preview=picture)


def _result(
    request: Request,
    recipe: str,
    loaded: Loaded,
    guidance: tuple[float, ...],
    meter: PhaseMeter,
    peaks: MeasuredPeaks,
    step_seconds: list[float],
    encode_seconds: float,
    terms: Provenance,
) -> Result:
    load, steps = meter.seconds["load"], sum(step_seconds)
    finish = meter.seconds["let go"] + meter.seconds["decode"]
    return Result(
        recipe=recipe,
        engaged=loaded.engaged,
        image=None,
        width=request.width,
        height=request.height,
        seed=request.seed,
        preset=request.preset,
        steps=len(step_seconds),
        caption=request.caption,
        seconds=Seconds(load, encode_seconds, step_seconds[0], steps, finish, load + encode_seconds + steps + finish),
        seconds_per_step=statistics.median(step_seconds[1:] or step_seconds),
        peak_memory_bytes=peaks.memory,
        peak_device_bytes=peaks.device,
        peak_device_reserved_bytes=peaks.reserved,
        peak_host_bytes=peaks.host,
        predicted_device_bytes=terms.predicted_device_bytes,
        predicted_host_bytes=terms.predicted_host_bytes,
        residency=terms.residency,
        planned_residency=terms.planned_residency,
        given_up=terms.given_up,
        warm=terms.warm_bytes is not None,
        weight_bytes=loaded.weight_bytes,
        guidance=guidance,
        arithmetic=loaded.arithmetic,
        kernels=loaded.kernels,
        savings=request.savings,
        versions=versions(),
    )
