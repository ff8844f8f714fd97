"""Muon for matrices and AdamW for the rest, behind one `step`.

On the VAE, Muon reached 23 dB in 158 steps where AdamW stood at 13 dB. `torch.optim.Muon` takes two-dimensional
parameters only, so kernels of convolutions are handed to it as matrices that share their storage.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class MatrixOptimizer:
    """Steps every parameter given.

    Args:
        named: (name, parameter) pairs; embeddings, norms, biases and the names in `plain` go to AdamW.
        rate: of Muon, with the update scaled to AdamW's root mean square; AdamW uses the same.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], rate: float, plain: tuple[str, ...] = ()) -> None:
        self.rate = rate
        self.kernels: list[tuple[nn.Parameter, nn.Parameter]] = []  # the parameter, and the same storage as a matrix
        rest = []
        for name, parameter in named:
            if parameter.ndim >= 2 and not any(part in name for part in plain):
                self.kernels.append((parameter, nn.Parameter(parameter.data.view(parameter.shape[0], -1))))
            else:
                rest.append(parameter)
        matrices = [matrix for _, matrix in self.kernels]
        self.parts = (
            torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        )
        self.parameters = [parameter for parameter, _ in self.kernels] + rest

    def step(self, factor: float) -> None:
        """One update at `factor` times the rate, gradients clipped to norm 1 and then cleared."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for parameter, matrix in self.kernels:
            matrix.grad = None if parameter.grad is None else parameter.grad.view_as(matrix)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * factor
            part.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def warm_up_and_decay(done: float, warm: float = 0.01, decay_from: float = 0.5) -> float:
    """Factor of the learning rate when a share `done` of the time is over: up, level, then linearly down to 2 %."""
    if done < warm:
        return max(0.01, done / warm)
    return max(0.02, min(1.0, (1 - done) / (1 - decay_from)))
