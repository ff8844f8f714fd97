"""Calibration pass: the source-precision model draws captions, statistics of every Linear's input are recorded.

    encode every caption -> draw each, recording what every Linear reads -> smoothing, ranking, protected set -> file

It is an iterator: stopping is not asking for the next event. After every caption a partial file beside the final one
holds all sums so far; a later run with the same settings skips the captions in it and comes to the same bits. Features
of all captions wait in host memory in the computing type (53 MB a caption of 500 tokens in bf16), because the encoder
is as large as a transformer and is staged on the device once.

The published calibration took 128 raw prompts at 48 steps. Left out: decoding pictures, and writing weights
(`prepare/transformers.py` takes the file this leaves).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.models import PIXELS_PER_TOKEN, check_size, find_model
from ideogram_app.catalog.presets import Preset, find_preset, guidance_for
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import CaptionError, CheckpointError, DeviceError, RequestError
from ideogram_app.generation.captions import check_caption
from ideogram_app.generation.sampler import Step, denoise, make_noise, schedule, times
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.meter import release
from ideogram_app.model.components import load_components
from ideogram_app.model.offload.offload import COMPUTE_DTYPES, OffloadHooks, offload, staged
from ideogram_app.model.reference_model import ReferenceGuidance, ReferenceModel, load_reference_model
from ideogram_app.model.text_encoder.features import encode
from ideogram_app.model.transformer.layers import Fp8Linear
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import plan
from ideogram_app.planning.streaming import FEWEST_SLOTS, spread
from ideogram_app.prepare.calibration.calibration import Calibration, read_calibration
from ideogram_app.prepare.calibration.statistics import Recorder
from ideogram_app.quantization.rows import dequantize_rows
from ideogram_app.records import REFERENCE, Event, Request

CAPTIONS = Path(__file__).resolve().parents[3] / "assets" / "prompts" / "calibration.jsonl"
OF_MINIATURE = CAPTIONS.with_name("calibration-miniature.jsonl")  # scenes like those it was trained on
SOURCE_PRECISION = (REFERENCE, "fp8")  # what is published is FP8; both hold its values


def read_captions(path: Path = CAPTIONS) -> list[str]:
    """Captions, one JSON object a line; CaptionError where there are none, or one breaks the schema."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise CaptionError(f"{path} cannot be read", got=str(problem)) from problem
    captions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                captions.append(check_caption(line))
            except CaptionError as problem:
                raise CaptionError(f"Line {number} of {path}: {problem}") from problem
    if not captions:
        raise CaptionError(f"{path} holds no captions", expected="one JSON caption a line")
    return captions


def calibrate(
    request: Request,
    captions: Sequence[str],
    store: Store,
    hardware: Hardware,
    path: Path,
    *,
    steps: int | None = None,
    sources: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> Iterator[Event]:
    """Make the calibration file at `path`, or do nothing where it is there already.

    Args:
        request: model, preset, size, seed, guidance, and one recipe of `SOURCE_PRECISION`; its caption is not used.
        steps: in place of the preset's.
        sources: the model's files -> hashes, noted in the file.
        source: a pipeline folder with text encoder and tokenizer, where neither ships nor was prepared.

    Yields:
        Events of phase `calibrate`; `done` and `total` count steps over all captions.

    Raises:
        RequestError: several recipes, or one that has been rounded already.
        AppError: the model cannot be loaded or does not fit; a caption is too long.
    """
    (recipe, *others) = request.recipes
    if others or recipe not in SOURCE_PRECISION:
        said, expected = "A calibration watches the model in the precision of its source", " or ".join(SOURCE_PRECISION)
        raise RequestError(said, expected=expected, got=", ".join(request.recipes))
    preset = shortened(find_preset(request.preset), steps)
    calibration = resume(path, request, captions, preset, recipe, sources)
    total = len(captions) * preset.steps
    if calibration.captions == len(captions) and path.exists():
        yield Event("calibrate", recipe, total, total, message=f"{path} is ready: {summary(calibration)}")
        return
    size = request.width, request.height
    chosen = plan(PlanInputs.of(hardware, request.model, *size, recipe=recipe, ready=(recipe,)))  # else loading says so
    if not chosen.fits:
        raise DeviceError(f"{recipe} does not fit this machine: {chosen.why}", do=chosen.suggestion.text)
    device, dtype = torch.device(chosen.device), COMPUTE_DTYPES[chosen.compute_dtype]
    components = load_components(request.model, torch.device("cpu"), dtype, source, store)
    tokenizer, encoder = components.tokenizer, components.text_encoder
    with staged(encoder, device, torch.device("cpu")), torch.inference_mode():
        further = captions[calibration.captions :]
        features = [encode(tokenizer, encoder, caption).to("cpu", dtype) for caption in further]
    loaded = load_reference_model(store, request.model, recipe, torch.device("cpu"), dtype)
    hooks = OffloadHooks(device, chosen.slots or FEWEST_SLOTS)
    for transformer, count in zip(loaded.modules, chosen.streamed_blocks, strict=True):
        blocks: list[torch.nn.Module] = [*transformer.get_submodule("layers").children()]
        offload(transformer, blocks, spread(count, len(blocks)), hooks)
    trajectory = Trajectory.of(request, preset, components.shift, device)
    yield from collect(calibration, loaded, features, trajectory, path)
    for found, module in zip(calibration.branches, loaded.modules, strict=True):
        found.smooth(partial(weight_rows, module))
    calibration.save(path)
    partial_file(path).unlink(missing_ok=True)
    hooks.close()
    release(device)
    yield Event("calibrate", recipe, total, total, message=summary(calibration))


@dataclass(frozen=True)
class Trajectory:
    """How every caption is drawn. sigmas: (steps + 1,); guidance: one value a step; rows, columns: of tokens."""

    sigmas: Tensor
    guidance: tuple[float, ...]
    rows: int
    columns: int
    seed: int
    device: torch.device

    @classmethod
    def of(cls, request: Request, preset: Preset, shift: float, device: torch.device) -> Trajectory:
        """`shift` is the scheduler's."""
        guidance = guidance_for(preset, find_model(request.model), request.guidance)
        sigmas = schedule(preset, request.width, request.height, shift)
        rows, columns = request.height // PIXELS_PER_TOKEN, request.width // PIXELS_PER_TOKEN
        return cls(sigmas, guidance, rows, columns, request.seed, device)

    def steps(self, loaded: ReferenceModel, features: Tensor, number: int) -> Iterator[Step]:
        """The steps of caption `number`, each from noise of its own seed."""
        width, height = self.columns * PIXELS_PER_TOKEN, self.rows * PIXELS_PER_TOKEN
        noise = make_noise(self.seed + number, width, height).to(self.device)
        velocity = ReferenceGuidance(loaded, features.to(self.device), self.rows, self.columns, times(self.sigmas))
        return denoise(velocity, noise, self.sigmas, self.guidance)


def collect(
    calibration: Calibration, loaded: ReferenceModel, features: Sequence[Tensor], trajectory: Trajectory, path: Path
) -> Iterator[Event]:
    """Draw captions of these features, each (1, n, taps x hidden), and record what every Linear reads: an event a step.

    After every caption the partial file is whole again.
    """
    recorders = [Recorder(found.inputs) for found in calibration.branches]
    steps, first = len(trajectory.guidance), calibration.captions
    total = (first + len(features)) * steps
    started = time.monotonic()
    for caption in features:
        number = calibration.captions
        drawing = trajectory.steps(loaded, caption, number)
        for index in range(steps):
            with ExitStack() as stack:
                for recorder, module in zip(recorders, loaded.modules, strict=True):
                    recorder.half = int(2 * index >= steps)
                    stack.enter_context(recorder.attached(module))
                next(drawing)
            done = number * steps + index + 1
            rate = (done - first * steps) / max(time.monotonic() - started, 1e-9)
            message = f"caption {number + 1} of {first + len(features)}"
            yield Event("calibrate", loaded.engaged, done, total, rate, (total - done) / rate, message)
        calibration.captions += 1
        calibration.save(partial_file(path))


def resume(
    path: Path,
    request: Request,
    captions: Sequence[str],
    preset: Preset,
    recipe: str,
    sources: Mapping[str, str] | None,
) -> Calibration:
    """The finished or partial calibration of these very settings, else an empty one."""
    check_size(request.width, request.height)
    model = find_model(request.model)
    settings = {
        "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "preset": preset.name,
        "steps": str(preset.steps),
        "guidance": json.dumps(guidance_for(preset, model, request.guidance)),
        "size": f"{request.width}x{request.height}",
        "seed": str(request.seed),
        "recipe": recipe,
    }
    empty = Calibration.empty(model, settings, sources)
    for candidate in (path, partial_file(path)):
        if candidate.exists():
            try:
                found = read_calibration(candidate, model)
            except CheckpointError:
                continue  # damaged or another model's: made anew
            if found.settings == settings and found.sources == empty.sources:
                return found
    return empty


def partial_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def shortened(preset: Preset, steps: int | None) -> Preset:
    """The preset with another number of steps, guidance stretched along."""
    if steps is None:
        return preset
    if not 2 <= steps <= 100:  # ranks are compared between two halves
        raise RequestError("This many steps cannot be used", expected="2 to 100", got=str(steps))
    guidance = tuple(preset.guidance[index * preset.steps // steps] for index in range(steps))
    return replace(preset, steps=steps, guidance=guidance)


def summary(calibration: Calibration) -> str:
    """How sure the ranking is, and what leads it, in a line for people."""
    agreements = " and ".join(f"{found.agreement():.3f}" for found in calibration.branches)
    alike = f"early and late steps rank layers alike (Spearman {agreements})"
    name, score = calibration.ranking()[0]
    return f"{calibration.captions} captions; {alike}; most fragile is {name} ({score:.0f})"


def weight_rows(module: nn.Module, name: str, rows: slice) -> Tensor:
    """Rows of a weight of a loaded transformer; FP8 ones widened to float32."""
    layer: Any = module.get_submodule(name.removesuffix(".weight"))
    weight: Tensor = layer.weight[rows]
    return dequantize_rows(weight, layer.scale[rows]) if isinstance(layer, Fp8Linear) else weight
