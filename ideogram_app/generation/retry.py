"""Retry loop of one recipe's picture: where memory runs out it takes a fallback, or offers the fallbacks.

    for event in attempts(planned, recipe, shared, session):
        ...                      the last event carries a result, of a picture or of the reason why there is none

Models are unloaded before anything else is decided, so that the next attempt starts from the memory that there is. A
request that says `adapt` gets the first fallback (planning/fallbacks.py) that needs no preparation, and a result with
what was asked for, what ran and why; any other gets the fallbacks as offers. Every other exception, of whatever
library, becomes a failed result of this recipe alone, in words; only cancelling passes. Where the error says that the
device computes nothing more (planning/lost_device.py), further recipes on it are not tried.

Left out: the fallbacks themselves, and out of memory in the text encoder (generation/encode_prompt.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from ideogram_app.errors import AppError, Cancelled, DeviceError
from ideogram_app.generation.draw import Provenance, SharedInputs, draw
from ideogram_app.generation.sampler import make_noise
from ideogram_app.generation.session import Session, free_memory, with_free_memory
from ideogram_app.model.cache import LoadedKey
from ideogram_app.model.loader import Homes
from ideogram_app.model.offload.offload import COMPUTE_DTYPES
from ideogram_app.planning.failures import forget, in_words
from ideogram_app.planning.fallbacks import apply_fallback
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.intervals import outcomes_of
from ideogram_app.planning.lost_device import lost_device
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.profile import Observation, beside_steps
from ideogram_app.planning.streaming import FEWEST_SLOTS
from ideogram_app.records import Event, Fallback, Request, Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One try at one recipe's picture."""

    asked: Request  # as it was made
    recipe: str  # of it, under which the result stands
    request: Request  # with the size and the limits of this try
    inputs: PlanInputs  # of `plan`
    plan: Plan
    shared: SharedInputs  # with noise of this try's size
    planned_residency: str  # of the first try
    given_up: tuple[str, ...]  # as in `Result`

    @classmethod
    def first(cls, planned: PlannedRequest, recipe: str, shared: SharedInputs) -> Attempt:
        """The attempt as it was planned."""
        chosen = planned.plans[recipe]
        return cls(
            asked=planned.request,
            recipe=recipe,
            request=planned.request,
            inputs=planned.inputs_of(recipe),
            plan=chosen,
            shared=shared,
            planned_residency=chosen.residency or "",
            given_up=shared.given_up,
        )

    @property
    def engaged(self) -> str:
        """The recipe that runs."""
        return self.inputs.recipe or self.recipe

    @property
    def devices(self) -> tuple[str, ...]:
        """All that the plan uses."""
        return tuple(dict.fromkeys((self.plan.device, *self.plan.branch_devices)))

    def failed(self, error: str) -> Result:
        """A result of this attempt without a picture."""
        return replace(Result.failed(self.asked, self.recipe, error), given_up=self.given_up)


def attempts(planned: PlannedRequest, recipe: str, shared: SharedInputs, session: Session) -> Iterator[Event]:
    """Draw one recipe of a request.

    Yields:
        The events of `draw`, for every attempt; the last is `result`, whatever is raised on the way.

    Raises:
        Cancelled: by what draws. Nothing else.
    """
    try:
        yield from _attempts(planned, recipe, shared, session)
    except Cancelled:
        raise
    except Exception as problem:  # between two attempts
        log.exception("%s failed", recipe)
        yield Event("result", recipe, result=Result.failed(planned.request, recipe, in_words(problem)))


def _attempts(planned: PlannedRequest, recipe: str, shared: SharedInputs, session: Session) -> Iterator[Event]:
    attempt = Attempt.first(planned, recipe, shared)
    while True:
        outcome = yield from run(attempt, session)
        if isinstance(outcome, Result):
            yield Event("result", recipe, result=outcome)
            return
        attempt = replace(attempt, inputs=with_free_memory(attempt.inputs))
        ready = session.ready(attempt.request.model)
        offers = session.fallbacks(attempt.inputs, attempt.plan, outcome, ready, attempt.request.recipes)
        fallback = next((offer for offer in offers if offer.recipe in ready), None)
        if fallback is None or not planned.request.adapt:
            yield Event("result", recipe, result=replace(attempt.failed(outcome.sentence()), offers=offers))
            return
        attempt = next_attempt(attempt, outcome, fallback)
        yield Event("load", recipe, message=attempt.given_up[-1])


def run(attempt: Attempt, session: Session) -> Generator[Event, None, Result | OutOfMemory]:
    """One try: its events, and at the end a result, of a picture or of an error, or what ran out of memory.

    After a failure everything has been unloaded. On a device that was lost before, nothing is tried.

    Raises:
        Cancelled: by what draws.
    """
    phase, before = "load", session.lost_among(attempt.devices)
    if before:
        return attempt.failed(before.again())
    try:
        for event in _draw(attempt, session):
            if event.result:
                _observe(event.result, attempt, session)
                return event.result
            phase = event.phase
            yield event
    except Cancelled:
        raise
    except Exception as problem:
        lost = lost_device(problem, phase)
        oom = None if lost else classify(problem, phase, free_memory(attempt.inputs.hardware))
        if lost or not (oom or isinstance(problem, AppError)):
            log.exception("%s failed in the phase %s", attempt.recipe, phase)
        outcome = oom or attempt.failed(in_words(problem, phase))
        forget(problem)
    lost = session.unload(attempt.devices, phase) or lost  # a library's own error may be the first sign of it
    if lost:
        session.lose(lost, attempt.devices)
        return attempt.failed(lost.sentence())
    return outcome


def next_attempt(attempt: Attempt, oom: OutOfMemory, fallback: Fallback) -> Attempt:
    """The attempt after one that ran out of memory, with a plan and noise of its own."""
    request = apply_fallback(attempt.request, attempt.engaged, fallback)
    inputs = replace(
        attempt.inputs,
        recipe=fallback.recipe,
        ready=(fallback.recipe,),
        size=(fallback.width, fallback.height),
        limit_bytes=fallback.device_limit_bytes,
        host_limit_bytes=fallback.host_limit_bytes,
    )
    shared = attempt.shared
    if inputs.size != attempt.inputs.size:
        shared = replace(shared, noise=make_noise(request.seed, *inputs.size).to(shared.noise.device))
    given_up = (*attempt.given_up, oom.account(fallback.title))
    return replace(attempt, request=request, inputs=inputs, plan=plan(inputs), shared=shared, given_up=given_up)


def _draw(attempt: Attempt, session: Session) -> Iterator[Event]:
    """Draw with the transformers where the plan wants them, from the cache or loaded."""
    request, chosen, cache = attempt.request, attempt.plan, session.cache
    if not chosen.fits:
        raise DeviceError(f"{attempt.engaged} does not fit this machine: {chosen.why}", do=chosen.suggestion.text)
    homes, dtype = homes_of(chosen), COMPUTE_DTYPES[chosen.compute_dtype]
    version = session.store.version(request.model, attempt.engaged)
    key = LoadedKey(
        model=request.model,
        recipe=attempt.engaged,
        version=version,
        dtype=dtype,
        homes=homes,
        arithmetic=chosen.arithmetic,
        compiled=request.compiled,
    )
    if chosen.encoder != "resident":
        cache.drop_encoder()
    warm_bytes = cache.transformers_host_bytes if cache.key == key else None
    load = partial(
        session.load,
        session.store,
        request.model,
        attempt.engaged,
        homes,
        dtype,
        arithmetic=chosen.arithmetic,
        compiled=request.compiled,
    )
    device = torch.device(chosen.device)  # where the plan counts latents and decoder, once the text encoder has left
    shared = replace(attempt.shared, noise=attempt.shared.noise.to(device))
    shared.vae.to(device).enable_tiling(smaller_tile(shared.tile, chosen.decode_tile))
    expected = chosen.predicted
    provenance = Provenance(
        predicted_device_bytes=expected.device.allocated if expected.device else None,
        predicted_host_bytes=expected.peak_host_bytes,
        predicted=expected.of_picture,
        residency=chosen.residency or "",
        planned_residency=attempt.planned_residency,
        given_up=attempt.given_up,
        warm_bytes=warm_bytes,
    )
    transformers = partial(cache.transformers, key, load)
    yield from draw(request, attempt.recipe, transformers, shared, session.output, provenance)


def homes_of(chosen: Plan) -> Homes:
    """Where a plan wants both transformers."""
    first, second = (torch.device(device) for device in chosen.branch_devices)
    return Homes((first, second), chosen.streamed_blocks, chosen.residency == "disk", chosen.slots or FEWEST_SLOTS)


def smaller_tile(*sides: int) -> int:
    """The smallest side of tiles; 0 stands for a whole picture."""
    return min((side for side in sides if side), default=0)


def _observe(result: Result, attempt: Attempt, session: Session) -> None:
    """Report the seconds of a step, where nothing was left out of it. The picture is kept whatever becomes of that."""
    if session.observe is None or result.seconds_per_step is None or attempt.request.savings:
        return
    chosen = attempt.plan
    try:
        seen = Observation(
            model=attempt.request.model,
            arithmetic=chosen.arithmetic,
            width=result.width,
            height=result.height,
            text_tokens=attempt.inputs.text_tokens,
            seconds=result.seconds_per_step,
            streamed_bytes=chosen.streamed_bytes,
            streamed_blocks=chosen.streamed_blocks,
            disk=chosen.residency == "disk",
            devices=len(set(chosen.branch_devices)),
            beside=beside_steps(result),
            outcomes=outcomes_of(result, attempt.request.model),
        )
        session.observe(seen)
    except Exception:
        log.exception("the seconds of a step could not be noted")
