"""VAE decoder (FLUX.2's autoencoder), written for inference: latents to pixels, also in tiles.

    post_quant_conv, conv_in, a middle of two residual blocks around attention, four stages of residual blocks that
    double the side between them, norm, conv_out

Modules have the names of diffusers' `AutoencoderKLFlux2`, so its files fit, and every operation is done in its order,
so pictures are equal to the last bit. The encoder half of those files is never read. diffusers' own class is assembled
from blocks for many models, and importing it takes seconds.

Left out: encoding, other activations and stages, slicing of batches; pictures are decoded one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.errors import CheckpointError
from ideogram_app.kernels.attention import is_fused
from ideogram_app.machine.capabilities import type_of_decoder
from ideogram_app.machine.hardware import compute_capability

GROUP_NORM_EPSILON = 1e-6  # of every group norm, fixed in diffusers' Decoder
OVERLAP = 0.25  # of a tile, diffusers' tile_overlap_factor
STAGE = "UpDecoderBlock2D"
# Attention's one head of 512 is too wide for the fast kernels of AMD cards and of MPS, where torch then holds every
# score: 34 GB of them for 2048 x 2048 pixels. So queries come in runs of so many scores, 128 MB in float32. NVIDIA's
# memory-efficient kernels take any width and see all of them at once, where PyTorch says that they run.
SCORES = 2**25


@dataclass(frozen=True)
class AutoencoderConfig:
    """What a config.json says of the decoder."""

    latent_channels: int
    out_channels: int
    widths: tuple[int, ...]  # channels of the stages, the last first in the forward pass
    layers: int  # residual blocks of a stage, one less than there are
    groups: int
    sample_size: int  # side in pixels above which tiles are of this size
    patch_size: tuple[int, ...]
    batch_norm_eps: float
    attends: bool
    has_entry: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """From diffusers' config.json, whose defaults are those of the published file.

        Raises:
            CheckpointError: another autoencoder.
        """
        stages = set(config.get("up_block_types", (STAGE,)))
        variant = {"stages": sorted(stages), "act_fn": config.get("act_fn", "silu")}
        known = {"stages": [STAGE], "act_fn": "silu"}
        if variant != known:
            raise CheckpointError("This autoencoder is of an unknown variant", expected=str(known), got=str(variant))
        widths = config.get("decoder_block_out_channels") or config.get("block_out_channels", (128, 256, 512, 512))
        return cls(
            latent_channels=int(config.get("latent_channels", 32)),
            out_channels=int(config.get("out_channels", 3)),
            widths=tuple(widths),
            layers=int(config.get("layers_per_block", 2)),
            groups=int(config.get("norm_num_groups", 32)),
            sample_size=int(config.get("sample_size", 1024)),
            patch_size=tuple(config.get("patch_size", (2, 2))),
            batch_norm_eps=float(config.get("batch_norm_eps", 1e-4)),
            attends=bool(config.get("mid_block_add_attention", True)),
            has_entry=bool(config.get("use_post_quant_conv", True)),
        )

    @property
    def scale(self) -> int:
        """Pixels a side of what one latent becomes."""
        return int(2 ** (len(self.widths) - 1))


class Residual(nn.Module):
    """Two convolutions, each behind a norm and SiLU, beside a shortcut: (1, inside, h, w) -> (1, outside, h, w)."""

    def __init__(self, inside: int, outside: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inside, GROUP_NORM_EPSILON)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outside, GROUP_NORM_EPSILON)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        hidden = nn.functional.silu(self.norm2(hidden))  # no other name, so that the sum before it goes
        hidden = self.conv2(hidden)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class SpatialAttention(nn.Module):
    """Every pixel attends to every other, in one head: (1, width, h, w) -> the same."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, GROUP_NORM_EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x.flatten(2)).transpose(1, 2)  # (1, h x w, width)
        q, k, v = (part(pixels).unsqueeze(1) for part in (self.to_q, self.to_k, self.to_v))
        runs = [nn.functional.scaled_dot_product_attention(run, k, v) for run in q.split(_queries(q, k, v), 2)]
        mixed = (runs[0] if len(runs) == 1 else torch.cat(runs, 2)).squeeze(1)
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x


def _queries(q: Tensor, k: Tensor, v: Tensor) -> int:
    """How many of the queries attend at once; (1, 1, pixels, width) each."""
    pixels = q.shape[2]
    return pixels if q.device.type == "cuda" and is_fused(q, k, v) else max(1, SCORES // pixels)


class Middle(nn.Module):
    """Two residual blocks, attention between them: (1, width, h, w) -> the same."""

    def __init__(self, width: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(width, groups)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Enlarged(nn.Module):
    """Every pixel becomes four (`doubled`), then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)


class DecoderStage(nn.Module):
    """Residual blocks of one width, and upsampling behind all stages but the last."""

    upsamplers: Any  # an nn.ModuleList of `Enlarged`, whose items PyTorch types as bare modules

    def __init__(self, inside: int, width: int, count: int, groups: int, enlarges: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(width if index else inside, width, groups) for index in range(count))
        self.upsamplers = nn.ModuleList([Enlarged(width)] if enlarges else [])

    def parts(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes (1, width, h or 2h, w or 2w) of (1, inside, h, w), one after another.

        The caller calls each, so that it holds nothing but the last result: a function holds its argument to its end.
        """
        yield from self.resnets
        for enlarged in self.upsamplers:
            yield doubled
            yield enlarged.conv


def doubled(x: Tensor) -> Tensor:
    """(1, width, h, w) -> (1, width, 2h, 2w), every pixel four times."""
    return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


class Decoder(nn.Module):
    """Latents to pixels."""

    up_blocks: Any  # of `DecoderStage`, likewise

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], config.groups, config.attends)
        self.up_blocks = nn.ModuleList(
            DecoderStage(widths[max(0, index - 1)], width, config.layers + 1, config.groups, index < last)
            for index, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], GROUP_NORM_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(1, latent channels, h, w) -> (1, 3, scale x h, scale x w)."""
        x = self.mid_block(self.conv_in(latents))
        for part in (part for stage in self.up_blocks for part in stage.parts()):
            x = part(x)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """The decoder, and the mean and variance that latents were normed with (`bn`)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, self.tile = config, 0
        self.decoder = Decoder(config)
        channels = config.latent_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.has_entry else None
        self.bn = nn.BatchNorm2d(prod(config.patch_size) * channels, config.batch_norm_eps, affine=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def enable_tiling(self, side: int | None = None) -> None:
        """Decode large pictures in tiles: memory no longer grows with their size, seams are blended.

        `side` is that of a tile in pixels, a multiple of 64; the config's `sample_size` where None, 0: no tiles.
        """
        self.tile = self.config.sample_size if side is None else side

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """(1, latent channels, h, w) -> a tuple, as diffusers gives it, of (1, 3, scale x h, scale x w) in [-1, 1]."""
        assert not return_dict
        tile = self.tile // self.config.scale
        if tile and max(latents.shape[-2:]) > tile:
            return (self._in_tiles(latents, tile),)
        return (self._whole(latents),)

    def _whole(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

    def _in_tiles(self, latents: Tensor, tile: int) -> Tensor:
        """Tiles from the upper left on; each fades in over the end of the one above it and the one beside it."""
        step, blend = int(tile * (1 - OVERLAP)), int(self.tile * OVERLAP)
        visible = self.tile - blend
        above: list[Tensor] = []
        bands = []
        for top in range(0, latents.shape[2], step):
            row: list[Tensor] = []
            for left in range(0, latents.shape[3], step):
                made = self._whole(latents[:, :, top : top + tile, left : left + tile])
                if above:
                    made = _faded(above[len(row)], made, blend, 2)
                if row:
                    made = _faded(row[-1], made, blend, 3)
                row.append(made)
            bands.append(torch.cat([made[:, :, :visible, :visible] for made in row], 3))
            above = row
        return torch.cat(bands, 2)


def _faded(before: Tensor, after: Tensor, blend: int, axis: int) -> Tensor:
    """`after`, whose beginning along an axis comes out of the end of `before`."""
    blend = min(before.shape[axis], after.shape[axis], blend)
    shape = [1, 1, 1, 1]
    shape[axis] = blend
    share = (torch.arange(blend, dtype=torch.float64) / blend).view(shape)
    share_before, share_after = (part.to(after.device, torch.float32) for part in (1 - share, share))
    end, begin = before.narrow(axis, before.shape[axis] - blend, blend), after.narrow(axis, 0, blend)
    mixed = (end * share_before).to(after.dtype) + (begin * share_after).to(after.dtype)
    return torch.cat((mixed, after.narrow(axis, blend, after.shape[axis] - blend)), axis)


def decoder_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which to decode what was drawn in `dtype` on a device."""
    chosen: torch.dtype = getattr(torch, type_of_decoder(str(dtype).removeprefix("torch."), compute_capability(device)))
    return chosen


def autoencoder(config: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder that a config.json describes, without memory for its weights: all of it on the meta device.

    Raises:
        CheckpointError: another autoencoder.
    """
    with torch.device("meta"):
        return Autoencoder(AutoencoderConfig.from_config(config))
