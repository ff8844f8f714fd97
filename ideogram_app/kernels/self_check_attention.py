"""Attention in the self-check: every backend by itself, at heads of 256 with the strides that `heads` leaves.

The truth is attention in float64 on the host. Left out: what Qwen's attention asks for, groups of queries and a causal
mask; runs of queries, which are the same backend again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import MODELS
from ideogram_app.errors import DeviceError
from ideogram_app.kernels import self_check_truths as truths
from ideogram_app.kernels.attention import BACKENDS, Attention
from ideogram_app.kernels.self_check_cases import Case, Trial, noise, sizes_for
from ideogram_app.kernels.self_check_truths import Verdict
from ideogram_app.machine.attention import order
from ideogram_app.machine.hardware import compute_capability

ATTENTION, OF_TORCH = "attention", "torch's choice"
HEAD = MODELS["ideogram-4"].conditional.attention_head_dim
HIDDEN = MODELS["ideogram-4"].conditional.hidden_size
# A row of attention may be off by this share of its length: a step of the type, for the weights are rounded to it too
# (2.2e-3 measured in bfloat16 on an H100, for all three backends, over whole results).
ATTENTION_SHARE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-14}


def attention_names(device: torch.device) -> tuple[str, ...]:
    """Of the backends to try on a device, best first; one name for devices where PyTorch alone chooses."""
    return order(compute_capability(device), torch.backends.cudnn.version()) or (OF_TORCH,)


@dataclass(frozen=True)
class OneBackend:
    """Attention on one backend alone; what PyTorch cannot take it for is an error, not another backend."""

    name: str
    attend: Attention

    @classmethod
    def of(cls, name: str, names: Sequence[str]) -> OneBackend:
        return cls(name, Attention(excluded=[other for other in names if other != name]))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Attention`. Raises DeviceError: PyTorch took another backend."""
        made = self.attend(query, key, value)
        if self.name in BACKENDS and not self.attend.engaged.startswith(self.name):
            raise DeviceError(f"PyTorch takes {self.attend.engaged} in its place")
        return made


def attention_case(device: torch.device, dtype: torch.dtype) -> Case:
    """Its candidates are `OneBackend`s."""
    return Case(ATTENTION, "", partial(_trials, device, dtype))


def _trials(device: torch.device, dtype: torch.dtype) -> Iterator[Trial]:
    """A few tokens, no multiple of any tile, against the truth; more of them where backends are compared by time."""
    sizes = sizes_for(device)
    yield _trial(sizes.tokens, device, dtype, judged=True, timed=not sizes.timed_tokens)
    if sizes.timed_tokens:
        yield _trial(sizes.timed_tokens, device, dtype, judged=False, timed=True)


def _trial(tokens: int, device: torch.device, dtype: torch.dtype, judged: bool, timed: bool) -> Trial:
    qkv = noise(tokens, 3 * HIDDEN, 40)
    qkv[:, :HIDDEN] *= 3.0  # some tokens look at few others
    whole = qkv.to(device, dtype)

    @cache
    def truth() -> Tensor:
        q, k, v = (part.double().cpu() for part in _parts(whole))
        return ((q @ k.mT / HEAD**0.5).softmax(-1) @ v).transpose(0, 1)  # (M, H, D)

    def judge(got: Any) -> Verdict:
        return truths.judge_close(got.unflatten(-1, (-1, HEAD)), truth(), ATTENTION_SHARE[dtype])

    def prepare(attend: OneBackend) -> Callable[[], Tensor]:  # of a copy: it may overwrite what it is given
        return lambda: attend(*_parts(whole.clone()))

    return Trial(prepare, judge if judged else None, timed)


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, 3 H D) -> q, k and v, each (H, M, D)."""
    query, key, value = qkv.unflatten(-1, (3, -1, HEAD)).permute(1, 2, 0, 3)
    return query, key, value
