"""What was prepared is what runs: every recipe against the dense weights and libraries that share its files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from exact_cpu import cpu_multiplies_exactly
from small_model import NAME, backbone_velocity, relative_error, shrink_published_model, velocity, write_source

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints import prefetch as transit
from ideogram_app.checkpoints.prefetch import Prefetcher
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.checkpoints.span import Span
from ideogram_app.errors import CheckpointError
from ideogram_app.machine.copies import CopyStream
from ideogram_app.model.loader import load_transformers
from ideogram_app.model.reference_model import load_reference_model
from ideogram_app.model.transformer.layers import DenseLinear, Fp8Linear, GgufLinear, Int8Linear
from ideogram_app.planning.weight_bytes import loaded_bytes
from ideogram_app.prepare.transformers import prepare

pytestmark = pytest.mark.slow

LAYERS = {"fp8": Fp8Linear, "int8": Int8Linear, "convrot": Int8Linear, "gguf": GgufLinear}
PARTS = {"qkv": "attention.to_q", "o": "attention.to_out.0", "gate_up": "feed_forward.w1", "down": "feed_forward.w2"}
# Relative error of the velocity on random weights, at most; about twice what was measured.
LARGEST_ERROR = {"reference": 1e-5, "fp8": 0.12, "gguf-q8_0": 0.02, "gguf-q4_k": 0.2}  # the INT8 family: 0.03


@pytest.fixture(scope="module")
def miniature(prepared_miniature: Store) -> Store:
    """The miniature in every recipe."""
    return prepared_miniature


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A random bfloat16 model in every recipe."""
    folder = tmp_path_factory.mktemp("small")
    source = write_source(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        shrink_published_model(patch)
        store = Store(folder / "data")
        for recipe in RECIPES:
            list(prepare(store, NAME, recipe, source))
        yield store


@pytest.fixture
def copied(miniature: Store, tmp_path: Path) -> Store:
    """A copy that may be damaged."""
    return Store(Path(shutil.copytree(miniature.root, tmp_path / "copy")))


def both(store: Store, recipe: str, model: str = NAME) -> list[torch.Tensor]:
    """Through diffusers' own modules, filled by this program."""
    return [velocity(module) for module in load_reference_model(store, model, recipe, "cpu", torch.float32).modules]


def test_the_reference_is_what_diffusers_loads(miniature) -> None:
    for name, got in zip(BRANCHES, both(miniature, "reference", "miniature"), strict=True):
        stock = Ideogram4Transformer2DModel.from_pretrained(
            local_folder("miniature") / name, torch_dtype=torch.float32, local_files_only=True
        )
        assert torch.equal(got, velocity(stock))


def test_every_recipe_is_close_to_the_reference_in_the_expected_order(small) -> None:
    (reference, _) = both(small, "reference")
    errors = {
        recipe: relative_error(
            backbone_velocity(load_transformers(small, NAME, recipe, "cpu", torch.float32).conditional), reference
        )
        for recipe in RECIPES
    }
    assert all(error <= LARGEST_ERROR.get(recipe, 0.03) for recipe, error in errors.items()), errors
    ordered = ["reference", "gguf-q8_0", "int8-w8a8", "fp8", "gguf-q4_k"]
    assert sorted(ordered, key=errors.__getitem__) == ordered, errors


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_packed_layers_are_those_of_the_recipe_and_sizes_are_as_planned(miniature, recipe) -> None:
    loaded = load_transformers(miniature, "miniature", recipe, "cpu", torch.float32, kernels="plain")
    row, planned = RECIPES[recipe].protecting(), 0
    assert loaded.engaged == recipe
    for number, (backbone, branch) in enumerate(zip(loaded.modules, MODELS["miniature"].branches, strict=True)):
        planned += sum(loaded_bytes(branch, row, 4, sees_text=number == 0))
        for index, block in enumerate(backbone.trunk.blocks):
            for part, name in PARTS.items():
                kind = LAYERS[row.storage] if row.packs(f"layers.{index}.{name}") else DenseLinear
                assert type(getattr(block, part)) is kind, (index, part)
        assert (backbone.conditioner.text_project is None) == (number == 1)
        assert not backbone.training
        assert not [name for name, value in backbone.named_parameters() if value.requires_grad]
    assert planned == loaded.weight_bytes


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_narrow_computing_type_keeps_head_norms_and_scales_wide(miniature, recipe) -> None:
    backbone = load_transformers(miniature, "miniature", recipe, "cpu", torch.bfloat16, kernels="plain").conditional
    assert backbone.dtype == backbone.conditioner.norms.dtype == torch.bfloat16
    wide = [buffer for name, buffer in backbone.named_buffers() if "scale" in name or "norm_" in name]
    assert wide and {buffer.dtype for buffer in wide} == {torch.float32}


def test_stock_diffusers_loads_the_int8_folder_and_agrees(small) -> None:
    if not cpu_multiplies_exactly():
        pytest.skip("torch._int_mm saturates on this CPU")
    for name, got in zip(BRANCHES, both(small, "int8-w8a8"), strict=True):
        stock = Ideogram4Transformer2DModel.from_pretrained(
            small.path(NAME, "int8-w8a8") / name, torch_dtype=torch.float32, local_files_only=True
        )
        assert type(stock.layers[0].feed_forward.w1.weight).__name__ == "Int8Tensor"
        assert type(stock.layers[0].adaln_modulation.weight) is torch.nn.Parameter
        assert relative_error(got, velocity(stock)) < 1e-6


def test_the_int8_metadata_is_what_torchao_would_write(small) -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    file = SafetensorsFile(small.path(NAME, "int8-w8a8") / BRANCHES[0] / "diffusion_pytorch_model.safetensors")
    names = json.loads(file.metadata["tensor_names"])
    folder = small.path(NAME, "int8-w8a8") / BRANCHES[0]
    module = Ideogram4Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
    tensors, metadata = flatten_tensor_state_dict({name: module.get_parameter(name).data for name in names})
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: info.shape for name, info in file.infos.items()
    }
    for name in names:
        assert json.loads(file.metadata[name]) == json.loads(metadata[name])


def test_the_published_model_runs_from_a_prepared_reference(small) -> None:
    for name, got in zip(BRANCHES, both(small, "reference"), strict=True):
        stock = Ideogram4Transformer2DModel.from_pretrained(
            small.root.parent / "source" / name, torch_dtype=torch.float32
        )
        assert torch.equal(got, velocity(stock))


def test_what_was_not_prepared_says_so(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"is missing: .*Prepare fp8 first"):
        load_transformers(Store(tmp_path), "miniature", "fp8", "cpu", torch.float32)


def damaged(store: Store, recipe: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_transformers(store, "miniature", recipe, "cpu", torch.float32)
    return str(caught.value)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "reference"])
def test_a_file_that_is_missing_truncated_or_altered_is_named(copied, recipe) -> None:
    folder = copied.path("miniature", recipe)
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    whole = bytearray(path.read_bytes())
    os.truncate(path, len(whole) // 2)
    assert str(path) in damaged(copied, recipe)
    path.unlink()
    assert str(path) in damaged(copied, recipe)
    whole[len(whole) // 2] ^= 16
    path.write_bytes(whole)
    assert str(path) in damaged(copied, recipe)


def test_nothing_is_loaded_from_a_file_that_changes_afterwards(copied) -> None:
    loaded = load_transformers(copied, "miniature", "gguf-q8_0", "cpu", torch.float32)
    before = backbone_velocity(loaded.conditional)
    for path in copied.path("miniature", "gguf-q8_0").glob("*.gguf"):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 10_000)
    assert torch.equal(backbone_velocity(loaded.conditional), before)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "reference"])
def test_what_every_step_needs_is_announced_in_the_order_in_which_it_is_taken(small, recipe, monkeypatch) -> None:
    """Each once, and all of it: nothing of the trunk is read out of turn."""
    announced: list[Span] = []
    taken: list[Span] = []

    class Watched(Prefetcher):
        def __init__(self, spans: list[Span], copies: CopyStream) -> None:
            announced.extend(spans)
            super().__init__(spans, copies)

        def take(self, span: Span) -> torch.Tensor:
            if span in announced:  # the conditioner's are not
                taken.append(span)
            return super().take(span)

    monkeypatch.setattr(transit, "Prefetcher", Watched)
    load_transformers(small, NAME, recipe, "cpu", torch.float32)
    assert taken == announced and len(set(taken)) == len(taken)
