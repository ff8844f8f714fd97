"""What the worker knows: its jobs, the machine, what is on disk, and everything a watcher may show, as one `State`.

All of it is immutable: the worker publishes a new `State`, and whoever watches keeps the one it has for as long as it
likes. Left out: doing anything, which is studio/studio.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ideogram_app.comparison.history import Entry
from ideogram_app.hub.access import Access
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.fallbacks import within
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.profile import MachineProfile
from ideogram_app.records import Event, Request, Result
from ideogram_app.studio.backend import SourceState


@dataclass(frozen=True)
class Job:
    """One thing asked for and how far it is.

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
    """The hardware, what is planned for each model at its default size, and what the machine has shown of itself."""

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
        loaded: what is kept in memory for the next picture, in words; "" where nothing is.
        unloads_at: when that is let go unless it is used before, in seconds since 1970; None where never.
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

    def planned(
        self,
        hardware: Hardware,
        model: str,
        request: Request | None = None,
        reserve_bytes: int = 0,
        known: MachineProfile | None = None,
    ) -> Plan:
        """The plan for a request, or at the model's default size, knowing what need not be fetched or made again."""
        ready, stored = self.at_hand(model)
        return plan(
            within(hardware, request.host_limit_bytes if request else None),
            model,
            width=request.width if request else None,
            height=request.height if request else None,
            stored_bytes=stored,
            ready=ready,
            limit_bytes=request.device_limit_bytes if request else None,
            reserve_bytes=reserve_bytes,
            known=known,
            savings=request.savings if request else (),
        )

    def at_hand(self, model: str) -> tuple[tuple[str, ...], int]:
        """Recipes of a model that are ready, and bytes on disk of them and of the download."""
        rows, source = self.statuses.get(model, {}), self.sources.get(model)
        stored = sum(row.bytes for row in rows.values() if row.usable or row.state == "partial")
        stored += source.bytes + source.companions_bytes + source.companions_begun if source else 0
        return tuple(name for name, row in rows.items() if row.usable), stored
