"""From files to modules: both transformers in a recipe's storage, and what stands around them.

A transformer is built by diffusers without memory for its weights (on the meta device), then filled tensor by tensor:
packed Linears are replaced by the layer of their storage (layers.py), all else is assigned in the computing type.
Nothing is read over the network, and only safetensors and GGUF files are read. What is missing, truncated or altered is
an error that names the file; a module that is only half filled never leaves this file.

diffusers' `from_pretrained` reads one storage of these and fills gaps with warnings. Left out: which device things live
on while drawing (residency.py), the kernels of packed layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.architecture import Branch, find_model
from ideogram_app.checkpoints.companions import ENCODER, open_encoder
from ideogram_app.checkpoints.encoder_source import SourceEncoder
from ideogram_app.checkpoints.formats import PackedBranch, PackedWeight, branch_file
from ideogram_app.checkpoints.manifest import verify_sums
from ideogram_app.checkpoints.readers import SourceBranch, read_config, weight_files
from ideogram_app.checkpoints.safetensors_file import SafetensorsFile
from ideogram_app.checkpoints.sources import BRANCHES, find_source, local_folder
from ideogram_app.checkpoints.store import Store
from ideogram_app.errors import CheckpointError
from ideogram_app.model.encoder import encoder_from_file, encoder_from_source
from ideogram_app.model.layers import Fp8Linear, GgufLinear, Int8Linear, RotatedInt8Linear, weight_bytes
from ideogram_app.recipes import find_recipe
from ideogram_app.text_encoder import DENSE, find_encoder_recipe

# Files up to this size are hashed whenever they are loaded (0.07 s with SHA instructions); larger ones are compared by
# size, and by hash when `Store.verify` is asked for.
HASHED_AT_LOAD = 100_000_000


@dataclass(frozen=True)
class Loaded:
    """Both transformers, ready to run.

    Attributes:
        weight_bytes: of both, as they are held.
        engaged: the recipe that was loaded.
    """

    transformer: nn.Module
    unconditional_transformer: nn.Module
    weight_bytes: int
    engaged: str

    @property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.transformer, self.unconditional_transformer

    @property
    def dtype(self) -> torch.dtype:
        """The computing type: that of a weight which no recipe packs."""
        return self.transformer.get_parameter("embed_image_indicator.weight").dtype


@dataclass(frozen=True)
class Parts:
    """What stands around the transformers: objects of transformers and diffusers."""

    tokenizer: Any
    text_encoder: nn.Module
    vae: nn.Module
    scheduler: Any


def load_transformers(
    store: Store, model_name: str, recipe_name: str, device: torch.device | str, dtype: torch.dtype
) -> Loaded:
    """Load both transformers of a prepared recipe.

    Args:
        dtype: of everything that is not packed.

    Raises:
        RequestError: no such model or recipe.
        CheckpointError: not prepared, or damaged; the message names the file.
    """
    model, status = find_model(model_name), store.status(model_name, recipe_name)
    if not status.usable:
        raise CheckpointError(
            f"{find_recipe(recipe_name).title} of {model.title} is {status.state}: {status.path}",
            got=status.detail,
            do=f"Prepare {recipe_name} first",
        )
    recipe = store.effective(model_name, recipe_name)
    if status.bytes < HASHED_AT_LOAD:
        store.verify(model_name, recipe_name)
    modules = []
    for name, branch in zip(BRANCHES, model.branches, strict=True):
        if store.is_included(model_name, recipe_name):
            source: SourceBranch | PackedBranch = SourceBranch(status.path / name, branch)
        else:
            source = PackedBranch(status.path / branch_file(model_name, recipe, name), recipe, branch)
        modules.append(_filled(status.path / name, source, branch, torch.device(device), dtype))
    conditional, unconditional = modules
    return Loaded(conditional, unconditional, weight_bytes(conditional) + weight_bytes(unconditional), recipe_name)


def load_pipeline_parts(
    model_name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    source: Path | None = None,
    store: Store | None = None,
) -> Parts:
    """Load tokenizer, text encoder, VAE and scheduler.

    Args:
        source: a pipeline folder; what ships with the program where None.
        store: whose companions of the model are taken where nothing ships and no folder is named.

    Raises:
        AccessError: the weights do not ship with the program, no folder was named, and none were prepared.
        CheckpointError: a file is missing or damaged; the message names it.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer

    status = store.companions_status(model_name) if store and source is None else None
    if status and status.state == "ready":
        folder = status.path
        encoder = encoder_from_file(*open_encoder(folder, status.recipe), device, dtype)
    else:
        folder = local_folder(model_name, source)
        if folder == find_source(model_name).included:
            verify_sums(folder, (ENCODER, "tokenizer", "vae"))
        encoder = encoder_from_source(SourceEncoder(folder / ENCODER), find_encoder_recipe(DENSE), device, dtype)
    _check_dense(folder / "vae")
    vae = _pretrained(AutoencoderKLFlux2, folder / "vae", use_safetensors=True).to(dtype)
    return Parts(
        tokenizer=_named(AutoTokenizer.from_pretrained, folder / "tokenizer"),
        text_encoder=encoder,
        vae=vae.to(device),
        scheduler=_named(FlowMatchEulerDiscreteScheduler.from_pretrained, folder / "scheduler"),
    )


def _filled(
    folder: Path, source: SourceBranch | PackedBranch, branch: Branch, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """One transformer with every weight in its place."""
    module = _empty(folder)
    for name, tensor in source if isinstance(source, SourceBranch) else source.dense():
        owner, leaf = name.rsplit(".", 1)
        value = tensor.to(device=device, dtype=dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if isinstance(source, PackedBranch):
        for linear in branch.linears():
            if linear.name in source.packed:
                bias = module.get_parameter(f"{linear.name}.bias") if linear.bias else None
                layer = _layer(source.weight(linear.name), (linear.rows, linear.columns), bias, dtype)
                module.set_submodule(linear.name, layer.to(device))
    module.get_submodule("rotary_emb").to(device)  # computed, never stored
    _check_filled(folder, module)
    return module.eval().requires_grad_(False)


def _empty(folder: Path) -> nn.Module:
    """The transformer that a folder's config describes, parameters on the meta device."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from diffusers import Ideogram4Transformer2DModel

    config = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    with init_empty_weights():  # buffers stay real: the rotary frequencies are in no file
        module: nn.Module = Ideogram4Transformer2DModel.from_config(config)
    return module


def _layer(weight: PackedWeight, shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The Linear of a storage around a packed weight."""
    if weight.storage == "gguf":
        return GgufLinear(weight.values, weight.gguf_type, *shape, bias)
    assert weight.scale is not None
    if weight.storage == "fp8":
        return Fp8Linear(weight.values, weight.scale, bias)
    kind = RotatedInt8Linear if weight.rotated else Int8Linear
    return kind(weight.values, weight.scale, bias, dtype)


def _check_filled(folder: Path, module: nn.Module) -> None:
    """Refuse a module with a hole in it."""
    named = [*module.named_parameters(), *module.named_buffers()]
    holes = [name for name, tensor in named if tensor.is_meta]
    if holes:
        raise CheckpointError(f"{folder} left {len(holes)} tensors without values", got=f"first {holes[0]}")
    frequencies = module.get_buffer("rotary_emb.inv_freq")
    if not bool(torch.isfinite(frequencies).all()) or not bool(frequencies.any()):
        raise CheckpointError(f"The rotary frequencies of {folder} were not computed", got=str(frequencies))


def _check_dense(folder: Path) -> None:
    """Refuse weights that are truncated, or that need more than a change of type."""
    for path in weight_files(folder):
        for info in SafetensorsFile(path).infos.values():
            if info.dtype in ("F8_E4M3", "I8", "U8"):
                raise CheckpointError(
                    f"{path} is packed, which this version does not read here",
                    expected="float32, bfloat16 or float16",
                    got=f"{info.name}: {info.dtype}",
                )


def _pretrained(kind: Any, folder: Path, **settings: Any) -> nn.Module:
    """`from_pretrained` that takes no gaps: libraries fill missing tensors with random numbers and a warning."""
    module, report = _named(kind.from_pretrained, folder, output_loading_info=True, **settings)
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        wrong = missing[0] if missing else str(next(iter(report["mismatched_keys"])))
        raise CheckpointError(f"The weights in {folder} do not fill a {kind.__name__}", got=f"nothing for {wrong}")
    filled: nn.Module = module
    return filled.eval().requires_grad_(False)


def _named(load: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """Call a library's loader offline; its errors come out naming the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}")
    try:
        return load(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as problem:
        raise CheckpointError(f"{folder} cannot be loaded", got=f"{type(problem).__name__}: {problem}") from problem
