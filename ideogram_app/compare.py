"""One request through several recipes: the same text features, the same noise, one picture after another.

One recipe is loaded at a time and gone before the next, so memory is that of the largest and every peak is its own.
The reference is drawn first wherever it stands, because the others are measured against its picture. A recipe that
fails becomes a result with its reason and does not take the others down.

Left out: preparing recipes (the studio and the command line do that first) and judging pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ideogram_app.checkpoints.store import Store
from ideogram_app.checks import check_request, failed_result
from ideogram_app.errors import AppError, DeviceError
from ideogram_app.flow import REFERENCE, Event, Request, Result
from ideogram_app.hardware import Hardware, usable_cores
from ideogram_app.kernels.processor import threads
from ideogram_app.measure import release
from ideogram_app.metrics import psnr, ssim
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.parts import find_parts
from ideogram_app.model.residency import DTYPES, place, staged
from ideogram_app.model.text import FeatureCache, FeatureKey, encode
from ideogram_app.pipeline import Shared, draw, share
from ideogram_app.planner import Plan, plan


def compare(
    request: Request, store: Store, hardware: Hardware, chosen: Plan, output: Path, features: FeatureCache | None = None
) -> Iterator[Event]:
    """Draw the request with each of its recipes; PNGs go to `output`.

    Args:
        features: of captions read before; a caption that is there needs no text encoder.

    Yields:
        The events of every picture, one `result` for each recipe, failed ones included, and `done` at the end.

    Raises:
        AppError: nothing at all can be drawn (bad request, broken text encoder or VAE).
    """
    check_request(request)
    device, dtype = torch.device(chosen.device), DTYPES[chosen.compute_dtype]
    if device.type == "cpu":  # more threads than a container's share of time wait for each other, spinning
        count, _ = threads(*usable_cores(), hardware.cpu_allowed)
        torch.set_num_threads(min(torch.get_num_threads(), count))
    yield Event("encode")
    where, home = find_parts(request.model, store=store), torch.device("cpu")
    key = FeatureKey(request.model, where.identity, dtype, request.caption)
    kept = features or FeatureCache()

    def encoded() -> Tensor:
        with staged(where.text_encoder(home, dtype), device, home) as encoder:
            return encode(where.tokenizer(), encoder, request.caption)

    vae = where.vae(home, dtype)
    if chosen.decode == "tiled":
        vae.enable_tiling()
    shift = where.scheduler().config.shift
    shared = share(request, device, lambda: kept.features(key, encoded), vae, shift)
    vae.to(device)  # once the text encoder has left it
    reference: Result | None = None
    for recipe in sorted(request.recipes, key=lambda name: name != REFERENCE):
        for event in _draw_or_explain(request, recipe, store, hardware, shared, output):
            if event.result is None:
                yield event
                continue
            result = with_distance(event.result, reference)
            reference = result if recipe == REFERENCE and result.image else reference
            yield replace(event, result=result)
        release(device)
    yield Event("done")


def with_distance(result: Result, reference: Result | None) -> Result:
    """The result with PSNR and SSIM to the reference's picture, where both exist."""
    if reference is None or not reference.image or not result.image or result.recipe == REFERENCE:
        return result
    with Image.open(result.image) as picture, Image.open(reference.image) as truth:
        return replace(result, psnr=psnr(picture, truth), ssim=ssim(picture, truth))


def _draw_or_explain(
    request: Request, recipe: str, store: Store, hardware: Hardware, shared: Shared, output: Path
) -> Iterator[Event]:
    """`draw`, with an error turned into a failed result."""
    size = {"width": request.width, "height": request.height}
    # Disk is no question any more: what was not prepared is refused when it is loaded.
    chosen = plan(hardware, request.model, **size, recipe=recipe, ready=(recipe,))

    def load() -> Loaded:
        if not chosen.fits:
            raise DeviceError(f"{recipe} does not fit this machine: {' '.join(chosen.reasons)}", do=chosen.suggestion)
        device = shared.noise.device
        loaded = load_transformers(
            store,
            request.model,
            recipe,
            device,
            DTYPES[chosen.compute_dtype],
            second=chosen.branch_devices[1],
            home=None if chosen.residency == "resident" else torch.device("cpu"),
            arithmetic=chosen.arithmetic,
            compiled=request.compiled,
        )
        for transformer, own in zip(loaded.modules, loaded.devices, strict=True):
            place(transformer, chosen.residency or "resident", own)
        return loaded

    try:
        yield from draw(request, recipe, load, shared, output)
    except AppError as problem:
        yield Event("result", recipe, result=failed_result(request, recipe, str(problem)))
    except torch.OutOfMemoryError as problem:
        message = DeviceError("The device ran out of memory", got=str(problem), do="Try a smaller picture or gguf-q4_k")
        yield Event("result", recipe, result=failed_result(request, recipe, str(message)))
