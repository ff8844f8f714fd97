"""Reference model: diffusers' own transformers, filled from our files, to test and to calibrate.

A calibration watches what every Linear of diffusers' names reads, and the backbone has merged some of those and runs
others once a picture. Here they all stand where diffusers has them, packed ones as drop-in layers (layers.py). This is
the one place where a q, k and v that were one matrix become three.

    reference = load_reference_model(store, model, recipe, device, dtype)
    guided = ReferenceGuidance(reference, features, rows, columns, times)        guided(latents, step, guidance)

Left out: speed. Text features and adaLN are computed again in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.models import Branch
from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.tensor_names import diffusers_names, official_shapes
from ideogram_app.model.fill import finished
from ideogram_app.model.loader import open_branches
from ideogram_app.model.transformer.assemble import BranchWeights
from ideogram_app.model.transformer.conditioner import positions
from ideogram_app.model.transformer.layers import linear

TEXT, IMAGE = 3, 2  # diffusers' LLM_TOKEN_INDICATOR and OUTPUT_IMAGE_INDICATOR


@dataclass(frozen=True)
class ReferenceModel:
    """Both transformers as diffusers builds them. engaged: the recipe that was loaded."""

    conditional: nn.Module
    unconditional: nn.Module
    dtype: torch.dtype
    engaged: str

    @property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.conditional, self.unconditional


def load_reference_model(
    store: Store, model_name: str, recipe_name: str, device: torch.device | str, dtype: torch.dtype
) -> ReferenceModel:
    """Fill both transformers of a prepared recipe; errors are those of `open_branches`."""
    first, second = (
        _filled(weights, branch, config, torch.device(device), dtype)
        for branch, weights, config in open_branches(store, model_name, recipe_name)
    )
    return ReferenceModel(first, second, dtype, recipe_name)


class ReferenceGuidance:
    """Guided velocity of both transformers: `guidance x conditional + (1 - guidance) x unconditional`, in float32.

    Args:
        features: (1, n, taps x encoder).
        times: (steps,), 0 is noise and 1 is data.
    """

    def __init__(self, reference: ReferenceModel, features: Tensor, rows: int, columns: int, times: Tensor) -> None:
        self.reference, self.times = reference, times.to(features.device, reference.dtype)
        self.text = features.shape[1]
        no_text = features.new_zeros(1, rows * columns, features.shape[2])
        self.features = torch.cat((features, no_text), 1).to(reference.dtype)
        self.no_features = no_text.to(reference.dtype)
        self.layout = lay_out(self.text, rows, columns, features.device)
        self.image_layout = lay_out(0, rows, columns, features.device)

    def __call__(self, latents: Tensor, step: int, guidance: float) -> Tensor:
        """latents: (1, tokens, 128) float32."""
        image, time = latents.to(self.reference.dtype), self.times[step : step + 1]
        sequence = torch.cat((image.new_zeros(1, self.text, image.shape[2]), image), 1)
        with_text = self._run(self.reference.conditional, sequence, time, self.features, self.layout)[:, self.text :]
        without = self._run(self.reference.unconditional, image, time, self.no_features, self.image_layout)
        return guidance * with_text + (1.0 - guidance) * without

    @staticmethod
    def _run(network: Any, sequence: Tensor, time: Tensor, features: Tensor, layout: dict[str, Tensor]) -> Tensor:
        output: Tensor = network(
            hidden_states=sequence, timestep=time, encoder_hidden_states=features, return_dict=False, **layout
        )[0]
        return output.float()


def lay_out(text_tokens: int, rows: int, columns: int, device: torch.device) -> dict[str, Tensor]:
    """Positions (1, L, 3), segments and roles (1, L) of `[text][image]`, as diffusers' transformer takes them."""
    roles = torch.tensor([TEXT] * text_tokens + [IMAGE] * (rows * columns))[None]
    return {
        "position_ids": positions(text_tokens, rows, columns)[None].to(device),
        "segment_ids": torch.ones_like(roles).to(device),
        "indicator": roles.to(device),
    }


def _filled(
    weights: BranchWeights, branch: Branch, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from diffusers import Ideogram4Transformer2DModel

    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    with init_empty_weights():  # buffers stay real: the rotary frequencies are in no file
        module: nn.Module = Ideogram4Transformer2DModel.from_config(settings)
    linears = {each.name for each in branch.linears()}
    for official in official_shapes(branch.shapes()):
        stem, _, leaf = official.rpartition(".")
        is_matrix = leaf == "weight" and linears.issuperset(diffusers_names(stem))
        for name, value in _apart(weights, stem) if is_matrix else [(stem, weights.tensor(official))]:
            if isinstance(value, Tensor):
                parameter = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False)
                setattr(module.get_submodule(name), leaf, parameter)
            else:  # its bias is next
                module.set_submodule(name, linear(value, None, dtype).to(device))
    module.get_submodule("rotary_emb").to(device)  # computed, never stored
    return finished(module, "A transformer")


def _apart(weights: BranchWeights, official: str) -> Iterator[tuple[str, Tensor | PackedWeight]]:
    """diffusers' Linears of an official one, with the rows that are theirs."""
    names, parts = diffusers_names(official), weights.stored(official)
    if len(parts) < len(names):
        (whole,) = parts
        parts = whole.chunk(len(names))
    return zip(names, parts, strict=True)
