"""The backbone is diffusers' transformer: the same velocity over many shapes, and the same blocks in every storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from small_model import fused, random_tensors, relative_error
from torch import Tensor

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.kernels.attention import Attention
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.model.loader import load_transformers
from ideogram_app.model.reference_model import lay_out, load_reference_model
from ideogram_app.model.transformer.assemble import Placement, assemble
from ideogram_app.model.transformer.backbone import Backbone
from ideogram_app.model.transformer.conditioner import rotary, sinusoids
from ideogram_app.model.transformer.layers import weight_bytes
from ideogram_app.planning.weight_bytes import loaded_bytes

CPU = torch.device("cpu")
# layers, head size, heads, feed-forward, adaLN, text features; then rope_theta and sections
SHAPES = [
    (Branch(1, 64, 1, 16, 8, 26), 1000, (12, 10, 10)),
    (Branch(3, 64, 4, 256, 256, 832), 1000, (12, 10, 10)),
    (Branch(2, 256, 2, 1280, 512, 1300), 5_000_000, (24, 20, 20)),
    (Branch(5, 32, 3, 100, 48, 130), 10_000, (8, 4, 4)),
]
# text tokens, rows and columns of image tokens
GRIDS = [(1, 1, 1), (7, 6, 6), (40, 3, 11), (0, 8, 2)]


class DenseWeights:
    """Tensors by their names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, set[str]()

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        self.asked.add(name)
        return self.tensors[name][rows or slice(None)]

    def stored(self, linear: str) -> tuple[Tensor, ...]:
        return (self.tensor(f"{linear}.weight"),)


def pair(
    branch: Branch, theta: float, sections: tuple[int, ...], dtype: torch.dtype = torch.float32, sees_text: bool = True
) -> tuple[Backbone, Any]:
    """The same random weights in the backbone and in diffusers' transformer."""
    tensors = random_tensors(branch, seed=5, dtype=torch.float32)
    settings: dict[str, Any] = {**vars(branch), "rope_theta": theta, "mrope_section": sections, "in_channels": 128}
    stock = Ideogram4Transformer2DModel(**settings)
    stock.load_state_dict(tensors)
    mine = assemble(DenseWeights(fused(tensors)), branch, settings, Placement(dtype), sees_text)
    return mine, stock.to(dtype).eval()


@torch.inference_mode()
def velocities(
    mine: Backbone, stock: Any, grid: tuple[int, int, int], features: Tensor, latents: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Both for every step: (steps, tokens, 128)."""
    text, rows, columns = grid
    dtype = mine.dtype
    prepared = mine.prepare(features, times, rows, columns)
    ours = [mine(latents, prepared, step) for step in range(len(times))]
    sequence = torch.cat((latents.new_zeros(text, 128), latents))[None].to(dtype)
    seen = torch.cat((features, features.new_zeros(rows * columns, features.shape[1])))[None].to(dtype)
    layout = lay_out(text, rows, columns, CPU)
    theirs = [
        stock(
            hidden_states=sequence,
            timestep=time.reshape(1).to(dtype),
            encoder_hidden_states=seen,
            return_dict=False,
            **layout,
        )[0][0, text:]
        for time in times
    ]
    return torch.stack(ours), torch.stack(theirs)


def inputs(branch: Branch, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Text features, latents and three times."""
    generator = torch.Generator().manual_seed(6)
    text, rows, columns = grid
    features = 3 * torch.randn(text, branch.llm_features_dim, generator=generator)
    return features, torch.randn(rows * columns, 128, generator=generator), torch.tensor([0.001, 0.4, 0.97])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("branch", "theta", "sections"), SHAPES, ids=str)
def test_the_velocity_equals_diffusers(
    branch: Branch, theta: float, sections: tuple[int, ...], grid: tuple[int, int, int]
) -> None:
    mine, stock = pair(branch, theta, sections, sees_text=grid[0] > 0)
    ours, theirs = velocities(mine, stock, grid, *inputs(branch, grid))
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


def test_bfloat16_is_no_further_from_float32_than_diffusers_own() -> None:
    branch, theta, sections = SHAPES[1]
    given = inputs(branch, GRIDS[1])
    _, exact = velocities(*pair(branch, theta, sections), GRIDS[1], *given)
    ours, theirs = velocities(*pair(branch, theta, sections, torch.bfloat16), GRIDS[1], *given)
    assert relative_error(ours, exact) < 1.1 * relative_error(theirs, exact)


def test_the_branch_without_text_never_reads_its_projection() -> None:
    branch, theta, sections = SHAPES[1]
    weights = DenseWeights(fused(random_tensors(branch, seed=5)))
    settings = {"rope_theta": theta, "mrope_section": sections}
    blind = assemble(weights, branch, settings, Placement(torch.float32), sees_text=False)
    unread = set(weights.tensors) - weights.asked
    assert unread == {"llm_cond_norm.weight", "llm_cond_proj.weight", "llm_cond_proj.bias"}
    assert weight_bytes(blind) == sum(loaded_bytes(branch, RECIPES["reference"], 4, sees_text=False))
    seeing = assemble(weights, branch, settings, Placement(torch.float32), sees_text=True)
    assert weight_bytes(seeing) == sum(loaded_bytes(branch, RECIPES["reference"], 4, sees_text=True))


def test_a_step_touches_nothing_that_runs_once_a_picture() -> None:
    """Whatever the conditioner holds is away from the device while steps run."""
    branch, theta, sections = SHAPES[1]
    mine, _ = pair(branch, theta, sections)
    features, latents, times = inputs(branch, GRIDS[1])
    with torch.inference_mode():
        prepared = mine.prepare(features, times, 6, 6)
        before = mine(latents, prepared, 1)
        mine.conditioner.to("meta")
        assert torch.equal(mine(latents, prepared, 1), before)


@pytest.fixture(scope="module")
def miniature(prepared_miniature: Store) -> Store:
    """The miniature in every recipe."""
    return prepared_miniature


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_of_every_storage_equals_the_same_layers_in_diffusers_block(miniature: Store, recipe: str) -> None:
    """One block at a time, because INT8 carries a difference of 1e-6 through several blocks to its own error."""
    backbone = load_transformers(miniature, "miniature", recipe, CPU, torch.float32, kernels="plain").conditional
    stock: Any = load_reference_model(miniature, "miniature", recipe, CPU, torch.float32).conditional
    features, latents, times = inputs(MODELS["miniature"].conditional, GRIDS[1])
    layout = lay_out(7, 6, 6, CPU)
    with torch.inference_mode():
        prepared = backbone.prepare(features, times, 6, 6)
        hidden = backbone.trunk.enter(latents, prepared)
        condition = torch.nn.functional.silu(stock.adaln_proj(stock.t_embedding(times[1:2]).unsqueeze(1)))
        angles = stock.rotary_emb(layout["position_ids"])
        mask = torch.ones(1, 1, 43, 43, dtype=torch.bool)
        for index in (0, 3, 5):
            vector = prepared.vectors[1, index, 0]
            block: Any = backbone.trunk.blocks[index]
            x = PLAIN.norm(hidden, vector, 1e-5, block.qkv.input_format)
            ours, _ = block(hidden, x, prepared.vectors[1, index], None, "dense", prepared, PLAIN, Attention())
            theirs = stock.layers[index](hidden[None], mask, angles, condition)[0]
            # An INT8 value on the edge between two may fall either way. Where a token's largest is 30 times its typical
            # value, one such step is 30 / 127.5 of it in one of 256 channels: 1.5 % of one token, 0.2 % of all 43.
            bound = 1e-2 if "a8" in RECIPES[recipe].arithmetic else 1e-5
            assert relative_error(ours - hidden, theirs - hidden) < bound
            hidden = theirs


def test_angles_and_sinusoids_are_diffusers_own() -> None:
    from diffusers.models.transformers.transformer_ideogram4 import Ideogram4MRoPE, _sinusoidal_embedding

    positions = lay_out(9, 5, 7, CPU)["position_ids"]
    for head, theta, sections in ((256, 5_000_000, (24, 20, 20)), (64, 1000, (12, 10, 10))):
        cos, sin = Ideogram4MRoPE(head, theta, sections)(positions)
        mine = rotary(9, 5, 7, head, theta, sections)
        assert torch.equal(mine[0], cos[0, :, : head // 2]) and torch.equal(mine[1], sin[0, :, head // 2 :])
    times = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(sinusoids(times, 33), _sinusoidal_embedding(1e4 * times, 33))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_draws_what_the_processor_draws(miniature: Store, recipe: str, tmp_path: Path) -> None:
    """The kernels of the device against plain torch on the processor, whole velocities in bfloat16."""
    features, latents, times = inputs(MODELS["miniature"].conditional, GRIDS[1])
    answers = []
    for device, kernels in (("cpu", "plain"), ("cuda", None)):
        loaded = load_transformers(miniature, "miniature", recipe, device, torch.bfloat16, kernels=kernels)
        with torch.inference_mode():
            prepared = loaded.conditional.prepare(features.to(device), times.to(device), 6, 6)
            answers.append(loaded.conditional(latents.to(device), prepared, 1).cpu())
    assert relative_error(answers[1], answers[0]) < 0.05
