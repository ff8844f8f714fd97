"""Encoding the caption before anything is drawn: text features and noise, or what ran out of memory on the way.

The text encoder is on the device the way the plan says. Where transformers are loaded already it passes through layer
by layer instead, so that they can stay. If it finds no room, everything loaded goes and it tries again as planned, and
then, for those who said `adapt`, layer by layer: features are the same, so only the way is told. Captions that were
encoded before need no encoder at all.

Left out: prompt enhancement, and encoding on the processor while the device draws.
"""

from __future__ import annotations

from functools import partial
from traceback import clear_frames

import torch
from torch import Tensor

from ideogram_app.generation.draw import SharedInputs
from ideogram_app.generation.sampler import make_noise
from ideogram_app.generation.session import Session
from ideogram_app.machine.memory import memory_now
from ideogram_app.machine.meter import PhaseMeter, release
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.components import ComponentsFolder, find_components
from ideogram_app.model.offload.offload import COMPUTE_DTYPES
from ideogram_app.model.text_encoder import features as text
from ideogram_app.model.text_encoder.on_device import encoder_on_device
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.planner import Plan

LIGHTEST = "streamed"


def caption_tokens(parts: ComponentsFolder, caption: str) -> tuple[int, ...]:
    """Token ids of a caption, which say how much memory and time it takes.

    Raises:
        CaptionError: it is too long. CheckpointError: the tokenizer is missing or damaged.
    """
    return tuple(text.tokenize(parts.tokenizer(), caption)[0].tolist())


def encode_prompt(planned: PlannedRequest, session: Session) -> SharedInputs | OutOfMemory:
    """What every recipe of a request starts from; or the shortage, with everything loaded given back.

    Raises:
        AppError: the model's parts cannot be used.
    """
    request, chosen = planned.request, planned.encoding
    device, dtype = torch.device(chosen.device), COMPUTE_DTYPES[chosen.compute_dtype]
    parts = find_components(request.model, store=session.store)
    vae, shift = parts.vae("cpu", dtype), parts.shift()
    key = text.FeatureKey(request.model, parts.identity, dtype, request.caption)
    ids = torch.tensor([planned.tokens])  # (1, n)
    shortage: OutOfMemory | None = None
    for way in _ways(request.adapt, chosen, session.kept):
        try:
            with PhaseMeter(device) as meter, meter.phase("encode"):
                features = session.features.get(key)
                if features is None:
                    features = session.features.put(key, _encode(parts, way, device, dtype, ids, session.kept))
        except Exception as problem:
            shortage = classify(problem, "encode", memory_now(planned.inputs.hardware))
            if shortage is None:
                raise
            clear_frames(problem.__traceback__)  # which hold what was loaded
            session.kept.unload()
            release(device)
            continue
        given_up: tuple[str, ...] = ()
        if shortage and way != chosen.encoder:
            given_up = (shortage.account("the text encoder passed through layer by layer"),)
        noise = make_noise(request.seed, request.width, request.height).to(device)
        seconds = meter.seconds["encode"]
        return SharedInputs(features, noise, seconds, vae, shift, given_up=given_up, peaks=meter.peaks)
    assert shortage
    return shortage


def _ways(adapt: bool, chosen: Plan, kept: ModelCache) -> list[str]:
    """How the encoder may be on the device, the first choice first."""
    ways = [chosen.encoder]
    if kept.key is not None:  # what is loaded stays if it can, whatever it is: if not, once more as planned
        ways.insert(0, LIGHTEST if chosen.encoder != "resident" else "resident")
    if adapt and chosen.device != "cpu" and chosen.encoder != LIGHTEST:
        ways.append(LIGHTEST)
    return ways


def _encode(
    parts: ComponentsFolder, way: str, device: torch.device, dtype: torch.dtype, ids: Tensor, kept: ModelCache
) -> Tensor:
    """Token ids (1, n) -> features (1, n, taps x hidden), on the host."""
    if way == "resident":
        encoder = kept.encoder((parts.identity, dtype, device), partial(parts.text_encoder, device, dtype))
        return text.features(encoder, ids)
    with encoder_on_device(parts, way, device, dtype) as visiting:
        return text.features(visiting, ids)
