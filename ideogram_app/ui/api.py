"""Public API endpoints, for gradio_client and plain HTTP: system_info, status, prepare, compare.

They speak the names on the wire and go the same way as the page: through the studio's queue, waiting for the end.
Everything else on the page is private. Left out: uploads, and progress, which `status` reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gradio.events import api

from ideogram_app.catalog.models import find_model
from ideogram_app.errors import AppError, DeviceError
from ideogram_app.studio.state import Job
from ideogram_app.studio.studio import Studio
from ideogram_app.ui.form import request_of
from ideogram_app.wire import to_plain

MACHINE_SECONDS = 120.0  # how long a call waits for the first look at the machine


def add_endpoints(studio: Studio, errors_as_toast: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Add the endpoints to the page that is being built. `errors_as_toast` turns an `AppError` into an answer."""

    def system_info(model: str = "miniature") -> dict[str, Any]:
        """The machine, and the plan for a model at its default size."""
        find_model(model)
        state = studio.state
        version = -1
        while state.machine is None and not state.machine_error and state.version != version:
            version, state = state.version, studio.watch(state.version, MACHINE_SECONDS)
        if state.machine is None:
            raise DeviceError(state.machine_error or "The machine is still being looked at", do="Try again in a moment")
        return {"hardware": to_plain(state.machine.hardware), "plan": to_plain(state.machine.plans[model])}

    def status(model: str = "miniature") -> dict[str, Any]:
        """The recipes of a model on disk, the running job and the number of waiting ones."""
        find_model(model)
        studio.wake()
        state = studio.state
        return {
            "recipes": {name: _status(row) for name, row in state.statuses.get(model, {}).items()},
            "job": _job(state.job) if state.job else None,
            "waiting": len(state.waiting),
        }

    def prepare(model: str, recipe: str) -> dict[str, Any]:
        """Prepare one recipe and wait until it is there."""
        _finish(studio, studio.submit_prepare(model, (recipe,)))
        return _status(studio.state.statuses[model][recipe])

    def compare(
        prompt: str,
        recipes: list[str],
        preset: str = "default-20",
        width: int = 0,
        height: int = 0,
        seed: int = 0,
        model: str = "miniature",
        savings: list[str] | None = None,
        adapt: bool = False,
        device_limit_gb: float = 0,
    ) -> dict[str, Any]:
        """Draw one caption in several precisions and wait for the Comparison. A side of 0 means the model's own.

        With `adapt` a picture that runs out of memory is drawn with less; `device_limit_gb` plans with no more.
        """
        own = find_model(model).default_size
        sides = width or own[0], height or own[1]
        request = request_of(model, prompt, preset, *sides, seed, recipes, savings or [], adapt)
        limit = round(max(0, device_limit_gb) * 1e9) or None
        job = _finish(studio, studio.submit_compare(replace(request, device_limit_bytes=limit)))
        if job.entry is None:  # nothing was drawn, so nothing was kept
            raise AppError(next((result.error for result in job.results if result.error), "Nothing was drawn"))
        return dict(to_plain(studio.entry(job.entry).comparison))

    for endpoint in (system_info, status, prepare, compare):
        api(errors_as_toast(endpoint), api_name=endpoint.__name__, concurrency_limit=None)


def _finish(studio: Studio, job_id: str) -> Job:
    """Wait for a job; one that did not get through raises."""
    job = studio.wait(job_id)
    if job.state != "done":
        raise AppError(job.error or "It was stopped before it was done")
    return job


def _status(row: Any) -> dict[str, Any]:
    return {"state": row.state, "bytes": row.bytes, "detail": row.detail}


def _job(job: Job) -> dict[str, Any]:
    stage = job.stage
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "phase": stage.phase if stage else None,
        "recipe": stage.recipe if stage else None,
        "done": stage.done if stage else 0,
        "total": stage.total if stage else 0,
        "error": job.error,
    }
