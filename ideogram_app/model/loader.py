"""From files to modules: both transformers in a recipe's storage.

A transformer is assembled from its tensors in the order in which they are used (assemble.py): nothing is built that is
not filled, and nothing is read that no picture needs. Nothing is read over the network, and only safetensors and GGUF
files are read. What is missing, truncated or altered is an error that names the file.

diffusers' `from_pretrained` reads one storage of these and fills gaps with warnings. Left out: how offloaded blocks get
to their device (offload.py), diffusers' own transformer (stock.py), what stands around both (components.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ideogram_app.catalog.models import Branch, find_model
from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prefetch import prefetched
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.prepared.storage import branch_file
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.transformer import TransformerCheckpoint
from ideogram_app.checkpoints.weight_files import read_config
from ideogram_app.errors import CheckpointError
from ideogram_app.kernels.attention import backends
from ideogram_app.kernels.choice import choose_kernels
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.kernels.compiled import compiled_kernels
from ideogram_app.kernels.contract import Kernels
from ideogram_app.machine.copies import CopyStream
from ideogram_app.machine.hardware import compute_capability
from ideogram_app.machine.meter import empty_cache
from ideogram_app.model.offload.offload import FileSpans, Offload
from ideogram_app.model.offload.packed_block import file_spans
from ideogram_app.model.transformer.assemble import Placement, assemble, blocks_of, in_every_step, linears_of
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
        offload: what brings offloaded blocks.
    """

    conditional: Backbone
    unconditional: Backbone
    weight_bytes: int
    engaged: str
    devices: tuple[torch.device, torch.device]
    arithmetic: str
    kernels: str
    offload: Offload = field(default_factory=Offload)

    @property
    def modules(self) -> tuple[Backbone, Backbone]:
        return self.conditional, self.unconditional

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should while this was loaded, a sentence each."""
        return self.offload.notes

    def rest(self) -> None:
        """Give back the room that weights are decoded in; whoever draws next takes it again."""
        for module in self.modules:
            module.trunk.kernels.rest()

    def close(self) -> None:
        """Give back what is offloaded and the memory that it is copied from. This can draw no more."""
        self.offload.close()


@dataclass(frozen=True)
class Homes:
    """Where both transformers live.

    Attributes:
        devices: which compute, one for each transformer.
        travelling: how many blocks of each are offloaded and come to the device in every step, evenly spread over its
            depth.
        from_disk: whether those are read from the recipe's file at every visit, in place of pinned host memory.
        slots: on each device, which they share.
        copies: to a device; those of its kind where there are none.
    """

    devices: tuple[torch.device, torch.device]
    offloaded: tuple[int, int] = (0, 0)
    from_disk: bool = False
    slots: int = FEWEST_SLOTS
    copies: Mapping[torch.device, CopyStream] = field(default_factory=dict)

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
    homes, backbones = homes if isinstance(homes, Homes) else Homes.on(homes), []
    with Offload(homes.slots, homes.copies) as offload:
        for number, (branch, weights, config) in enumerate(open_branches(store, model_name, recipe_name)):
            hooks = offload.on(homes.devices[number])
            placement = Placement(
                dtype=dtype,
                trunk=hooks.device,
                kernels=_kernels(hooks.device, kernels, compiled),
                arithmetic=arithmetic,
                offloaded=spread(homes.offloaded[number], branch.num_layers),
            )
            spans_of = _spans_of(weights, homes.from_disk)
            with _prefetching(weights, branch, hooks.device) as read:
                blocks = hooks.add_some(blocks_of(read, branch, placement), placement.offloaded, spans_of)
                backbones.append(assemble(read, branch, config, placement, sees_text=number == 0, blocks=blocks))
            backbones[-1].trunk.order = backends(compute_capability(hooks.device))
        held = sum(map(weight_bytes, backbones))
        for device in set(homes.devices):  # segments in which only pieces of merged matrices lay, before slots are made
            empty_cache(device)
        offload.start()
    first, second = backbones
    return Loaded(
        conditional=first,
        unconditional=second,
        weight_bytes=held,
        engaged=recipe_name,
        devices=homes.devices,
        arithmetic=arithmetic or find_recipe(recipe_name).arithmetic,
        kernels=placement.kernels.name,
        offload=offload,
    )


def _kernels(device: torch.device, name: str | None, compiled: bool) -> Kernels:
    """Those of a name, or of the device."""
    found = find_kernels(name or choose_kernels(device, compute_capability(device))[0])
    return compiled_kernels(found, device) if compiled else found


@contextmanager
def _prefetching(
    weights: TransformerCheckpoint | PackedFile, branch: Branch, device: torch.device
) -> Iterator[TransformerCheckpoint | PackedFile]:
    """The same weights, arriving on the device in the order in which `assemble` asks for them.

    What ships with the program is 27 MB, and is read when it is asked for.
    """
    if isinstance(weights, TransformerCheckpoint):
        yield weights
        return
    with prefetched([span for name in in_every_step(branch) for span in weights.spans(name)], device) as reader:
        yield weights.read_with(reader)


def _spans_of(weights: TransformerCheckpoint | PackedFile, from_disk: bool) -> Callable[[int, Block], FileSpans | None]:
    """By number and block, where a file has what is read again at every visit; None where host memory holds it all."""
    if not from_disk or isinstance(weights, TransformerCheckpoint):  # whose file may be of any layout
        return lambda index, block: None
    return lambda index, block: file_spans(weights, block, linears_of(index))


def open_branches(
    store: Store, model_name: str, recipe_name: str
) -> Iterator[tuple[Branch, TransformerCheckpoint | PackedFile, dict[str, Any]]]:
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
            weights: TransformerCheckpoint | PackedFile = TransformerCheckpoint(folder, branch)
        else:
            weights = PackedFile(status.path / branch_file(model_name, recipe, name), recipe, branch)
        yield branch, weights, read_config(folder)
