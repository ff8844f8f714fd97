"""From files to modules: both transformers in a recipe's storage.

A transformer is assembled from its tensors in the order in which they are used (assemble.py): nothing is built that is
not filled, and nothing is read that no picture needs. Nothing is read over the network, and only safetensors and GGUF
files are read. What is missing, truncated or altered is an error that names the file.

diffusers' `from_pretrained` reads one storage of these and fills gaps with warnings. Left out: how blocks that travel
get to their device (offload.py), diffusers' own transformer (stock.py), what stands around both (components.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ideogram_app.catalog.models import Branch, find_model
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.checkpoints.prepared.storage import PackedBranch, branch_file
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.local import BRANCHES
from ideogram_app.checkpoints.published.transformer import SourceBranch, read_config
from ideogram_app.errors import CheckpointError, DeviceError
from ideogram_app.kernels.attention import backends
from ideogram_app.kernels.choice import choose_kernels
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.kernels.compiled import compiled_kernels
from ideogram_app.kernels.contract import Kernels
from ideogram_app.machine.hardware import compute_capability
from ideogram_app.machine.meter import give_back
from ideogram_app.model.offload.carrier import Carrier
from ideogram_app.model.offload.located import located
from ideogram_app.model.offload.offload import Residence, Residences
from ideogram_app.model.transformer.assemble import Placement, assemble, in_every_step, linears_of
from ideogram_app.model.transformer.backbone import Backbone, Block
from ideogram_app.model.transformer.layers import weight_bytes
from ideogram_app.planning.streaming import FEWEST_SLOTS, spread

# Files up to this size are hashed whenever they are loaded (0.07 s with SHA instructions); larger ones are compared by
# size, and by hash when `Store.verify` is asked for.
HASHED_AT_LOAD = 100_000_000


@dataclass(frozen=True)
class Loaded:
    """Both transformers, ready to run.

    Attributes:
        weight_bytes: of both, as they are held, wherever that is.
        engaged: the recipe that was loaded.
        devices: which compute, one for each transformer.
        arithmetic: bits of weights and activations in a product.
        kernels: what ran between the products, for reports.
        residences: what brings blocks that travel.
    """

    conditional: Backbone
    unconditional: Backbone
    weight_bytes: int
    engaged: str
    devices: tuple[torch.device, torch.device]
    arithmetic: str
    kernels: str
    residences: Residences = field(default_factory=Residences)

    @property
    def modules(self) -> tuple[Backbone, Backbone]:
        return self.conditional, self.unconditional

    def rest(self) -> None:
        """Give back the room that weights are decoded in; whoever draws next takes it again."""
        for module in self.modules:
            module.trunk.kernels.rest()

    def close(self) -> None:
        """Give back what travels, and the memory that it travels from. Nothing can be drawn with this any more."""
        self.residences.close()


@dataclass(frozen=True)
class Homes:
    """Where both transformers live.

    Attributes:
        devices: which compute, one for each transformer.
        travelling: how many blocks of each come to the device in every step, evenly spread over its depth.
        from_disk: whether those are read from the recipe's file at every visit, in place of locked host memory.
        slots: places on each device that they share.
        carriers: what copies, by device; that of its kind where there is none.
    """

    devices: tuple[torch.device, torch.device]
    offloaded: tuple[int, int] = (0, 0)
    from_disk: bool = False
    slots: int = FEWEST_SLOTS
    carriers: Mapping[torch.device, Carrier] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device | str) -> Homes:
        """Both resident on one device."""
        return cls((torch.device(device), torch.device(device)))


def load_transformers(
    store: Store,
    model_name: str,
    recipe_name: str,
    homes: Homes | torch.device | str,
    dtype: torch.dtype,
    *,
    kernels: str | None = None,
    arithmetic: str = "",
    compiled: bool = False,
) -> Loaded:
    """Load both transformers of a prepared recipe.

    Args:
        homes: where they live; a device stands for both resident on it.
        dtype: of everything that is not packed.
        kernels: by name (`kernels.choice`); None picks those of the device.
        arithmetic: of Q4_K, see `layers.linear`.
        compiled: whether what runs between the products is compiled first.

    Raises:
        RequestError: no such model, recipe or kernels.
        CheckpointError: not prepared, or damaged; the message names the file.
        DeviceError: nothing here can compile.
    """
    homes = homes if isinstance(homes, Homes) else Homes.on(homes)
    residences, modules = Residences(homes.slots, homes.carriers), []
    try:
        for number, (branch, weights, config) in enumerate(open_branches(store, model_name, recipe_name)):
            found = _kernels(homes.devices[number], kernels, compiled)
            away = spread(homes.offloaded[number], branch.num_layers)
            residence = residences.on(homes.devices[number])
            placement = Placement(
                dtype,
                residence.device,
                torch.device("cpu"),
                found,
                arithmetic,
                away,
                partial(_let_travel, residence, weights if homes.from_disk else None),
            )
            with _read_ahead(weights, branch, placement):
                modules.append(assemble(weights, branch, config, placement, sees_text=number == 0))
            modules[-1].trunk.order = backends(compute_capability(residence.device))
        held = sum(map(weight_bytes, modules))
        for device in set(homes.devices):  # pieces that were merged lie in memory which only their own stream may use
            give_back(device)
        residences.start()
    except BaseException:
        with suppress(DeviceError, RuntimeError):  # what happened first is what is told
            residences.close()
        raise
    used = arithmetic or find_recipe(recipe_name).arithmetic
    first, second = modules
    return Loaded(first, second, held, recipe_name, homes.devices, used, found.name, residences)


def _kernels(device: torch.device, name: str | None, compiled: bool) -> Kernels:
    """Those of a name, or of the device."""
    found = find_kernels(name or choose_kernels(device, compute_capability(device))[0])
    return compiled_kernels(found, device) if compiled else found


def _read_ahead(
    weights: SourceBranch | PackedBranch, branch: Branch, placement: Placement
) -> AbstractContextManager[None]:
    """Weights arrive on the device in the order in which `assemble` asks for them.

    What ships with the program is 27 MB, and is read when it is asked for.
    """
    if isinstance(weights, PackedBranch):
        return weights.ahead(in_every_step(branch), placement.trunk)
    return nullcontext()


def _let_travel(residence: Residence, weights: SourceBranch | PackedBranch | None, index: int, block: Block) -> None:
    """A block that was built travels from now on; from its file, where that is one of the program's."""
    residence.add(block, located(weights, block, linears_of(index)) if isinstance(weights, PackedBranch) else None)


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
