"""Qwen3-VL's text side: what a config may say. That its features equal transformers' is in test_encoder.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_encoder import CONFIG, ROPE, TEXT, stock_model, text_side
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from ideogram_app.errors import CheckpointError
from ideogram_app.model.text_encoder.qwen import text_model

WITHOUT_ROPE = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
# How configs have said it: transformers 5, transformers 4 (as the published folder does), not at all.
CONFIGS: dict[str, dict[str, Any]] = {
    "parameters": TEXT,
    "scaling": {**WITHOUT_ROPE, "rope_theta": 5e6, "rope_scaling": {**ROPE, "rope_theta": None}},
    "default": {**WITHOUT_ROPE, "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10]}},
}
CONFIGS["scaling"]["rope_scaling"].pop("rope_theta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_positions_turn_as_in_transformers(config: dict[str, Any], dtype: torch.dtype) -> None:
    with torch.device("cpu"):
        stock = Qwen3VLTextModel._from_config(Qwen3VLTextConfig(**config))
    x, positions = torch.zeros(1, 300, 1, dtype=dtype), torch.arange(300).expand(3, 1, -1)
    for got, expected in zip(text_model(config).rotary_emb(x, positions), stock.rotary_emb(x, positions), strict=True):
        assert got.dtype == dtype and torch.equal(got, expected)


def test_names_and_shapes_are_those_of_transformers() -> None:
    stock = {name.removeprefix("language_model."): value.shape for name, value in text_side(stock_model()).items()}
    ours = text_model(CONFIG)
    assert {name: value.shape for name, value in ours.state_dict().items()} == stock
    assert all(value.is_meta for value in ours.parameters()) and not ours.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}},
    ],
    ids=["activation", "bias", "rotary"],
)
def test_a_variant_that_is_not_computed_here_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="unknown variant"):
        text_model(TEXT | changes)


def test_a_size_that_is_missing_is_named() -> None:
    with pytest.raises(CheckpointError, match="head_dim"):
        text_model({"text_config": {**TEXT, "head_dim": None}})
