"""Device memory of a picture, counted by running the real code on fake tensors (`FakeTensorMode`).

    counted = count_picture(case)            one picture from loading to pixels, phase by phase
    count_decode(...), count_encode(...)     what stands around the transformers, alone

Modules, kernels' wrappers, the denoising loop and the decoder are the program's own, at the published shapes and on a
CUDA device that need not exist: fake tensors have shapes, types and lifetimes, which is all that memory asks for.
`pretended` keeps from it the calls that would reach a driver: launches of Triton kernels, the query for a card's
capability, and making a device the current one. Which attention kernel runs is a rule read in PyTorch's source
(`ledger.backend_on`).

Left out: numbers, time, and what is no tensor (planning/footprint.py's constants); cuDNN's workspace is an assumption
(`activations.CONVOLVES_IN_COPIES`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counting.allocator import fits, reserved_bytes
from benchmarks.counting.ledger import Capability, Ledger, Unguarded, asked_on, attention_on
from ideogram_app.benchmark.ours import GUIDANCE, SCHEDULE_SHIFT, evenly
from ideogram_app.benchmark.shapes import Workload
from ideogram_app.catalog.models import LATENT_CHANNELS, PIXELS_PER_TOKEN, Branch
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import PUBLISHED_ENCODER, TextEncoder, block_type
from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.checkpoints.prepared.storage import held_as, held_packed, held_shapes, packed_layers
from ideogram_app.checkpoints.span import Reader, Span
from ideogram_app.generation import sampler
from ideogram_app.generation.guidance import GuidedModel
from ideogram_app.generation.sampler import decode, denoise, preview, schedule, times
from ideogram_app.kernels import attention
from ideogram_app.kernels.choice import choose_kernels, new_kernels
from ideogram_app.machine.capabilities import type_of_decoder
from ideogram_app.machine.copies import BlockingCopyStream
from ideogram_app.machine.meter import empty_cache
from ideogram_app.model.loader import Loaded
from ideogram_app.model.offload.offload import COMPUTE_DTYPES, Offload
from ideogram_app.model.text_encoder.encoder import CaptionEncoder, encoder_from_file
from ideogram_app.model.text_encoder.features import features
from ideogram_app.model.text_encoder.on_device import encoder_on_device
from ideogram_app.model.transformer import layers
from ideogram_app.model.transformer.assemble import Placement, assemble, blocks_of
from ideogram_app.model.vae import Autoencoder, autoencoder
from ideogram_app.planning.streaming import FEWEST_SLOTS, spread
from ideogram_app.quantization import k_quants, rotation

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
AMPERE_CAPABILITY: Capability = (8, 6)  # the cards that matter most


@dataclass(frozen=True)
class Case:
    """What is drawn: a workload (shapes.py), with which recipe, on which card.

    Attributes:
        workload: `padding` and `shape` play no part.
        arithmetic: of Q4_K, as for `Placement`.
        tile: side of the decoder's tiles in pixels; None decodes at once.
        decodes: whether latents become pictures, a small one between two steps and the last one.
        flash: whether PyTorch has FlashAttention: not on Windows.
        offloaded: how many blocks of each transformer are copied to the device in every step, through so many `slots`.
        kernels: by name; "" takes those of a card of this capability on which Triton works.
    """

    workload: Workload
    recipe: Recipe
    arithmetic: str = ""
    capability: Capability = AMPERE_CAPABILITY
    tile: int | None = None
    decodes: bool = True
    flash: bool = True
    offloaded: tuple[int, int] = (0, 0)
    slots: int = FEWEST_SLOTS
    kernels: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return COMPUTE_DTYPES[self.workload.dtype]


@dataclass(frozen=True)
class Counted:
    """Bytes on the device.

    Attributes:
        kept: weights of both transformers, between steps.
        phases: the most that is there in load, prepare, step, preview and decode, everything included.
        prepared: what no step changes (`conditioner.Prepared` of both branches), features, noise and latents.
        events: of the allocator (allocator.py).
    """

    kept: int
    prepared: int
    phases: dict[str, int]
    events: tuple[tuple[int, int], ...]

    @property
    def peak(self) -> int:
        """Of tensors, over all phases."""
        return max(self.phases.values())

    @property
    def reserved(self) -> int:
        """What PyTorch's allocator takes from the driver where there is plenty."""
        return reserved_bytes(self.events)

    @property
    def least(self) -> int:
        """The smallest device on which the allocator finds room for all of it, to 8 MB."""
        low, high = self.peak, self.reserved
        while high - low > 2**23:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(self.events, middle) else (middle, high)
        return high


@contextmanager
def pretended(ledger: Ledger, capability: Capability = AMPERE_CAPABILITY, flash: bool = True) -> Iterator[None]:
    """A CUDA device of a capability, with FlashAttention or without, that computes nothing: tensors are fake."""
    from triton.runtime.jit import KernelInterface

    with (
        _no_rotation_kept(),
        patch.object(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **options: None),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
        patch.object(torch.cuda, "empty_cache", lambda: ledger.events.append((-1, DEVICE, 0))),
        patch.object(attention, "ask", asked_on(capability, flash)),
        patch.object(sampler, "is_finite", lambda values: True),  # there are no numbers to look at
        patch.object(torch.utils, "swap_tensors", _become),
        patch.object(layers, "row_scales", _no_scales),
        warnings.catch_warnings(),
        FakeTensorMode(),
        ledger,
        Unguarded(),
    ):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def _no_rotation_kept() -> Iterator[None]:
    """Matrices that were cached outside are no fake ones, and those made inside are of no use later."""
    rotation._halves.cache_clear()
    try:
        yield
    finally:
        rotation._halves.cache_clear()


def _become(old: Any, new: Any) -> None:
    """What `Module.to` does to a parameter, if fake: torch would swap both, and refuses where a mode looks on."""
    old.data, old.fake_device = new.data, new.fake_device


def _no_scales(packed: Tensor, rotated: bool) -> Tensor:
    """Room for what `layers.row_scales` finds, without its thousands of small operations: 40 MB at most, in loading."""
    return torch.empty(packed.shape[0], dtype=torch.float32, device=packed.device)


class FakeBranch:
    """A branch of a recipe without numbers: a `model.assemble.BranchWeights` whose tensors lie in host memory."""

    def __init__(self, branch: Branch, recipe: Recipe, dtype: torch.dtype) -> None:
        self._recipe, self._dtype = recipe, dtype
        self._held, self._packed = held_shapes(recipe, branch), held_packed(recipe, branch)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that is not packed; `rows` is never asked for."""
        assert rows is None
        return torch.empty(self._held[name], dtype=self._dtype)

    def stored(self, linear: str) -> tuple[Tensor | PackedWeight, ...]:
        """The weight of a Linear as it rests."""
        return tuple(map(self._one, held_as(self._recipe, linear)))

    def _one(self, held: str) -> Tensor | PackedWeight:
        if held not in self._packed:
            return self.tensor(f"{held}.weight")
        return fake_packed(self._recipe, held, *self._held[f"{held}.weight"])


def fake_packed(recipe: Recipe, name: str, rows: int, columns: int) -> PackedWeight:
    """A matrix as it rests in a recipe, without numbers."""
    if recipe.storage == "gguf":
        kind = block_type(recipe, name, columns)
        values = torch.empty(rows, k_quants.packed_columns(columns, kind), dtype=torch.uint8)
        return PackedWeight("gguf", values, gguf_type=kind)
    dtype = torch.float8_e4m3fn if recipe.storage == "fp8" else torch.int8
    scale = torch.empty(rows, dtype=torch.float32)
    return PackedWeight(
        recipe.storage, torch.empty(rows, columns, dtype=dtype), scale, rotated=recipe.storage == "convrot"
    )


def count_picture(case: Case) -> Counted:
    """Load, prepare, two steps, a preview, decode: both transformers stay on the device throughout."""
    return next(count_pictures(case, (case.workload,)))


def count_pictures(case: Case, workloads: Sequence[Workload]) -> Iterator[Counted]:
    """One picture after another with the transformers that `case.workload` names, loaded once.

    Args:
        workloads: sizes and texts; of the same model and type.
    """
    decoder = getattr(torch, type_of_decoder(case.workload.dtype, case.capability))
    ledger, vae = Ledger(attention_on(case.capability, case.flash)), _autoencoder(decoder, case.tile)
    with pretended(ledger, case.capability, case.flash), torch.inference_mode():
        with ledger.phase("load"):
            loaded = _loaded(case)
        kept = ledger.live[DEVICE]
        for workload in workloads:
            prepared = _drawn(replace(case, workload=workload), loaded, vae, ledger)
            yield _counted(ledger, kept, prepared)


def _drawn(case: Case, loaded: Loaded, vae: Autoencoder, ledger: Ledger) -> int:
    """Draw a picture, each phase in the ledger; returns what was beside the weights between two steps."""
    workload, before = case.workload, ledger.live[DEVICE]
    sigmas = schedule(evenly(workload.steps), workload.width, workload.height, SCHEDULE_SHIFT)
    _on_device(vae)
    read = torch.empty(1, workload.text_tokens, workload.model.conditional.llm_features_dim)  # on the host
    noise = torch.empty(1, workload.image_tokens, LATENT_CHANNELS, device=DEVICE)
    with ledger.phase("prepare"):
        velocity = GuidedModel(loaded, read, workload.rows, workload.columns, times(sigmas))
    prepared = ledger.live[DEVICE] - before
    levels: Any = [torch.tensor(1.0 - index / workload.steps) for index in range(3)]  # fake tensors know constants
    steps = denoise(velocity, noise, levels, (GUIDANCE,) * 2)
    next(steps)
    with ledger.phase("step"):  # the second, when latents of the first are there
        step = next(steps)
    if case.decodes:
        with ledger.phase("preview"):
            _pictured(preview, vae, step.clean, workload.rows, workload.columns)
        latents = step.latents.cpu()
        del velocity, steps, step  # as `draw.sample` lets go of them
        loaded.release_scratch()
        empty_cache(DEVICE)
        with ledger.phase("decode"):
            _pictured(decode, vae, latents, workload.rows, workload.columns)
    return prepared


def _autoencoder(dtype: torch.dtype, tile: int | None) -> Autoencoder:
    """The published decoder as shapes; for the outside of `pretended`."""
    vae = autoencoder({}).to(dtype).eval()
    vae.enable_tiling(tile or 0)
    return vae


def _on_device(module: nn.Module) -> None:
    """Give a module of shapes fake memory on the device."""

    def made(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(made(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = made(buffer)


def _loaded(case: Case) -> Loaded:
    """Both transformers of a case on the device, as `model.loader` loads them.

    Blocks are offloaded as to any device, but without streams: a copy is over when it returns, and takes no memory.
    """
    chosen = case.kernels or choose_kernels(DEVICE, case.capability, triton="", int_mm="")[0]
    kernels = new_kernels(chosen)  # with scratch that no other counting has seen
    offload = Offload(case.slots, {DEVICE: BlockingCopyStream(DEVICE)})
    hooks, backbones = offload.on(DEVICE), []
    for number, branch in enumerate(case.workload.model.branches):
        weights = FakeBranch(branch, case.recipe, case.dtype)
        away = spread(case.offloaded[number], branch.num_layers)
        placement = Placement(case.dtype, DEVICE, kernels=kernels, arithmetic=case.arithmetic, offloaded=away)
        blocks = hooks.add_some(blocks_of(weights, branch, placement), away)
        backbone = assemble(weights, branch, branch.config(), placement, sees_text=number == 0, blocks=blocks)
        backbones.append(backbone)
    first, second = backbones
    offload.start()
    names = case.recipe.name, (DEVICE, DEVICE), case.arithmetic, kernels.name
    return Loaded(first, second, 0, *names, offload)


def _pictured(draw: Any, vae: Autoencoder, latents: Tensor, rows: int, columns: int) -> None:
    """Decode as far as a device is asked for; a picture has no numbers to be made of."""
    with patch.object(Image, "fromarray"), patch.object(Tensor, "numpy"):
        draw(vae, latents, rows, columns)


class FakeEncoderFile:
    """A prepared text encoder without numbers: what `encoder_from_file` asks of a `PackedFile`."""

    def __init__(self, encoder: TextEncoder, recipe: Recipe, dtype: torch.dtype) -> None:
        self._recipe, self._dtype, self._shapes = recipe, dtype, encoder.shapes()
        self.packed = packed_layers(recipe, encoder)

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not packed."""
        return torch.empty(self._shapes[name], dtype=self._dtype)

    def weight(self, name: str) -> PackedWeight:
        """A packed matrix."""
        return fake_packed(self._recipe, name, *self._shapes[f"{name}.weight"])

    def spans(self, name: str) -> list[Span]:
        """Nothing is read."""
        return []

    def read_with(self, reader: Reader) -> FakeEncoderFile:
        """It has no reader."""
        return self


def count_decode(
    width: int,
    height: int,
    dtype: torch.dtype,
    tile: int | None = None,
    capability: Capability = AMPERE_CAPABILITY,
) -> Counted:
    """The published decoder alone: its weights are kept, `phases` has decode."""
    ledger, vae = Ledger(attention_on(capability)), _autoencoder(dtype, tile)
    with pretended(ledger, capability), torch.inference_mode():
        _on_device(vae)
        kept = ledger.live[DEVICE]
        rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
        latents = torch.empty(1, rows * columns, LATENT_CHANNELS, device=DEVICE)
        with ledger.phase("decode"):
            _pictured(decode, vae, latents, rows, columns)
    return _counted(ledger, kept, 0)


def count_encode(
    recipe: Recipe,
    tokens: int,
    dtype: torch.dtype,
    layers: int = PUBLISHED_ENCODER.num_hidden_layers,
    capability: Capability = AMPERE_CAPABILITY,
    flash: bool = True,
) -> Counted:
    """The published text encoder, or its first layers alone: its weights are kept, `phases` has encode."""
    shape = replace(PUBLISHED_ENCODER, num_hidden_layers=layers)
    ledger = Ledger(attention_on(capability, flash))
    with pretended(ledger, capability, flash), torch.inference_mode():
        file: Any = FakeEncoderFile(shape, recipe, dtype)
        encoder = encoder_from_file(file, shape, {"text_config": vars(shape)}, DEVICE, dtype)
        kept = ledger.live[DEVICE]
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with ledger.phase("encode"):
            features(encoder, ids)
    return _counted(ledger, kept, 0)


@dataclass(frozen=True)
class FakeComponents:
    """What `encoder_on_device` asks of a components folder whose encoder is all in host memory."""

    recipe: Recipe
    shape: TextEncoder

    def encoder_file(self) -> None:
        """None is read from again."""

    def text_encoder(self, device: torch.device | str, dtype: torch.dtype, away: frozenset[str]) -> CaptionEncoder:
        """The encoder; nothing of it is away."""
        file: Any = FakeEncoderFile(self.shape, self.recipe, dtype)
        return encoder_from_file(file, self.shape, {"text_config": vars(self.shape)}, device, dtype)


def count_streamed_encode(
    recipe: Recipe, tokens: int, dtype: torch.dtype, layers: int = PUBLISHED_ENCODER.num_hidden_layers
) -> Counted:
    """The same of an encoder whose layers pass through the device: its slots are kept."""
    ledger = Ledger(attention_on(AMPERE_CAPABILITY))
    parts: Any = FakeComponents(recipe, replace(PUBLISHED_ENCODER, num_hidden_layers=layers))
    visit = encoder_on_device(parts, "streamed", DEVICE, dtype, BlockingCopyStream(DEVICE))
    with pretended(ledger), torch.inference_mode(), visit as encoder, ledger.phase("encode"):
        kept = ledger.live[DEVICE]
        features(encoder, torch.zeros(1, tokens, dtype=torch.long))
    return _counted(ledger, kept, 0)


def _counted(ledger: Ledger, kept: int, prepared: int) -> Counted:
    phases = {name: peak.get(DEVICE, 0) for name, peak in ledger.peaks.items()}
    events = tuple((number, size) for number, where, size in ledger.events if where == DEVICE)
    return Counted(kept, prepared, phases, events)
