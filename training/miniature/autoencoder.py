"""Trains the miniature's VAE on drawn scenes, then measures the statistics of its latents.

Weighted absolute error plus a little squared error, and a weak pull of the latents to a unit normal. Two things
mattered: the log-variance starts at -4 (started at 0, the noise drowns the first thousand steps), and pixels near an
edge weigh more (most of a scene is flat background, which is right at once). No adversary and no perceptual network:
the world is flat colour and edges, and neither is allowed to be pretty and wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor
from torch.nn import functional

from training.miniature.optimizer import MatrixOptimizer, warm_up_and_decay

LATENT_PULL = 1e-4  # weight of the Kullback-Leibler term, per latent value
EDGE_WEIGHT = 8.0  # extra weight of a pixel at a full-contrast edge


def to_signal(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def reconstruction_loss(autoencoder: AutoencoderKLFlux2, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and mean squared error of one batch. pictures: (B, 3, H, W) in [-1, 1]; noise: (B, 32, H/8, W/8)."""
    moments = autoencoder.quant_conv(autoencoder.encoder(pictures)).float()
    mean, log_variance = moments.chunk(2, 1)
    log_variance = log_variance.clamp(-12, 4)
    sample = mean + (0.5 * log_variance).exp() * noise
    decoded = autoencoder.decoder(autoencoder.post_quant_conv(sample)).float()
    error = decoded - pictures
    flat = functional.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False)
    weight = 1 + EDGE_WEIGHT * (pictures - flat).abs().amax(1, keepdim=True)
    pull = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squared = error.square()
    return (weight * (error.abs() + squared)).mean() + LATENT_PULL * pull, squared.mean()


def train_autoencoder(
    autoencoder: AutoencoderKLFlux2, pictures: Tensor, steps: int, report: Callable[[str], None], batch: int = 16
) -> None:
    """Train in place. pictures: uint8 (N, 3, 128, 128). Computes in bf16."""
    half = autoencoder.quant_conv.bias.shape[0] // 2
    with torch.no_grad():
        autoencoder.quant_conv.bias[half:] = -4.0
        autoencoder.quant_conv.weight[half:] *= 0.1
    optimizer = MatrixOptimizer(autoencoder.named_parameters(), rate=3e-3)
    generator = torch.Generator().manual_seed(1)
    smooth = 0.0
    for step in range(steps):
        chosen = pictures[torch.randint(len(pictures), (batch,), generator=generator)]
        noise = torch.randn(batch, 32, chosen.shape[2] // 8, chosen.shape[3] // 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss, squared = reconstruction_loss(autoencoder, to_signal(chosen), noise)
        loss.backward()
        optimizer.step(warm_up_and_decay(step / steps, warm=0.05))
        smooth = squared.item() if step == 0 else 0.98 * smooth + 0.02 * squared.item()
        if step % 50 == 49:
            report(f"autoencoder step {step + 1} of {steps}: {10 * math.log10(4 / smooth):.1f} dB")


@torch.no_grad()
def encode(autoencoder: AutoencoderKLFlux2, pictures: Tensor, batch: int = 32) -> Tensor:
    """Pictures -> packed latents (N, H/16 x W/16, 128), not yet normalised; patch row, patch column, then channel."""
    packed = []
    for chunk in pictures.split(batch):
        mean = autoencoder.quant_conv(autoencoder.encoder(to_signal(chunk))).chunk(2, 1)[0]
        count, channels, height, width = mean.shape
        patches = mean.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
        packed.append(patches.reshape(count, height * width // 4, 4 * channels))
    return torch.cat(packed)


@torch.no_grad()
def set_statistics(autoencoder: AutoencoderKLFlux2, latents: Tensor) -> None:
    """Record mean and variance of every packed channel where the pipeline looks for them. latents: (N, tokens, 128)."""
    flat = latents.flatten(0, 1).double()
    autoencoder.bn.running_mean.copy_(flat.mean(0))
    autoencoder.bn.running_var.copy_(flat.var(0))


def normalise(autoencoder: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Packed latents with zero mean and unit variance per channel, as the transformers see them."""
    deviation = (autoencoder.bn.running_var + autoencoder.config.batch_norm_eps).sqrt()
    return (latents - autoencoder.bn.running_mean) / deviation
