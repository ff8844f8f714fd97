"""One recipe's picture: a retry loop that goes on with less where memory runs out, or offers to.

    for event in attempts(planned, recipe, shared, session):
        ...                      the last event carries a result, of a picture or of the reason why there is none

Whatever was loaded is given back before anything else is decided, so that the next attempt starts from the memory that
there is. Who said `adapt` gets the first fallback (planning/fallbacks.py) that needs no preparation, and a result that
says what was asked for, what ran and why; everybody else gets the fallbacks as offers. Any other failure becomes a
failed result of this recipe alone.

Left out: the fallbacks themselves, and what the text encoder does when it finds no room (generation/encode_prompt.py).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from traceback import clear_frames

import torch

from ideogram_app.errors import AppError, DeviceError
from ideogram_app.generation.draw import Provenance, SharedInputs, draw
from ideogram_app.generation.sampler import make_noise
from ideogram_app.generation.session import Session, with_free_memory
from ideogram_app.generation.validate import failed_result
from ideogram_app.machine.memory import memory_now
from ideogram_app.machine.meter import release
from ideogram_app.model.cache import LoadedKey
from ideogram_app.model.loader import Homes
from ideogram_app.model.offload.offload import COMPUTE_DTYPES
from ideogram_app.planning.fallbacks import apply_fallback
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.profile import Observation
from ideogram_app.planning.streaming import FEWEST_SLOTS
from ideogram_app.records import Event, Fallback, Request, Result


@dataclass(frozen=True)
class Attempt:
    """One try at one recipe's picture.

    Attributes:
        asked: the request as it was made; recipe: of it, under which the result stands.
        request: with the size and the limits of this try.
        inputs: what its plan was computed from; `plan`: by which it is drawn.
        shared: text features, and noise of its size.
        planned_residency: where the first try wanted the transformers.
        given_up: what is done with less than was asked for, a sentence each.
    """

    asked: Request
    recipe: str
    request: Request
    inputs: PlanInputs
    plan: Plan
    shared: SharedInputs
    planned_residency: str
    given_up: tuple[str, ...]

    @classmethod
    def first(cls, planned: PlannedRequest, recipe: str, shared: SharedInputs) -> Attempt:
        """As it was planned."""
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


def attempts(planned: PlannedRequest, recipe: str, shared: SharedInputs, session: Session) -> Iterator[Event]:
    """Draw one recipe of a request.

    Yields:
        The events of `draw`, for every attempt; the last is `result`.
    """
    attempt = Attempt.first(planned, recipe, shared)
    while True:
        outcome = yield from run(attempt, session)
        if isinstance(outcome, Result):
            yield Event("result", recipe, result=outcome)
            return
        attempt = replace(attempt, inputs=with_free_memory(attempt.inputs))
        ready = session.ready(attempt.request.model)
        offers = session.fallbacks(attempt.inputs, attempt.plan, outcome, ready, attempt.request.recipes)
        at_once = next((rung for rung in offers if rung.recipe in ready), None)
        if at_once is None or not planned.request.adapt:
            failed = failed_result(planned.request, recipe, outcome.sentence())
            yield Event("result", recipe, result=replace(failed, offers=offers, given_up=attempt.given_up))
            return
        attempt = next_attempt(attempt, outcome, at_once)
        yield Event("load", recipe, message=attempt.given_up[-1])


def run(attempt: Attempt, session: Session) -> Generator[Event, None, Result | OutOfMemory]:
    """One try: its events, and at the end a result, of a picture or of an error, or the shortage of memory.

    Whatever was loaded for a try that failed has been given back when it ends.

    Raises:
        Exception: a bug.
    """
    phase, error = "load", ""
    try:
        for event in _draw(attempt, session):
            if event.result:
                _note(event.result, attempt, session.observe)
                return event.result
            phase = event.phase
            yield event
    except Exception as problem:
        shortage = classify(problem, phase, memory_now(attempt.inputs.hardware))
        if shortage is None and not isinstance(problem, AppError):
            raise
        error = str(problem)
        clear_frames(problem.__traceback__)  # which hold what was loaded for as long as somebody holds the problem
    session.kept.unload()
    for device in dict.fromkeys(attempt.plan.branch_devices):  # of what was not loaded whole, too
        release(torch.device(device))
    return shortage or failed_result(attempt.asked, attempt.recipe, error)


def next_attempt(attempt: Attempt, shortage: OutOfMemory, rung: Fallback) -> Attempt:
    """The try after one that ran out of memory: a fallback taken, with a plan and noise of its own."""
    request = apply_fallback(attempt.request, attempt.engaged, rung)
    inputs = replace(
        attempt.inputs,
        recipe=rung.recipe,
        ready=(rung.recipe,),
        size=(rung.width, rung.height),
        limit_bytes=rung.device_limit_bytes,
        host_limit_bytes=rung.host_limit_bytes,
    )
    shared = attempt.shared
    if inputs.size != attempt.inputs.size:
        shared = replace(shared, noise=make_noise(request.seed, *inputs.size).to(shared.noise.device))
    given_up = (*attempt.given_up, shortage.account(rung.title))
    return replace(attempt, request=request, inputs=inputs, plan=plan(inputs), shared=shared, given_up=given_up)


def _draw(attempt: Attempt, session: Session) -> Iterator[Event]:
    """Load or keep the transformers where the plan wants them, and draw."""
    request, chosen, shared = attempt.request, attempt.plan, attempt.shared
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
        session.kept.drop_encoder()
    warm_bytes = session.kept.transformers_host_bytes if session.kept.key == key else None
    load_anew = partial(
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
    shared.vae.to(device).enable_tiling(smaller_tile(shared.tile, chosen.decode_tile))
    shared = replace(shared, noise=shared.noise.to(device))
    load = partial(session.kept.transformers, key, load_anew)
    yield from draw(request, attempt.recipe, load, shared, session.output, _provenance(attempt, warm_bytes))


def homes_of(chosen: Plan) -> Homes:
    """Where a plan wants both transformers."""
    first, second = (torch.device(device) for device in chosen.branch_devices)
    return Homes((first, second), chosen.streamed_blocks, chosen.residency == "disk", chosen.slots or FEWEST_SLOTS)


def smaller_tile(*sides: int) -> int:
    """The smallest of some tiles, 0 for a whole picture where none is needed."""
    return min((side for side in sides if side), default=0)


def _provenance(attempt: Attempt, warm_bytes: int | None) -> Provenance:
    expected = attempt.plan.predicted
    return Provenance(
        predicted_device_bytes=expected.device.allocated if expected.device else None,
        predicted_host_bytes=expected.peak_host_bytes,
        residency=attempt.plan.residency or "",
        planned_residency=attempt.planned_residency,
        given_up=attempt.given_up,
        warm_bytes=warm_bytes,
    )


def _note(result: Result, attempt: Attempt, observe: Callable[[Observation], None] | None) -> None:
    """Tell how long a step took, where nothing was left out of it."""
    if observe is None or result.seconds_per_step is None or attempt.request.savings:
        return
    chosen = attempt.plan
    observe(
        Observation(
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
        )
    )
