"""Numbers that are not finite: told apart cheaply, and never made a picture of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ideogram_app.errors import DeviceError
from ideogram_app.generation.sampler import decode, denoise, is_finite, make_noise, preview

NAN, INFINITY = float("nan"), float("inf")
NOISE = make_noise(0, 64, 64)
SIGMAS, GUIDANCE = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), (3.0,) * 4


@pytest.mark.parametrize("broken", [(NAN,), (INFINITY,), (-INFINITY,), (INFINITY, -INFINITY), (NAN, INFINITY)], ids=str)
@pytest.mark.parametrize("place", [0, 7, -3])
def test_one_broken_number_anywhere_is_found(broken: tuple[float, ...], place: int) -> None:
    values = torch.randn(1, 16, 128)
    assert is_finite(values) and is_finite(values * 1e20)
    values.view(-1)[torch.arange(len(broken)) + place] = torch.tensor(broken)
    assert not is_finite(values)


@pytest.mark.parametrize("broken", [NAN, INFINITY])
@pytest.mark.parametrize("bad_step", range(4))
def test_a_step_that_is_not_finite_is_the_last_and_says_which_it_was(broken: float, bad_step: int) -> None:
    asked: list[int] = []

    def velocity(latents: Tensor, step: int, _: float) -> Tensor:
        asked.append(step)
        direction = torch.ones_like(latents)
        direction[0, 3, 5] = broken if step == bad_step else 1.0
        return direction

    given = []
    with pytest.raises(DeviceError, match=f"Step {bad_step + 1} of 4 .*recipe"):
        for step in denoise(velocity, NOISE, SIGMAS, GUIDANCE):
            given.append(step.index)
    assert given == list(range(bad_step)) and asked == list(range(bad_step + 1))


class Decoder:
    """A VAE that decodes latents to one value everywhere."""

    dtype = torch.float32
    config = SimpleNamespace(batch_norm_eps=1e-4)
    bn = SimpleNamespace(running_var=torch.ones(128), running_mean=torch.zeros(128))

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        self.value, self.made = value, dtype

    def decode(self, grid: Tensor, **_: Any) -> tuple[Tensor]:
        picture = torch.zeros(1, 3, grid.shape[2] * 8, grid.shape[3] * 8, dtype=self.made)
        picture[0, 1, 2, 3] = self.value
        return (picture,)


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_decoded_and_not_finite_is_no_picture_and_no_preview(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(DeviceError, match=r"not finite.*recipe"):
        decode(Decoder(value, dtype), NOISE, 4, 4)
    assert preview(Decoder(value, dtype), NOISE, 4, 4) is None


def test_what_is_finite_is_a_picture_and_a_preview() -> None:
    picture = decode(Decoder(1.0), NOISE, 4, 4)
    assert picture.size == (64, 64) and picture.getpixel((3, 2)) == (128, 255, 128)
    assert preview(Decoder(1.0), NOISE, 4, 4)
