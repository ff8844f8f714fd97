"""The studio's immutable `State`: jobs, the machine, what is on disk; and `SharedState`, the lock around it.

The worker publishes a newer state, and a watcher can show the one it has for as long as it likes. Left out: doing jobs
(studio/worker.py), and deciding when (studio/studio.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ideogram_app.comparison.history import Entry
from ideogram_app.errors import RequestError
from ideogram_app.hub.access import Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import Event, Request, Result

JOBS_KEPT = 50  # finished jobs that can still be asked for


@dataclass(frozen=True)
class SourceState:
    """What of a model's published weights is on this disk.

    Attributes:
        state: included (they ship with the program), given (in a folder that the user named), missing, partial (a
            download was begun) or complete.
        bytes: taken on disk; of an included or given source nothing is counted.
        folder: where they lie, or would.
        commit: the version that was fetched; "" where none was.
        components_bytes: taken by text encoder and VAE of prepared recipes; `components_begun` by unfinished ones.
    """

    state: str
    bytes: int = 0
    folder: Path | None = None
    commit: str = ""
    components_bytes: int = 0
    components_begun: int = 0

    @property
    def at_hand(self) -> bool:
        """Whether recipes can be made without a download."""
        return self.state in ("included", "given", "complete")


@dataclass(frozen=True)
class Job:
    """A queued task and how far it is.

    Attributes:
        kind: prepare (fetching what it needs), compare, or delete (of the download).
        state: waiting, running, done, stopped or failed; `error` says why it failed.
        stage: the latest event; `progress` the latest of each recipe.
        entry: the name of its folder in the history, once it has one.
    """

    id: str
    kind: str
    model: str
    recipes: tuple[str, ...] = ()
    request: Request | None = None
    state: str = "waiting"
    stage: Event | None = None
    progress: Mapping[str, Event] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    error: str = ""
    created: float = 0.0
    started: float | None = None
    finished: float | None = None
    entry: str | None = None

    @property
    def is_over(self) -> bool:
        return self.finished is not None


@dataclass(frozen=True)
class Machine:
    """The hardware, a plan for each model at its default size, and the measured profile."""

    hardware: Hardware
    plans: Mapping[str, Plan]
    known: MachineProfile | None = None


@dataclass(frozen=True)
class State:
    """Everything a watcher may show.

    Attributes:
        statuses: model -> recipe -> what of it is on disk.
        sources: model -> what of its published weights is on disk.
        access: model -> whether they may be fetched, as last asked; `checking` are being asked about now.
        job: runs, or ran last; `comparison` is the last such job that compares.
        loaded: title of the model that stays loaded for the next picture; "" where none does.
        unloads_at: when that is unloaded unless it is used before, in seconds since 1970; None where never.
    """

    version: int = 0
    machine: Machine | None = None
    machine_error: str = ""
    statuses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, SourceState] = field(default_factory=dict)
    access: Mapping[str, Access] = field(default_factory=dict)
    checking: frozenset[str] = frozenset()
    job: Job | None = None
    comparison: Job | None = None
    waiting: tuple[Job, ...] = ()
    history: tuple[Entry, ...] = ()
    loaded: str = ""
    unloads_at: float | None = None

    def preparing(self, model: str, recipe: str | None = None) -> Job | None:
        """The job that prepares this recipe, or any of the model where None, now or soon, if one does."""
        jobs = self.at_work(model, "prepare")
        return next((job for job in jobs if recipe is None or recipe in job.recipes), None)

    def at_work(self, model: str, *kinds: str) -> tuple[Job, ...]:
        """Jobs of these kinds that work on a model, or wait for their turn to, in order."""
        running = [self.job] if self.job and not self.job.is_over else []
        return tuple(job for job in (*running, *self.waiting) if job.kind in kinds and job.model == model)

    def planned(self, inputs: PlanInputs) -> Plan:
        """The plan, knowing what need not be fetched or made again."""
        ready, stored = self.at_hand(inputs.model.name)
        return plan(replace(inputs, ready=ready, stored_bytes=stored))

    def at_hand(self, model: str) -> tuple[tuple[str, ...], int]:
        """Recipes of a model that are ready, and bytes on disk of them and of the download."""
        rows, source = self.statuses.get(model, {}), self.sources.get(model)
        stored = sum(row.bytes for row in rows.values() if row.usable or row.state == "partial")
        stored += source.bytes + source.components_bytes + source.components_begun if source else 0
        return tuple(name for name, row in rows.items() if row.usable), stored


class SharedState:
    """One lock around the newest state and its jobs. Every method may be called from any thread.

    Attributes:
        changed: condition, held while state or jobs change, and notified when they have.
        queue: ids of the jobs that wait, in order.
    """

    def __init__(self, state: State) -> None:
        self.changed = threading.Condition()
        self.queue: list[str] = []
        self.state = state
        self._jobs: dict[str, Job] = {}

    def find(self, job_id: str) -> Job:
        """Raises RequestError where there is no such job."""
        with self.changed:
            if job_id not in self._jobs:
                raise RequestError("There is no such job", got=repr(job_id)[:60])
            return self._jobs[job_id]

    def put(self, job: Job) -> None:
        """Publish this version of a job."""
        with self.changed:
            self._jobs[job.id] = job
            over = [known.id for known in self._jobs.values() if known.is_over]
            for old in over[:-JOBS_KEPT]:
                del self._jobs[old]
            shown = self.state.job
            current = job if job.started and (not shown or shown.is_over or shown.id == job.id) else shown
            waiting = tuple(self._jobs[name] for name in self.queue)
            comparison = current if current and current.kind == "compare" else self.state.comparison
            self.publish(job=current, comparison=comparison, waiting=waiting)

    def publish(self, **changes: Any) -> None:
        """A newer state, with these of its fields changed."""
        with self.changed:
            self.state = replace(self.state, version=self.state.version + 1, **changes)
            self.changed.notify_all()

    def wait(self, is_time: Callable[[], bool], timeout: float | None) -> State:
        """The state once something is true, or as it is when the time is up."""
        with self.changed:
            self.changed.wait_for(is_time, timeout)
            return self.state
