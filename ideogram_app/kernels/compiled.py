"""torch.compile, on request: the plain kernels between two matrices, each compiled by itself.

Each is a small graph of its own without control flow, compiled once for every number of tokens (dynamic shapes) and
cached by PyTorch on disk. So it costs seconds when it is first used on a machine, and never again for a new prompt or
size. Products stay with the kernels it is made from. On a processor it needs a C++ compiler.

Left out: graphs of whole blocks, whose compilation takes minutes and depends on every layer's storage.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import torch

from ideogram_app.errors import DeviceError
from ideogram_app.kernels import plain
from ideogram_app.kernels.contract import Kernels

COMPILERS = ("g++", "clang++", "cl", "c++")  # of those Inductor looks for
BETWEEN_MATRICES = ("norm", "add_norm", "add", "swiglu", "quantize", "heads")


def compiled_kernels(base: Kernels, device: torch.device) -> Kernels:
    """`base` with everything between two matrices compiled.

    Raises:
        DeviceError: a processor without a C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise DeviceError(
            "torch.compile needs a C++ compiler on a processor",
            expected=" or ".join(COMPILERS),
            do="Install one, or draw without --compile",
        )
    made: dict[str, Any] = {name: torch.compile(getattr(plain, name), dynamic=True) for name in BETWEEN_MATRICES}
    return replace(base, name=f"{base.name}, compiled", **made)
