"""The worker, which looks at machine and disk and does jobs; `Backend`, the protocol of the services it calls.

Every event of a backend becomes a newer job in the shared state, and between two events Stop is obeyed by not asking
for the next. What was drawn is kept, in the state and on disk, whatever becomes of the rest of its job.

Left out: queueing and waiting (studio/studio.py), and the services themselves (studio/local_backend.py, and
tests/fake_backend.py without a model).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from ideogram_app.catalog.models import MODELS, find_model
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.comparison.history import SHEET_FILE, Comparison, new_name, read_history, write_entry
from ideogram_app.errors import AppError, Cancelled, DeviceError
from ideogram_app.hub.access import Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow
from ideogram_app.planning.failures import in_words
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planned_request import PlannedRequest, plan_request
from ideogram_app.planning.planner import Plan
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import Event, Result
from ideogram_app.studio.state import Job, Machine, SharedState, SourceState

log = logging.getLogger(__name__)


class Backend(Protocol):
    """The services that the worker calls. For its thread alone, but for `access` and `memory`."""

    def detect(self) -> Hardware: ...  # RAM of models that are loaded counts as free: they can be unloaded
    def known(self, hardware: Hardware) -> MachineProfile | None: ...  # what was measured on it before
    def memory(self, hardware: Hardware | None) -> MemoryNow: ...

    # What is on disk
    def status(self, model: str, recipe: str) -> Any: ...  # a `checkpoints.prepared.store.Status`
    def source_state(self, model: str) -> SourceState: ...
    def access(self, model: str) -> Access: ...  # whether this user may fetch the published weights
    def delete_source(self, model: str) -> int: ...  # bytes freed; RequestError where components are nowhere else
    def prepare(self, model: str, recipe: str) -> Iterator[Event]: ...  # fetches what is missing; a ready one stays

    # Pictures
    def tokens(self, model: str, caption: str) -> tuple[int, ...]: ...  # CaptionError where it is too long
    def compare(self, planned: PlannedRequest, output: Path) -> Iterator[Event]: ...  # PNGs go to `output`
    def write_sheet(self, comparison: Comparison, path: Path) -> None: ...
    def loaded(self) -> str: ...  # title of the model that stays loaded; "" where none does
    def unload(self) -> None: ...


class Worker:
    """The jobs of one studio. For its worker's thread alone."""

    def __init__(self, shared: SharedState, backend: Backend, output: Path, reserve_bytes: int) -> None:
        self.shared, self.backend, self.output, self.reserve_bytes = shared, backend, output, reserve_bytes
        self.stop = threading.Event()  # set to end the job that runs

    def look_around(self) -> None:
        """Publish the machine, then which recipes are at hand."""
        try:
            hardware = self.backend.detect()
            self._show_machine(hardware)
            for model in MODELS:
                self._look_at_disk(model)
            self._show_machine(hardware)  # now that it is known what need not be fetched or made again
        except AppError as problem:
            self.shared.publish(machine_error=str(problem))
        except Exception as problem:
            log.exception("looking at the machine failed")
            self.shared.publish(machine_error=in_words(problem))

    def do(self, job_id: str) -> AppError | None:
        """One job from start to end; gives the error that failed it, where the user can act. Raises nothing."""
        state, error, job = "done", "", self.shared.find(job_id)
        failed: AppError | None = None
        try:
            {"prepare": self._prepare, "compare": self._compare, "delete": self._delete}[job.kind](job)
        except Cancelled:
            state = "stopped"
        except AppError as problem:
            state, error, failed = "failed", str(problem), problem
        except Exception as problem:
            log.exception("job %s failed", job_id)
            state, error = "failed", in_words(problem, job.kind)
        job = self.shared.find(job_id)
        progress = {recipe: replace(event, preview=None) for recipe, event in job.progress.items()}
        self.shared.put(replace(job, state=state, error=error, finished=time.time(), progress=progress))
        return failed

    def _show_machine(self, hardware: Hardware) -> MachineProfile | None:
        """Publish it with a plan for each model at its default size; gives the measured profile."""
        known, state = self.backend.known(hardware), self.shared.state
        asked = {name: PlanInputs.of(hardware, name, reserve_bytes=self.reserve_bytes, known=known) for name in MODELS}
        plans = {name: state.planned(inputs) for name, inputs in asked.items()}
        self.shared.publish(machine=Machine(hardware, MappingProxyType(plans), known), machine_error="")
        return known

    def _look_at_disk(self, model: str) -> None:
        state = self.shared.state
        found = MappingProxyType({recipe: self.backend.status(model, recipe) for recipe in RECIPES})
        sources = MappingProxyType({**state.sources, model: self.backend.source_state(model)})
        self.shared.publish(statuses=MappingProxyType({**state.statuses, model: found}), sources=sources)

    def _prepare(self, job: Job) -> None:
        self.backend.unload()  # packing takes minutes, and memory of its own
        try:
            for recipe in job.recipes:
                self._follow(job.id, self.backend.prepare(job.model, recipe), recipe)
        finally:
            self._look_again(job.model)

    def _delete(self, job: Job) -> None:
        try:
            self.backend.delete_source(job.model)
        finally:
            self._look_again(job.model)

    def _look_again(self, model: str) -> None:
        self._look_at_disk(model)
        self._show_machine(self.backend.detect())

    def _compare(self, job: Job) -> None:
        request = job.request
        assert request is not None
        hardware = self.backend.detect()
        known = self._show_machine(hardware)
        inputs = PlanInputs.of_request(request, hardware, reserve_bytes=self.reserve_bytes, known=known)
        shown = self.shared.state.planned(inputs)
        check_fits(shown)
        failed = self._prepare_missing(job)
        drawn = tuple(recipe for recipe in request.recipes if recipe not in failed)
        if not drawn:
            raise next(iter(failed.values()))
        for recipe, problem in failed.items():
            self._add_result(job.id, Result.failed(request, recipe, in_words(problem, "prepare")))
        tokens = self.backend.tokens(job.model, request.caption)
        planned = plan_request(replace(request, recipes=drawn), inputs, tokens)
        folder = self.output / new_name()
        folder.mkdir(parents=True)
        try:
            self._follow(job.id, self.backend.compare(planned, folder))
        finally:
            unkept = self._keep(job.id, Comparison(request, hardware, shown), folder)
        if unkept:
            raise unkept

    def _keep(self, job_id: str, empty: Comparison, folder: Path) -> Exception | None:
        """Save what a job has drawn; gives the error of what could not be written. An entry needs no contact sheet.

        It raises nothing, so that the error which ended the job, or that it was stopped, is the one told.
        """
        comparison = replace(empty, results=self.shared.find(job_id).results)
        try:
            if any(result.image for result in comparison.results):
                write_entry(folder, comparison)
                try:
                    self.backend.write_sheet(comparison, folder / SHEET_FILE)
                finally:
                    self.shared.put(replace(self.shared.find(job_id), entry=folder.name))
                    self.shared.publish(history=tuple(read_history(self.output)))
            elif not any(folder.iterdir()):
                folder.rmdir()
        except Exception as problem:
            log.exception("%s could not be kept whole", folder)
            return problem
        return None

    def _prepare_missing(self, job: Job) -> dict[str, Exception]:
        """Prepare what is not at hand; gives the recipes that cannot be prepared, with the reason."""
        failed: dict[str, Exception] = {}
        self._look_at_disk(job.model)
        for recipe in job.recipes:
            if self.shared.state.statuses[job.model][recipe].usable:
                continue
            self.backend.unload()
            try:
                self._follow(job.id, self.backend.prepare(job.model, recipe), recipe)
            except Cancelled:
                raise
            except Exception as problem:
                if not isinstance(problem, AppError):
                    log.exception("%s could not be prepared", recipe)
                failed[recipe] = problem
            finally:
                self._look_at_disk(job.model)
        return failed

    def _follow(self, job_id: str, events: Iterator[Event], recipe: str | None = None) -> None:
        """Publish every event; raises Cancelled between two of them where the user stopped it."""
        try:
            while not self.stop.is_set():
                event = next(events, None)
                if event is None:
                    return
                self._publish(job_id, event if event.recipe else replace(event, recipe=recipe))
            raise Cancelled("Stopped")
        finally:
            if isinstance(events, Generator):
                events.close()

    def _publish(self, job_id: str, event: Event) -> None:
        if event.result:
            self._add_result(job_id, event.result)
        job = self.shared.find(job_id)
        before = job.progress.get(event.recipe or "")
        if before and not event.preview and event.phase in ("denoise", "decode"):
            event = replace(event, preview=before.preview)  # not every step brings a picture
        progress = {**job.progress, event.recipe: event} if event.recipe else job.progress
        self.shared.put(replace(job, stage=event, progress=progress))
        if job.stage and job.stage.phase == "fetch" != event.phase:
            self._look_at_disk(job.model)  # the download is complete now

    def _add_result(self, job_id: str, result: Result) -> None:
        """Results stay in the order asked for; a later one of the same recipe replaces the earlier."""
        job = self.shared.find(job_id)
        known = {old.recipe: old for old in job.results} | {result.recipe: result}
        ordered = tuple(known[recipe] for recipe in job.recipes if recipe in known)
        self.shared.put(replace(job, results=ordered))


def check_fits(planned: Plan) -> None:
    """Refuse what the plan says cannot run here, with its reasons."""
    if not planned.fits:
        title = find_model(planned.model).title
        raise DeviceError(f"{title} cannot run on this machine: {planned.why}", do=planned.suggestion.text)
