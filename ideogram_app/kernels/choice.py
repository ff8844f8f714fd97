"""Kernel selection: which set of kernels (Triton, int_mm, processor, plain) runs on a device, and why.

    triton     one launch between two matrices, INT8 products on tensor units    NVIDIA from sm_80 on, AMD
    int_mm     the same launches, products by `torch._int_mm`                    Turing, which Triton's products miss
    processor  oneDNN's products on weights in an order of their own             processors
    plain      plain torch, the truth                                            everywhere else

What is not there (no Triton, no INT8 units) is never an error, only a reason. Left out: measuring at run time.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ideogram_app.errors import DeviceError, RequestError
from ideogram_app.kernels import plain
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.plain import PLAIN

KERNEL_SETS = ("triton", "int_mm", "processor", "plain")
COMPILERS = ("g++", "clang++", "cl", "c++")  # of those Inductor looks for
BETWEEN_MATRICES = ("norm", "add_norm", "add", "swiglu", "quantize", "heads")


def choose_kernels(device: torch.device, capability: tuple[int, int] | None = None) -> tuple[str, str]:
    """Name of the kernels for a device, and why.

    Args:
        capability: NVIDIA's compute capability, where there is one.
    """
    if device.type == "cpu":
        return "processor", "the device is a processor"
    if device.type != "cuda":
        return "plain", f"the kernels here are made for NVIDIA and AMD, and the device is {device.type}"
    if find_spec("triton") is None:
        return "plain", "Triton is not installed"
    if capability is not None and capability < (7, 5):
        return "plain", f"Triton does not compile for sm_{capability[0]}{capability[1]}"
    if capability == (7, 5):
        return "int_mm", "Triton compiles no INT8 product for Turing (sm_75), PyTorch's own takes its place"
    return "triton", "every kernel compiles for this card"


@cache
def kernels(name: str) -> Kernels:
    """The kernels of a name, built once. Raises RequestError: no such kernels; lists those that exist."""
    if name == "plain":
        return PLAIN
    if name == "processor":
        from ideogram_app.kernels.processor import processor_kernels

        return processor_kernels()
    if name in ("triton", "int_mm"):
        return fused_kernels(name)
    raise RequestError(f"There are no kernels {name!r}", expected=" or ".join(KERNEL_SETS), got=name)


def fused_kernels(products: str) -> Kernels:
    """Triton's kernels as one set, with scratch of its own for decoded weights; products: "triton" or "int_mm"."""
    from ideogram_app.kernels.fused import heads, matmul, q4_k, rows

    scratch = q4_k.Scratch()
    return Kernels(
        name=products,
        norm=rows.norm,
        add_norm=rows.add_norm,
        add=rows.add,
        swiglu=rows.swiglu,
        quantize=rows.quantize,
        heads=heads.heads,
        weight=PLAIN.weight,
        matmul={"triton": matmul.matmul, "int_mm": matmul.int_mm}[products],
        decode_int8=scratch.decode_int8,
        decode=scratch.decode,
        release_scratch=scratch.release,
    )


def compiled_kernels(base: Kernels, device: torch.device) -> Kernels:
    """`base` with everything between two matrices compiled by `torch.compile`, each kernel by itself.

    Each is a small graph without control flow, compiled once for every number of tokens (dynamic shapes) and cached by
    PyTorch on disk. So it costs seconds when it is first used on a machine, and never again for a new prompt or size.
    Left out: graphs of whole blocks, whose compilation takes minutes and depends on every layer's storage.

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
