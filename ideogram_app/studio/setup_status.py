"""`SetupStatus`: one model's first run in numbers: bytes on disk, to fetch, to make and lacking; estimated times.

Read from the studio's state alone; studio/setup_stages.py puts it into stages and sentences. Times are estimates: from
an example rate until bytes come, and of packing as it was measured. Left out: measuring this machine's packing ahead of
time; once it packs, its own rate is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from ideogram_app.catalog.models import Model, find_model
from ideogram_app.catalog.recipes import RECIPES, Recipe, find_recipe
from ideogram_app.catalog.sources import Source, find_source
from ideogram_app.catalog.text_encoder import ENCODERS
from ideogram_app.files import DISK_MARGIN
from ideogram_app.hub.access import Access
from ideogram_app.planning.downloads import EXAMPLE_RATE
from ideogram_app.planning.footprint import encoder_weights
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import Plan
from ideogram_app.planning.policy import PREFERRED_RECIPES
from ideogram_app.planning.weight_bytes import weight_bytes
from ideogram_app.studio.state import Job, SourceState, State
from ideogram_app.text import gb, lasting, listed

# Weights a second, trying and hashing included, on two cores without a GPU (benchmarks/results/quantize-full-cpu.json:
# `weights_per_second_overall` of gguf-q4_k and int8-w8a8). Formats with minima and scales to search stand behind the
# first; the text encoder, which is stored as Q8_0, and everything else behind the second.
SEARCHED, ROUNDED = 33.2e6, 64.6e6
SEARCHED_TYPES = ("Q4_K", "Q5_K", "Q6_K")
STAGE_NAMES = ("machine", "plan", "licence", "fetch", "quantize", "smoke", "picture")
DRAWING_STAGES = ("load", "encode", "denoise", "decode", "result", "done")  # phases of the last stage


def made_bytes(model: str, recipe: str) -> int:
    """Bytes of the files of a recipe, both transformers."""
    return _made(find_model(model), find_recipe(recipe).protecting())


@cache
def _made(shape: Model, recipe: Recipe) -> int:
    return sum(weight_bytes(branch, recipe) for branch in shape.branches)


@cache  # 8 ms, several times whenever the page is shown
def _weights(shape: Model) -> int:
    return sum(branch.parameters() for branch in shape.branches)


@dataclass(frozen=True)
class SetupStatus:
    """One model's first run, as the state has it."""

    state: State
    model: str
    asked: tuple[str, ...] = ()  # recipes by name, where some were asked for

    @cached_property
    def shape(self) -> Model:
        return find_model(self.model)

    @cached_property
    def row(self) -> Source:
        return find_source(self.model)

    @property
    def source(self) -> SourceState:
        return self.state.sources.get(self.model, SourceState("missing"))

    @property
    def access(self) -> Access | None:
        return self.state.access.get(self.model)

    @cached_property
    def job(self) -> Job | None:
        """The job that works on this model, or waits to."""
        return next(iter(self.state.at_work(self.model, "prepare", "compare")), None)

    @property
    def last(self) -> Job | None:
        """The job that worked on this model last, once it is over."""
        job = self.state.job
        return job if job and job.is_over and job.model == self.model and job.kind in ("prepare", "compare") else None

    @cached_property
    def plan_ignoring_disk(self) -> Plan | None:
        """The plan for a disk that is large enough; `lacking` says how much this one lacks."""
        machine = self.state.machine
        if machine is None or machine.plans[self.model].fits:
            return machine.plans[self.model] if machine else None
        limitless = replace(machine.hardware, disk_free_bytes=None)
        return self.state.planned(PlanInputs.of(limitless, self.model, known=machine.known))

    @cached_property
    def recipes(self) -> tuple[str, ...]:
        """To be made: asked for, at work, ready, begun, or planned; the first of these that there is."""
        if self.asked:
            return tuple(find_recipe(name).name for name in self.asked)
        at_work = self.job or self.last
        if at_work and at_work.recipes and at_work.kind == "prepare":
            return at_work.recipes
        planned = self.plan_ignoring_disk.recipe if self.plan_ignoring_disk else None
        for names in (at_work.recipes if at_work else (), self._in_state("ready"), self._in_state("partial")):
            if names:
                return (planned if planned in names else names[0],)
        return (planned or PREFERRED_RECIPES[0],)

    def _in_state(self, state: str) -> tuple[str, ...]:
        """Recipes that are ready, or partial."""
        return tuple(name for name, row in self.state.statuses.get(self.model, {}).items() if row.state == state)

    def status(self, recipe: str) -> Any:
        return self.state.statuses.get(self.model, {}).get(recipe)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Those of `recipes` that are not ready."""
        rows = {name: self.status(name) for name in self.recipes}
        return tuple(name for name, row in rows.items() if row is None or not row.usable)

    @property
    def is_ready(self) -> bool:
        return not self.missing

    @cached_property
    def is_drawn(self) -> bool:
        """Whether there is a picture of this model."""
        saved = [entry.comparison for entry in self.state.history if entry.comparison.request.model == self.model]
        results = [result for comparison in saved for result in comparison.results]
        shown = self.state.comparison
        results += shown.results if shown and shown.model == self.model else ()
        return any(result.image for result in results)

    @property
    def is_begun(self) -> bool:
        """Whether anything of it is on disk, or somebody works on it."""
        components = self.source.components_bytes + self.source.components_begun
        on_disk = self.source.state in ("partial", "complete") or components or self._in_state("partial")
        return bool(on_disk or self.is_ready or self.job)

    @property
    def titles(self) -> str:
        return listed([RECIPES[name].title for name in self.recipes])

    @cached_property
    def at(self) -> int:
        """The job's stage, as an index into `STAGE_NAMES`; -1 where none works."""
        if self.job is None:
            return -1
        event = self.job.stage
        phase = event.phase if event else ""
        if phase in DRAWING_STAGES or (self.is_ready and self.job.kind == "compare"):
            return STAGE_NAMES.index("picture")
        if phase in ("smoke", "verify") and event and event.recipe in self.job.recipes:
            return STAGE_NAMES.index("smoke")
        fetching = phase == "fetch" or (not phase and not self.source.at_hand)
        return STAGE_NAMES.index("fetch" if fetching else "quantize")

    @property
    def is_partial(self) -> bool:
        """Whether a missing recipe is begun."""
        return any(row is not None and row.state == "partial" for row in map(self.status, self.missing))

    @property
    def to_fetch(self) -> int:
        """Bytes that still have to come."""
        return 0 if self.source.at_hand or self.is_ready else max(0, self.row.size - self.source.bytes)

    @cached_property
    def to_make(self) -> int:
        """Bytes of the files to be made, finished or not: recipes, and the text encoder unless it is there."""
        encoder = encoder_weights(self.shape, 2) if self.lacks_encoder else 0
        return sum(made_bytes(self.model, name) for name in self.missing) + encoder

    @property
    def lacks_encoder(self) -> bool:
        """Whether the text encoder is made, too."""
        return bool(self.missing and not self.source.components_bytes and not self.row.included)

    @property
    def free(self) -> int | None:
        return self.state.machine.hardware.disk_free_bytes if self.state.machine else None

    @property
    def needed(self) -> int:
        """Free disk that fetching and making still take, with `DISK_MARGIN`."""
        begun = [row.bytes for row in map(self.status, self.missing) if row is not None and row.state == "partial"]
        written = min(self.to_make, sum(begun) + self.source.components_begun)
        return round((self.to_fetch + self.to_make - written) * DISK_MARGIN)

    @property
    def lacking(self) -> int:
        """Bytes of disk that are not there; 0 where it is enough, or not known."""
        return 0 if self.free is None else max(0, self.needed - self.free)

    @property
    def failure(self) -> str:
        """What went wrong last, where nothing has been tried since."""
        if self.last is None or self.job:
            return ""
        undrawn = [result.error for result in self.last.results if result.error and not result.image]
        return self.last.error or next(iter(undrawn), "")

    @property
    def fetch_rate(self) -> float | None:
        """Bytes a second, once some have come."""
        event = (self.job or self.last or Job("", "", "")).stage
        return event.rate if event and event.phase == "fetch" else None

    @property
    def make_seconds(self) -> float:
        """Packing, trying and hashing, by the measured rates."""
        rates = [SEARCHED if find_recipe(name).gguf_type in SEARCHED_TYPES else ROUNDED for name in self.missing]
        encoder = ENCODERS[self.shape.text_encoder].parameters() if self.lacks_encoder else 0
        return sum(_weights(self.shape) / rate for rate in rates) + encoder / ROUNDED


def fetch_time(view: SetupStatus) -> str:
    """How long fetching still takes: by the rate seen, or by the example rate."""
    if not view.to_fetch:
        return ""
    if view.fetch_rate:
        return f"{lasting(view.to_fetch / view.fetch_rate)} at {gb(view.fetch_rate)}/s"
    return f"at 100 Mbit/s {lasting(view.to_fetch / EXAMPLE_RATE)}"


def make_time(view: SetupStatus) -> str:
    """How long making takes, with the machine it was measured on, because this one may be faster."""
    return f"{lasting(view.make_seconds)} on two cores" if view.missing else ""


def disk_short(view: SetupStatus) -> str:
    """What the disk lacks, and what helps; "" where it is enough."""
    if not view.lacking:
        return ""
    return (
        f"{gb(view.needed)} of free disk are needed, a tenth to spare, and {gb(view.free or 0)} are free: "
        f"{gb(view.lacking)} are lacking. Make room, or start the program with --data-dir on another disk."
    )
