"""Components beside the transformers: tokenizer, text encoder, VAE decoder, scheduler's shift.

    folder = find_components(model, store=store)            which folder, checked; nothing is loaded yet
    encoder = folder.text_encoder(device, dtype)            each when it is asked for
    components = load_components(model, device, dtype)      all of them at once

They are made of this program's own modules, which import nothing but torch, so that loading takes as long as reading.
Nothing is read over the network. Left out: the transformers themselves (loader.py), on which device what lives when
(offload.py), and components of diffusers and transformers, for a pipeline of theirs (interop/pipeline.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ideogram_app.catalog.sources import find_source
from ideogram_app.catalog.text_encoder import DENSE, find_encoder_recipe
from ideogram_app.checkpoints.prepared.manifest import verify_sums
from ideogram_app.checkpoints.prepared.packed_file import PackedFile, open_encoder
from ideogram_app.checkpoints.prepared.storage import ENCODER
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.local import local_folder
from ideogram_app.checkpoints.published.text_encoder import TextEncoderCheckpoint
from ideogram_app.checkpoints.safetensors import SafetensorsFile, SafetensorsTensor
from ideogram_app.checkpoints.weight_files import read_config, weight_files
from ideogram_app.errors import CheckpointError
from ideogram_app.files import identity
from ideogram_app.model.fill import finished, put
from ideogram_app.model.text_encoder.encoder import Builder, CaptionEncoder, encoder_from_file, encoder_from_source
from ideogram_app.model.text_encoder.qwen import text_model
from ideogram_app.model.text_encoder.tokenizer import VOCABULARY, CaptionTokenizer
from ideogram_app.model.vae import Autoencoder, autoencoder, decoder_dtype

TOKENIZER, VAE, SCHEDULER = "tokenizer", "vae", "scheduler"  # folders of a diffusers pipeline
SCHEDULER_CONFIG = "scheduler_config.json"
SHIFT = 1.0  # what diffusers' FlowMatchEulerDiscreteScheduler takes where a config does not say it
PACKED = ("F8_E4M3", "I8", "U8")
COUNTER = "num_batches_tracked"  # of training; nothing that draws reads it


@dataclass(frozen=True)
class Components:
    """Loaded: everything of a pipeline but its transformers."""

    tokenizer: Any
    text_encoder: nn.Module
    vae: Autoencoder
    shift: float  # of the noise levels (`sampler.schedule`): all that drawing asks a scheduler for


@dataclass(frozen=True)
class ComponentsFolder:
    """Where the components of a model lie. Methods raise CheckpointError: a file, named, is missing or damaged."""

    folder: Path
    encoder_recipe: str  # of a text encoder that was prepared; "" where the folder is that of a pipeline

    @property
    def identity(self) -> str:
        """Which text encoder this is, for the keys of `FeatureCache`."""
        return identity(self.folder, (ENCODER, TOKENIZER))

    def tokenizer(self) -> Any:
        """The program's own; where a folder has no tokenizer.json, that of transformers."""
        folder = self.folder / TOKENIZER
        return CaptionTokenizer(folder) if (folder / VOCABULARY).is_file() else stock_tokenizer(folder)

    def encoder_file(self) -> PackedFile | None:
        """The file of an encoder that was prepared; None where the folder is that of a pipeline."""
        return open_encoder(self.folder, self.encoder_recipe)[0] if self.encoder_recipe else None

    def text_encoder(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        offloaded: frozenset[str] = frozenset(),
        build: Builder = text_model,
    ) -> CaptionEncoder:
        """The text side; `offloaded` and `build` are those of `encoder_from_file`."""
        if self.encoder_recipe:
            return encoder_from_file(*open_encoder(self.folder, self.encoder_recipe), device, dtype, build, offloaded)
        source = TextEncoderCheckpoint(self.folder / ENCODER)
        return encoder_from_source(source, find_encoder_recipe(DENSE), device, dtype, build)

    def vae(self, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
        """The decoder, on a device."""
        return read_autoencoder(self.folder / VAE, dtype).to(device)

    def shift(self) -> float:
        """The scheduler's."""
        return read_shift(self.folder / SCHEDULER)


def find_components(model_name: str, source: Path | None = None, store: Store | None = None) -> ComponentsFolder:
    """Where the components of a model lie; what ships with the program is compared with its sums.

    Args:
        source: a pipeline folder; what ships with the program where None.
        store: whose prepared components are taken where nothing ships and no folder is named.

    Raises:
        AccessError: the weights do not ship with the program, no folder was named, and none were prepared.
        CheckpointError: what ships was altered.
    """
    status = store.components_status(model_name) if store and source is None else None
    if status and status.state == "ready":
        return ComponentsFolder(status.path, status.recipe)
    folder = local_folder(model_name, source)
    if folder == find_source(model_name).included:
        verify_sums(folder, (ENCODER, TOKENIZER, VAE))
    return ComponentsFolder(folder, "")


def load_components(
    model_name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    source: Path | None = None,
    store: Store | None = None,
) -> Components:
    """Load all of them in a computing type; arguments and errors are those of `find_components` and of its folder."""
    found = find_components(model_name, source, store)
    vae = found.vae(device, decoder_dtype(dtype, torch.device(device)))
    return Components(found.tokenizer(), found.text_encoder(device, dtype), vae, found.shift())


def read_shift(folder: Path) -> float:
    """The shift of a scheduler's folder. Raises: CheckpointError: missing or damaged."""
    path = folder / SCHEDULER_CONFIG
    try:
        return float(json.loads(path.read_text(encoding="utf-8")).get("shift", SHIFT))
    except FileNotFoundError as problem:
        raise CheckpointError(f"There is no file {path}") from problem
    except (ValueError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{path} is damaged", expected="JSON with a shift", got=str(problem)) from problem


def read_autoencoder(folder: Path, dtype: torch.dtype) -> Autoencoder:
    """The decoder of a VAE folder.

    Raises:
        CheckpointError: a file is missing, truncated or packed, or does not fill the decoder.
    """
    stored = dense_tensors(folder)
    module = autoencoder(read_config(folder))
    for name, empty in module.state_dict().items():
        if name.endswith(COUNTER):
            continue
        file, info = stored.get(name, (None, None))
        if file is None or info is None or info.shape != tuple(empty.shape):
            raise CheckpointError(
                f"The weights in {folder} do not fill the decoder that config.json there describes",
                expected=f"{name} {tuple(empty.shape)}",
                got=str(info.shape) if info else "nothing of that name",
            )
        put(module, name, file.tensor(name).to(dtype))
    module.bn.register_buffer(COUNTER, None)
    return finished(module, "A decoder")


def dense_tensors(folder: Path) -> dict[str, tuple[SafetensorsFile, SafetensorsTensor]]:
    """Every tensor of a folder's weights, by its name.

    Raises:
        CheckpointError: a file is truncated, or needs more than a change of type.
    """
    found = {}
    for path in weight_files(folder):
        file = SafetensorsFile(path)
        for info in file.infos.values():
            if info.dtype in PACKED:
                raise CheckpointError(
                    f"{path} is packed, which this version does not read here",
                    expected="float32, bfloat16 or float16",
                    got=f"{info.name}: {info.dtype}",
                )
            found[info.name] = (file, info)
    return found


def stock_tokenizer(folder: Path) -> Any:
    """transformers' own. Raises: CheckpointError: missing or damaged."""
    from transformers import AutoTokenizer

    return load_offline(AutoTokenizer.from_pretrained, folder)


def load_offline(load: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """Call a library's loader without its network; its errors become a CheckpointError that names the folder."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}")
    try:
        return load(folder, local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as problem:
        raise CheckpointError(f"{folder} cannot be loaded", got=f"{type(problem).__name__}: {problem}") from problem
