"""Text features of a caption from 13 decoder layers of Qwen3-VL, and the cache of the last ones.

The caption goes through the chat template as one user turn, at its true length: nothing is padded, so nothing is masked
(stock diffusers pads to 2048 tokens and computes them all). Features are interleaved, index = hidden x 13 + tap, and
float32. The last tap is the last layer before the final norm, so no layer can be left out, but the vision tower, that
norm and the head never run.

Features depend on nothing that a recipe, a seed or a size changes, and the encoder that makes them is as large as a
transformer: `FeatureCache` holds the last ones on the host and is asked before an encoder is loaded.

Left out: prompt enhancement and batches; pictures are drawn one caption at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ideogram_app.errors import CaptionError

TAPPED_LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)  # diffusers' QWEN3_VL_ACTIVATION_LAYERS
LONGEST_TEXT = 2048  # tokens, diffusers' default and the reference's limit
# A caption of 300 tokens takes 32 MB in bfloat16; the longest one in float32, 436 MB, still fits.
CACHE_BYTES = 500_000_000


def tokenize(tokenizer: Any, caption: str) -> Tensor:
    """Token ids (1, n) of one user turn. Raises CaptionError: more tokens than the text encoder was trained to read."""
    turn = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] > LONGEST_TEXT:
        raise CaptionError("The caption is too long", expected=f"at most {LONGEST_TEXT} tokens", got=str(ids.shape[1]))
    return ids


def encode(tokenizer: Any, encoder: Any, caption: str) -> Tensor:
    """Text features (1, n, 13 x hidden) in float32, on the host; errors of `tokenize`."""
    return features(encoder, tokenize(tokenizer, caption))


@torch.inference_mode()
def features(encoder: Any, ids: Tensor, taps: Collection[int] = TAPPED_LAYERS) -> Tensor:
    """What the tapped layers make of token ids (1, n): (1, n, taps x hidden), interleaved, in float32, on the host.

    Each tapped layer's output leaves the device as it is made: together they are 436 MB of the longest caption.

    Args:
        encoder: a `Qwen3VLModel` of transformers, or what encoder.py builds: anything with a `language_model`.
    """
    language = encoder.language_model
    ids = ids.to(language.embed_tokens.weight.device)
    hidden = language.embed_tokens(ids)  # (1, n, hidden)
    positions = torch.arange(ids.shape[1], device=hidden.device)[None]  # the same on all three axes: text alone
    rotary = language.rotary_emb(hidden, positions[None].expand(3, -1, -1))
    tapped = [index for index in range(len(language.layers)) if index in taps]
    made = torch.empty(*hidden.shape, len(tapped), dtype=torch.float32)  # (1, n, hidden, taps)
    for index, layer in enumerate(language.layers):
        hidden = layer(hidden, position_embeddings=rotary)
        if index in taps:
            made[..., tapped.index(index)] = hidden
    return made.flatten(2)


@dataclass(frozen=True)
class FeatureKey:
    """Everything that features depend on."""

    model: str
    encoder: str  # which weights and tokenizer: `ComponentsFolder.identity`
    dtype: torch.dtype  # the encoder's computing type, in which features lose nothing
    caption: str


class FeatureCache:
    """LRU cache of features in host memory; what is larger than its limit by itself is not cached."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._cached: OrderedDict[FeatureKey, Tensor] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Of all of them together."""
        return sum(cached.nbytes for cached in self._cached.values())

    def get(self, key: FeatureKey) -> Tensor | None:
        """The features (1, n, taps x hidden) in float32, on the host; None where they are not cached."""
        cached = self._cached.get(key)
        if cached is None:
            return None
        self._cached.move_to_end(key)
        return cached.float()

    def put(self, key: FeatureKey, features: Tensor) -> Tensor:
        """Cache features; gives them as `get` will, in float32 with what the encoder's type holds."""
        cached = features.to("cpu", key.dtype)
        if cached.nbytes <= self.limit_bytes:
            self._cached[key] = cached
            while self.bytes > self.limit_bytes:
                self._cached.popitem(last=False)
        return cached.float()
