"""The sampler in plain tensors: noise, schedule, Euler steps, VAE decoding and previews.

    sigmas = schedule(preset, width, height, shift)
    for step in denoise(velocity, make_noise(seed, width, height), sigmas, guidance):
        ...                                        one Euler step each; the latents of the last are the picture
    image = decode(vae, step.latents, rows, columns)

Given the same noise, latents equal stock diffusers' `Ideogram4Pipeline.__call__` (a test holds them together). Against
it: one caption at a time, and a velocity or a picture that is not finite is an error, where stock diffusers turns it
into a black picture. Left out: loading, measuring and saving (generation/draw.py), and the velocity itself
(generation/guidance.py).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ideogram_app.catalog.models import LATENT_CHANNELS, PIXELS_PER_TOKEN
from ideogram_app.catalog.presets import Preset
from ideogram_app.errors import DeviceError
from ideogram_app.planning.activations import PREVIEW_TOKENS

TIMESTEPS = 1000  # diffusers hands sigma x 1000 to its scheduler and divides again; the rounding is part of equality
LOWEST_LOGSNR, HIGHEST_LOGSNR = -15.0, 18.0  # clamps of the published schedule
BASE_PIXELS = 512 * 512  # the size at which a preset's mu holds
NOT_FINITE = "a number grew beyond what the computing type holds, or a kernel computes wrongly on this device"
HELPS = "Draw with another recipe: `reference` computes with the weights as they are, others in fewer bits"


@dataclass(frozen=True)
class Step:
    """After one Euler step: the latents, and the clean latents that the velocity points at, both (1, tokens, 128)."""

    index: int
    latents: Tensor
    clean: Tensor


def make_noise(seed: int, width: int, height: int) -> Tensor:
    """Starting noise (1, tokens, 128) in float32, drawn on the CPU so that every device starts from the same."""
    tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    return torch.randn(1, tokens, LATENT_CHANNELS, generator=torch.Generator().manual_seed(seed))


def schedule(preset: Preset, width: int, height: int, shift: float) -> Tensor:
    """Noise levels sigma, from near 1 down to exactly 0, as `steps + 1` float32 values.

    Equally spaced quantiles of a logit-normal distribution whose mean rises with the size of the picture, then the
    scheduler's own `shift` (1.0 for the published model), as diffusers applies it to the levels it is given.
    """
    mean = preset.mu + 0.5 * math.log(width * height / BASE_PIXELS)
    quantiles = torch.linspace(0, 1, preset.steps + 1, dtype=torch.float64)
    level = torch.special.expit(mean + preset.std * torch.special.ndtri(quantiles))
    cleanest, noisiest = (1 / (1 + math.exp(0.5 * bound)) for bound in (LOWEST_LOGSNR, HIGHEST_LOGSNR))
    sigmas = (1.0 - (1.0 - level).clamp(noisiest, cleanest)).flip(0)[:-1].float()  # the clamp is on time, 1 - sigma
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.cat((sigmas, torch.zeros(1)))


def times(sigmas: Tensor) -> Tensor:
    """Noise levels (steps + 1,) -> times (steps,), 0 is noise and 1 is data, rounded as diffusers rounds them."""
    return 1.0 - sigmas[:-1] * TIMESTEPS / TIMESTEPS


def denoise(
    velocity: Callable[[Tensor, int, float], Tensor], noise: Tensor, sigmas: Tensor, guidance: tuple[float, ...]
) -> Iterator[Step]:
    """Euler steps from noise to data, one at a time.

    Args:
        velocity: of latents (1, tokens, 128) float32, a step's number and its guidance; of the same shape and type.
        sigmas: (steps + 1,); guidance: one value a step.

    Raises:
        DeviceError: the velocity of a step is not finite.
    """
    latents = noise.float()
    for index, weight in enumerate(guidance):
        sigma, following = sigmas[index], sigmas[index + 1]
        with torch.inference_mode():
            direction = velocity(latents, index, weight)
            clean = latents + sigma.item() * direction
            latents = latents + (following - sigma).item() * -direction
        if not is_finite(direction):  # once all of the step is launched: whoever asks for steps waits for them anyway
            what = f"Step {index + 1} of {len(guidance)} gave numbers that are not finite (NaN or infinity)"
            raise DeviceError(f"{what}, which make no picture: {NOT_FINITE}", do=HELPS)
        yield Step(index, latents, clean)


def is_finite(values: Tensor) -> bool:
    """Whether none of the values, in float32, is NaN or infinite. Waits for the device.

    Their sum tells: both spread into it, and what is finite would have to be of the order of 1e30 to overflow it. So it
    is one reduction and one number to read, and asks no question of floats that a device's fast arithmetic may answer
    beforehand, as it may for `isfinite`.
    """
    return math.isfinite(values.sum().item())


def decode(vae: Any, latents: Tensor, rows: int, columns: int) -> Image.Image:
    """Latents (1, rows x columns, 128), on any device, to a picture of 16 pixels a token.

    Raises:
        DeviceError: what was decoded is not finite.
    """
    decoded = _decoded(vae, latents, rows, columns)
    if not is_finite(decoded):
        raise DeviceError(f"The decoder made a picture that is not finite (NaN or infinity): {NOT_FINITE}", do=HELPS)
    return _picture(decoded)


def preview(vae: Any, clean: Tensor, rows: int, columns: int) -> str | None:
    """A small PNG of the picture so far, base64; large grids are averaged down before decoding.

    None where it is not finite: the picture itself may still be, and says so by itself.
    """
    fold = math.ceil(max(rows, columns) / PREVIEW_TOKENS)
    if fold > 1:
        grid = clean.view(1, rows, columns, -1).permute(0, 3, 1, 2)
        rows, columns = max(1, rows // fold), max(1, columns // fold)
        grid = torch.nn.functional.adaptive_avg_pool2d(grid, (rows, columns))
        clean = grid.permute(0, 2, 3, 1).flatten(1, 2)
    decoded = _decoded(vae, clean, rows, columns)
    if not is_finite(decoded):
        return None
    buffer = io.BytesIO()
    _picture(decoded).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@torch.inference_mode()
def _decoded(vae: Any, latents: Tensor, rows: int, columns: int) -> Tensor:
    """Latents (1, rows x columns, 128) to values (1, 3, 16 x rows, 16 x columns) in [-1, 1], float32."""
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(latents)
    packed = latents * deviation + vae.bn.running_mean.to(latents)
    patches = packed.view(1, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)  # patch row, patch column, channel
    grid = patches.reshape(1, -1, rows * 2, columns * 2)
    decoded: Tensor = vae.decode(grid.to(vae.bn.running_mean.device, vae.dtype), return_dict=False)[0]
    return decoded.float()


@torch.inference_mode()
def _picture(decoded: Tensor) -> Image.Image:
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels[0].permute(1, 2, 0).cpu().numpy(), "RGB")
