"""Qwen3-VL's text model, written for inference: token ids to hidden states, layer by layer.

    hidden += attention(norm(hidden))       grouped queries, a norm for every head, rotary positions
    hidden += down(silu(gate(x)) * up(x)),  x = norm(hidden)      each of these is (1, n, hidden) -> (1, n, hidden)

Modules have the names of transformers' `Qwen3VLTextModel`, so its weights fit, and operations are done in its order, so
features are equal to the last bit. transformers' own class does the same in 1,300 lines that also know pictures, caches
and generation, and importing it takes seconds, because it brings compilers and quantizers along.

Left out: pictures, whose positions differ on the three axes (in text they are equal, so how frequencies are dealt out
to axes makes no difference); padding and masks; the final norm, which the transformer does not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.text_encoder import TextEncoder
from ideogram_app.errors import CheckpointError
from ideogram_app.kernels.attention import Attention
from ideogram_app.kernels.dense import linear
from ideogram_app.machine.attention import CUDNN

THETA = 500_000.0  # what transformers' Qwen3VLTextConfig takes where a config does not say it
NORM_EPSILON = 1e-6  # likewise
Rotation = tuple[Tensor, Tensor]


class Norm(nn.Module):
    """Root mean square norm, squared in float32 and scaled in the computing type."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """Cosines and sines of positions, each frequency twice: for both halves of a head."""

    inv_freq: Tensor

    def __init__(self, head: int, theta: float) -> None:
        super().__init__()
        with torch.device("cpu"):  # computed, in no file: real where all else is still on the meta device
            steps = torch.arange(0, head, 2, dtype=torch.float32)
            self.register_buffer("inv_freq", 1.0 / (theta ** (steps / head)), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Rotation:
        """Two tensors (1, n, head) in the type of x, for positions (3, 1, n) of which the first axis speaks for all."""
        angles = positions[0, ..., None].float() * self.inv_freq.to(x.device, torch.float32)
        cosine, sine = (torch.cat((half, half), -1).to(x.dtype) for half in (angles.cos(), angles.sin()))
        return cosine, sine


class Projection(nn.Linear):
    """A Linear whose product is `kernels.dense`'s."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class TextAttention(nn.Module):
    """Causal attention of grouped queries."""

    def __init__(self, shape: TextEncoder, epsilon: float) -> None:
        super().__init__()
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.head = shape.head_dim
        # Wrong numbers are known of cuDNN where few heads have keys and values (pytorch #193893).
        self.attend = Attention(excluded=(CUDNN,))
        self.q_proj = Projection(shape.hidden_size, queries, bias=False)
        self.k_proj = Projection(shape.hidden_size, keys, bias=False)
        self.v_proj = Projection(shape.hidden_size, keys, bias=False)
        self.o_proj = Projection(queries, shape.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(self.head, epsilon), Norm(self.head, epsilon)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head)  # (1, n, heads, head)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        mixed = self.attend(q[0], k[0], v[0], causal=x.shape[1] > 1, scale=self.head**-0.5)
        return self.o_proj(mixed[None])


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: TextEncoder) -> None:
        super().__init__()
        self.gate_proj = Projection(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = Projection(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = Projection(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: TextEncoder, epsilon: float) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(shape, epsilon), FeedForward(shape)
        self.input_layernorm = Norm(shape.hidden_size, epsilon)
        self.post_attention_layernorm = Norm(shape.hidden_size, epsilon)

    def forward(self, hidden: Tensor, position_embeddings: Rotation) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), position_embeddings)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class TextModel(nn.Module):
    """The embedding table, the rotary frequencies and the layers; features.py runs them and taps between them."""

    def __init__(self, shape: TextEncoder, theta: float, epsilon: float) -> None:
        super().__init__()
        # Not filled with random numbers first: on the meta device that alone imports torch's compiler, 1.2 seconds.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(shape.vocab_size, shape.hidden_size))
        self.layers = nn.ModuleList(Layer(shape, epsilon) for _ in range(shape.num_hidden_layers))
        self.rotary_emb = Rotary(shape.head_dim, theta)


def text_model(config: Mapping[str, Any]) -> TextModel:
    """The text side that a config.json describes, without memory for its weights: parameters on the meta device.

    Raises:
        CheckpointError: a size is missing, or it is a variant that this file does not compute.
    """
    text = config.get("text_config", config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    variant = {
        "rope_type": rope.get("rope_type", "default"),
        "hidden_act": text.get("hidden_act", "silu"),
        "attention_bias": bool(text.get("attention_bias", False)),
    }
    known = {"rope_type": "default", "hidden_act": "silu", "attention_bias": False}
    if variant != known:
        raise CheckpointError("This text encoder is of an unknown variant", expected=str(known), got=str(variant))
    theta = rope.get("rope_theta") or text.get("rope_theta") or THETA
    with torch.device("meta"):
        return TextModel(TextEncoder.from_config(config), float(theta), float(text.get("rms_norm_eps", NORM_EPSILON)))


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions on (1, heads, n, head): the second half of a head is the first's imaginary part."""
    cosine, sine = (part.unsqueeze(1) for part in rotation)
    first, second = x.chunk(2, -1)
    return (x * cosine) + (torch.cat((-second, first), -1) * sine)
