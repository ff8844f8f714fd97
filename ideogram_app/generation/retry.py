"""One recipe's picture, tried again with less where memory runs out, or offered to be.

    for event in attempts(request, recipe, shared, desk):
        ...                      the last event carries a result, of a picture or of the reason why there is none

Whatever was loaded is given back before anything else is decided, so that the next attempt starts from the memory that
there is. Who said `adapt` gets the first rung of the ladder (planning/fallbacks.py) that needs no preparation, and a
result that says what was asked for, what ran and why; everybody else gets the rungs as offers. Any other failure
becomes a failed result of this recipe alone.

Left out: the ladder itself, and what the text encoder does when it finds no room (generation/encode_prompt.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from traceback import clear_frames

import torch

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import AppError, DeviceError
from ideogram_app.generation.draw import Provenance, SharedInputs, draw, make_noise
from ideogram_app.generation.validate import failed_result
from ideogram_app.machine.hardware import Hardware
from ideogram_app.machine.memory import MemoryNow, memory_now
from ideogram_app.machine.meter import release
from ideogram_app.model.cache import LoadedKey, ModelCache
from ideogram_app.model.loader import Homes, load_transformers
from ideogram_app.model.offload.offload import COMPUTE_DTYPES
from ideogram_app.planning.fallbacks import fallbacks, taken, within
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.profile import MachineProfile, Observation
from ideogram_app.planning.streaming import FEWEST_SLOTS
from ideogram_app.records import Event, Fallback, Request, Result


@dataclass(frozen=True)
class Session:
    """What drawing goes by beside the request.

    Attributes:
        kept: what is loaded, and stays so.
        reserve_bytes: of device memory that is left to others.
        known: what this machine has shown of itself; `observe` is told of every picture that was drawn whole.
    """

    store: Store
    hardware: Hardware
    kept: ModelCache
    output: Path
    reserve_bytes: int = 0
    known: MachineProfile | None = None
    observe: Callable[[Observation], None] | None = None

    def plan(self, request: Request, recipe: str, text_tokens: int) -> Plan:
        """The plan for one recipe of a request. Disk is no question any more: loading refuses what was not prepared."""
        return plan(
            within(self.hardware, request.host_limit_bytes),
            request.model,
            width=request.width,
            height=request.height,
            recipe=recipe,
            ready=(recipe,),
            text_tokens=text_tokens,
            reserve_bytes=self.reserve_bytes,
            limit_bytes=request.device_limit_bytes,
            known=self.known,
            savings=request.savings,
        )

    def rungs(
        self, request: Request, recipe: str, planned: Plan, shortage: OutOfMemory, text_tokens: int
    ) -> tuple[Fallback, ...]:
        """What can still be drawn after a recipe's plan failed."""
        return fallbacks(
            self.hardware,
            request,
            recipe,
            planned,
            shortage,
            self.ready(request.model),
            text_tokens=text_tokens,
            reserve_bytes=self.reserve_bytes,
            known=self.known,
        )

    def ready(self, model: str) -> frozenset[str]:
        """Recipes whose files are complete."""
        return frozenset(recipe for recipe in RECIPES if self.store.status(model, recipe).usable)

    def now(self) -> MemoryNow:
        return memory_now(self.hardware)

    def seen_now(self) -> Session:
        """The same with the memory that is free now; what torch caches on a device can be given out again."""
        now, machine = self.now(), self.hardware
        device = machine.device_free_bytes if now.device_free is None else now.device_free + (now.device_ours or 0)
        host = machine.host_free_bytes if now.host_free is None else now.host_free
        return replace(self, hardware=replace(machine, device_free_bytes=device, host_free_bytes=host))


def homes_of(planned: Plan) -> Homes:
    """Where a plan wants both transformers."""
    first, second = (torch.device(device) for device in planned.branch_devices)
    from_disk = planned.residency == "disk"
    return Homes((first, second), planned.streamed_blocks, from_disk, planned.slots or FEWEST_SLOTS)


def smaller_tile(*sides: int) -> int:
    """The smallest of some tiles, 0 for a whole picture where none is needed."""
    return min((side for side in sides if side), default=0)


def attempts(request: Request, recipe: str, shared: SharedInputs, desk: Session) -> Iterator[Event]:
    """Draw one recipe of a request.

    Yields:
        The events of `pipeline.draw`, for every attempt; the last is `result`.
    """
    asked, now, engaged, tokens = recipe, request, recipe, shared.features.shape[1]
    first, given_up = "", shared.given_up
    while True:
        planned = desk.plan(now, engaged, tokens)
        first = first or planned.residency or ""
        terms = _terms(planned, first, given_up)
        phase = "load"
        try:
            for event in _draw(now, asked, engaged, planned, shared, desk, terms):
                phase = event.phase
                if event.result and desk.observe:
                    _note(event.result, now, planned, tokens, desk.observe)
                yield event
            return
        except Exception as problem:
            shortage = classify(problem, phase, desk.now())
            if shortage is None and not isinstance(problem, AppError):
                raise
            error = str(problem)
            clear_frames(problem.__traceback__)  # which hold what was loaded for as long as somebody holds the problem
        desk.kept.unload()
        for device in dict.fromkeys(planned.branch_devices):  # of what was not loaded whole, too
            release(torch.device(device))
        if shortage is None:
            yield Event("result", asked, result=failed_result(request, asked, error))
            return
        desk = desk.seen_now()
        ladder = desk.rungs(now, engaged, planned, shortage, tokens)
        rung = _next(ladder, desk.ready(now.model)) if request.adapt else None
        if rung is None:
            failed = failed_result(request, asked, shortage.sentence())
            yield Event("result", asked, result=replace(failed, offers=ladder, given_up=given_up))
            return
        given_up = (*given_up, shortage.account(rung.title))
        now, shared = _stepped_down(now, engaged, rung, shared)
        engaged = rung.recipe
        yield Event("load", asked, message=given_up[-1])


def _note(
    result: Result, request: Request, planned: Plan, text_tokens: int, observe: Callable[[Observation], None]
) -> None:
    """Tell how long a step took, where nothing was left out of it."""
    if result.seconds_per_step is None or request.savings:
        return
    size, offloaded = (result.width, result.height), (planned.streamed_bytes, planned.streamed_blocks)
    devices, from_disk = len(set(planned.branch_devices)), planned.residency == "disk"
    seconds = result.seconds_per_step
    seen = Observation(request.model, planned.arithmetic, *size, text_tokens, seconds, *offloaded, from_disk, devices)
    observe(seen)


def _next(ladder: tuple[Fallback, ...], ready: frozenset[str]) -> Fallback | None:
    """The first rung that can be taken at once."""
    return next((rung for rung in ladder if rung.recipe in ready), None)


def _stepped_down(request: Request, engaged: str, rung: Fallback, shared: SharedInputs) -> tuple[Request, SharedInputs]:
    """The request as a rung says, and noise of its size."""
    less = taken(request, engaged, rung)
    if (less.width, less.height) != (request.width, request.height):
        noise = make_noise(request.seed, less.width, less.height).to(shared.noise.device)
        shared = replace(shared, noise=noise)
    return less, shared


def _terms(planned: Plan, first: str, given_up: tuple[str, ...]) -> Provenance:
    expected = planned.predicted
    device = expected.device.allocated if expected.device else None
    return Provenance(device, expected.peak_host_bytes, planned.residency or "", first, given_up)


def _draw(
    request: Request, asked: str, engaged: str, planned: Plan, shared: SharedInputs, desk: Session, terms: Provenance
) -> Iterator[Event]:
    """One attempt."""
    if not planned.fits:
        raise DeviceError(f"{engaged} does not fit this machine: {planned.why}", do=planned.suggestion.text)
    homes, dtype, arithmetic = homes_of(planned), COMPUTE_DTYPES[planned.compute_dtype], planned.arithmetic
    version = desk.store.version(request.model, engaged)
    key = LoadedKey.of(request.model, engaged, version, dtype, homes, arithmetic, request.compiled)
    if planned.encoder != "resident":
        desk.kept.drop_encoder()
    if desk.kept.key == key:
        terms = replace(terms, warm_bytes=desk.kept.transformers_host_bytes)

    what = desk.store, request.model, engaged, homes, dtype
    load_anew = partial(load_transformers, *what, arithmetic=arithmetic, compiled=request.compiled)

    device = torch.device(planned.device)  # where the plan counts latents and decoder, once the text encoder has left
    shared.vae.to(device).enable_tiling(smaller_tile(shared.tile, planned.decode_tile))
    load = partial(desk.kept.transformers, key, load_anew)
    yield from draw(request, asked, load, replace(shared, noise=shared.noise.to(device)), desk.output, terms)
