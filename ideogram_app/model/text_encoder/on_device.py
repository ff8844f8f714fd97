"""The text encoder on a device, for as long as it reads a caption.

    resident   it stays (cache.py)
    staged     whole on the device, gone afterwards
    streamed   layer by layer through a few places on the device, straight from its file; its embedding table, whose
               rows are looked up and not multiplied, stays in host memory

It is as large as a transformer and needed once a caption. Streamed it takes two layers' room, so transformers that are
loaded can stay; and as it is read from its file once either way, that costs no more time than staging it. Left out:
encoding on a processor while the device draws, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ideogram_app.catalog.text_encoder import LAYER
from ideogram_app.errors import RequestError
from ideogram_app.machine.meter import release
from ideogram_app.model.components import ComponentsFolder
from ideogram_app.model.offload.carrier import Carrier
from ideogram_app.model.offload.located import located
from ideogram_app.model.offload.offload import Residence
from ideogram_app.model.text_encoder.encoder import CaptionEncoder

WAYS = ("resident", "staged", "streamed")


@contextmanager
def encoder_on_device(
    where: ComponentsFolder, way: str, device: torch.device, dtype: torch.dtype, carrier: Carrier | None = None
) -> Iterator[CaptionEncoder]:
    """The encoder, ready to read captions on a device; gone when the context ends.

    Args:
        way: staged or streamed.
        carrier: of a streamed one; that of the device's kind where None.

    Raises:
        CheckpointError: a file is missing or damaged.
        RequestError: another way.
    """
    if way not in WAYS[1:]:
        raise RequestError("The text encoder cannot visit like that", expected=" or ".join(WAYS[1:]), got=way)
    residence = Residence(device, carrier=carrier) if way == "streamed" else None
    encoder: CaptionEncoder | None = None
    try:
        encoder = _travelling(where, dtype, residence) if residence else where.text_encoder(device, dtype)
        yield encoder
    finally:
        if residence:
            residence.close()
        if encoder is not None:
            encoder.to("meta")  # gone now, though whoever was given it still has a name for it
        release(device)


def _travelling(where: ComponentsFolder, dtype: torch.dtype, residence: Residence) -> CaptionEncoder:
    """The encoder with its table on the host and its layers on the road."""
    file = where.encoder_file()
    matrices = file.linears_within(LAYER) if file else []
    encoder = where.text_encoder("cpu", dtype, frozenset(matrices))
    language: Any = encoder.language_model
    for index, layer in enumerate(language.layers):
        own = f"{LAYER}{index}."
        names = {name.removeprefix(own): (name,) for name in matrices if name.startswith(own)}
        residence.add(layer, located(file, layer, names) if file else None)

    def to_device(module: nn.Module, ids: Any, rows: Tensor) -> Tensor:
        return rows.to(residence.device)

    language.embed_tokens.register_forward_hook(to_device)
    residence.start()
    return encoder
