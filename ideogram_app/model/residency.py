"""What is on the device, and when.

    resident   both transformers stay on the device
    streamed   blocks come from host memory ahead of their use, through diffusers' group offloading
    staged     a guest: moved to the device for a while and freed afterwards (the text encoder)

The text encoder is as large as a transformer and needed once per prompt, so it is always a guest; so are those layers
of a transformer that run once a picture (conditioner.py). Left out: splits with part of the blocks resident,
memory-mapped disk residency and two devices; a plan that asks for one of these is refused, not run as something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ideogram_app.errors import DeviceError
from ideogram_app.measure import release
from ideogram_app.model.backbone import Backbone
from ideogram_app.model.conditioner import Prepared

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def staged(module: Any, device: torch.device, home: torch.device) -> Iterator[Any]:
    """The module on `device` while the context is open, back at `home` afterwards."""
    module.to(device)
    try:
        yield module
    finally:
        if device != home:
            module.to(home)
            release(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the one on which kernels are launched; nothing to do where there is only one of its kind."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def prepare(backbone: Backbone, features: Tensor, times: Tensor, rows: int, columns: int) -> Prepared:
    """`Backbone.prepare` on the device of `features` (n, taps x encoder), where the conditioner is a guest."""
    home = backbone.conditioner.norms.device
    with current(features.device), staged(backbone.conditioner, features.device, home):
        return backbone.prepare(features, times, rows, columns)


def place(transformer: Any, residency: str, device: torch.device) -> None:
    """Put what runs in every step where the plan says: a backbone's trunk, or a whole transformer of diffusers.

    Raises:
        DeviceError: the plan asks for a residency that this version does not run.
    """
    if isinstance(transformer, Backbone):
        transformer = transformer.trunk
    if residency == "resident":
        transformer.to(device)
    elif residency == "streamed":
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            transformer,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
        )
    else:
        raise DeviceError(
            f"Weights cannot live in {residency!r} yet", expected="resident or streamed", do="Free memory and try again"
        )
