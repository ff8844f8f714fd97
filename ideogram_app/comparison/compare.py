"""Comparison of recipes: one request drawn with each, from the same text features and the same noise.

One recipe is loaded at a time and unloaded before the next, so memory is that of the largest and every peak is its own;
the last one stays for the next request. The reference is drawn first wherever it stands, because the others are
measured against its picture. A recipe that fails, by whatever exception, becomes a result with its reason, and the
others are still drawn; where the caption could not be encoded, that is the reason of all. Only cancelling passes.

Left out: checking and planning the request, which the worker does first (generation/validate.py, planned_request.py),
preparing recipes, and judging pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from PIL import Image

from ideogram_app.comparison.metrics import psnr, ssim
from ideogram_app.errors import AppError, DeviceError
from ideogram_app.generation.draw import SharedInputs
from ideogram_app.generation.encode_prompt import encode_prompt
from ideogram_app.generation.retry import attempts, smaller_tile
from ideogram_app.generation.session import Session, give_back, with_free_memory
from ideogram_app.kernels.processor import threads
from ideogram_app.machine.hardware import usable_cores
from ideogram_app.machine.meter import empty_cache
from ideogram_app.planning.failures import forget, in_words, named
from ideogram_app.planning.oom import OutOfMemory
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.records import REFERENCE, Event, Result

log = logging.getLogger(__name__)


def compare(planned: PlannedRequest, session: Session) -> Iterator[Event]:
    """Draw the request with each of its recipes.

    Yields:
        The events of every picture, one `result` for each recipe, failed ones included, and `done` at the end.

    Raises:
        AppError: nothing at all can be drawn (broken files of the text encoder or VAE).
    """
    device = torch.device(planned.encoding.device)
    if device.type == "cpu":  # more threads than a container's share of time wait for each other, spinning
        count, _ = threads(*usable_cores(), planned.inputs.hardware.cpu_allowed)
        torch.set_num_threads(min(torch.get_num_threads(), count))
    for limit in planned.inputs.memory_limits:  # before anything is loaded, the text encoder included
        limit.apply()
    yield Event("encode")
    try:
        shared = _encode(planned, session)
        if isinstance(shared, SharedInputs):
            yield from _pictures(planned, shared, session)
        elif isinstance(shared, OutOfMemory):
            yield from _offers(planned, shared, session)
        else:
            for recipe in planned.plans:
                yield Event("result", recipe, result=Result.failed(planned.request, recipe, shared))
    finally:  # stopped or failed too: pinned memory that nobody frees could never be pinned again
        if not session.stays:
            give_back(session.cache.unload)
        give_back(partial(empty_cache, device))
    yield Event("done")


def _encode(planned: PlannedRequest, session: Session) -> SharedInputs | OutOfMemory | str:
    """What all recipes start from, what ran out, or in words why there is nothing to start from.

    Raises:
        AppError: the model's files cannot be used, or it was stopped.
    """
    try:
        return encode_prompt(planned, session)
    except DeviceError as problem:
        return str(problem)
    except AppError:
        raise
    except Exception as problem:
        log.exception("the caption could not be encoded")
        forget(problem)
        return in_words(problem, "encode")


def _pictures(planned: PlannedRequest, shared: SharedInputs, session: Session) -> Iterator[Event]:
    """Every recipe in turn, the reference first; each result with its distance to the reference."""
    reference: Result | None = None
    shared = replace(shared, tile=smaller_tile(*(chosen.decode_tile for chosen in planned.plans.values())))
    for recipe in sorted(planned.plans, key=lambda name: name != REFERENCE):
        for event in attempts(planned, recipe, shared, session):
            if event.result is None:
                yield event
                continue
            result = _compared(event.result, reference)
            reference = result if recipe == REFERENCE and result.image else reference
            yield replace(event, result=result)


def _offers(planned: PlannedRequest, oom: OutOfMemory, session: Session) -> Iterator[Event]:
    """Failed results of all recipes, because encoding the caption ran out of memory."""
    request, ready = planned.request, session.ready(planned.request.model)
    for recipe, chosen in planned.plans.items():
        inputs = with_free_memory(planned.inputs_of(recipe))
        offers = session.fallbacks(inputs, chosen, oom, ready, request.recipes)
        failed = Result.failed(request, recipe, oom.sentence())
        yield Event("result", recipe, result=replace(failed, offers=offers))


def _compared(result: Result, reference: Result | None) -> Result:
    """The same as `with_distance`; a picture is kept whatever becomes of its numbers."""
    try:
        return with_distance(result, reference)
    except Exception as problem:
        log.exception("%s could not be compared with the reference", result.recipe)
        missing = f"PSNR and SSIM could not be computed: {named(problem)}."
        return replace(result, given_up=(*result.given_up, missing))


def with_distance(result: Result, reference: Result | None) -> Result:
    """The result with PSNR and SSIM to the reference's picture, where both exist and have the same size."""
    if reference is None or not reference.image or not result.image or result.recipe == REFERENCE:
        return result
    if (result.width, result.height) != (reference.width, reference.height):
        return result
    with Image.open(result.image) as picture, Image.open(reference.image) as truth:
        return replace(result, psnr=psnr(picture, truth), ssim=ssim(picture, truth))
