"""Compile-time signature of a Triton kernel: all its machine code depends on, to compile offline.

Each file of this folder yields its own from `signatures()`; `offline.py` compiles them all and reads what they need.
Left out: specialisation on values. Pointers, and integers that the kernel does not exclude by `do_not_specialize`, are
taken as multiples of 16, which they are at run time: the widths of the model are, and torch aligns what it allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compilable:
    """One instance of a kernel."""

    name: str  # of the row in the report; unique, with the variant in it: "norm, rotated, bf16, 4608"
    function: Any  # what `triton.jit` made
    signature: Mapping[str, str]  # run-time argument -> its type in Triton's words: "*bf16", "*i8", "i32", "fp32"
    constants: Mapping[str, Any]  # constexpr argument -> its value
    warps: int = 4
    stages: int = 3
    fuses: bool = True  # `enable_fp_fusion`: whether a product and a sum may become one instruction of one rounding
