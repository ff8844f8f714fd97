"""One request through several recipes: the same text features, the same noise, one picture after another.

One recipe is loaded at a time and gone before the next, so memory is that of the largest and every peak is its own; the
last one stays for the next request. The reference is drawn first wherever it stands, because the others are measured
against its picture. A recipe that fails becomes a result with its reason and does not take the others down.

Left out: reading the caption (generation/encode_prompt.py), one recipe's attempts (generation/retry.py), preparing
recipes (the studio and the command line do that first), and judging pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.comparison.metrics import psnr, ssim
from ideogram_app.generation.draw import SharedInputs
from ideogram_app.generation.encode_prompt import encode_prompt
from ideogram_app.generation.retry import Session, attempts, smaller_tile
from ideogram_app.generation.validate import check_request, failed_result
from ideogram_app.kernels.processor import threads
from ideogram_app.machine.hardware import Hardware, usable_cores
from ideogram_app.machine.meter import give_back
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.text_encoder.features import LONGEST_TEXT, FeatureCache
from ideogram_app.planning.oom import OutOfMemory
from ideogram_app.planning.planner import Plan
from ideogram_app.planning.profile import MachineProfile, Observation
from ideogram_app.records import REFERENCE, Event, Request, Result


def compare(
    request: Request,
    store: Store,
    hardware: Hardware,
    chosen: Plan,
    output: Path,
    features: FeatureCache | None = None,
    *,
    kept: ModelCache | None = None,
    reserve_bytes: int = 0,
    known: MachineProfile | None = None,
    observe: Callable[[Observation], None] | None = None,
) -> Iterator[Event]:
    """Draw the request with each of its recipes; PNGs go to `output`.

    Args:
        features: of captions read before; a caption that is there needs no text encoder.
        kept: what is loaded, and stays so after the last picture; None loads for this request alone.
        reserve_bytes: device memory that is left to others.
        known: what this machine has shown of itself; `observe` is told what each picture adds to that.

    Yields:
        The events of every picture, one `result` for each recipe, failed ones included, and `done` at the end.

    Raises:
        AppError: nothing at all can be drawn (bad request, broken text encoder or VAE).
    """
    check_request(request)
    device = torch.device(chosen.device)
    if device.type == "cpu":  # more threads than a container's share of time wait for each other, spinning
        count, _ = threads(*usable_cores(), hardware.cpu_allowed)
        torch.set_num_threads(min(torch.get_num_threads(), count))
    yield Event("encode")
    desk = Session(store, hardware, kept or ModelCache(), output, reserve_bytes, known, observe)
    try:
        shared = encode_prompt(request, chosen, desk, features or FeatureCache())
        if isinstance(shared, OutOfMemory):
            yield from _offers(request, shared, desk)
        else:
            yield from _pictures(request, shared, desk)
    finally:  # stopped or failed too: RAM that was locked for nobody could never be locked again
        if kept is None:
            desk.kept.unload()
        give_back(device)
    yield Event("done")


def _pictures(request: Request, shared: SharedInputs, desk: Session) -> Iterator[Event]:
    """Every recipe in turn, the reference first; each result with its distance to the reference."""
    reference: Result | None = None
    plans = (desk.plan(request, recipe, shared.features.shape[1]) for recipe in request.recipes)
    shared = replace(shared, tile=smaller_tile(*(planned.decode_tile for planned in plans)))
    for recipe in sorted(request.recipes, key=lambda name: name != REFERENCE):
        for event in attempts(request, recipe, shared, desk):
            if event.result is None:
                yield event
                continue
            result = with_distance(event.result, reference)
            reference = result if recipe == REFERENCE and result.image else reference
            yield replace(event, result=result)


def _offers(request: Request, shortage: OutOfMemory, desk: Session) -> Iterator[Event]:
    """Failed results of all recipes, because the caption found no room to be read in."""
    desk = desk.seen_now()
    for recipe in request.recipes:
        planned = desk.plan(request, recipe, LONGEST_TEXT)
        ladder = desk.rungs(request, recipe, planned, shortage, LONGEST_TEXT)
        failed = failed_result(request, recipe, shortage.sentence())
        yield Event("result", recipe, result=replace(failed, offers=ladder))


def with_distance(result: Result, reference: Result | None) -> Result:
    """The result with PSNR and SSIM to the reference's picture, where both exist and have the same size."""
    if reference is None or not reference.image or not result.image or result.recipe == REFERENCE:
        return result
    if (result.width, result.height) != (reference.width, reference.height):
        return result
    with Image.open(result.image) as picture, Image.open(reference.image) as truth:
        return replace(result, psnr=psnr(picture, truth), ssim=ssim(picture, truth))
