"""Smoothing: the folded model is the same model to the bit, and INT8 hurts it less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel
from torch import Tensor, nn

from ideogram_app.catalog.models import MODELS, Branch
from ideogram_app.errors import CheckpointError
from ideogram_app.prepare.calibration.smoothing import (
    LARGEST_EXPONENT,
    Factors,
    column_maxima,
    exponents,
    folded,
    groups,
    input_of,
)
from ideogram_app.quantization import int8
from tests.conftest import MINIATURE

BRANCH = MODELS["miniature"].unconditional


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def miniature(dtype: torch.dtype) -> Any:
    folder = MINIATURE / "unconditional_transformer"
    return Ideogram4Transformer2DModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).eval()


def run(model: Any, dtype: torch.dtype) -> Tensor:
    """Text and image tokens, so that every Linear sees something."""
    text, image = 5, 16
    length = text + image
    with torch.inference_mode():
        return model(
            hidden_states=gaussian(1, length, 128).to(dtype),
            timestep=torch.tensor([0.3], dtype=dtype),
            encoder_hidden_states=gaussian(1, length, BRANCH.llm_features_dim, seed=1).to(dtype),
            position_ids=torch.arange(length).view(1, -1, 1).expand(1, -1, 3),
            segment_ids=torch.ones(1, length, dtype=torch.long),
            indicator=torch.tensor([[3] * text + [2] * image]),
            return_dict=False,
        )[0]


def random_powers(branch: Branch, largest: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = branch.shapes()
    return {
        group.name: torch.randint(
            -largest, largest + 1, (shapes[f"{group.name}.weight"][1],), generator=generator, dtype=torch.int8
        )
        for group in groups(branch)
    }


def scale(model: nn.Module, factors: dict[str, Factors]) -> None:
    for name, parameter in model.named_parameters():
        if name in factors:
            parameter.data = factors[name].applied(parameter.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_model_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = miniature(dtype)
    before = run(model, dtype)
    untouched = model.get_parameter("layers.0.feed_forward.w3.weight").clone()
    scale(model, folded(BRANCH, random_powers(BRANCH)))
    assert not torch.equal(model.get_parameter("layers.0.feed_forward.w3.weight"), untouched)
    assert torch.equal(run(model, dtype), before)


@pytest.mark.parametrize("left_out", ["columns", "rows"])
def test_half_a_fold_is_another_model(left_out: str) -> None:
    model = miniature(torch.float32)
    before = run(model, torch.float32)
    factors = folded(BRANCH, random_powers(BRANCH))
    scale(model, {name: replace(found, **{left_out: None}) for name, found in factors.items()})
    assert (run(model, torch.float32) - before).norm() > 0.1 * before.norm()


def test_every_linear_that_reads_many_rows_is_in_one_group() -> None:
    consumers = [consumer for group in groups(BRANCH) for consumer in group.consumers]
    one_row = ("input_proj", "t_embedding.", "adaln", "final_layer.")
    expected = {linear.name for linear in BRANCH.linears() if not any(part in linear.name for part in one_row)}
    assert len(consumers) == len(set(consumers)) and set(consumers) == expected
    for group in groups(BRANCH):
        assert {input_of(consumer) for consumer in group.consumers} == {group.name}
        assert group.producer in BRANCH.shapes()


def test_layers_said_to_share_an_input_are_given_the_same_tensor() -> None:
    model = miniature(torch.float32)
    seen: dict[str, int] = {}
    kept = []  # so that no address is used twice

    def note(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            kept.append(arguments[0])
            seen[name] = id(arguments[0])

        return hook

    for linear in BRANCH.linears():
        model.get_submodule(linear.name).register_forward_pre_hook(note(linear.name))
    run(model, torch.float32)
    for linear in BRANCH.linears():
        assert seen[linear.name] == seen[input_of(linear.name)]


def test_exponents_are_the_formula_rounded_with_the_median_taken_out() -> None:
    largest, weights = gaussian(301).abs() * torch.logspace(-3, 3, 301, base=2), gaussian(301, seed=1).abs()
    exact = (largest.sqrt() / weights.sqrt()).log2()
    powers = exponents(largest, weights)
    assert powers.dtype == torch.int8
    assert ((powers - (exact - exact.median())).abs() <= 0.5001).all()
    assert torch.equal(exponents(largest * 64, weights), powers)  # what all channels share changes nothing


def test_silent_channels_keep_their_scale_and_outliers_are_bounded() -> None:
    largest, weights = torch.ones(9), torch.ones(9)
    largest[0], weights[1], largest[2], largest[3] = 0, 0, 1e30, 1e-30
    assert exponents(largest, weights).tolist() == [0, 0, LARGEST_EXPONENT, -LARGEST_EXPONENT, 0, 0, 0, 0, 0]
    assert not exponents(torch.zeros(4), torch.ones(4)).any()


def test_column_maxima_are_taken_over_all_readers_a_few_rows_at_a_time() -> None:
    branch = Branch(1, 64, 8, 1280, 64, 64)  # w1 and w3 have 1280 rows: three reads each
    group = next(group for group in groups(branch) if group.name.endswith("w1"))
    weights = {f"{name}.weight": gaussian(1280, 512, seed=seed) for seed, name in enumerate(group.consumers)}
    reads: list[int] = []

    def read(name: str, rows: slice | None = None) -> Tensor:
        assert rows is not None
        reads.append(rows.stop - rows.start)
        return weights[name][rows]

    expected = torch.cat(list(weights.values())).abs().amax(0)
    assert torch.equal(column_maxima(group, branch, read), expected)
    assert reads == [512, 512, 256] * 2


def test_some_rows_of_a_tensor_are_scaled_as_in_the_whole() -> None:
    factors = Factors(torch.exp2(gaussian(6).round()), torch.exp2(gaussian(4, seed=1).round()))
    tensor = gaussian(6, 4).bfloat16()
    whole = factors.applied(tensor)
    assert whole.dtype == torch.bfloat16
    assert torch.equal(whole.float(), tensor.float() * factors.rows[:, None] * factors.columns)
    assert torch.equal(factors.applied(tensor[2:5], slice(2, 5)), whole[2:5])


def test_factors_for_another_width_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"llm_cond_proj.*832 channels.*\(831,\)"):
        folded(BRANCH, {"llm_cond_proj": torch.zeros(831, dtype=torch.int8)})


def test_smoothing_halves_the_error_that_outlier_channels_cause() -> None:
    x, weight = gaussian(64, 1024), gaussian(96, 1024, seed=1)
    x[:, [5, 300, 801]] *= 30
    lambdas = torch.exp2(exponents(x.abs().amax(0), weight.abs().amax(0)).float())
    exact = x @ weight.T

    def error(x: Tensor, weight: Tensor) -> float:
        return float((int8.linear(x, *int8.quantize_rows(weight)) - exact).norm() / exact.norm())

    assert error(x / lambdas, weight * lambdas) < 0.5 * error(x, weight)
