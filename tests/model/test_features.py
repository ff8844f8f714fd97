"""Features that are kept: the same as new ones, only as many as fit, and never those of something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.folders import identity
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.model.components import load_components
from ideogram_app.model.text_encoder.features import CACHE_BYTES, LONGEST_TEXT, FeatureCache, FeatureKey, encode

KEY = FeatureKey("miniature", "an encoder", torch.float32, "a red circle")
WIDTH = 52  # 13 taps of 4
TAPPED = 13 * 4096  # of the published encoder


def made(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def counted(features: Tensor) -> tuple[Callable[[], Tensor], list[str]]:
    """What makes these features, and a list that grows with every time it did."""
    calls: list[str] = []

    def make() -> Tensor:
        calls.append("encoded")
        return features

    return make, calls


def refuse() -> Tensor:
    pytest.fail("the caption was encoded again")


def holds(cache: FeatureCache, key: FeatureKey) -> bool:
    """Whether features are given without encoding; asking makes them those used last."""

    def absent() -> Tensor:
        raise KeyError(key)

    try:
        cache.features(key, absent)
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_caption_is_encoded_once_and_comes_back_without_loss(dtype: torch.dtype) -> None:
    features, cache = made(5).to(dtype).float(), FeatureCache()  # as an encoder gives them that computes in this type
    make, calls = counted(features)
    key = replace(KEY, dtype=dtype)
    for _ in range(3):
        got = cache.features(key, make)
        assert torch.equal(got, features) and got.dtype == torch.float32
    assert calls == ["encoded"] and cache.bytes == features.numel() * dtype.itemsize


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
    cache.features(KEY, lambda: made(4))
    assert torch.equal(cache.features(other, lambda: theirs), theirs)
    assert torch.equal(cache.features(KEY, refuse), made(4))


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = FeatureCache(limit_bytes=3 * made(4).nbytes)
    keys = [replace(KEY, caption=str(number)) for number in range(4)]
    for key in keys[:3]:
        cache.features(key, lambda: made(4))
    cache.features(keys[0], refuse)
    cache.features(keys[3], lambda: made(4))
    assert [holds(cache, key) for key in keys] == [True, False, True, True]
    assert cache.bytes <= cache.limit_bytes
    cache.features(keys[1], lambda: made(8))  # as large as two
    assert [holds(cache, key) for key in keys] == [False, True, False, True]


def test_what_is_too_large_is_given_but_not_kept() -> None:
    cache = FeatureCache(limit_bytes=made(4).nbytes)
    cache.features(KEY, lambda: made(4))
    large = replace(KEY, caption="long")
    assert torch.equal(cache.features(large, lambda: made(5)), made(5))
    assert not holds(cache, large) and holds(cache, KEY)


def test_the_longest_caption_fits() -> None:
    assert LONGEST_TEXT * TAPPED * torch.float32.itemsize <= CACHE_BYTES


def test_a_failure_keeps_nothing() -> None:
    def fail() -> Tensor:
        raise ZeroDivisionError

    cache = FeatureCache()
    with pytest.raises(ZeroDivisionError):
        cache.features(KEY, fail)
    assert not holds(cache, KEY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_miniatures_features_come_back_to_the_last_bit(dtype: torch.dtype) -> None:
    parts, caption = load_components("miniature", "cpu", dtype), wrap_plain("a red circle")
    features = encode(parts.tokenizer, parts.text_encoder, caption)
    cache, key = FeatureCache(), FeatureKey("miniature", "shipped", dtype, caption)
    cache.features(key, lambda: features)
    assert torch.equal(cache.features(key, refuse), features)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("text_encoder", "tokenizer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_an_encoder_is_another_when_a_file_of_it_changes(folder: Path) -> None:
    seen = {identity(folder, ("text_encoder", "tokenizer"))}
    assert identity(folder, ("text_encoder", "tokenizer")) in seen
    (folder / "vae" / "config.json").write_text("{ }", encoding="utf-8")
    assert identity(folder, ("text_encoder", "tokenizer")) in seen, "the VAE has no part in features"
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"weights")
    assert identity(folder, ("text_encoder", "tokenizer")) not in seen
    seen.add(identity(folder, ("text_encoder", "tokenizer")))
    os.utime(folder / "tokenizer" / "config.json", ns=(1, 1))
    assert identity(folder, ("text_encoder", "tokenizer")) not in seen
    seen.add(identity(folder, ("text_encoder", "tokenizer")))
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model-Q4_K.gguf")
    assert identity(folder, ("text_encoder", "tokenizer")) not in seen


def test_encoders_in_two_folders_are_two(folder: Path) -> None:
    parts = ("text_encoder", "tokenizer")
    assert identity(folder, parts) != identity(local_folder("miniature"), parts)
