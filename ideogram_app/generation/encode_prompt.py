"""The caption, read before anything is drawn: text features and noise, or what ran out on the way.

The text encoder visits the device the way the plan says. Where transformers are loaded already it passes through layer
by layer instead, so that they can stay. If it finds no room, everything loaded goes and it tries again as planned, and
then, for those who said `adapt`, layer by layer: features are the same, so only the way is told. Captions that were
read before need no encoder at all.

Left out: prompt enhancement, and reading on the processor while the device draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from ideogram_app.generation.draw import SharedInputs, share
from ideogram_app.generation.retry import Session
from ideogram_app.machine.meter import release
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.components import ComponentsFolder, find_components
from ideogram_app.model.offload.offload import COMPUTE_DTYPES
from ideogram_app.model.text_encoder.features import FeatureCache, FeatureKey, encode
from ideogram_app.model.text_encoder.on_device import encoder_on_device
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.planning.planner import Plan
from ideogram_app.records import Request

LIGHTEST = "streamed"


def encode_prompt(request: Request, chosen: Plan, desk: Session, features: FeatureCache) -> SharedInputs | OutOfMemory:
    """What every recipe of a request starts from; or the shortage, with everything loaded given back.

    Raises:
        AppError: the request or the model's parts cannot be used.
    """
    first, *others = _ways(request, chosen, desk.kept)
    where = find_components(request.model, store=desk.store)
    parts = where, where.vae("cpu", COMPUTE_DTYPES[chosen.compute_dtype]), where.shift()
    outcome = _read(request, chosen, desk, features, parts, first)
    for way in others:
        if not isinstance(outcome, OutOfMemory):
            return outcome
        given_up = (outcome.account("the text encoder passed through layer by layer"),)
        outcome = _read(request, chosen, desk, features, parts, way)
        if not isinstance(outcome, OutOfMemory) and way != chosen.encoder:
            return replace(outcome, given_up=given_up)
    return outcome


def _read(
    request: Request,
    chosen: Plan,
    desk: Session,
    features: FeatureCache,
    parts: tuple[ComponentsFolder, Any, float],
    way: str,
) -> SharedInputs | OutOfMemory:
    """One try, with the encoder visiting in one way."""
    device, dtype = torch.device(chosen.device), COMPUTE_DTYPES[chosen.compute_dtype]
    where, vae, shift = parts
    key = FeatureKey(request.model, where.identity, dtype, request.caption)
    reader = _reader(where, way, device, dtype, request.caption, desk.kept)
    try:
        return share(request, device, lambda: features.features(key, reader), vae, shift)
    except Exception as problem:
        shortage = classify(problem, "encode", desk.now())
        if shortage is None:
            raise
        clear_frames(problem.__traceback__)
    desk.kept.unload()
    release(device)
    return shortage


def _ways(request: Request, chosen: Plan, kept: ModelCache) -> list[str]:
    """How the encoder may visit, the first choice first."""
    ways = [chosen.encoder]
    if kept.key is not None:  # what is loaded stays if it can, whatever it is: if not, once more as planned
        ways.insert(0, LIGHTEST if chosen.encoder != "resident" else "resident")
    if request.adapt and chosen.device != "cpu" and chosen.encoder != LIGHTEST:
        ways.append(LIGHTEST)
    return ways


def _reader(
    where: ComponentsFolder, way: str, device: torch.device, dtype: torch.dtype, caption: str, kept: ModelCache
) -> Callable[[], Tensor]:
    """Reads the caption: (1, n, taps x hidden)."""

    def staying() -> Tensor:
        key = where.identity, dtype, device
        return encode(where.tokenizer(), kept.encoder(key, lambda: where.text_encoder(device, dtype)), caption)

    def visiting() -> Tensor:
        with encoder_on_device(where, way, device, dtype) as encoder:
            return encode(where.tokenizer(), encoder, caption)

    return staying if way == "resident" else visiting
