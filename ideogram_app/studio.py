"""The one worker: a queue of jobs, what is known of them, and the history of comparisons on disk.

Work never runs inside a page's event. Jobs wait in one queue and one thread does them, so two tabs never fight for a
device, a reload loses nothing, and stopping means that the worker does not ask for the next event. Watchers get an
immutable `State` and wait for a newer one. What does the work comes in as a `Backend`, so that tests can force it.

Left out: jobs that survive a restart of the program (their finished comparisons do), several workers, priorities.
ComfyUI and Fooocus keep a server of their own for this; here it is one thread, one lock and one folder a comparison.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ideogram_app.architecture import MODELS, find_model
from ideogram_app.backend import Backend
from ideogram_app.checkpoints.access import Access
from ideogram_app.checks import check_recipes, check_request, failed_result
from ideogram_app.comparison import Comparison
from ideogram_app.errors import AccessError, AppError, Cancelled, DeviceError, RequestError
from ideogram_app.flow import Event, Request, Result
from ideogram_app.hardware import Hardware
from ideogram_app.history import SHEET_FILE, Entry, find_entry, new_name, read_history, write_entry
from ideogram_app.jobs import Job, Machine, State
from ideogram_app.planner import Plan, plan
from ideogram_app.recipes import RECIPES

log = logging.getLogger(__name__)

JOBS_KEPT = 50  # finished jobs that can still be asked for


class Studio:
    """Start it, submit jobs, watch `state`. Every public method may be called from any thread."""

    def __init__(self, backend: Backend, output: Path) -> None:
        self.output = output.absolute()
        self._backend = backend
        self._changed = threading.Condition()
        self._state = State(history=tuple(read_history(self.output)))
        self._jobs: dict[str, Job] = {}
        self._queue: list[str] = []
        self._stop, self._awake = threading.Event(), threading.Event()
        self._closing, self._grace = False, 0.0
        self._thread = threading.Thread(target=self._work, name="studio", daemon=True)

    def start(self, grace: float = 0.0) -> None:
        """Let the worker begin: first it looks at the machine, then it takes jobs.

        Args:
            grace: seconds that it holds back, at most until somebody waits for it (`wake`). Its first look loads torch,
                which takes the processor from a page that is just being shown.
        """
        self._grace = grace
        self._thread.start()

    def wake(self) -> None:
        """Let a worker that holds back begin now."""
        self._awake.set()

    def close(self, timeout: float = 10.0) -> None:
        """Stop the running job, drop the waiting ones and wait for the worker to end."""
        with self._changed:
            self._closing = True
            self.wake()
            self._queue.clear()
            self._stop.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def state(self) -> State:
        with self._changed:
            return self._state

    def watch(self, version: int, timeout: float) -> State:
        """The first state newer than `version`, or the present one when the time is up."""
        self.wake()
        with self._changed:
            self._changed.wait_for(lambda: self._state.version > version, timeout)
            return self._state

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is over, or as it is when the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(job_id).is_over or self._closing, timeout)
            return self._find(job_id)

    def submit_prepare(self, model: str, recipes: tuple[str, ...]) -> str:
        """Queue the preparation of recipes, and the download that they need; gives the job's id.

        Raises:
            RequestError: an unknown model or recipe, or none at all.
        """
        find_model(model)
        check_recipes(recipes)
        return self._submit(Job(_new_id(), "prepare", model, recipes, created=time.time()))

    def submit_compare(self, request: Request) -> str:
        """Queue a comparison; gives the job's id.

        Raises:
            RequestError: something asked for does not exist or is outside what can be drawn.
            DeviceError: this machine cannot run the model.
        """
        check_request(request)
        machine = self.state.machine
        if machine:
            check_fits(self._planned(machine.hardware, request.model, request.width, request.height))
        job = Job(_new_id(), "compare", request.model, request.recipes, request, created=time.time())
        return self._submit(job)

    def submit_delete(self, model: str) -> str:
        """Queue the deletion of a model's download; what was made from it stays. Gives the job's id.

        Raises:
            RequestError: an unknown model, or one of which nothing was fetched.
        """
        source = self.state.sources.get(find_model(model).name)
        if source is None or not source.bytes:
            raise RequestError(f"Nothing of {find_model(model).title} was downloaded, so there is nothing to delete")
        return self._submit(Job(_new_id(), "delete", model, created=time.time()))

    def check_access(self, model: str) -> None:
        """Ask whether this user may fetch a model's weights; the answer comes as a new state.

        Asked beside the queue and not in it: a long job need not end first.
        """
        with self._changed:
            if find_model(model).name in self._state.checking:
                return
            self._publish(checking=self._state.checking | {model})
        threading.Thread(target=self._ask, args=(model,), name="access", daemon=True).start()

    def stop(self, job_id: str | None = None) -> None:
        """Stop the running job within one step, or take a waiting one out of the queue."""
        with self._changed:
            running = self._state.job
            if job_id in self._queue:
                self._queue.remove(job_id)
                self._put(replace(self._find(job_id), state="stopped", finished=time.time()))
            elif running and not running.is_over and job_id in (None, running.id):
                self._stop.set()

    def entry(self, entry_id: str) -> Entry:
        """One comparison of the history.

        Raises:
            RequestError: there is none of that name.
        """
        return find_entry(self.output, entry_id)

    # The rest runs in the worker, or under its lock.

    def _find(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise RequestError("There is no such job", got=repr(job_id)[:60])
        return self._jobs[job_id]

    def _submit(self, job: Job) -> str:
        with self._changed:
            self._queue.append(job.id)
            self._put(job)
        self.wake()
        return job.id

    def _put(self, job: Job) -> None:
        """Keep this version of a job and tell everybody."""
        with self._changed:
            self._jobs[job.id] = job
            over = [known.id for known in self._jobs.values() if known.is_over]
            for old in over[:-JOBS_KEPT]:
                del self._jobs[old]
            shown = self._state.job
            current = job if job.started and (not shown or shown.is_over or shown.id == job.id) else shown
            waiting = tuple(self._jobs[name] for name in self._queue)
            comparison = current if current and current.kind == "compare" else self._state.comparison
            self._publish(job=current, comparison=comparison, waiting=waiting)

    def _publish(self, **changes: Any) -> None:
        with self._changed:
            self._state = replace(self._state, version=self._state.version + 1, **changes)
            self._changed.notify_all()

    def _work(self) -> None:
        self._awake.wait(self._grace)
        if not self._closing:
            self._look_around()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                job = self._jobs[self._queue.pop(0)]
                self._stop.clear()
                self._put(replace(job, state="running", started=time.time()))
            self._run(job.id)

    def _ask(self, model: str) -> None:
        try:
            answer = self._backend.access(model)
        except Exception as problem:
            log.exception("asking about access failed")
            answer = Access("unreachable", _bug(problem))
        with self._changed:
            known = MappingProxyType({**self._state.access, model: answer})
            self._publish(access=known, checking=self._state.checking - {model})

    def _look_around(self) -> None:
        """What the machine is, then which recipes are at hand."""
        try:
            hardware = self._measure_machine()
            for model in MODELS:
                self._look_at_disk(model)
            self._plan(hardware)  # now that it is known what need not be fetched or made again
        except AppError as problem:
            self._publish(machine_error=str(problem))
        except Exception as problem:
            log.exception("looking at the machine failed")
            self._publish(machine_error=_bug(problem))

    def _measure_machine(self) -> Hardware:
        hardware = self._backend.detect()
        self._plan(hardware)
        return hardware

    def _plan(self, hardware: Hardware) -> None:
        plans = {name: self._planned(hardware, name) for name in MODELS}
        self._publish(machine=Machine(hardware, MappingProxyType(plans)), machine_error="")

    def _look_at_disk(self, model: str) -> None:
        """What of a model's recipes and of its download is there."""
        found = MappingProxyType({recipe: self._backend.status(model, recipe) for recipe in RECIPES})
        sources = MappingProxyType({**self.state.sources, model: self._backend.source_state(model)})
        self._publish(statuses=MappingProxyType({**self.state.statuses, model: found}), sources=sources)

    def _planned(self, hardware: Hardware, model: str, width: int | None = None, height: int | None = None) -> Plan:
        """The plan, knowing what need not be fetched or made again."""
        rows, source = self.state.statuses.get(model, {}), self.state.sources.get(model)
        stored = sum(row.bytes for row in rows.values() if row.usable or row.state == "partial")
        stored += source.bytes + source.companions_bytes if source else 0
        ready = [name for name, row in rows.items() if row.usable]
        return plan(hardware, model, width=width, height=height, stored_bytes=stored, ready=ready)

    def _run(self, job_id: str) -> None:
        """One job from start to end; whatever happens, the worker survives."""
        state, error, job = "done", "", self._find(job_id)
        try:
            {"prepare": self._prepare, "compare": self._compare, "delete": self._delete}[job.kind](job)
        except Cancelled:
            state = "stopped"
        except AppError as problem:
            state, error = "failed", str(problem)
            if isinstance(problem, AccessError):
                self.check_access(job.model)
        except Exception as problem:
            log.exception("job %s failed", job_id)
            state, error = "failed", _bug(problem)
        job = self._find(job_id)
        progress = {recipe: replace(event, preview=None) for recipe, event in job.progress.items()}
        self._put(replace(job, state=state, error=error, finished=time.time(), progress=progress))

    def _prepare(self, job: Job) -> None:
        try:
            for recipe in job.recipes:
                self._follow(job.id, self._backend.prepare(job.model, recipe), recipe)
        finally:
            self._look_at_disk(job.model)
            self._measure_machine()

    def _delete(self, job: Job) -> None:
        try:
            self._backend.delete_source(job.model)
        finally:
            self._look_at_disk(job.model)
            self._measure_machine()

    def _compare(self, job: Job) -> None:
        request = job.request
        assert request is not None
        hardware = self._measure_machine()
        sized = self._planned(hardware, job.model, request.width, request.height)
        check_fits(sized)
        failed = self._prepare_missing(job)
        drawn = tuple(recipe for recipe in request.recipes if recipe not in failed)
        if not drawn:
            raise next(iter(failed.values()))
        for recipe, problem in failed.items():
            self._add_result(job.id, failed_result(request, recipe, str(problem)))
        entry = new_name()
        folder = self.output / entry
        folder.mkdir(parents=True)
        try:
            events = self._backend.compare(replace(request, recipes=drawn), hardware, sized, folder)
            self._follow(job.id, events)
        finally:
            results = self._find(job.id).results
            if any(result.image for result in results):
                self._keep(job.id, entry, Comparison(request, hardware, sized, results))
            elif not any(folder.iterdir()):
                folder.rmdir()

    def _prepare_missing(self, job: Job) -> dict[str, AppError]:
        """Prepare what is not at hand; recipes that cannot be prepared, with the reason."""
        failed: dict[str, AppError] = {}
        self._look_at_disk(job.model)
        for recipe in job.recipes:
            if self.state.statuses[job.model][recipe].usable:
                continue
            try:
                self._follow(job.id, self._backend.prepare(job.model, recipe), recipe)
            except Cancelled:
                raise
            except AppError as problem:
                failed[recipe] = problem
            finally:
                self._look_at_disk(job.model)
        return failed

    def _follow(self, job_id: str, events: Iterator[Event], recipe: str | None = None) -> None:
        """Note every event; between two of them, obey Stop.

        Raises:
            Cancelled: the user stopped it.
        """
        try:
            while not self._stop.is_set():
                event = next(events, None)
                if event is None:
                    return
                self._note(job_id, event if event.recipe else replace(event, recipe=recipe))
            raise Cancelled("Stopped")
        finally:
            close = getattr(events, "close", None)
            if close:
                close()

    def _note(self, job_id: str, event: Event) -> None:
        if event.result:
            self._add_result(job_id, event.result)
        job = self._find(job_id)
        before = job.progress.get(event.recipe or "")
        if before and not event.preview and event.phase in ("denoise", "decode"):
            event = replace(event, preview=before.preview)  # not every step brings a picture
        progress = {**job.progress, event.recipe: event} if event.recipe else job.progress
        self._put(replace(job, stage=event, progress=progress))
        if job.stage and job.stage.phase == "fetch" != event.phase:
            self._look_at_disk(job.model)  # the download is complete now

    def _add_result(self, job_id: str, result: Result) -> None:
        """Results stay in the order asked for; a later one of the same recipe replaces the earlier."""
        job = self._find(job_id)
        known = {old.recipe: old for old in job.results} | {result.recipe: result}
        ordered = tuple(known[recipe] for recipe in job.recipes if recipe in known)
        self._put(replace(job, results=ordered))

    def _keep(self, job_id: str, entry: str, comparison: Comparison) -> None:
        """Write the comparison into its folder, and tell that the history is longer by one."""
        folder = self.output / entry
        write_entry(folder, comparison)
        self._backend.write_sheet(comparison, folder / SHEET_FILE)
        self._put(replace(self._find(job_id), entry=entry))
        self._publish(history=tuple(read_history(self.output)))


def check_fits(sized: Plan) -> None:
    """Refuse what the plan says cannot run here, with its reasons."""
    if not sized.fits:
        title = find_model(sized.model).title
        raise DeviceError(f"{title} cannot run on this machine: {' '.join(sized.reasons)}", do=sized.suggestion)


def _new_id() -> str:
    return secrets.token_hex(6)


def _bug(problem: Exception) -> str:
    return f"This is a bug in the program: {type(problem).__name__}: {problem}. The terminal shows where."
