"""First run on the command line: the same seven stages as on the page, printed on standard error as they are passed.

    prepare_by_stages(studio, "ideogram-4") -> Job

Everything is said before the first byte, and what stands in the way ends it before anything is begun. Stopped, killed
or cut off, the same command goes on where it stopped. Left out: questions; what has to be decided is a flag.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from ideogram_app.catalog.models import find_model
from ideogram_app.cli.output import follow
from ideogram_app.errors import AccessError, AppError, DeviceError, DiskError, RequestError
from ideogram_app.files import data_folder, output_folder
from ideogram_app.generation.validate import check_recipes
from ideogram_app.studio.setup_stages import Stage, current_stage, setup_stages
from ideogram_app.studio.setup_status import SetupStatus
from ideogram_app.studio.state import Job, State
from ideogram_app.studio.studio import Studio

DETECT_SECONDS = 300.0  # the longest that is waited for the first look at the machine, which loads torch
ASK_SECONDS = 60.0  # for the Hub's answer
SETTLE_SECONDS = 0.5  # the plan is made once more when the disk has been looked at


def prepare_by_stages(
    studio: Studio, model: str, recipes: tuple[str, ...] = (), stream: TextIO | None = None
) -> tuple[Job, str]:
    """Bring a model from where its first run stands to where it can be drawn with: the job, and the recipe for that.

    Args:
        recipes: what to make; the plan's choice, or what is begun, where none is named.

    Raises:
        DeviceError: the machine cannot run it, and nothing was asked for by name.
        AccessError: the gate is closed.
        DiskError: too little room, or it filled up.
        RequestError: no such model or recipe, or it was stopped, or it failed.
    """
    find_model(model)
    if recipes:
        check_recipes(recipes)
    report = _Report(model, recipes, stream or sys.stderr)
    studio.start()
    try:
        print("Looking at this machine ...", file=report.stream)
        state = _wait_until(studio, lambda now: bool(now.machine_error) or model in now.sources, DETECT_SECONDS)
        if not state.machine_error:
            state = studio.watch(state.version, SETTLE_SECONDS)
        report.insist(state, ("machine", "plan"))
        if not (SetupStatus(state, model, recipes).is_ready or state.sources[model].at_hand):
            studio.check_access(model)
            state = _wait_until(studio, lambda now: model in now.access and model not in now.checking, ASK_SECONDS)
        report.insist(state, ("licence", "fetch", "quantize"))
        report.recipes = SetupStatus(state, model, recipes).recipes
        job = follow(studio, studio.submit_prepare(model, report.recipes), report.stream, report.passed)
        state = studio.state
    finally:
        studio.close()
    if job.state == "failed":
        raise _problem(setup_stages(state, model, report.recipes), job.error)
    if job.state != "done":
        raise RequestError("Stopped; what is done is kept", do="The same command goes on where it stopped")
    report.print(report.passed(state))
    return job, report.recipes[0]


def draw_command(model: str, recipe: str, data: Path, output: Path) -> str:
    """What draws the first picture, from the same folders."""
    flags = [("--data", data, data_folder()), ("--output", output, output_folder())]
    folders = [f"{flag} {shlex.quote(str(path))}" for flag, path, own in flags if path != own]
    start = f"python -m ideogram_app generate --model {model} --recipe {recipe}"
    return " ".join([start, *folders, '--prompt "a lighthouse at dusk" --out first.png'])


def _wait_until(studio: Studio, is_so: Callable[[State], bool], seconds: float) -> State:
    """The first state of which something is true, or the last one when the time is up."""
    state = studio.state
    while not is_so(state) and seconds > 0:
        state = studio.watch(state.version, 1.0)
        seconds -= 1.0
    return state


def _problem(stages: tuple[Stage, ...], words: str) -> AppError:
    """What stands in the way, as an error of its kind, with the page on which to act."""
    here = current_stage(stages)
    page = f" {here.link[1]}" if here.link and here.link[1] not in words else ""
    lacks = any(name == "Lacking" for name, _ in here.facts)
    kinds = {"machine": DeviceError, "plan": DiskError if lacks else DeviceError, "licence": AccessError}
    kind: type[AppError] = kinds.get(here.name, DiskError if lacks else RequestError)
    by_name = here.name == "plan" and not lacks
    return kind(words + page, do="Name a recipe to make it all the same, for another machine" if by_name else "")


@dataclass
class _Report:
    """Stages on a terminal or in a file: each is printed once, as soon as it is done."""

    model: str
    recipes: tuple[str, ...]
    stream: TextIO
    printed: set[str] = field(default_factory=set)

    def passed(self, state: State, names: tuple[str, ...] = ()) -> list[str]:
        """Lines about the stages that are done and not printed yet, in order; of these names, or all."""
        lines: list[str] = []
        for number, stage in enumerate(setup_stages(state, self.model, self.recipes), 1):
            if stage.status != "done":
                break
            if stage.name not in self.printed and (not names or stage.name in names):
                self.printed.add(stage.name)
                lines += _lines(stage, number)
        return lines

    def insist(self, state: State, names: tuple[str, ...]) -> None:
        """Print these stages as far as they are done; refuse where one is blocked."""
        self.print(self.passed(state, names))
        stages = setup_stages(state, self.model, self.recipes)
        here = current_stage(stages)
        if here.status == "blocked" and here.name in names:
            if here.facts and here.name != "licence":
                self.print(_lines(replace(here, sentence=""), 1 + stages.index(here)))
            raise _problem(stages, here.sentence)

    def print(self, lines: list[str]) -> None:
        for line in lines:
            print(line, file=self.stream, flush=True)


def _lines(stage: Stage, number: int) -> list[str]:
    """One stage: its number, its status, and its numbers where they are to be read now."""
    shown = stage.facts if stage.is_open or stage.name == "licence" else ()
    first = f"{number}/7 {stage.title}: {stage.sentence}".rstrip()
    return [first, *(f"      {name:<18} {value}" for name, value in shown)]
