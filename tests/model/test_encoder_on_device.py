"""The text encoder staged or streamed: the same features either way, and no more of it at once than was said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ideogram_app.catalog.text_encoder import ENCODER_RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import RequestError
from ideogram_app.generation.captions import wrap_plain
from ideogram_app.model.components import ComponentsFolder, find_components
from ideogram_app.model.text_encoder.features import encode
from ideogram_app.model.text_encoder.on_device import encoder_on_device
from ideogram_app.prepare.components import prepare_components
from tests.conftest import MINIATURE
from tests.model.test_offload import Budget, Late

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NAME = "ideogram-4"


@pytest.fixture(scope="module", params=["pipeline folder", *ENCODER_RECIPES])
def where(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComponentsFolder]:
    """The miniature's encoder as it ships, and prepared in every recipe."""
    if request.param == "pipeline folder":
        yield find_components("miniature")
        return
    store = Store(tmp_path_factory.mktemp("data"))
    list(prepare_components(store, NAME, MINIATURE, request.param))
    yield find_components(NAME, store=store)


def read(where: ComponentsFolder, way: str, copies: Budget | Late | None = None) -> Tensor:
    with encoder_on_device(where, way, CPU, torch.float32, copies) as encoder:
        return encode(where.tokenizer(), encoder, wrap_plain("the word TEA in white letters on a green background"))


def test_layers_that_pass_through_give_the_features_of_the_whole_encoder(where: ComponentsFolder) -> None:
    expected = read(where, "staged")
    assert torch.equal(read(where, "streamed"), expected)
    assert torch.equal(read(where, "streamed", Late()), expected)


def test_two_layers_are_all_that_is_on_the_device(where: ComponentsFolder) -> None:
    budget = Budget(10**9)
    read(where, "streamed", budget)
    whole = sum(tensor.nbytes for tensor in where.text_encoder(CPU, torch.float32).state_dict().values())
    assert 0 < budget.most < whole / 8, "of 36 layers and a table"
    assert budget.held == 0


def test_matrices_of_a_prepared_encoder_are_not_kept_on_the_host_while_it_passes_through(
    where: ComponentsFolder,
) -> None:
    with encoder_on_device(where, "streamed", CPU, torch.float32) as encoder:
        query = encoder.get_submodule("language_model.layers.3.self_attn.q_proj").weight
        assert query.is_meta is bool(where.encoder_recipe)
        assert not encoder.get_submodule("language_model.embed_tokens").weight.is_meta


def test_a_way_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RequestError, match="staged or streamed"):
        read(find_components("miniature"), "by post")


@pytest.mark.parametrize("way", ["staged", "streamed"])
def test_a_staged_encoder_is_freed_even_though_somebody_still_has_a_name_for_it(way: str) -> None:
    with encoder_on_device(find_components("miniature"), way, CPU, torch.float32) as encoder:
        assert not encoder.get_submodule("language_model.embed_tokens").weight.is_meta
    assert all(tensor.is_meta for tensor in (*encoder.parameters(), *encoder.buffers()))
