"""Opt-in speed-ups ("savings"): what may be left out of a picture, as rows, each with its cost measured.

A step runs both transformers, and near the end of a schedule, or between two steps that hardly differ, not all of that
changes the picture. What each saves and costs is measured on the miniature (`benchmarks/choices.py`, README); what it
costs on the published model has not been seen. The cheapest saving is none of these but fewer steps: a preset.

Left out: TaylorSeer and MagCache, which need tuning for a model, and distilled weights, which are another model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.catalog.models import PIXELS_PER_TOKEN, Model
from ideogram_app.errors import RequestError, choose
from ideogram_app.text import listed

# The miniature, 20 steps, 8 captions: blocks that still run, PSNR to the whole picture in the median and at worst.
# 0.08: 96 %, 83 and 61 dB; 0.15: 74 %, 70 and 54 dB; 0.25: 60 %, 63 and 41 dB; 0.4: 52 %, 60 and 27 dB.
FIRST_BLOCK_CHANGE = 0.15
RUN, REUSE, LEAVE = "run", "reuse", "leave"  # what becomes of the unconditional transformer in a step


@dataclass(frozen=True)
class Speedup:
    """One thing left out.

    Attributes:
        begins, ends: the part of the schedule in which it applies, as shares of the steps.
        every: of the steps in that part, one in so many still runs the unconditional transformer; 0 none, 1 all.
        keeps_guidance: whether the difference that guidance made is added again where that transformer did not run.
        threshold: of the first block's change between two steps, relative, below which all others are reused.
    """

    name: str
    title: str
    summary: str
    begins: float
    ends: float
    every: int = 1
    keeps_guidance: bool = False
    threshold: float | None = None

    def applies(self, step: int, steps: int) -> bool:
        """Whether a step (0-based) lies in its part of the schedule."""
        return round(self.begins * steps) <= step < round(self.ends * steps)


SPEEDUPS: dict[str, Speedup] = {
    saving.name: saving
    for saving in (
        Speedup(
            "reuse-guidance",
            "Reuse guidance",
            "From the third step on, the unconditional transformer runs in every second step; between, the difference "
            "it made is used again.",
            begins=0.1,
            ends=1.0,
            every=2,
            keeps_guidance=True,
        ),
        Speedup(
            "late-conditional",
            "Conditional at the end",
            "The last 40 % of the steps run the conditional transformer alone, without guidance.",
            begins=0.6,
            ends=1.0,
            every=0,
        ),
        Speedup(
            "first-block-cache",
            "First-block cache",
            "Where the first block changes little from one step to the next, the other blocks' work is used again.",
            begins=0.1,
            ends=0.95,
            threshold=FIRST_BLOCK_CHANGE,
        ),
    )
}


def find_speedup(name: str) -> Speedup:
    """The saving of that name; RequestError lists those that exist."""
    return choose(SPEEDUPS, name, "saving")


def check_speedups(names: tuple[str, ...]) -> None:
    """RequestError for unknown savings, the same one twice, and two that decide about the same thing; names them."""
    rows = [find_speedup(name) for name in names]
    if len(set(names)) < len(names):
        raise RequestError("A saving was named twice", got=", ".join(names))
    about_guidance = [row.name for row in rows if row.every != 1]
    if len(about_guidance) > 1:
        raise RequestError(
            "These savings decide about the same transformer", expected="one of them", got=listed(about_guidance)
        )


def unconditional(names: tuple[str, ...], step: int, steps: int) -> str:
    """What becomes of the unconditional transformer in a step (0-based): `RUN`, `REUSE` or `LEAVE`."""
    for row in map(find_speedup, names):
        if row.every == 1 or not row.applies(step, steps):
            continue
        if row.every == 0 or (step - round(row.begins * steps)) % row.every:
            return REUSE if row.keeps_guidance else LEAVE
    return RUN


def cached_bytes(
    names: tuple[str, ...], model: Model, size: tuple[int, int], text_tokens: int, dense_bytes: int
) -> int:
    """Device bytes that savings cache from one step to the next, and compare with (generation/guidance.py).

    A first-block cache holds two tensors of the residual's size (tokens, hidden) for each transformer; while the
    conditional one runs there is one more of its own.
    """
    if all(find_speedup(name).threshold is None for name in names):
        return 0
    image = (size[0] // PIXELS_PER_TOKEN) * (size[1] // PIXELS_PER_TOKEN)
    tokens = 3 * (image + text_tokens) + 2 * image
    return tokens * model.conditional.hidden_size * dense_bytes


def threshold(names: tuple[str, ...], step: int, steps: int) -> float | None:
    """Below which relative change of the first block the others are reused in a step; None where they all run."""
    rows = map(find_speedup, names)
    return next((row.threshold for row in rows if row.threshold is not None and row.applies(step, steps)), None)
