"""The cache of features: the same as new ones, only as many as fit, and never those of something else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ideogram_app.generation.captions import wrap_plain
from ideogram_app.model.components import load_components
from ideogram_app.model.text_encoder.features import CACHE_BYTES, LONGEST_TEXT, FeatureCache, FeatureKey, encode

KEY = FeatureKey("miniature", "an encoder", torch.float32, "a red circle")
WIDTH = 52  # 13 taps of 4
TAPPED = 13 * 4096  # of the published encoder


def made(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def cached(cache: FeatureCache, key: FeatureKey) -> Tensor:
    """Features that must be cached."""
    found = cache.get(key)
    assert found is not None, "the caption would be encoded again"
    return found


def holds(cache: FeatureCache, key: FeatureKey) -> bool:
    """Whether features are given without encoding; asking makes them those used last."""
    return cache.get(key) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_caption_is_encoded_once_and_comes_back_without_loss(dtype: torch.dtype) -> None:
    features, cache = made(5).to(dtype).float(), FeatureCache()  # as an encoder gives them that computes in this type
    key = replace(KEY, dtype=dtype)
    assert cache.get(key) is None
    for got in (cache.put(key, features), cached(cache, key), cached(cache, key)):
        assert torch.equal(got, features) and got.dtype == torch.float32
    assert cache.bytes == features.numel() * dtype.itemsize


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, model="ideogram-4"),
        replace(KEY, encoder="another"),
        replace(KEY, dtype=torch.bfloat16),
        replace(KEY, caption="a red circle."),
    ],
    ids=["model", "encoder", "dtype", "caption"],
)
def test_features_of_something_else_are_never_given(other: FeatureKey) -> None:
    cache, theirs = FeatureCache(), made(4, seed=1).bfloat16().float()
    cache.put(KEY, made(4))
    assert cache.get(other) is None
    assert torch.equal(cache.put(other, theirs), theirs)
    assert torch.equal(cached(cache, KEY), made(4))


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = FeatureCache(limit_bytes=3 * made(4).nbytes)
    keys = [replace(KEY, caption=str(number)) for number in range(4)]
    for key in keys[:3]:
        cache.put(key, made(4))
    cached(cache, keys[0])
    cache.put(keys[3], made(4))
    assert [holds(cache, key) for key in keys] == [True, False, True, True]
    assert cache.bytes <= cache.limit_bytes
    cache.put(keys[1], made(8))  # as large as two
    assert [holds(cache, key) for key in keys] == [False, True, False, True]


def test_what_is_too_large_is_given_but_not_cached() -> None:
    cache = FeatureCache(limit_bytes=made(4).nbytes)
    cache.put(KEY, made(4))
    large = replace(KEY, caption="long")
    assert torch.equal(cache.put(large, made(5)), made(5))
    assert not holds(cache, large) and holds(cache, KEY)


def test_the_longest_caption_fits() -> None:
    assert LONGEST_TEXT * TAPPED * torch.float32.itemsize <= CACHE_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_miniatures_features_come_back_to_the_last_bit(dtype: torch.dtype) -> None:
    parts, caption = load_components("miniature", "cpu", dtype), wrap_plain("a red circle")
    features = encode(parts.tokenizer, parts.text_encoder, caption)
    cache, key = FeatureCache(), FeatureKey("miniature", "shipped", dtype, caption)
    cache.put(key, features)
    assert torch.equal(cached(cache, key), features)
