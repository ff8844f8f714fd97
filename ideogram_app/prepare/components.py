"""Components beside the transformers: the text encoder packed; tokenizer, scheduler and VAE copied as they are.

    <root>/checkpoints/<model>/companions/    text_encoder/, tokenizer/, scheduler/, vae/, manifest.json

Made once for a model, shared by its recipes, and enough to draw with: when it is there, a download may be deleted. The
encoder's file goes through the same run as a transformer's (run.py), so it is resumable and compared row by row. Its
smoke test fills transformers' own decoder layer once from the source and once from the file.

The encoder is packed as Q8_0: behind layers of full width its features are off by 2.7 %, INT8 rows give 8.2 and Q4_K
26, for 8.0 GB instead of 7.6 and 4.6 (benchmarks/results/encoder.json). Left out: packing the VAE, 0.17 GB in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.text_encoder import DEFAULT, LAYER, find_encoder_recipe
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.prepared.storage import ENCODER, encoder_file
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.checkpoints.published.text_encoder import TextEncoderCheckpoint
from ideogram_app.errors import CheckpointError
from ideogram_app.prepare.packing import Packing
from ideogram_app.prepare.run import PrepareRun, PrepareTask
from ideogram_app.prepare.smoke_test import BLOCK, SEED, TOKENS, check_error, fill
from ideogram_app.quantization.rows import RowReader
from ideogram_app.records import Event

LEAST_CHANGE = 0.01  # of the hidden states: a trained layer that adds less than this is judged as if it added so much
COPIED = {"tokenizer": ("*",), "scheduler": ("*.json",), "vae": ("*.json", "*.safetensors")}


def prepare_components(
    store: Store, model_name: str, source: Path, encoder: str = DEFAULT, device: str = "cpu"
) -> Iterator[Event]:
    """Make a model's components from a pipeline folder, or do nothing where they are ready: events as of a recipe.

    Args:
        encoder: a row of `ENCODER_RECIPES`; components made with another one are made again.

    Raises:
        RequestError: no such encoder recipe, or another process prepares them.
        CheckpointError: the folder lacks one of them, or holds something else.
        DiskError: too little room.
    """
    recipe, prepared = find_encoder_recipe(encoder), store.components_folder(model_name)
    with prepared.lock():
        status = store.components_status(model_name)
        if status.usable and status.recipe == encoder:
            yield Event("prepare", encoder, status.bytes, status.bytes, message=f"{encoder} is ready")
            return
        reader = TextEncoderCheckpoint(source / ENCODER)
        path = prepared.staging / encoder_file(encoder)
        packing = Packing(ENCODER, reader, reader.encoder, recipe, path, torch.device(device))
        copies = _copies(source)
        layers = sorted({0, reader.encoder.num_hidden_layers - 1})
        task = PrepareTask(
            model_name,
            recipe,
            (packing,),
            sources=(*(file.path for file in reader.files), *copies.values()),
            folder=source,
            named=source,
            smoke=partial(_smoke_test, reader=reader, layers=layers),
            tries=len(layers),
            copies=copies,
        )
        yield from PrepareRun(prepared, task).guarded()


def _copies(source: Path) -> dict[str, Path]:
    """Path inside the components' folder -> file of the source; CheckpointError where one of its folders is missing."""
    found: dict[str, Path] = {}
    for name, patterns in COPIED.items():
        files = sorted({path for pattern in patterns for path in (source / name).glob(pattern) if path.is_file()})
        if not files:
            raise CheckpointError(
                f"{source} holds no {name}",
                expected=f"a pipeline folder with {', '.join((ENCODER, *COPIED))}",
                do="Name the folder of the whole pipeline once, so that it can be kept beside the recipes",
            )
        found |= {path.relative_to(source).as_posix(): path for path in files}
    return found


def _smoke_test(packing: Packing, reader: TextEncoderCheckpoint, layers: Iterable[int]) -> Iterator[tuple[str, float]]:
    """Decoder layers, filled from the source and from the file: what they add must agree."""
    recipe = packing.recipe
    written = PackedFile(packing.path, recipe, reader.encoder)
    for index in layers:
        hidden, source = _output(reader.config, index, reader.tensor)
        _, packed = _output(reader.config, index, written.values)
        scale = max(float((source - hidden).norm()), LEAST_CHANGE * float(hidden.norm()))
        error, name = float((packed - source).norm()) / scale, f"layer {index}"
        yield name, check_error(name, error, BLOCK[recipe.gguf_type or recipe.storage])


def _output(config: dict[str, Any], index: int, read: RowReader) -> tuple[Tensor, Tensor]:
    """Random hidden states (1, 16, hidden) before and after decoder layer `index`, in float32."""
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, Qwen3VLTextRotaryEmbedding

    text = {key: value for key, value in config.get("text_config", config).items() if key != "dtype"}
    settings = Qwen3VLTextConfig(**text, attn_implementation="eager")
    with torch.device("meta"):
        layer: nn.Module = Qwen3VLTextDecoderLayer(settings, index)
    layer = layer.to_empty(device="cpu").float().eval().requires_grad_(False)
    fill(layer, f"{LAYER}{index}.", read)
    hidden = torch.randn(1, TOKENS, settings.hidden_size, generator=torch.Generator().manual_seed(SEED))
    positions = torch.arange(TOKENS)[None]
    rotary = Qwen3VLTextRotaryEmbedding(settings)(hidden, positions[None].expand(3, -1, -1))
    output: Tensor = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    return hidden, output
