"""Workload of a benchmark: the model's shape by its name, picture size, tokens, computing dtype.

    ideogram-4, miniature     the models of catalog/models.py
    layers=N                  the published widths with N layers in both branches: a whole step in small, for a device
                              that cannot hold, or a processor that cannot finish, all 34

Left out: other widths; the point is to time the shapes that people run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ideogram_app.catalog.models import MODELS, PIXELS_PER_TOKEN, Model, check_size
from ideogram_app.errors import RequestError
from ideogram_app.machine.capabilities import compute_type
from ideogram_app.machine.hardware import Hardware

LAYERS = "layers="
DTYPE_LABELS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # torch's name -> what rows are called by
BF16_UNITS = ("amx_bf16", "avx512_bf16")  # of processors, as machine/hardware.py names them


@dataclass(frozen=True)
class Workload:
    """What is timed: a step of `model` at a size, after so many text tokens."""

    shape: str
    model: Model
    width: int
    height: int
    text_tokens: int
    padding: int  # text tokens that stock rows compute with: their pipeline pads captions to 2048 unless told not to
    steps: int
    dtype: str  # torch's name of the computing type

    @property
    def rows(self) -> int:
        return self.height // PIXELS_PER_TOKEN

    @property
    def columns(self) -> int:
        return self.width // PIXELS_PER_TOKEN

    @property
    def image_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def dense_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


def find_shape(text: str) -> Model:
    """The model of a name, or the published one with another number of layers; RequestError where there is neither."""
    if text in MODELS:
        return MODELS[text]
    count = text.removeprefix(LAYERS)
    if text.startswith(LAYERS) and count.isdigit() and 1 <= int(count) <= 34:
        published = MODELS["ideogram-4"]
        branch = replace(published.conditional, num_layers=int(count))
        return replace(published, title=f"Ideogram 4, {count} layers", conditional=branch, unconditional=branch)
    raise RequestError(
        f"Unknown shape {text!r:.60}", expected=f"{', '.join(MODELS)}, or {LAYERS}N with N from 1 to 34", got=text
    )


def ask(shape: str, size: int, text_tokens: int, padding: int, steps: int, dtype: str) -> Workload:
    """Check the flags and put them together; pictures are square. RequestError for a flag out of range."""
    check_size(size, size)
    if steps < 1:
        raise RequestError("There is nothing to time", expected="at least 1 step", got=str(steps))
    if not 1 <= text_tokens <= padding:
        expected = f"1 to {padding} text tokens"
        raise RequestError("The caption does not fit its padding", expected=expected, got=str(text_tokens))
    return Workload(shape, find_shape(shape), size, size, text_tokens, padding, steps, dtype)


def choose_dtype(hardware: Hardware, kind: str, asked: str) -> tuple[str, str]:
    """The computing type, and why.

    The program itself draws in float32 on a processor, for exactness. Here speed is the question and stock's bf16 the
    measure, so a processor with bf16 units is timed in that. RequestError where there is no such type.
    """
    if asked != "auto":
        if asked not in DTYPE_LABELS:
            raise RequestError(f"Unknown computing type {asked!r:.60}", expected=f"auto, {', '.join(DTYPE_LABELS)}")
        return asked, "Asked for."
    if kind == "cpu":
        units = [name for name in BF16_UNITS if name in hardware.cpu_features]
        if units:
            return "bfloat16", f"Computes in bfloat16: this processor has units for it ({units[0]})."
        return "float32", "Computes in float32: this processor has no bfloat16 units."
    dtype, why = compute_type(hardware)
    return dtype, why.text
