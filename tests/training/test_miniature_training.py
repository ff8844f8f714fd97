"""The miniature's training: forward passes equal the stock modules, and a small run writes a pipeline that loads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Ideogram4Pipeline

from ideogram_app.model.text_encoder.features import tokenize
from training.miniature import scenes, train
from training.miniature.network import TextFeatures, Velocity, padding_bias
from training.miniature.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow

PADDING = 5


@pytest.fixture(scope="module")
def lively(stock: Any) -> Any:
    """The stock pipeline with random weights everywhere, so that no layer is near the identity and hides a fault."""
    from copy import deepcopy

    torch.manual_seed(0)
    parts = {
        name: deepcopy(stock.components[name]) for name in ("text_encoder", "transformer", "unconditional_transformer")
    }
    for module in parts.values():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.06)
    for index, layer in enumerate(parts["text_encoder"].language_model.layers):
        if index not in (0, 12, 24):  # the training forward leaves these out, so they must do nothing
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return Ideogram4Pipeline(**{**stock.components, **parts})


@torch.no_grad()
def test_the_training_forward_equals_transformers_and_diffusers(lively: Any) -> None:
    caption = scenes.to_json(scenes.sample_scene(random.Random(4)))
    ids = tokenize(lively.tokenizer, caption)
    count = ids.shape[1]
    theirs, *layout = lively.encode_prompt(caption, 8, 8, count, "cpu")
    padded = torch.cat((ids, torch.zeros(1, PADDING, dtype=torch.long)), 1)
    features = TextFeatures(lively.text_encoder)(padded)
    assert torch.allclose(features[:, :count], theirs[:, :count], atol=1e-5)

    latents, moment = torch.randn(1, 64, 128), torch.tensor([0.3])
    sequence = torch.cat((torch.zeros(1, count, 128), latents), 1)
    expected = lively.transformer(sequence, moment, theirs, *layout, return_dict=False)[0][:, count:]
    bias = torch.cat(
        (padding_bias(torch.tensor([count]), count + PADDING, torch.float32), torch.zeros(1, 1, 1, 64)), -1
    )
    mine = Velocity(lively.transformer, 8, count + PADDING)(latents, moment, features, bias)
    assert torch.allclose(mine, expected, atol=1e-4)

    image = [part[:, count:] for part in layout]
    nothing = torch.zeros(1, 64, theirs.shape[-1])
    expected = lively.unconditional_transformer(latents, moment, nothing, *image, return_dict=False)[0]
    mine = Velocity(lively.unconditional_transformer, 8, 0)(latents, moment, None, torch.zeros(1, 1, 1, 64))
    assert torch.allclose(mine, expected, atol=1e-4)


def test_every_capital_is_a_token_of_its_own_and_captions_are_short() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer("HELLO", add_special_tokens=False)["input_ids"]) == 5
    rng = random.Random(0)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        for form in train.FORMS:
            ids = tokenize(tokenizer, train.caption_of(scene, form, rng))[0].tolist()
            assert len(ids) <= max(train.TEXT_WIDTHS)
            assert "<|im_start|>assistant" in tokenizer.decode(ids)


def test_the_shipped_tokenizer_is_the_one_that_training_builds(stock: Any) -> None:
    text = 'user {"compositional_deconstruction":{"background":"pink","elements":[ a café 123'
    assert stock.tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]


def test_held_out_scenes_are_never_trained_on() -> None:
    from training.miniature.evaluate import held_out_scenes

    assert not set(train.training_scenes(2000)) & set(held_out_scenes(50))


def test_a_killed_training_goes_on_and_writes_a_pipeline_that_stock_diffusers_draws_with(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    sizes = {"pictures": 48, "autoencoder_steps": 2, "unconditional_minutes": 0.01, "threads": 1, "fast": False}
    train.main(work=work, out=out, conditional_minutes=0.02, **sizes)  # type: ignore[arg-type]
    finished = torch.load(work / "conditional.pt", weights_only=True)
    # As after a kill in the second stage: the first stage's files are there, the last file is not.
    (work / "unconditional.pt").unlink()
    train.main(work=work, out=out, conditional_minutes=0.02, **sizes)  # type: ignore[arg-type]
    again = torch.load(work / "conditional.pt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in finished.items())
    pipeline = Ideogram4Pipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red circle", height=128, width=128, num_inference_steps=2, guidance_scale=2.0, guidance_schedule=None,
        max_sequence_length=32,
    ).images[0]  # fmt: skip
    assert picture.size == (128, 128)
