"""A backend without a model: the studio and the page are tested on it, fast and the same every time.

It draws the scene that a picture's number asks for with Pillow, and each recipe differs from the reference by a known
number of pixels. Steps, bytes and failures can be set.
"""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, ImageDraw

from ideogram_app.catalog.models import find_model
from ideogram_app.catalog.presets import find_preset
from ideogram_app.catalog.reasons import Reason
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import find_source
from ideogram_app.checkpoints.prepared.store import Status
from ideogram_app.comparison.contact_sheet import write_sheet
from ideogram_app.comparison.history import Comparison
from ideogram_app.errors import AccessError, AppError, DeviceError, DiskError
from ideogram_app.hub.access import Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow
from ideogram_app.planning.oom import OutOfMemory
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.planning.weight_bytes import weight_bytes
from ideogram_app.records import REFERENCE, Event, Fallback, Request, Result, Seconds
from ideogram_app.studio.state import SourceState

MACHINE = Hardware(
    kind="cpu",
    name="Example processor",
    host_memory_bytes=32_000_000_000,
    host_free_bytes=24_000_000_000,
    disk_free_bytes=200_000_000_000,
    cpu_name="Example processor",
    cpu_cores=8,
    torch="2.13.0",
)
MEMORY = MemoryNow(None, None, None, 32_000_000_000, 24_000_000_000, 2_000_000_000)
SHORTAGE = OutOfMemory("device", 2_300_000_000, "denoise", 1_100_000_000)
LIMIT = 9_000_000_000  # of device memory: what a hungry recipe can be drawn with
MEASURED = {"reference": 44.5e6, "fp8": 13.2e6, "int8-w8a8": 12.9e6, "gguf-q8_0": 15.1e6, "gguf-q4_k": 9.8e6}
WEIGHTS = {name: MEASURED.get(name, 14.0e6) for name in RECIPES}
BYTES = 12_000_000  # of every preparation
SOURCE_BYTES = 27_500_000_000  # of the download of the published model
READY = Access("ready", "ideogram-ai/ideogram-4-fp8 can be fetched: 27.5 GB.", "https://huggingface.co/")


@dataclass
class Fake:
    """Knobs and notes. `broken` recipes fail while drawing, `unpreparable` ones before; `bug` is raised in a step.

    `hungry` recipes run out of device memory unless they are given a limit or may adapt. `in_use` is
    what memory is taken now; what is loaded has a `title` until it is unloaded.

    Steps take `step_seconds`; after `hold` they wait until they are let pass, so that a test need not hurry.

    Of the published weights `fetched_bytes` are on disk; `line_breaks_at` drops the line once, at that share of them.
    """

    step_seconds: float = 0.0
    turnstile: threading.Semaphore | None = None
    prepared: set[tuple[str, str]] = field(default_factory=lambda: {("miniature", REFERENCE)})
    broken: set[str] = field(default_factory=set)
    unpreparable: set[str] = field(default_factory=set)
    hungry: set[str] = field(default_factory=set)
    in_use: MemoryNow = MEMORY
    title: str = ""
    bug: Exception | None = None
    allowed: Access = READY
    machine: Hardware = MACHINE
    fetched_bytes: int = 0
    line_breaks_at: float | None = None
    steps_done: list[str] = field(default_factory=list)
    closed: int = 0

    def known(self, hardware: Hardware) -> MachineProfile | None:
        return None

    def memory(self, hardware: Hardware | None) -> MemoryNow:
        return self.in_use

    def access(self, model: str) -> Access:
        return self.allowed

    def tokens(self, model: str, caption: str) -> tuple[int, ...]:
        return tuple(caption.encode())

    def write_sheet(self, comparison: Comparison, path: Path) -> None:
        write_sheet(comparison, path)

    def loaded(self) -> str:
        return self.title

    def hold(self, passing: int = 0) -> None:
        """Let so many steps pass, and no further one until `let_pass`."""
        self.turnstile = threading.Semaphore(passing)

    def let_pass(self, steps: int | None = None) -> None:
        """So many more steps; all there will be where no number is given."""
        held = self.turnstile
        if steps is None:
            self.turnstile = None
        if held:
            held.release(steps or 1_000_000)

    def _step(self) -> None:
        time.sleep(self.step_seconds)
        if turnstile := self.turnstile:
            turnstile.acquire()

    def detect(self) -> Hardware:
        return self.machine

    def status(self, model: str, recipe: str) -> Status:
        there = (model, recipe) in self.prepared
        state = "missing" if not there else "included" if recipe == REFERENCE else "ready"
        return Status(model, recipe, state, Path("nowhere"), held(model, recipe) if there else 0, "")

    def prepare(self, model: str, recipe: str) -> Iterator[Event]:
        if recipe in self.unpreparable:
            raise DiskError("The disk is full", do="Free some of it")
        if find_source(model).included is None:
            yield from self.fetch()
        try:
            for tenth in range(11):
                done = BYTES * tenth // 10
                left = self.step_seconds * (10 - tenth)
                yield Event("prepare", recipe, done, BYTES, 8e6, left, f"layers.{tenth}")
                self._step()
            self.prepared.add((model, recipe))
        finally:
            self.closed += 1

    def fetch(self) -> Iterator[Event]:
        """From what is there, in fortieths; the line drops where it was told to."""
        if self.allowed.state != "ready":
            raise AccessError(self.allowed.sentence)
        for part in range(40 * self.fetched_bytes // SOURCE_BYTES, 41):
            if self.line_breaks_at is not None and part / 40 >= self.line_breaks_at:
                self.line_breaks_at = None
                raise AccessError("Hugging Face cannot be reached", do="Check the network")
            self.fetched_bytes = SOURCE_BYTES * part // 40
            left = (SOURCE_BYTES - self.fetched_bytes) / 41e6
            file = f"transformer/diffusion_pytorch_model.safetensors: {part / 4:.1f} GB of 9.3 GB, file 18 of 20"
            yield Event("fetch", None, self.fetched_bytes, SOURCE_BYTES, 41e6, left, file)
            self._step()

    def source_state(self, model: str) -> SourceState:
        if find_source(model).included:
            return SourceState("included")
        begun = "complete" if self.fetched_bytes == SOURCE_BYTES else "partial" if self.fetched_bytes else "missing"
        return SourceState(begun, self.fetched_bytes, Path("nowhere"), "ee79a7237b519f1402ceacf952f30c8a31ec5073")

    def delete_source(self, model: str) -> int:
        freed, self.fetched_bytes = self.fetched_bytes, 0
        return freed

    def unload(self) -> None:
        self.title = ""

    def compare(self, planned: PlannedRequest, output: Path) -> Iterator[Event]:
        request = planned.request
        try:
            yield Event("encode")
            for recipe in sorted(request.recipes, key=lambda name: name != REFERENCE):
                yield from self._draw(request, recipe, output)
            yield Event("done")
        finally:
            self.closed += 1

    def _draw(self, request: Request, recipe: str, output: Path) -> Iterator[Event]:
        steps = find_preset(request.preset).steps
        yield Event("load", recipe)
        if recipe in self.broken:
            problem: AppError = DeviceError("The device ran out of memory", do="Try gguf-q4_k")
            yield Event("result", recipe, result=result_of(request, recipe, None, str(problem)))
            return
        if recipe in self.hungry and request.device_limit_bytes is None and not request.adapt:
            ran_out = result_of(request, recipe, None, SHORTAGE.sentence())
            yield Event("result", recipe, result=replace(ran_out, offers=offers_for(request, recipe)))
            return
        picture = paint(request, recipe)
        for step in range(1, steps + 1):
            if self.bug:
                raise self.bug
            self._step()
            self.steps_done.append(recipe)
            seen = as_text(picture) if step % 3 == 0 else None
            rate = 1 / max(self.step_seconds, 1e-3)
            yield Event("denoise", recipe, step, steps, rate, (steps - step) / rate, preview=seen)
        yield Event("decode", recipe)
        path = output / f"{recipe}.png"
        picture.save(path)
        result = result_of(request, recipe, path)
        if recipe in self.hungry and request.adapt:
            given_up = (SHORTAGE.account("stream 5.3 GB from RAM"), SHORTAGE.account("GGUF Q4_K"))
            result = replace(result, engaged="gguf-q4_k", residency="streamed", given_up=given_up)
        yield Event("result", recipe, result=result)


def held(model: str, recipe: str) -> int:
    """Bytes of a prepared recipe: round numbers for the miniature, counted ones for the published model."""
    published = sum(weight_bytes(branch, RECIPES[recipe].protecting()) for branch in find_model(model).branches)
    return published if model == "ideogram-4" else int(WEIGHTS[recipe])


def paint(request: Request, recipe: str) -> Image.Image:
    """A shape on a gradient; other recipes than the reference differ in some pixels."""
    width, height = request.width, request.height
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    pen = ImageDraw.Draw(picture)
    x = width // 4 + request.seed % (width // 4)
    pen.ellipse((x, height // 4, x + width // 2, height * 3 // 4), fill=(200, 60, 40))
    pen.text((6, height - 16), "HELLO", fill=(250, 250, 250))
    for index in range(0 if recipe == REFERENCE else len(recipe)):
        place = (index * 37 % width, index * 53 % height)
        red, green, blue = picture.getpixel(place)
        picture.putpixel(place, (min(255, red + 9), green, blue))
    return picture


def offers_for(request: Request, recipe: str) -> tuple[Fallback, ...]:
    """One rung of each kind: the same picture, the smallest recipe, a smaller picture."""
    whole = {"width": request.width, "height": request.height, "device_limit_bytes": LIMIT}
    half = {"width": request.width // 2, "height": request.height // 2, "device_limit_bytes": LIMIT}
    return (
        Fallback(
            "Stream 5.3 GB from RAM",
            Reason("", "The picture stays the same; a step takes longer."),
            recipe,
            **whole,
            same_picture=True,
        ),
        Fallback("GGUF Q4_K, resident", Reason("", "GGUF Q4_K takes 11.1 GB of weights."), "gguf-q4_k", **whole),
        Fallback(
            f"{half['width']} × {half['height']}", Reason("", "The same shape with 25% of the pixels."), recipe, **half
        ),
    )


def as_text(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.resize((32, 32)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def result_of(request: Request, recipe: str, path: Path | None, error: str | None = None) -> Result:
    """A result with plausible numbers."""
    steps, factor = find_preset(request.preset).steps, 1 + 0.4 * list(WEIGHTS).index(recipe)
    step = 0.11 * factor
    return Result(
        recipe=recipe,
        engaged="" if error else recipe,
        image=str(path) if path else None,
        width=request.width,
        height=request.height,
        seed=request.seed,
        preset=request.preset,
        steps=steps,
        caption=request.caption,
        seconds=Seconds(0.31, 0.12, step * 1.5, step * steps, 0.08, 0.51 + step * steps),
        seconds_per_step=step,
        peak_memory_bytes=int(WEIGHTS[recipe] * 2.1),
        peak_host_bytes=int(WEIGHTS[recipe] * 2.1),
        predicted_host_bytes=int(WEIGHTS[recipe] * 2.2),
        residency="resident",
        planned_residency="resident",
        weight_bytes=int(WEIGHTS[recipe]),
        psnr=None if recipe == REFERENCE or error else 52.0 / factor,
        ssim=None if recipe == REFERENCE or error else 1 - 0.004 * factor,
        guidance=(3.0,) * steps,
        error=error,
        versions={"torch": "2.13.0"},
    )
