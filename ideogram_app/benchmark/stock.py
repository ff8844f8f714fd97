"""Stock rows of a benchmark: diffusers' own transformers and denoising loop, on random weights.

    dense      Ideogram4Transformer2DModel as it is
    torchao    Int8DynamicActivationInt8WeightConfig on the blocks' matrices
    gguf       diffusers' GGUFLinear around GGUFParameter, for the layers that published files pack
    fp8        float8 weights with a scale a row, widened at every use: what ports of the published files do
    nf4        bitsandbytes' Linear4bit where it is installed and there is CUDA, else NF4 decoded by quantization/nf4.py

`StockLoop` is the body of the denoising loop in `Ideogram4Pipeline.__call__` and what that sets up before: text padded
to 2048, features for the whole sequence, positions and segments by the pipeline's own `_prepare_ids`, guidance,
scheduler. A test holds it to the pipeline's latents bit by bit. Left out: progress bars, callbacks, LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.benchmark.ours import GUIDANCE, PUBLISHED_PRESET
from ideogram_app.benchmark.rows import Row
from ideogram_app.benchmark.shapes import Workload
from ideogram_app.benchmark.weights import Tiles
from ideogram_app.catalog.models import LATENT_CHANNELS, Branch
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import block_type
from ideogram_app.checkpoints.prepared.storage import packed_layers
from ideogram_app.model.transformer.layers import Fp8Linear, PackedLinear
from ideogram_app.quantization import nf4

MakeLinear = Callable[[int, int, Tensor | None], nn.Module]  # (rows, columns, bias) -> layer


class Nf4Linear(PackedLinear):
    """`weight` uint8 (rows x columns / 2,), `absmax` float32 (blocks,); decoded at every use, as bitsandbytes does."""

    weight: Tensor
    absmax: Tensor
    levels: Tensor

    def __init__(self, packed: Tensor, absmax: Tensor, rows: int, columns: int, bias: Tensor | None) -> None:
        super().__init__(rows, columns, bias)
        self.register_buffer("weight", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("levels", torch.tensor(nf4.NF4_LEVELS, device=packed.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        weight = nf4.decode(self.weight, nf4.Scales(self.absmax), self.levels).to(x.dtype)
        return nn.functional.linear(x, weight.view(self.out_features, self.in_features), self.bias)


class StockLoop:
    """The state of the pipeline's denoising loop between two steps, for the conditional and unconditional transformer.

    `text` and `noise` are (1, n, features) and (1, tokens, 128), float32; `padding` is `max_sequence_length`.
    """

    def __init__(
        self,
        modules: tuple[nn.Module, nn.Module],
        text: Tensor,
        noise: Tensor,
        workload: Workload,
        padding: int,
        steps: int,
        dtype: torch.dtype,
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline
        from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as source

        device = noise.device
        self.transformer, self.unconditional = modules
        self.dtype, self.padding, self.latents = dtype, padding, noise
        layout = Ideogram4Pipeline._prepare_ids([text.shape[1]], workload.rows, workload.columns, padding, device)
        names = ("position_ids", "segment_ids", "indicator")
        self.layout = dict(zip(names, layout, strict=True))
        self.image_layout = {name: part[:, padding:] for name, part in self.layout.items()}
        features = text.new_zeros(1, padding + workload.image_tokens, text.shape[2])
        features[:, padding - text.shape[1] : padding] = text
        self.features = features.to(dtype)
        self.no_features = features.new_zeros(1, workload.image_tokens, text.shape[2]).to(dtype)
        self.text_z_padding = torch.zeros(1, padding, LATENT_CHANNELS, device=device)
        self.guidance = torch.full((steps,), GUIDANCE, device=device)
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()
        mean = source._resolution_aware_mu(workload.height, workload.width, PUBLISHED_PRESET.mu)
        sigmas = source._logit_normal_sigmas(steps, mean, std=PUBLISHED_PRESET.std, device=device)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        self.index = 0

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One step: the latents after it, (1, tokens, 128) float32. One that was broken off changed nothing."""
        time, weight = self.scheduler.timesteps[self.index], self.guidance[self.index]
        t_model = 1.0 - (time.float() / self.scheduler.config.num_train_timesteps)
        t_model = t_model.expand(1).to(self.dtype)
        sequence = torch.cat([self.text_z_padding, self.latents], dim=1).to(self.dtype)
        with_text = self._run(self.transformer, sequence, t_model, self.features, self.layout)
        velocity = with_text[:, self.padding :].to(torch.float32)
        image = self.latents.to(self.dtype)
        without = self._run(self.unconditional, image, t_model, self.no_features, self.image_layout).to(torch.float32)
        guided = weight * velocity + (1.0 - weight) * without
        self.latents = self.scheduler.step(-guided, time, self.latents, return_dict=False)[0]
        self.index += 1
        return self.latents

    @staticmethod
    def _run(network: Any, sequence: Tensor, time: Tensor, features: Tensor, layout: dict[str, Tensor]) -> Tensor:
        inputs = {"hidden_states": sequence, "timestep": time, "encoder_hidden_states": features, **layout}
        output: Tensor = network(**inputs, attention_kwargs=None, return_dict=False)[0]
        return output


def build_stock(row: Row, workload: Workload, tiles: Tiles, steps: int) -> tuple[Callable[[], Tensor], str]:
    """Both transformers of a row of stock, set up for so many steps: as `build_ours`."""
    make, note = _linears(row, tiles)
    first, second = (_transformer(branch, row, tiles, make) for branch in workload.model.branches)
    padding = workload.text_tokens if row.trimmed else workload.padding
    text = tiles.dense((workload.text_tokens, workload.model.conditional.llm_features_dim))[None].float()
    noise = torch.randn(1, workload.image_tokens, LATENT_CHANNELS, generator=torch.Generator().manual_seed(0))
    return StockLoop((first, second), text, noise.to(tiles.device), workload, padding, steps, tiles.dtype), note


def load_packages(row: Row) -> None:
    """Import what a row of stock needs, so that neither its time nor its memory includes that."""
    for package in row.needs:
        import_module(package)
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel  # noqa: F401 - diffusers imports when asked


def _transformer(branch: Branch, row: Row, tiles: Tiles, make: MakeLinear | None) -> nn.Module:
    """diffusers' transformer on the meta device, filled block by block; packed Linears are replaced by `make`'s."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from diffusers import Ideogram4Transformer2DModel

    with init_empty_weights():  # buffers stay real: the rotary frequencies are computed
        module: Any = Ideogram4Transformer2DModel.from_config(branch.config())
    packed = packed_layers(row.recipe, branch)
    replaced = packed if make is not None else set()
    for name, shape in branch.shapes().items():
        owner, leaf = name.rsplit(".", 1)
        if leaf != "weight" or owner not in replaced:
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tiles.dense(shape, name), requires_grad=False))
    for linear in branch.linears():
        if make is not None and linear.name in replaced:
            bias = module.get_parameter(f"{linear.name}.bias").data if linear.bias else None
            module.set_submodule(linear.name, make(linear.rows, linear.columns, bias))
        elif row.kind == "torchao" and linear.name in packed:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            # as diffusers' TorchAoConfig does it to a loaded model
            quantize_(module.get_submodule(linear.name), Int8DynamicActivationInt8WeightConfig())
    module.rotary_emb.to(tiles.device)
    module.eval().requires_grad_(False)
    if row.compiled:
        module.compile_repeated_blocks(fullgraph=True, dynamic=False)  # two lengths, each compiled for itself
    return module


def _linears(row: Row, tiles: Tiles) -> tuple[MakeLinear | None, str]:
    """What stands in place of packed Linears, None where they stay; and what a reader has to know of the row."""
    if row.kind == "gguf":
        linear = partial(_gguf_linear, row.recipe, tiles)
        return linear, "GGUFLinear with compute_dtype set; its default, float32, is slower."
    if row.kind == "fp8":
        return partial(_fp8_linear, tiles), ""
    if row.kind == "nf4":
        if tiles.device.type == "cuda" and find_spec("bitsandbytes"):
            return partial(_bitsandbytes_linear, tiles), "bitsandbytes' Linear4bit."
        where = "bitsandbytes is not installed" if tiles.device.type == "cuda" else "bitsandbytes wants CUDA"
        return partial(_nf4_linear, tiles), f"Decoded in plain torch: {where}."
    return None, ""


def _gguf_linear(recipe: Recipe, tiles: Tiles, rows: int, columns: int, bias: Tensor | None) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = block_type(recipe, "", columns)
    layer: nn.Module = GGUFLinear(columns, rows, bias is not None, compute_dtype=tiles.dtype, device="meta")
    packed = tiles.packed("gguf", rows, columns, kind).values
    return _filled(layer, GGUFParameter(packed, quant_type=gguf.GGMLQuantizationType[kind]), bias)


def _bitsandbytes_linear(tiles: Tiles, rows: int, columns: int, bias: Tensor | None) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    options = {"compute_dtype": tiles.dtype, "quant_type": "nf4", "device": "meta"}
    layer: nn.Module = Linear4bit(columns, rows, bias is not None, **options)
    weight = Params4bit(tiles.dense((rows, columns)), requires_grad=False, quant_type="nf4")
    return _filled(layer, weight.to(tiles.device), bias)  # the move packs it


def _filled(layer: Any, weight: Any, bias: Tensor | None) -> nn.Module:
    layer.weight, layer.bias = weight, None if bias is None else nn.Parameter(bias, requires_grad=False)
    filled: nn.Module = layer
    return filled


def _fp8_linear(tiles: Tiles, rows: int, columns: int, bias: Tensor | None) -> nn.Module:
    weight = tiles.packed("fp8", rows, columns)
    assert weight.scale is not None
    return Fp8Linear(weight.values, weight.scale, bias)


def _nf4_linear(tiles: Tiles, rows: int, columns: int, bias: Tensor | None) -> nn.Module:
    return Nf4Linear(*tiles.nf4(rows, columns), rows, columns, bias)
