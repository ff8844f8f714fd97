"""Encoding the caption: text features and noise that all recipes share, or what ran out of memory.

The text encoder is on the device as the plan says: resident, staged or streamed. Where transformers are loaded already
it is streamed layer by layer instead, so that they can stay. If memory runs out, everything is unloaded and it is tried
again as planned, and then, where the request says `adapt`, streamed: the features are the same. Captions that are
cached need no encoder at all. Features that are not finite are an error and never cached: every recipe would draw
noise from them, or nothing.

Left out: prompt enhancement, and encoding on the processor while the device draws.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from ideogram_app.errors import Cancelled, DeviceError
from ideogram_app.generation.draw import SharedInputs
from ideogram_app.generation.sampler import NOT_FINITE, is_finite, make_noise
from ideogram_app.generation.session import Session, free_memory
from ideogram_app.machine.meter import PhaseMeter
from ideogram_app.model.cache import ModelCache
from ideogram_app.model.components import ComponentsFolder, find_components
from ideogram_app.model.offload.offload import COMPUTE_DTYPES
from ideogram_app.model.text_encoder import features as text
from ideogram_app.model.text_encoder.on_device import encoder_on_device
from ideogram_app.model.vae import decoder_dtype
from ideogram_app.planning.failures import forget
from ideogram_app.planning.lost_device import lost_device
from ideogram_app.planning.oom import OutOfMemory, classify
from ideogram_app.planning.planned_request import PlannedRequest
from ideogram_app.planning.planner import Plan

log = logging.getLogger(__name__)

STREAMED = "streamed"  # the encoder mode that takes the least memory
HELPS = "No recipe can draw from them: update the device's driver, or keep the text encoder in another type (--encoder)"


def caption_tokens(components: ComponentsFolder, caption: str) -> tuple[int, ...]:
    """Token ids of a caption, whose number decides memory and time.

    Raises:
        CaptionError: it is too long. CheckpointError: the tokenizer is missing or damaged.
    """
    return tuple(text.tokenize(components.tokenizer(), caption)[0].tolist())


def encode_prompt(planned: PlannedRequest, session: Session) -> SharedInputs | OutOfMemory:
    """What every recipe of a request starts from; or what ran out, with everything unloaded.

    Raises:
        DeviceError: the device is lost, or computes features that are not finite.
        AppError: the model's components cannot be used.
        Exception: whatever a library raised; everything has been unloaded.
    """
    request, chosen = planned.request, planned.encoding
    before = session.lost_among([chosen.device])
    if before:
        raise DeviceError(before.again())
    device, dtype = torch.device(chosen.device), COMPUTE_DTYPES[chosen.compute_dtype]
    components = find_components(request.model, store=session.store)
    vae, shift = components.vae("cpu", decoder_dtype(dtype, device)), components.shift()
    key = text.FeatureKey(request.model, components.identity, dtype, request.caption)
    ids = torch.tensor([planned.tokens])  # (1, n)
    oom: OutOfMemory | None = None
    for mode in _modes(request.adapt, chosen, session.cache):
        try:
            with PhaseMeter(device) as meter, meter.phase("encode"):
                features = session.features.get(key)
                if features is None:
                    features = session.features.put(key, _encode(components, mode, device, dtype, ids, session.cache))
                noise = make_noise(request.seed, request.width, request.height).to(device)
        except Cancelled:
            raise
        except Exception as problem:
            lost = lost_device(problem, "encode")
            oom = None if lost else classify(problem, "encode", free_memory(planned.inputs.hardware))
            forget(problem)
            lost = session.unload([chosen.device], "encode") or lost
            if lost:
                log.exception("the text encoder lost its device")
                session.lose(lost, [chosen.device])
                raise DeviceError(lost.sentence()) from problem
            if oom is None:
                raise
            continue
        given_up: tuple[str, ...] = ()
        if oom and mode != chosen.encoder:
            given_up = (oom.account("the text encoder passed through layer by layer"),)
        return SharedInputs(
            features, noise, meter.seconds["encode"], vae=vae, shift=shift, given_up=given_up, peaks=meter.peaks
        )
    assert oom
    return oom


def _modes(adapt: bool, chosen: Plan, cache: ModelCache) -> list[str]:
    """How the encoder may be on the device, the first choice first."""
    modes = [chosen.encoder]
    if cache.key is not None:  # what is loaded stays if it can, whatever it is: if not, once more as planned
        modes.insert(0, STREAMED if chosen.encoder != "resident" else "resident")
    if adapt and chosen.device != "cpu" and chosen.encoder != STREAMED:
        modes.append(STREAMED)
    return modes


def _encode(
    components: ComponentsFolder, mode: str, device: torch.device, dtype: torch.dtype, ids: Tensor, cache: ModelCache
) -> Tensor:
    """Token ids (1, n) -> features (1, n, taps x hidden), on the host.

    Raises:
        DeviceError: they are not finite.
    """
    if mode == "resident":
        load = partial(components.text_encoder, device, dtype)
        made = text.features(cache.encoder((components.identity, dtype, device), load), ids)
    else:
        with encoder_on_device(components, mode, device, dtype) as encoder:
            made = text.features(encoder, ids)
    if not is_finite(made):
        raise DeviceError(f"The text encoder made features of the caption that are not finite: {NOT_FINITE}", do=HELPS)
    return made
