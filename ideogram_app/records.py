"""Records: `Request`, `Event`, `Result` and `Fallback`, frozen dataclasses without tensors that turn into JSON.

    Request -> Event ... -> Result -> Comparison

`Hardware` and `Plan` stand with the code that makes them (machine/hardware.py, planning/planner.py). Field names are
the names on the wire: of the page, the command line, the PNG metadata and the files in `benchmarks/results/`. Seconds
are wall-clock seconds, sizes are bytes, images are paths of PNG files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ideogram_app.catalog.presets import find_preset
from ideogram_app.catalog.reasons import Reason

REFERENCE = "reference"
IN_BYTES = ("fetch", "prepare", "verify")  # phases whose events count bytes


@dataclass(frozen=True)
class Request:
    """One picture, or a comparison of several recipes, asked for."""

    model: str
    caption: str  # JSON, as it is given to the text encoder
    recipes: tuple[str, ...] = (REFERENCE,)  # in the order of display
    preset: str = "default-20"
    width: int = 128
    height: int = 128
    seed: int = 0
    guidance: float | None = None  # one value for all steps; None keeps the preset's
    savings: tuple[str, ...] = ()  # speed-ups (catalog/speedups.py)
    compiled: bool = False  # whether kernels may be compiled first: seconds, on a machine's first picture
    adapt: bool = False  # whether, when memory runs out, the next `Fallback` is taken without asking
    device_limit_bytes: int | None = None  # to plan with, where that is less than what is free
    host_limit_bytes: int | None = None  # likewise


@dataclass(frozen=True)
class Fallback:
    """One way to draw the same caption and seed with less memory: what the request becomes."""

    title: str  # for a button
    reason: Reason  # what it changes, and what it is expected to take
    recipe: str
    width: int
    height: int
    device_limit_bytes: int | None = None
    host_limit_bytes: int | None = None
    same_picture: bool = False  # whether the picture stays the one that was asked for


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of each phase; `first_step` is inside `denoise`."""

    load: float = 0.0
    encode: float = 0.0
    first_step: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Interval:
    """The 90 % interval round a number that a plan expects (planning/intervals.py).

    Attributes:
        low, high: in the unit of that number.
        basis: what the number rests on: `published` or `measured` rates, pictures `drawn` here, bytes `counted`, or
            something merely `assumed`.
        assumed: the limits, as factors of the expected number, before anything was observed on this machine.
    """

    low: float
    high: float
    basis: str = ""
    assumed: tuple[float, float] = (1.0, 1.0)

    def holds(self, value: float) -> bool:
        """Whether a measured value is inside."""
        return self.low <= value <= self.high

    def scaled(self, factor: float) -> Interval:
        """The same interval in another unit, or of a part of the number."""
        return replace(self, low=self.low * factor, high=self.high * factor)


@dataclass(frozen=True)
class Prediction:
    """What a plan expected of a picture, kept in its result beside what came of it; None where nobody knew.

    Seconds of a picture are those of caption, steps and decoding, without loading the weights. Ranges of memory belong
    to the result's `predicted_device_bytes` and `predicted_host_bytes`.
    """

    seconds_per_step: float | None = None
    seconds_per_step_range: Interval | None = None
    seconds_per_picture: float | None = None
    seconds_per_picture_range: Interval | None = None
    device_bytes_range: Interval | None = None
    host_bytes_range: Interval | None = None


@dataclass(frozen=True)
class Result:
    """One picture drawn, or the reason why it was not.

    Attributes:
        recipe, engaged: what was asked for and what ran; never silently different.
        image: path of the PNG, None where `error` says why.
        seconds_per_step: median over the steps after the first.
        peak_memory_bytes: on a device with its own memory `peak_device_bytes`, else `peak_host_bytes`.
        peak_host_bytes: resident memory of the process above what it is without a model, at its highest.
        predicted_device_bytes, predicted_host_bytes: of `peak_device_bytes` and `peak_host_bytes`, by the plan.
        predicted: what the plan expected of time, and the 90 % intervals of all that it expected.
        residency: of both transformers: resident, streamed or disk; planned_residency: as first planned.
        given_up: what was done with less for want of memory, or slower for want of pinned memory, a sentence each.
        offers: fallbacks, where memory ran out and the request did not say `adapt`.
        warm: whether the weights were loaded already, so that `seconds.load` is next to nothing.
        weight_bytes: of both transformers as held while drawing.
        arithmetic: bits of weights and activations in a product (w8a8, w4a8, ...); kernels: which ran between them.
        attention: which of PyTorch's backends ran, as PyTorch said; "math in runs" where none is fused.
        psnr, ssim: to the reference's picture; None for the reference and where there is none.
    """

    recipe: str
    engaged: str
    image: str | None
    width: int
    height: int
    seed: int
    preset: str
    steps: int
    caption: str
    seconds: Seconds = Seconds()
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_device_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None
    predicted_device_bytes: int | None = None
    predicted_host_bytes: int | None = None
    predicted: Prediction = Prediction()
    residency: str = ""
    planned_residency: str = ""
    given_up: tuple[str, ...] = ()
    offers: tuple[Fallback, ...] = ()
    warm: bool = False
    weight_bytes: int | None = None
    psnr: float | None = None
    ssim: float | None = None
    guidance: tuple[float, ...] = ()
    arithmetic: str = ""
    kernels: str = ""
    attention: str = ""
    savings: tuple[str, ...] = ()
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def failed(cls, request: Request, recipe: str, error: str) -> Result:
        """Of a recipe that could not be drawn, with the reason."""
        return cls(
            recipe=recipe,
            engaged="",
            image=None,
            width=request.width,
            height=request.height,
            seed=request.seed,
            preset=request.preset,
            steps=find_preset(request.preset).steps,
            caption=request.caption,
            error=error,
        )


@dataclass(frozen=True)
class Event:
    """Progress that a watcher may show.

    Phases: fetch, prepare, smoke (trying what was prepared), verify (hashing it), calibrate, load, encode, denoise,
    decode, result (`result` is set) or done.
    """

    phase: str
    recipe: str | None = None
    done: int = 0  # units of this phase: bytes in the phases of `IN_BYTES`, else steps
    total: int = 0
    rate: float | None = None  # units a second
    seconds_left: float | None = None  # of this phase, from the rate so far
    message: str = ""
    preview: str | None = None  # a small PNG of the picture so far, base64
    result: Result | None = None
