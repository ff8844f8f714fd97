"""Dense product of a Linear: PyTorch's own, and in float32 on cards whose bfloat16 is emulated.

Cards before Ampere have no bfloat16 units: cuBLAS refuses such products on some of them (pytorch #57773) and takes more
than twice float32's time on a T4 (openxla/xla #12429). float16 would be fast there and is not safe in this model, whose
products in front of a norm may be of any size. So numbers are stored in bfloat16 and multiplied in float32, which is
exact, a run of rows at a time.

Left out: float16 products with sums in float32 (`torch.mm` with out_dtype), which would be faster where weights are
dense; on those cards the recipes that a plan takes multiply in INT8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ideogram_app.machine.capabilities import multiplies_bfloat16
from ideogram_app.machine.hardware import compute_capability
from ideogram_app.quantization.rows import WIDENED_AT_ONCE, row_runs


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K), plus bias (N,): (..., N) in the type of x."""
    if x.dtype != torch.bfloat16 or multiplies_bfloat16(compute_capability(x.device)):
        return functional.linear(x, weight, bias)
    return widened_linear(x, weight, bias)


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` in float32, rounded once; of x, weight and result at most `WIDENED_AT_ONCE` numbers are wide at once."""
    flat = x.reshape(-1, x.shape[-1])
    made = x.new_empty(flat.shape[0], weight.shape[0])
    for columns in row_runs(tuple(weight.shape), WIDENED_AT_ONCE):
        wide = weight[columns].float()
        added = None if bias is None else bias[columns].float()
        for rows in row_runs((flat.shape[0], max(wide.shape)), WIDENED_AT_ONCE):
            made[rows, columns] = functional.linear(flat[rows].float(), wide, added)
    return made.view(*x.shape[:-1], weight.shape[0])
