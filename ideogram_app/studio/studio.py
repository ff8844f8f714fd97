"""The studio: a queue of jobs, the one thread that does them, and models that stay loaded between them.

Work never runs inside a page's event. Jobs wait in one queue and one thread does them, so two tabs never compete for a
device, a reload loses nothing, and stopping means that the worker does not ask for the next event. Watchers get an
immutable `State` and wait for a newer one. While the queue is empty, models that were not used for a while are
unloaded. The work itself is a `Backend`'s, so that tests can replace it.

Left out: jobs that survive a restart of the program (their finished comparisons do), several workers, priorities.
ComfyUI and Fooocus keep a server of their own for this; here it is one thread, one lock and one folder a comparison.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from ideogram_app.catalog.models import find_model
from ideogram_app.comparison.history import Entry, find_entry, read_history
from ideogram_app.errors import AccessError, RequestError
from ideogram_app.generation.validate import check_recipes, check_request
from ideogram_app.hub.access import Access
from ideogram_app.machine.memory import MemoryNow
from ideogram_app.planning.failures import in_words
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.records import Request
from ideogram_app.studio.state import Job, SharedState, State
from ideogram_app.studio.worker import Backend, Worker, check_fits

log = logging.getLogger(__name__)

UNLOAD_SECONDS = 300.0  # long enough to look at a picture and change the prompt


class Studio:
    """Start it, submit jobs, watch `state`. Every public method may be called from any thread."""

    def __init__(
        self, backend: Backend, output: Path, *, reserve_bytes: int = 0, unload_after: float = UNLOAD_SECONDS
    ) -> None:
        """
        Args:
            reserve_bytes: device memory left to other programs.
            unload_after: seconds without use after which models are unloaded: 0 at once, negative never.
        """
        self.output, self.reserve_bytes = output.absolute(), reserve_bytes
        self._backend, self._unload_after = backend, unload_after
        self._shared = SharedState(State(history=tuple(read_history(self.output))))
        self._work = Worker(self._shared, backend, self.output, reserve_bytes)
        self._awake = threading.Event()
        self._closing, self._unloading, self._grace = False, False, 0.0
        self._thread = threading.Thread(target=self._live, name="studio", daemon=True)

    def start(self, grace: float = 0.0) -> None:
        """Start the worker: first it looks at the machine, then it takes jobs.

        Args:
            grace: seconds of delay, ended by `wake`. The first look loads torch, which takes the processor from a page
                that is just being shown.
        """
        self._grace = grace
        self._thread.start()

    def wake(self) -> None:
        """End the delay that `start` was given."""
        self._awake.set()

    def close(self, timeout: float = 10.0) -> None:
        """Stop the running job, drop the waiting ones and wait for the worker to end."""
        with self._shared.changed:
            self._closing = True
            self.wake()
            self._shared.queue.clear()
            self._work.stop.set()
            self._shared.changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def state(self) -> State:
        return self._shared.state

    def watch(self, version: int, timeout: float) -> State:
        """The first state newer than `version`, or the present one when the time is up."""
        self.wake()
        return self._shared.wait(lambda: self._shared.state.version > version, timeout)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is over, or as it is when the time is up."""
        self._shared.wait(lambda: self._shared.find(job_id).is_over or self._closing, timeout)
        return self._shared.find(job_id)

    def submit_prepare(self, model: str, recipes: tuple[str, ...]) -> str:
        """Queue the preparation of recipes, and the download that they need; gives the job's id.

        Raises RequestError for an unknown model or recipe, or none at all.
        """
        find_model(model)
        check_recipes(recipes)
        return self._submit("prepare", model, recipes)

    def submit_compare(self, request: Request) -> str:
        """Queue a comparison; gives the job's id. Raises as `check_request` and `check_fits`."""
        check_request(request)
        machine = self.state.machine
        if machine and not machine.plans[request.model].fits:  # as the page shows; else the worker says, once it looks
            settled = {"reserve_bytes": self.reserve_bytes, "known": machine.known}
            check_fits(self.state.planned(PlanInputs.of_request(request, machine.hardware, **settled)))
        return self._submit("compare", request.model, request.recipes, request)

    def submit_delete(self, model: str) -> str:
        """Queue the deletion of a model's download; gives the job's id. Raises RequestError where there is none."""
        source = self.state.sources.get(find_model(model).name)
        if source is None or not source.bytes:
            raise RequestError(f"Nothing of {find_model(model).title} was downloaded, so there is nothing to delete")
        return self._submit("delete", model)

    def check_access(self, model: str) -> None:
        """Ask whether this user may fetch a model's weights, beside the queue; the answer comes as a new state."""
        with self._shared.changed:
            if find_model(model).name in self.state.checking:
                return
            self._shared.publish(checking=self.state.checking | {model})
        threading.Thread(target=self._ask, args=(model,), name="access", daemon=True).start()

    def stop(self, job_id: str | None = None) -> None:
        """Stop the running job within one step, or take a waiting one out of the queue."""
        with self._shared.changed:
            running = self.state.job
            if job_id in self._shared.queue:
                self._shared.queue.remove(job_id)
                self._shared.put(replace(self._shared.find(job_id), state="stopped", finished=time.time()))
            elif running and not running.is_over and job_id in (None, running.id):
                self._work.stop.set()

    def memory(self) -> MemoryNow:
        """Memory in use now, of the device and of RAM."""
        machine = self.state.machine
        return self._backend.memory(machine.hardware if machine else None)

    def unload(self) -> None:
        """Unload models, once no job runs."""
        with self._shared.changed:
            self._unloading = True
            self._shared.changed.notify_all()

    def entry(self, entry_id: str) -> Entry:
        """One comparison of the history. Raises RequestError where there is none of that name."""
        return find_entry(self.output, entry_id)

    def _submit(self, kind: str, model: str, recipes: tuple[str, ...] = (), request: Request | None = None) -> str:
        job = Job(secrets.token_hex(6), kind, model, recipes, request, created=time.time())
        with self._shared.changed:
            self._shared.queue.append(job.id)
            self._shared.put(job)
        self.wake()
        return job.id

    def _live(self) -> None:
        self._awake.wait(self._grace)
        if not self._closing:
            self._work.look_around()
        while job := self._next():
            failed = self._work.do(job.id)
            if isinstance(failed, AccessError):
                self.check_access(job.model)
            self._note_loaded()

    def _next(self) -> Job | None:
        """Wait for the next job; None at the end. Models are unloaded when their time has come."""
        while True:
            with self._shared.changed:
                due = self.state.unloads_at
                left = None if due is None else max(0.0, due - time.time())
                self._shared.wait(lambda: bool(self._shared.queue or self._closing or self._unloading), left)
                if self._closing:
                    return None
                if self._shared.queue:
                    job = self._shared.find(self._shared.queue.pop(0))
                    self._work.stop.clear()
                    started = replace(job, state="running", started=time.time())
                    self._shared.put(started)
                    return started
                self._unloading = False
            try:
                self._backend.unload()
            except Exception:  # the worker lives on
                log.exception("unloading models failed")
            self._shared.publish(loaded="", unloads_at=None)

    def _note_loaded(self) -> None:
        """Publish what a job left loaded, and when that is unloaded."""
        loaded = self._backend.loaded()
        due = time.time() + self._unload_after if loaded and self._unload_after >= 0 else None
        self._shared.publish(loaded=loaded, unloads_at=due)

    def _ask(self, model: str) -> None:
        try:
            answer = self._backend.access(model)
        except Exception as problem:
            log.exception("asking about access failed")
            answer = Access("unreachable", in_words(problem))
        with self._shared.changed:
            known = MappingProxyType({**self.state.access, model: answer})
            self._shared.publish(access=known, checking=self.state.checking - {model})
