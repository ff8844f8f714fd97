"""Pictures are those of diffusers' autoencoder, to the last bit, whole and in tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2

from ideogram_app.errors import CheckpointError
from ideogram_app.model import vae as decoding
from ideogram_app.model.components import read_autoencoder
from ideogram_app.model.vae import autoencoder

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16, 24),  # stages with and without a shortcut
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"layers_per_block": 2},
    "a decoder of its own width": {"decoder_block_out_channels": (12, 12, 16, 32)},
    "no attention": {"mid_block_add_attention": False},
    "no convolution in front": {"use_post_quant_conv": False},
    "three stages": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
}
DECODES = ("decoder.", "post_quant_conv.", "bn.running_")  # what begins the names of tensors that are read


def stock_model(**changes: Any) -> Any:
    """diffusers' own with random weights, the statistics of its latents too."""
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(**SMALL | changes)
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))  # biases and norms too, which begin as zeros and ones
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_pictures_equal_those_of_diffusers_to_the_last_bit(variant, dtype, tmp_path: Path) -> None:
    stock = stock_model(**variant)
    stock.save_pretrained(tmp_path)
    ours, stock = read_autoencoder(tmp_path, dtype), stock.to(dtype)
    latents = torch.randn(1, 4, 6, 9).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours.decode(latents)[0], stock.decode(latents, return_dict=False)[0])
    assert torch.equal(ours.bn.running_mean, stock.bn.running_mean)
    assert torch.equal(ours.bn.running_var, stock.bn.running_var)
    assert ours.config.batch_norm_eps == stock.config.batch_norm_eps and ours.dtype == dtype


@pytest.mark.parametrize("sides", [(8, 9), (20, 8), (17, 23), (6, 30)], ids=str)
def test_tiles_are_blended_as_diffusers_blends_them(sides, tmp_path: Path) -> None:
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    ours, latents = read_autoencoder(tmp_path, torch.float32), torch.randn(1, 4, *sides)
    stock.enable_tiling()
    ours.enable_tiling()
    with torch.no_grad():
        assert torch.equal(ours.decode(latents)[0], stock.decode(latents, return_dict=False)[0])


def test_a_picture_no_larger_than_a_tile_stays_whole(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    ours, latents = read_autoencoder(tmp_path, torch.float32), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        whole = ours.decode(latents)[0]
        ours.enable_tiling()
        assert torch.equal(ours.decode(latents)[0], whole)


def test_queries_in_runs_attend_as_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_model().save_pretrained(tmp_path)
    ours, latents = read_autoencoder(tmp_path, torch.float32), torch.randn(1, 4, 8, 9)
    with torch.no_grad():
        at_once = ours.decode(latents)[0]
        monkeypatch.setattr(decoding, "SCORES", 72 * 7)  # of 72 queries 7, and 2 in the end
        in_runs = ours.decode(latents)[0]
    # Every query's softmax is its own; kernels sum in another order for fewer of them. 1e-5 is 80 roundings of float32.
    assert torch.allclose(in_runs, at_once, rtol=1e-5, atol=1e-5)


def test_the_published_decoder_has_the_tensors_of_diffusers() -> None:
    with torch.device("meta"):
        stock = AutoencoderKLFlux2()
    expected = {name: value.shape for name, value in stock.state_dict().items() if name.startswith(DECODES)}
    ours = {name: value.shape for name, value in autoencoder({}).state_dict().items()}
    ours.pop("bn.num_batches_tracked")
    assert ours == expected


def test_nothing_of_the_encoder_is_held(tmp_path: Path) -> None:
    stock_model().save_pretrained(tmp_path)
    ours = read_autoencoder(tmp_path, torch.float32)
    assert all(name.startswith(DECODES) for name in ours.state_dict())
    assert not [name for name, value in ours.named_parameters() if value.requires_grad or value.is_meta]


@pytest.mark.parametrize("changes", [{"act_fn": "gelu"}, {"up_block_types": ["AttnUpDecoderBlock2D"]}], ids=str)
def test_another_autoencoder_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="unknown variant"):
        autoencoder(changes)
