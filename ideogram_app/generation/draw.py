"""Drawing one picture as an iterator of events: load, sample, decode, save as PNG.

    for event in draw(request, recipe, load, shared, output):
        ...                                              the last event carries the Result

Whoever iterates owns progress, previews and cancelling: to stop between two steps is not to ask for the next event.
Against stock diffusers' `Ideogram4Pipeline.__call__`: text at its true length instead of padded to 2048, no prompt
enhancement, and time and memory of every phase in the result. Left out: encoding the caption
(generation/encode_prompt.py), and the arithmetic of a step (generation/sampler.py, generation/guidance.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ideogram_app.catalog.models import PIXELS_PER_TOKEN, find_model
from ideogram_app.catalog.presets import find_preset, guidance_for
from ideogram_app.files import write_png
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import decode, denoise, preview, schedule, times
from ideogram_app.machine.meter import MeasuredPeaks, PhaseMeter, empty_cache
from ideogram_app.machine.versions import versions
from ideogram_app.model.loader import Loaded
from ideogram_app.records import Event, Prediction, Request, Result, Seconds
from ideogram_app.wire import to_json

PREVIEW_SECONDS = 0.5  # at most one preview in this time, and none of it counts as denoising


@dataclass(frozen=True)
class SharedInputs:
    """What all recipes of a request share."""

    features: Tensor  # (1, n, taps x hidden), on the host
    noise: Tensor  # (1, tokens, 128), on the device that draws
    seconds: float  # of encoding; next to nothing where the features were cached
    vae: Any
    shift: float  # of the noise levels, the scheduler's
    tile: int = 0  # side in pixels of the tiles in which all are decoded, so that they can be compared; 0: whole
    given_up: tuple[str, ...] = ()  # while encoding, as in `Result`
    peaks: MeasuredPeaks = field(default_factory=MeasuredPeaks)  # while encoding


@dataclass(frozen=True)
class Provenance:
    """What led to a picture: copied into the `Result`'s fields of the same names."""

    predicted_device_bytes: int | None = None
    predicted_host_bytes: int | None = None
    predicted: Prediction = field(default_factory=Prediction)
    residency: str = ""
    planned_residency: str = ""
    given_up: tuple[str, ...] = ()
    warm_bytes: int | None = None  # host memory of transformers that were loaded already; None where none were


def draw(
    request: Request,
    recipe: str,
    load: Callable[[], Loaded],
    shared: SharedInputs,
    output: Path,
    provenance: Provenance = Provenance(),
) -> Iterator[Event]:
    """Draw one picture with one recipe and save it as a PNG in `output`.

    Args:
        load: gives both transformers; called once, inside the measurement.

    Yields:
        Events of the phases load, denoise and decode; the last is `result`.
    """
    device = shared.noise.device
    yield Event("load", recipe)
    with PhaseMeter(device, provenance.warm_bytes or 0) as meter:
        with meter.phase("load"):
            loaded = load()
        latents = yield from sample(request, recipe, loaded, shared, meter)
        yield Event("decode", recipe)
        with meter.phase("release"):
            loaded.release_scratch()
            if device.type != "cpu":
                empty_cache(device)
        with meter.phase("decode"):
            image = decode(shared.vae, latents, *_grid(request))
    result = _result(request, recipe, loaded, shared, meter, provenance)
    yield Event("result", recipe, result=save(image, result, output))


def sample(
    request: Request, recipe: str, loaded: Loaded, shared: SharedInputs, meter: PhaseMeter
) -> Generator[Event, None, Tensor]:
    """Denoise, from the shared noise to latents (1, tokens, 128) on the host.

    What only the steps need on a device, prepared text and latents, is freed when this generator ends: the decoder
    needs the memory. Latents come to the host because a small part of an allocator's large segment would keep all of
    that from being given back.

    Yields:
        Events of the phase denoise, the first before any step.
    """
    (rows, columns), preset = _grid(request), find_preset(request.preset)
    sigmas = schedule(preset, request.width, request.height, shared.shift)
    with meter.phase("prepare"):
        velocity = GuidedModel(loaded, shared.features, rows, columns, times(sigmas), request.savings)
    steps = denoise(velocity, shared.noise, sigmas, _guidance(request))
    last_preview = time.monotonic()
    yield Event("denoise", recipe, 0, preset.steps)
    for index in range(preset.steps):
        with meter.phase(f"step {index}"):
            step = next(steps)
        picture = None
        if time.monotonic() - last_preview > PREVIEW_SECONDS and index + 1 < preset.steps:
            picture, last_preview = preview(shared.vae, step.clean, rows, columns), time.monotonic()
        yield _progress(recipe, _step_seconds(meter, index + 1), preset.steps, picture)
    with meter.phase("release"):
        return step.latents.cpu()


def save(image: Image.Image, result: Result, output: Path) -> Result:
    """Write the PNG, with the result inside it as text, in one rename; returns the result with its path."""
    path = output / f"{result.recipe}.png"
    write_png(path, image, to_json(replace(result, image=path.name), indent=None))
    return replace(result, image=str(path))


def _progress(recipe: str, step_seconds: list[float], steps: int, picture: str | None) -> Event:
    typical = _typical(step_seconds)
    left = typical * (steps - len(step_seconds))
    return Event("denoise", recipe, len(step_seconds), steps, 1 / typical, left, preview=picture)


def _typical(step_seconds: list[float]) -> float:
    """Median over the steps after the first, which pays for allocations and caches."""
    return statistics.median(step_seconds[1:] or step_seconds)


def _grid(request: Request) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return request.height // PIXELS_PER_TOKEN, request.width // PIXELS_PER_TOKEN


def _guidance(request: Request) -> tuple[float, ...]:
    return guidance_for(find_preset(request.preset), find_model(request.model), request.guidance)


def _step_seconds(meter: PhaseMeter, steps: int) -> list[float]:
    return [meter.seconds[f"step {index}"] for index in range(steps)]


def _result(
    request: Request, recipe: str, loaded: Loaded, shared: SharedInputs, meter: PhaseMeter, provenance: Provenance
) -> Result:
    guidance = _guidance(request)
    peaks = meter.peaks.with_those_of(shared.peaks)
    step_seconds = _step_seconds(meter, len(guidance))
    load, steps = meter.seconds["load"], sum(step_seconds)
    encode = shared.seconds + meter.seconds["prepare"]  # a recipe's own projection is part of reading text
    finish = meter.seconds["release"] + meter.seconds["decode"]
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
        seconds=Seconds(
            load=load,
            encode=encode,
            first_step=step_seconds[0],
            denoise=steps,
            decode=finish,
            total=load + encode + steps + finish,
        ),
        seconds_per_step=_typical(step_seconds),
        peak_memory_bytes=peaks.memory,
        peak_device_bytes=peaks.device,
        peak_device_reserved_bytes=peaks.reserved,
        peak_host_bytes=peaks.host,
        predicted_device_bytes=provenance.predicted_device_bytes,
        predicted_host_bytes=provenance.predicted_host_bytes,
        predicted=provenance.predicted,
        residency=provenance.residency,
        planned_residency=provenance.planned_residency,
        given_up=(*provenance.given_up, *loaded.notes),
        warm=provenance.warm_bytes is not None,
        weight_bytes=loaded.weight_bytes,
        guidance=guidance,
        arithmetic=loaded.arithmetic,
        kernels=loaded.kernels,
        attention=loaded.attention,
        savings=request.savings,
        versions=versions(),
    )
