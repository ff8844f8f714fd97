"""Staged or streamed text encoder: on the device while it encodes a caption, freed afterwards.

    resident   it stays (cache.py)
    staged     whole on the device, freed afterwards
    streamed   offloaded, layer by layer through a few slots on the device, straight from its file; its embedding
               table, whose rows are looked up and not multiplied, stays in host memory

It is as large as a transformer and needed once a caption. Streamed it takes the memory of two layers, so transformers
that are loaded can stay; and as it is read from its file once either way, that costs no more time than staging it. Left
out: encoding on a processor while the device draws, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ideogram_app.catalog.text_encoder import LAYER
from ideogram_app.errors import RequestError
from ideogram_app.machine.copies import CopyStream
from ideogram_app.machine.meter import release
from ideogram_app.model.components import ComponentsFolder
from ideogram_app.model.offload.offload import OffloadHooks
from ideogram_app.model.offload.packed_block import file_spans
from ideogram_app.model.text_encoder.encoder import CaptionEncoder

WAYS = ("resident", "staged", "streamed")


@contextmanager
def encoder_on_device(
    folder: ComponentsFolder, way: str, device: torch.device, dtype: torch.dtype, copies: CopyStream | None = None
) -> Iterator[CaptionEncoder]:
    """The encoder, ready to encode on a device; freed when the context ends.

    Args:
        way: staged or streamed; the latter by `copies`, those of the device's kind where None.

    Raises:
        CheckpointError: a file is missing or damaged.
        RequestError: another way.
    """
    if way not in WAYS[1:]:
        raise RequestError("The text encoder is either staged or streamed", expected=" or ".join(WAYS[1:]), got=way)
    hooks = OffloadHooks(device, copies=copies) if way == "streamed" else None
    encoder: CaptionEncoder | None = None
    try:
        encoder = _streamed(folder, dtype, hooks) if hooks else folder.text_encoder(device, dtype)
        yield encoder
    finally:
        if hooks:
            hooks.close()
        if encoder is not None:
            encoder.to("meta")  # free now even if the caller keeps a reference
        release(device)


def _streamed(folder: ComponentsFolder, dtype: torch.dtype, hooks: OffloadHooks) -> CaptionEncoder:
    """The encoder with its table on the host and its layers offloaded."""
    file = folder.encoder_file()
    matrices = file.linears_within(LAYER) if file else []
    encoder = folder.text_encoder("cpu", dtype, frozenset(matrices))
    language: Any = encoder.language_model
    for index, layer in enumerate(language.layers):
        own = f"{LAYER}{index}."
        names = {name.removeprefix(own): (name,) for name in matrices if name.startswith(own)}
        hooks.add(layer, file_spans(file, layer, names) if file else None)
    language.embed_tokens.register_forward_hook(lambda module, ids, rows: rows.to(hooks.device))
    hooks.start()
    return encoder
