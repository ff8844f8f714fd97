"""The miniature as a Turing card computes it: bfloat16 between matrices, float16 inside attention, VAE in float32.

No card is there: the processor is taken for one, so types, overflows and roundings are real and speed is not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import relative_error
from torch import Tensor

from ideogram_app.catalog.models import MODELS
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.kernels import attention, dense
from ideogram_app.model import vae
from ideogram_app.model.components import load_components
from ideogram_app.model.loader import Loaded, load_transformers
from ideogram_app.model.text_encoder.features import encode

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TEXT, ROWS, COLUMNS = 7, 6, 6
CAPTION = '{"high_level_description": "a red circle on a yellow background"}'


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, dense, vae):
        monkeypatch.setattr(module, "compute_capability", lambda device: (7, 5))


def loaded(store: Store, recipe: str, dtype: torch.dtype, times: float = 1.0) -> Loaded:
    """times: of every `o` and `down`. What they make is normed, so a picture hardly changes by it."""
    made = load_transformers(store, "miniature", recipe, CPU, dtype, kernels="plain")
    for module in made.modules if times != 1.0 else ():
        for block in module.trunk.blocks:
            for layer in (block.o, block.down):
                layer.weight.mul_(times) if recipe == "reference" else layer.scale.mul_(times)
    return made


@torch.inference_mode()
def velocity(made: Loaded) -> Tensor:
    """(tokens, 128) in float32."""
    generator = torch.Generator().manual_seed(6)
    features = 3 * torch.randn(TEXT, MODELS["miniature"].conditional.llm_features_dim, generator=generator)
    latents = torch.randn(ROWS * COLUMNS, 128, generator=generator)
    prepared = made.conditional.prepare(features, torch.tensor([0.4]), ROWS, COLUMNS)
    return made.conditional(latents, prepared, 0).float()


@pytest.mark.parametrize("recipe", ["reference", "int8-w8a8-rotated"])
def test_products_beyond_float16_are_drawn_on_turing_and_nothing_but_nan_in_float16(
    prepared_miniature: Store, recipe: str, turing: None
) -> None:
    usual = velocity(loaded(prepared_miniature, recipe, torch.bfloat16))
    large = loaded(prepared_miniature, recipe, torch.bfloat16, times=1e5)
    assert relative_error(velocity(large), usual) < 0.05
    assert large.attention.endswith("in float16") and large.modules[0].dtype == torch.bfloat16
    narrow = velocity(loaded(prepared_miniature, recipe, torch.float16, times=1e5))
    assert not bool(torch.isfinite(narrow).any()), "what such cards drew before: a black picture"


@pytest.mark.parametrize("recipe", ["reference", "fp8", "gguf-q4_k", "gguf-q8_0"])
def test_every_storage_is_as_near_to_float32_as_on_an_ampere_card(
    prepared_miniature: Store, recipe: str, request: pytest.FixtureRequest
) -> None:
    exact = velocity(loaded(prepared_miniature, recipe, torch.float32))
    ampere = velocity(loaded(prepared_miniature, recipe, torch.bfloat16))
    request.getfixturevalue("turing")
    here = velocity(loaded(prepared_miniature, recipe, torch.bfloat16))
    assert relative_error(here, exact) < 1.1 * relative_error(ampere, exact)


def test_what_is_not_widened_is_not_multiplied_on_turing(
    prepared_miniature: Store, turing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bfloat16 product is left anywhere, in transformers or text encoder."""
    real = torch.nn.functional.linear

    def linear(x: Tensor, *others: Any) -> Tensor:
        assert x.dtype == torch.float32
        return real(x, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert bool(torch.isfinite(velocity(loaded(prepared_miniature, "reference", torch.bfloat16))).all())
    components = load_components("miniature", CPU, torch.bfloat16)
    assert bool(torch.isfinite(encode(components.tokenizer, components.text_encoder, CAPTION)).all())


def test_the_decoder_is_float32_where_bfloat16_has_no_units(turing: None) -> None:
    assert load_components("miniature", CPU, torch.bfloat16).vae.dtype == torch.float32
    assert vae.decoder_dtype(torch.float32, CPU) == torch.float32


def test_the_decoder_stays_in_the_computing_type_elsewhere() -> None:
    assert vae.decoder_dtype(torch.bfloat16, CPU) == torch.bfloat16
