"""From files to modules: both transformers in a recipe's storage, and what stands around them.

A transformer is assembled from its tensors in the order in which they are used (assemble.py): nothing is built that is
not filled, and nothing is read that no picture needs. Nothing is read over the network, and only safetensors and GGUF
files are read. What is missing, truncated or altered is an error that names the file.

diffusers' `from_pretrained` reads one storage of these and fills gaps with warnings. Left out: which device things live
on while drawing (residency.py), diffusers' own transformer (stock.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ideogram_app.architecture import Branch, find_model
from ideogram_app.checkpoints.companions import ENCODER, open_encoder
from ideogram_app.checkpoints.encoder_source import SourceEncoder
from ideogram_app.checkpoints.formats import PackedBranch, branch_file
from ideogram_app.checkpoints.manifest import verify_sums
from ideogram_app.checkpoints.readers import SourceBranch, read_config, weight_files
from ideogram_app.checkpoints.safetensors_file import SafetensorsFile
from ideogram_app.checkpoints.sources import BRANCHES, find_source, local_folder
from ideogram_app.checkpoints.store import Store
from ideogram_app.errors import CheckpointError
from ideogram_app.hardware import compute_capability
from ideogram_app.kernels.attention import backends
from ideogram_app.kernels.choice import choose
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.kernels.compiled import compiled_kernels
from ideogram_app.model.assemble import Placement, assemble
from ideogram_app.model.backbone import Backbone
from ideogram_app.model.encoder import encoder_from_file, encoder_from_source
from ideogram_app.model.layers import weight_bytes
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
        devices: which compute, one for each transformer.
        arithmetic: bits of weights and activations in a product.
        kernels: what ran between the products, for reports.
    """

    conditional: Backbone
    unconditional: Backbone
    weight_bytes: int
    engaged: str
    devices: tuple[torch.device, torch.device]
    arithmetic: str
    kernels: str

    @property
    def modules(self) -> tuple[Backbone, Backbone]:
        return self.conditional, self.unconditional


@dataclass(frozen=True)
class Parts:
    """What stands around the transformers: objects of transformers and diffusers."""

    tokenizer: Any
    text_encoder: nn.Module
    vae: nn.Module
    scheduler: Any


def load_transformers(
    store: Store,
    model_name: str,
    recipe_name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    second: torch.device | str | None = None,
    home: torch.device | str | None = None,
    kernels: str | None = None,
    arithmetic: str = "",
    compiled: bool = False,
) -> Loaded:
    """Load both transformers of a prepared recipe.

    Args:
        device: which computes; `second`: which computes the unconditional one, where that is another.
        dtype: of everything that is not packed.
        home: where the blocks rest; the device where None.
        kernels: by name (`kernels.choice`); None picks those of the device.
        arithmetic: of Q4_K, see `layers.linear`.
        compiled: whether what runs between the products is compiled first.

    Raises:
        RequestError: no such model, recipe or kernels.
        CheckpointError: not prepared, or damaged; the message names the file.
        DeviceError: nothing here can compile.
    """
    devices = torch.device(device), torch.device(second or device)
    branches = zip(open_branches(store, model_name, recipe_name), devices, strict=True)
    modules, chosen = [], ""
    for number, ((branch, weights, config), own) in enumerate(branches):
        capability = compute_capability(own)
        chosen = kernels or choose(own, capability)[0]
        found = compiled_kernels(find_kernels(chosen), own) if compiled else find_kernels(chosen)
        placement = Placement(dtype, torch.device(home or own), torch.device("cpu"), found, arithmetic)
        backbone = assemble(weights, branch, config, placement, sees_text=number == 0)
        backbone.trunk.order = backends(capability)
        modules.append(backbone)
    first, held = modules[0], sum(map(weight_bytes, modules))
    used = arithmetic or find_recipe(recipe_name).arithmetic
    return Loaded(first, modules[1], held, recipe_name, devices, used, first.trunk.kernels.name)


def open_branches(
    store: Store, model_name: str, recipe_name: str
) -> Iterator[tuple[Branch, SourceBranch | PackedBranch, dict[str, Any]]]:
    """Shape, weights and config.json of both transformers, in order, each opened when it is asked for.

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
    for name, branch in zip(BRANCHES, model.branches, strict=True):
        folder = status.path / name
        if store.is_included(model_name, recipe_name):
            weights: SourceBranch | PackedBranch = SourceBranch(folder, branch)
        else:
            weights = PackedBranch(status.path / branch_file(model_name, recipe, name), recipe, branch)
        yield branch, weights, read_config(folder)


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
