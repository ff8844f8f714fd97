"""Activation statistics of Linear layers, recorded by forward hooks while pictures are drawn.

A `Recorder` hooks the Linears of any module tree, dense or packed, resident or streamed, and keeps running sums alone:
per channel the largest magnitude and the sum of squares, per layer and half of the trajectory how far its values reach.
No activation outlives its layer's call, so memory is two numbers a channel whatever the number of captions.

Rows of zeros are not counted: the transformer sees zeros where another kind of token stands (text features at image
tokens), and those are rounded without error. Left out: histograms, covariances (GPTQ wants them), a history per step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS_ROWS = 512  # tokens widened to float32 together: 25 MB for the widest input inside a block, 12 288 channels
HALVES = 2  # early and late steps
MAXIMUM, KURTOSIS, CALLS, ROWS = range(4)  # columns of `InputStatistics.reach`


@dataclass
class InputStatistics:
    """Running statistics of one Linear's input."""

    columns: int
    maximum: Tensor = field(init=False)  # float32 (columns,): largest magnitude of every channel
    squares: Tensor = field(init=False)  # float64 (columns,): sum of squares of every channel
    reach: Tensor = field(init=False)  # float64 (halves, 4): MAXIMUM, sum of KURTOSIS, CALLS and ROWS with any signal

    def __post_init__(self) -> None:
        self.maximum = torch.zeros(self.columns)
        self.squares = torch.zeros(self.columns, dtype=torch.float64)
        self.reach = torch.zeros(HALVES, 4, dtype=torch.float64)

    def add(self, x: Tensor, half: int) -> None:
        """Take in one call's input (..., columns), in the early (0) or late (1) half of a trajectory."""
        x = x.reshape(-1, self.columns)
        x = x[x.any(-1)]
        if not len(x):
            return
        powers = torch.zeros(4, dtype=torch.float64)  # sums of x, x^2, x^3, x^4 over all values
        for part in x.split(STATISTICS_ROWS):
            values = part.float()
            square = values * values
            torch.maximum(self.maximum, values.abs().amax(0).cpu(), out=self.maximum)
            per_channel = square.sum(0).cpu().double()  # on the CPU: MPS has no float64
            self.squares += per_channel
            odd = torch.stack((values.sum(), (square * values).sum(), (square * square).sum())).cpu().double()
            powers += torch.stack((odd[0], per_channel.sum(), odd[1], odd[2]))
        row = self.reach[half]
        row[MAXIMUM] = max(float(row[MAXIMUM]), float(x.abs().amax()))
        row[KURTOSIS] += kurtosis(powers / x.numel())
        row[CALLS] += 1
        row[ROWS] += len(x)

    @property
    def second_moment(self) -> Tensor:
        """Mean square of every channel over rows with any signal: float32 (columns,)."""
        return (self.squares / self.reach[:, ROWS].sum().clamp(min=1)).float()

    def fragility(self, halves: Sequence[int] = (0, 1)) -> float:
        """Mean kurtosis over calls times the largest magnitude: the published score of how much INT8 hurts a layer.

        Values far out stretch the one scale of a token, and the rest of it is rounded more coarsely.
        """
        rows = self.reach[list(halves)]
        return float(rows[:, KURTOSIS].sum() / rows[:, CALLS].sum().clamp(min=1) * rows[:, MAXIMUM].max())


def kurtosis(raw: Tensor) -> float:
    """Pearson's kurtosis (3 if normally distributed) from raw moments E[x], E[x^2], E[x^3], E[x^4]; 0 if constant."""
    mean, second, third, fourth = raw.tolist()
    variance = second - mean**2
    if variance <= 1e-12 * second:
        return 0.0
    return float((fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2)


@dataclass
class Recorder:
    """Adds to `inputs` (Linear name -> statistics) while it is attached; the caller sets `half` before a step."""

    inputs: dict[str, InputStatistics]
    half: int = 0

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[Recorder]:
        """Watch a module's Linears of those names while the context is open."""
        hooks = ((module.get_submodule(name), partial(self._add, found)) for name, found in self.inputs.items())
        handles = [linear.register_forward_pre_hook(hook) for linear, hook in hooks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, found: InputStatistics, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.add(arguments[0].detach(), self.half)
