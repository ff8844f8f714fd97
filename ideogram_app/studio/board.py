"""What everybody may look at: the present `State`, the jobs behind it, and a way to wait for a newer one.

Watchers get an immutable `State`; whoever works puts jobs and publishes changes. Every method may be called from any
thread. Left out: doing anything, which is studio/worker.py, and deciding when, which is studio/studio.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ideogram_app.errors import RequestError
from ideogram_app.studio.state import Job, State

JOBS_KEPT = 50  # finished jobs that can still be asked for


class Board:
    """One lock around one state and its jobs.

    Attributes:
        changed: held while state or jobs change, and told when they have.
        queue: ids of the jobs that wait, in order.
    """

    def __init__(self, state: State) -> None:
        self.changed = threading.Condition()
        self.queue: list[str] = []
        self._state = state
        self._jobs: dict[str, Job] = {}

    @property
    def state(self) -> State:
        with self.changed:
            return self._state

    def find(self, job_id: str) -> Job:
        """Raises: RequestError: there is no such job."""
        with self.changed:
            if job_id not in self._jobs:
                raise RequestError("There is no such job", got=repr(job_id)[:60])
            return self._jobs[job_id]

    def put(self, job: Job) -> None:
        """Keep this version of a job and tell everybody."""
        with self.changed:
            self._jobs[job.id] = job
            over = [known.id for known in self._jobs.values() if known.is_over]
            for old in over[:-JOBS_KEPT]:
                del self._jobs[old]
            shown = self._state.job
            current = job if job.started and (not shown or shown.is_over or shown.id == job.id) else shown
            waiting = self._named(self.queue)
            comparison = current if current and current.kind == "compare" else self._state.comparison
            self.publish(job=current, comparison=comparison, waiting=waiting)

    def publish(self, **changes: Any) -> None:
        """A newer state, with these of its fields changed."""
        with self.changed:
            self._state = replace(self._state, version=self._state.version + 1, **changes)
            self.changed.notify_all()

    def wait(self, is_time: Callable[[], bool], timeout: float | None) -> State:
        """The state once something is true, or as it is when the time is up."""
        with self.changed:
            self.changed.wait_for(is_time, timeout)
            return self._state

    def _named(self, names: Sequence[str]) -> tuple[Job, ...]:
        return tuple(self._jobs[name] for name in names)
