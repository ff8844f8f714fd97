"""What is on the device, and when.

    resident   both transformers stay on the device
    streamed   blocks come from host memory ahead of their use, through diffusers' group offloading
    staged     a guest: moved to the device for a while and freed afterwards (the text encoder)

The text encoder is as large as a transformer and needed once per prompt, so it is always a guest. Left out: splits with
part of the blocks resident, memory-mapped disk residency and two devices; a plan that asks for one of these is refused
rather than run as something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ideogram_app.errors import DeviceError
from ideogram_app.measure import release

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


def place(transformer: Any, residency: str, device: torch.device) -> None:
    """Put one loaded transformer where the plan says.

    Raises:
        DeviceError: the plan asks for a residency that this version does not run.
    """
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
