"""The training forward passes: the same functions as transformers' Qwen3-VL text layers and diffusers' transformer.

They read the weights of those very modules, so what is trained is what is saved. Written out because fixed shapes
compile to one graph on a CPU (2.4 times the samples a second of the eager modules, measured on two cores) and because
attention as two batched products is faster there than the fused kernel, whose backward pass took 28 % of a step.
Tests hold both against the stock classes.

Left out: packed sequences, vision, dropout, every mask but the one for padding behind the text.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLModel

from ideogram_app.catalog.models import TAPS
from ideogram_app.model.transformer.conditioner import IMAGE_OFFSET
from training.miniature.blueprint import TRAINED_LAYERS

MASKED = -1e4  # added to scores of padding; far below any score and still finite in bf16
# How many taps repeat each trained layer: 0, 3, 6, 9 see layer 0; 12 to 21 see layer 12; 24 to 35 see layer 24.
TAP_REPEATS = (4, 4, 5)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, its statistics in float32."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon).to(x.dtype)
    return x * scale * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, first half against second half. x: (B, heads, L, D); cos, sin: (1, 1, L, D)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention; all (B, heads, L, D), bias broadcasts to (B, heads, L, L). Returns (B, L, heads x D)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + bias
    mixed = scores.float().softmax(-1).to(value.dtype) @ value
    return mixed.transpose(1, 2).flatten(2)


def padding_bias(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, width): 0 on the first `lengths` positions, `MASKED` behind them."""
    padding = torch.arange(width)[None] >= lengths[:, None]
    return padding[:, None, None].to(dtype) * MASKED


class TextFeatures(nn.Module):
    """Token ids -> (B, n, 832) features: the trained text layers, each repeated over its taps, interleaved by tap."""

    def __init__(self, encoder: Qwen3VLModel) -> None:
        super().__init__()
        self.language = encoder.language_model

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, n) ids, padding behind the text (the layers are causal, so it changes nothing before it)."""
        hidden = self.language.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1])[None, None].expand(3, 1, -1)
        cos, sin = self.language.rotary_emb(hidden, positions)  # (1, n, D)
        causal = torch.full((tokens.shape[1],) * 2, MASKED).triu(1)
        taps: list[Tensor] = []
        for index, repeats in zip(TRAINED_LAYERS, TAP_REPEATS, strict=True):
            hidden = self._layer(self.language.layers[index], hidden, cos[:, None], sin[:, None], causal)
            taps += [hidden] * repeats
        return torch.stack(taps, -1).flatten(2)  # feature index = hidden x 13 + tap

    @staticmethod
    def _layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, causal: Tensor) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        x = rms_norm(hidden, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        size = attention.head_dim
        query, key, value = (
            project(x).unflatten(-1, (-1, size)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query = rms_norm(query, attention.q_norm.weight, attention.q_norm.variance_epsilon)
        key = rms_norm(key, attention.k_norm.weight, attention.k_norm.variance_epsilon)
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        groups = query.shape[1] // key.shape[1]
        key = rotate(key, cos, sin).repeat_interleave(groups, 1)
        mixed = attend(rotate(query, cos, sin), key, value.repeat_interleave(groups, 1), causal.to(query.dtype))
        hidden = hidden + attention.o_proj(mixed)
        x = rms_norm(hidden, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon)
        return hidden + mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


class Velocity(nn.Module):
    """Noisy latents, time and text features -> velocity, through the weights of a diffusers transformer.

    Args:
        grid: image tokens per side.
        text_width: text tokens a batch is padded to; 0 for the unconditional branch.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, transformer: Ideogram4Transformer2DModel, grid: int, text_width: int) -> None:
        super().__init__()
        self.net, self.text_width = transformer, text_width
        cos, sin = transformer.rotary_emb(_positions(grid, text_width))
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    def forward(self, latents: Tensor, time: Tensor, features: Tensor | None, bias: Tensor) -> Tensor:
        """latents: (B, grid x grid, 128); time: (B,), 0 is noise; features: (B, text, 832); bias: see `attend`."""
        net = self.net
        hidden = net.input_proj(latents) + net.embed_image_indicator.weight[1]
        if features is not None:
            text = net.llm_cond_proj(rms_norm(features, net.llm_cond_norm.weight, 1e-6))
            hidden = torch.cat((text + net.embed_image_indicator.weight[0], hidden), 1)
        hidden = hidden.to(bias.dtype)
        condition = functional.silu(net.adaln_proj(net.t_embedding(time)))[:, None]
        cos, sin = self.cos.to(hidden.dtype), self.sin.to(hidden.dtype)
        for block in net.layers:
            hidden = self._block(block, hidden, condition, cos, sin, bias)
        return net.final_layer(hidden[:, self.text_width :], condition)

    @staticmethod
    def _block(block: Any, hidden: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        scale_attention, gate_attention, scale_mlp, gate_mlp = block.adaln_modulation(condition).chunk(4, -1)
        attention, mlp = block.attention, block.feed_forward
        x = rms_norm(hidden, block.attention_norm1.weight, 1e-5) * (1 + scale_attention)
        query, key, value = (
            project(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        query = rotate(rms_norm(query, attention.norm_q.weight, 1e-5), cos, sin)
        key = rotate(rms_norm(key, attention.norm_k.weight, 1e-5), cos, sin)
        mixed = attention.to_out[0](attend(query, key, value, bias))
        hidden = hidden + torch.tanh(gate_attention) * rms_norm(mixed, block.attention_norm2.weight, 1e-5)
        x = rms_norm(hidden, block.ffn_norm1.weight, 1e-5) * (1 + scale_mlp)
        mixed = mlp.w2(functional.silu(mlp.w1(x)) * mlp.w3(x))
        return hidden + torch.tanh(gate_mlp) * rms_norm(mixed, block.ffn_norm2.weight, 1e-5)


def _positions(grid: int, text_width: int) -> Tensor:
    """(1, text + grid x grid, 3) positions along time, height and width, as the pipeline lays them out."""
    text = torch.arange(text_width)[:, None].expand(-1, 3)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    image = torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1) + IMAGE_OFFSET
    return torch.cat((text, image))[None]


assert sum(TAP_REPEATS) == TAPS
