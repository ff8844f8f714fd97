"""Kernel selection: which set of kernels (Triton, int_mm, torch, processor, plain) runs on a device, and why.

    triton     one launch between two matrices, INT8 products on tensor units    NVIDIA from sm_80 on, AMD
    int_mm     the same launches, products by `torch._int_mm`                    Turing, which Triton's products miss
    torch      plain torch in runs of rows, products by `torch._int_mm`          where Triton cannot start
    processor  oneDNN's products on weights in an order of their own             processors
    plain      plain torch in runs of rows, products in float32                  everywhere else

What is not there (no Triton, no compiler for it, no INT8 units) is never an error, only a reason with what would help.
`machine.capabilities.products` says the same of a described machine. Left out: measuring at run time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ideogram_app.errors import DeviceError, RequestError
from ideogram_app.files import data_folder
from ideogram_app.kernels import plain
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.kernels.torch_products import WITHOUT_TRITON, int_mm_problem
from ideogram_app.machine.triton_support import usable_triton

KERNEL_SETS = ("triton", "int_mm", "torch", "processor", "plain")
COMPILERS = ("g++", "clang++", "cl", "c++")  # of those Inductor looks for
BETWEEN_MATRICES = ("norm", "add_norm", "add", "swiglu", "quantize", "heads")


def choose_kernels(
    device: torch.device,
    capability: tuple[int, int] | None = None,
    triton: str | None = None,
    int_mm: str | None = None,
) -> tuple[str, str]:
    """Name of the kernels for a device, and why.

    Args:
        capability: NVIDIA's compute capability, where there is one.
        triton, int_mm: what is wrong with Triton and with `torch._int_mm` there, "" for nothing; None asks this machine
            (`usable_triton`, `int_mm_problem`), each once and only where the answer matters.
    """
    if device.type == "cpu":
        return "processor", "the device is a processor"
    if device.type != "cuda":
        return "plain", f"the kernels here are made for NVIDIA and AMD, and the device is {device.type}"
    if capability is not None and capability < (7, 5):
        return "plain", f"Triton does not compile for sm_{capability[0]}{capability[1]}"
    problem = triton_problem() if triton is None else triton
    if problem or capability == (7, 5):
        wrong = int_mm_problem(device) if int_mm is None else int_mm
        if wrong:
            return "plain", f"{problem} {wrong}".strip()
        if problem:
            return "torch", problem
        return "int_mm", "Triton compiles no INT8 product for Turing (sm_75), PyTorch's own takes its place"
    return "triton", "every kernel compiles for this card"


def kernels_note(device: torch.device, name: str, reason: str) -> str:
    """For results: that slower kernels ran on a device that faster ones are made for, and why; "" where none did."""
    slower = device.type == "cuda" and name in WITHOUT_TRITON
    return f"Slower kernels ran ({name}): {reason}" if slower and reason else ""


def triton_problem() -> str:
    """`usable_triton` of the devices that torch calls cuda."""
    return usable_triton("rocm" if torch.version.hip else "cuda")


@cache
def kernels(name: str) -> Kernels:
    """The kernels of a name, built once. Raises RequestError: no such kernels; lists those that exist."""
    if name == "processor":
        from ideogram_app.kernels.processor import processor_kernels

        return processor_kernels()
    if name in KERNEL_SETS:
        return new_kernels(name)
    raise RequestError(f"There are no kernels {name!r}", expected=" or ".join(KERNEL_SETS), got=name)


def new_kernels(name: str) -> Kernels:
    """A set for a device, with scratch that nobody else uses."""
    return WITHOUT_TRITON[name] if name in WITHOUT_TRITON else fused_kernels(name)


def fused_kernels(products: str) -> Kernels:
    """Triton's kernels as one set, with scratch of its own for decoded weights; products: "triton" or "int_mm"."""
    from ideogram_app.kernels.fused import heads, matmul, q4_k, rows

    scratch = q4_k.Scratch()
    multiply: dict[str, Callable[..., Tensor]] = {"triton": matmul.Matmul(), "int_mm": matmul.int_mm}
    return Kernels(
        name=products,
        norm=rows.norm,
        add_norm=rows.add_norm,
        add=rows.add,
        swiglu=rows.swiglu,
        quantize=rows.quantize,
        heads=heads.heads,
        weight=PLAIN.weight,
        matmul=multiply[products],
        decode_int8=scratch.decode_int8,
        decode=scratch.decode,
        release_scratch=scratch.release,
    )


def compiled_kernels(base: Kernels, device: torch.device) -> Kernels:
    """`base` with everything between two matrices compiled by `torch.compile`, each kernel by itself.

    Each is a small graph without control flow, compiled once for every number of tokens (dynamic shapes) and cached by
    PyTorch on disk, below the data folder unless TORCHINDUCTOR_CACHE_DIR names another place. So it costs seconds when
    it is first used on a machine, and never again for a new prompt or size. Left out: graphs of whole blocks, whose
    compilation takes minutes and depends on every layer's storage.

    Raises:
        DeviceError: a processor without a C++ compiler, or a card for which Triton, which torch.compile writes, cannot
            be used.
    """
    problem = triton_problem() if device.type == "cuda" else ""
    if problem:
        raise DeviceError(
            "torch.compile needs Triton on this device", got=problem, do="Do that, or draw without --compile"
        )
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise DeviceError(
            "torch.compile needs a C++ compiler on a processor",
            expected=" or ".join(COMPILERS),
            do="Install one, or draw without --compile",
        )
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(data_folder().absolute() / "torchinductor"))
    made: dict[str, Any] = {name: torch.compile(getattr(plain, name), dynamic=True) for name in BETWEEN_MATRICES}
    return replace(base, name=f"{base.name}, compiled", **made)
