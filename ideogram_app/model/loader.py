"""From files to modules: both transformers in a recipe's storage.

A transformer is assembled from its tensors in the order in which they are used (assemble.py): nothing is built that is
not filled, and nothing is read that no picture needs. Nothing is read over the network, and only safetensors and GGUF
files are read. What is missing, truncated or altered is an error that names the file.

diffusers' `from_pretrained` reads one storage of these and fills gaps with warnings. Left out: which device things live
on while drawing (residency.py), diffusers' own transformer (stock.py), what stands around the transformers (parts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ideogram_app.architecture import Branch, find_model
from ideogram_app.checkpoints.formats import PackedBranch, branch_file
from ideogram_app.checkpoints.readers import SourceBranch, read_config
from ideogram_app.checkpoints.sources import BRANCHES
from ideogram_app.checkpoints.store import Store
from ideogram_app.errors import CheckpointError
from ideogram_app.hardware import compute_capability
from ideogram_app.kernels.attention import backends
from ideogram_app.kernels.choice import choose
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.kernels.compiled import compiled_kernels
from ideogram_app.model.assemble import Placement, assemble, in_every_step
from ideogram_app.model.backbone import Backbone
from ideogram_app.model.layers import weight_bytes
from ideogram_app.recipes import find_recipe

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
        order = in_every_step(branch)  # what ships with the program is 27 MB, and is read when it is asked for
        with weights.ahead(order, placement.trunk) if isinstance(weights, PackedBranch) else nullcontext():
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
