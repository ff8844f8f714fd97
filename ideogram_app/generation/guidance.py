"""Classifier-free guidance (CFG): `GuidedModel` combines both transformers at every step, with speed-ups.

    guidance x conditional + (1 - guidance) x unconditional        in float32

The two meet only in their outputs, so each may have a device of its own: both are started before either is waited for.
Speed-ups that a request asks for (catalog/speedups.py) are applied here, step by step. Left out: batches of both
branches, which have different weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ideogram_app.catalog.speedups import LEAVE, REUSE, RUN, threshold, unconditional
from ideogram_app.model.loader import Loaded
from ideogram_app.model.offload.offload import current, prepare
from ideogram_app.model.transformer.backbone import Backbone
from ideogram_app.model.transformer.conditioner import Conditioning

SMALLEST_NORM = 1e-12  # of the first block's change; keeps the relative change finite where nothing changed


class GuidedModel:
    """The guided velocity, called with latents and the number of a step.

    Args:
        features: (1, n, taps x encoder), on any device.
        times: (steps,), 0 is noise and 1 is data.
        savings: names of rows of `SPEEDUPS`.
    """

    def __init__(
        self, loaded: Loaded, features: Tensor, rows: int, columns: int, times: Tensor, savings: tuple[str, ...] = ()
    ) -> None:
        self._steps, self._savings = len(times), savings
        loaded.release_scratch()  # a picture that was cancelled may have left its decoding buffers
        self._branches = [
            _Branch(backbone, prepare(backbone, features[0], times, rows, columns, device), device)
            for backbone, device in zip(loaded.modules, loaded.devices, strict=True)
        ]
        self._reuses = any(unconditional(savings, step, self._steps) == REUSE for step in range(self._steps))
        self._difference = torch.zeros(())  # conditional - unconditional, from the last full step

    def __call__(self, latents: Tensor, step: int, guidance: float) -> Tensor:
        """latents: (1, tokens, 128) float32 -> the same shape and type, on the same device."""
        conditional, other = self._branches
        reusable = threshold(self._savings, step, self._steps)
        mode = unconditional(self._savings, step, self._steps)
        outputs = [conditional(latents[0], step, reusable)]
        if mode == RUN:
            outputs.append(other(latents[0], step, reusable))
        with_text, *rest = (output.to(latents.device).float() for output in outputs)
        if mode == LEAVE:
            return with_text[None]
        if mode == REUSE:
            return (with_text + (guidance - 1.0) * self._difference)[None]
        (without,) = rest
        if self._reuses:
            self._difference = with_text - without
        return (guidance * with_text + (1.0 - guidance) * without)[None]


@dataclass
class _Branch:
    """One transformer, and what the first-block cache holds: changes made by the first block and by all others."""

    backbone: Backbone
    prepared: Conditioning
    device: torch.device
    first: Tensor | None = None  # (M, hidden)
    rest: Tensor | None = None  # (M, hidden)

    def __call__(self, latents: Tensor, step: int, reusable: float | None) -> Tensor:
        """latents: (tokens, 128) -> velocity (tokens, 128) in the computing type, on the branch's own device."""
        latents = latents.to(self.device, self.backbone.dtype)
        with current(self.device):
            if reusable is None:
                return self.backbone(latents, self.prepared, step)
            return self._first_block_cached(latents, step, reusable)

    def _first_block_cached(self, latents: Tensor, step: int, reusable: float) -> Tensor:
        """Run the first block; run the others only where it changed more than `reusable` against the step before."""
        trunk, prepared = self.backbone.trunk, self.prepared
        hidden = trunk.enter(latents, prepared)
        before = hidden.clone()  # kernels may write over the residual they are given
        hidden, x = trunk.block(0, hidden, trunk.read(hidden, prepared, step), prepared, step)
        first, self.first = self.first, hidden - before
        if first is not None and self.rest is not None and _change(first, self.first) < reusable:
            self.first = first  # drift is measured from the last step that ran
            return trunk.leave(hidden + self.rest, prepared, step)
        del first
        self.rest, before = None, hidden.clone()
        for index in range(1, len(trunk.blocks)):
            hidden, x = trunk.block(index, hidden, x, prepared, step)
        self.rest = hidden - before
        return trunk.leave(hidden, prepared, step)


def _change(before: Tensor, after: Tensor) -> float:
    """Mean magnitude of a difference, relative: |after - before| / |before|. Waits for the device."""
    return float((after - before).abs().mean() / before.abs().mean().clamp(min=SMALLEST_NORM))
