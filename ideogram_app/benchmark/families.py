"""Names of operators and kernels to families: where does a step's time go?

    gemm        products of matrices, whoever wrote them, the summing of their parts included
    attention   fused attention
    other       norms, rotations, rounding, decoding, copies: what should hide behind the two above

On a device, names are those of kernels, on a processor those of torch's operators. The first rule that fits counts;
what none names is `other`, so an unknown kernel never looks like useful work. An operator one of whose matrices is as
small as a Hadamard block is a rotation, not a product of the model: on a processor its shapes tell.

Left out: attention written out in products (torch's math fallback), whose kernels cannot be told from others on a
device; on a processor its callers tell (profiling.py). Code that torch.compile generates for a processor is one
operator, and counts as other with all that was fused into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ideogram_app.benchmark.report import Families

GEMM, ATTENTION, OTHER = "gemm", "attention", "other"
# Inductor names pointwise kernels after everything around them, `triton_poi_fused_mm_mul_3`: they are neither.
RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (OTHER, re.compile(r"^triton_(poi|red|per|for)_")),
    (
        ATTENTION,
        re.compile(
            r"scaled_dot_product|flash_fwd|flash_fprop|flash_attn|flash_attention|fmha|sdpa|efficient_attention"
            r"|mem_eff|attn_fwd|attention_kernel|^_?attention"
        ),
    ),
    (
        GEMM,
        re.compile(
            r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|wgmma|imma_|hmma|s16816|matmul"
            r"|^triton_tem_|^triton_mm|ck_tile.*tile|\bcijk_"  # Inductor's templates; rocBLAS
            r"|(^|::|_)(add|b|baddb)?mm(_out|_for_cpu|$)|mkldnn_linear|qlinear|linear_pointwise|linear_unary"
        ),
    ),
)
# A group of 256 is rotated by two matrices of 16 x 16 (quantization/rotation.py); no matrix of a model is that small.
ROTATION_SIDE = 16


def family(name: str, shapes: Sequence[Sequence[int]] = ()) -> str:
    """gemm, attention or other.

    Args:
        name: of an operator or a kernel, as a profiler gives it.
        shapes: of the operator's tensors, where they are known.
    """
    lowered = name.lower()
    for found, rule in RULES:
        if rule.search(lowered):
            rotation = any(len(shape) > 1 and max(shape[-2:]) <= ROTATION_SIDE for shape in shapes)
            return OTHER if found == GEMM and rotation else found
    return OTHER


def shares(times: Iterable[tuple[str, float]]) -> Families | None:
    """Each family's share of the whole, from (family, time); None where no time was spent."""
    totals = dict.fromkeys((GEMM, ATTENTION, OTHER), 0.0)
    for name, time in times:
        totals[name] += time
    whole = sum(totals.values())
    return Families(**{name: time / whole for name, time in totals.items()}) if whole else None
