"""Whether the processor that runs the tests multiplies int8 exactly, for tests of what relies on it."""

from __future__ import annotations

from functools import cache

import torch

from ideogram_app.quantization.int8 import int32_product


@cache
def cpu_multiplies_exactly() -> bool:
    """Whether `torch._int_mm`, and so torchao, can be trusted on this CPU.

    Without VNNI instructions (oneDNN held to AVX2 or AVX512_CORE) it adds pairs of products in 16 bits, which overflow
    silently: 127 * 127 summed 256 times comes out wrong.
    """
    left, right = torch.full((32, 256), 127, dtype=torch.int8), torch.full((32, 256), 127, dtype=torch.int8)
    return torch.equal(torch._int_mm(left, right.t()), int32_product(left, right))
