"""Loading both transformers of a recipe from prepared files to modules, resident or offloaded.

A transformer is assembled from its tensors in the order in which they are used (assemble.py): nothing is built that is
not filled, and nothing is read that no picture needs. Nothing is read over the network, and only safetensors and GGUF
files are read. What is missing, truncated or altered is an error that names the file.

diffusers' `from_pretrained` reads one storage of these and fills gaps with warnings. Left out: how offloaded blocks get
to their device (offload.py), diffusers' own transformer (reference_model.py), the other components (components.py).
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
from ideogram_app.kernels.attention import Attention
from ideogram_app.kernels.choice import choose_kernels, compiled_kernels, kernels_note
from ideogram_app.kernels.choice import kernels as find_kernels
from ideogram_app.machine.copies import BlockingCopyStream, CopyStream
from ideogram_app.machine.hardware import compute_capability
from ideogram_app.machine.meter import empty_cache
from ideogram_app.model.offload.offload import FileSpans, Offload
from ideogram_app.model.offload.packed_block import file_spans
from ideogram_app.model.self_check import Found, checked, uses_of
from ideogram_app.model.transformer.assemble import Placement, assemble, blocks_of, in_every_step, linears_of
from ideogram_app.model.transformer.backbone import Backbone, Block
from ideogram_app.model.transformer.layers import weight_bytes
from ideogram_app.planning.streaming import FEWEST_SLOTS, spread

# Files up to this size are hashed whenever they are loaded (0.07 s with SHA instructions); larger ones are compared by
# size, and by hash when `Store.verify` is asked for.
HASHED_AT_LOAD = 100_000_000


@dataclass(frozen=True)
class Loaded:
    """Both transformers, ready to run."""

    conditional: Backbone
    unconditional: Backbone
    weight_bytes: int  # of both, as they are held, wherever that is
    engaged: str  # the recipe that was loaded
    devices: tuple[torch.device, torch.device]  # which compute, one for each transformer
    arithmetic: str  # bits of weights and activations in a product
    kernels: str  # their name, for reports
    offload: Offload = field(default_factory=Offload)
    kernels_note: str = ""  # why they are slower than this device's could be, if they are

    @property
    def modules(self) -> tuple[Backbone, Backbone]:
        return self.conditional, self.unconditional

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as it should while this was loaded, a sentence each."""
        attention = (note for module in self.modules for note in module.trunk.attention.notes)
        return tuple(dict.fromkeys((*self.offload.notes, *filter(None, (self.kernels_note,)), *attention)))

    @property
    def attention(self) -> str:
        """What attention of the last picture ran on, for reports; "" before the first step."""
        return ", ".join(dict.fromkeys(name for module in self.modules if (name := module.trunk.attention.engaged)))

    def release_scratch(self) -> None:
        """Free the scratch that weights are decoded in; the next step allocates it again."""
        for module in self.modules:
            module.trunk.kernels.release_scratch()

    def close(self) -> None:
        """Free what is offloaded and the pinned memory that it is copied from. This can draw no more."""
        self.offload.close()


@dataclass(frozen=True)
class Homes:
    """Device assignment and offload of both transformers. Without `copies` to a device, those of its kind are taken."""

    devices: tuple[torch.device, torch.device]  # which compute, one for each transformer
    offloaded: tuple[int, int] = (0, 0)  # blocks of each that are copied in every step, evenly spread over its depth
    from_disk: bool = False  # whether those are read from the recipe's file every time, in place of pinned host memory
    slots: int = FEWEST_SLOTS  # on each device, which they share
    copies: Mapping[torch.device, CopyStream] = field(default_factory=dict, compare=False)

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
        homes: a device stands for both resident on it.
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
    backbones: list[Backbone] = []
    with Offload(homes.slots, homes.copies) as offload:
        for number, (branch, weights, config) in enumerate(open_branches(store, model_name, recipe_name)):
            hooks = offload.on(homes.devices[number])
            device, offloaded = hooks.device, spread(homes.offloaded[number], branch.num_layers)
            chosen, why = (kernels, "") if kernels else choose_kernels(device, compute_capability(device))
            if kernels:
                found = Found(find_kernels(kernels))
            else:
                uses = uses_of(store.effective(model_name, recipe_name), model_name, arithmetic)
                found = checked(chosen, device, dtype, store.root, uses)
            if found.blocking and not homes.copies:
                hooks.copies = BlockingCopyStream(device)
                hooks.copies.notes.append(f"Copies to the device wait for each other: {found.blocking}.")
            engaged = compiled_kernels(found.kernels, device) if compiled else found.kernels
            placement = Placement(dtype, device, kernels=engaged, arithmetic=arithmetic, offloaded=offloaded)
            with _prefetching(weights, branch, device) as read:
                made = blocks_of(read, branch, placement)
                blocks = hooks.add_some(made, offloaded, _spans_of(weights, homes.from_disk))
                backbone = assemble(read, branch, config, placement, sees_text=number == 0, blocks=blocks)
            backbone.trunk.attention = Attention(excluded=found.excluded)
            backbones.append(backbone)
        weights_held = sum(map(weight_bytes, backbones))  # before slots are made, which are no weights
        for device in set(homes.devices):  # segments in which only pieces of merged matrices lay: room for slots
            empty_cache(device)
        offload.start()
    conditional, unconditional = backbones
    return Loaded(
        conditional=conditional,
        unconditional=unconditional,
        weight_bytes=weights_held,
        engaged=recipe_name,
        devices=homes.devices,
        arithmetic=arithmetic or find_recipe(recipe_name).arithmetic,
        kernels=engaged.name,
        offload=offload,
        kernels_note=kernels_note(device, chosen, why),
    )


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
    """By number and block, where a file has what is read in every step; None where host memory holds it all."""
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
