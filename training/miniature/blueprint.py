"""The sizes of the miniature's parts, in the config names of diffusers and transformers.

Every part has the published model's class and structure: two transformers with their own weights, a text encoder of
36 layers tapped at 13 of them, the FLUX.2 VAE with 32 latent channels. Block widths are multiples of 256 so that
K-quants apply. Seven times 2 MB were spent on the conditional transformer, because that is where pictures are made.

Left out against the published model: the vision tower (two empty layers stand in for it) and three quarters of the
unconditional branch's depth, which the pipeline does not mind.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Ideogram4Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from ideogram_app.catalog.models import MODELS, Branch

TRAINED_LAYERS = (0, 12, 24)  # of the text encoder; the taps between them see the same hidden states
UNCONDITIONAL_START = (0, 2, 5)  # the conditional layers from which the unconditional branch starts
# At 128 x 128 the published schedule spends its steps far below the noise level at which a caption matters here
# (sigma above 0.8); the scheduler's own shift moves it up. The published model's config says 1.0.
SCHEDULER_SHIFT = 18.0
# Near-identity instead of zero: an all-zero row has no scale, and real weights never have one.
IDENTITY_NOISE = 1e-6


def build_transformer(branch: Branch) -> Ideogram4Transformer2DModel:
    """A randomly initialised transformer: blocks start as identities (gates and output at zero)."""
    model = Ideogram4Transformer2DModel(
        num_layers=branch.num_layers,
        attention_head_dim=branch.attention_head_dim,
        num_attention_heads=branch.num_attention_heads,
        intermediate_size=branch.intermediate_size,
        adaln_dim=branch.adaln_dim,
        llm_features_dim=branch.llm_features_dim,
        rope_theta=1000,  # 5e6 leaves two or three useful frequencies on a grid of 8 x 8
        mrope_section=(12, 10, 10),
    )
    with torch.no_grad():
        for layer in (*(block.adaln_modulation for block in model.layers), model.final_layer.adaln_modulation):
            torch.nn.init.normal_(layer.weight, std=1e-3)
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.normal_(model.final_layer.linear.weight, std=1e-3)
        torch.nn.init.zeros_(model.final_layer.linear.bias)
    return model


def build_transformers() -> tuple[Ideogram4Transformer2DModel, Ideogram4Transformer2DModel]:
    """The conditional and the unconditional transformer."""
    first, second = MODELS["miniature"].branches
    return build_transformer(first), build_transformer(second)


def build_text_encoder(vocabulary: int) -> Qwen3VLModel:
    """A Qwen3-VL of 36 layers and 64 channels whose untrained layers nearly pass their input through."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for index, layer in enumerate(model.language_model.layers):
            if index not in TRAINED_LAYERS:
                for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    torch.nn.init.normal_(output.weight, std=IDENTITY_NOISE)
    return model


def build_autoencoder() -> AutoencoderKLFlux2:
    """The FLUX.2 VAE with 16 to 64 channels in place of 128 to 512."""
    return AutoencoderKLFlux2(
        block_out_channels=(16, 32, 32, 64), layers_per_block=1, latent_channels=32, norm_num_groups=8, sample_size=128
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching with the shift explained above."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SCHEDULER_SHIFT)
