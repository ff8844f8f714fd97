"""The fused kernels as one set: `fused_kernels("triton")`, or "int_mm" where Triton compiles no INT8 product (Turing).

Left out: which card gets which (`kernels.choice`).
"""

from __future__ import annotations

from ideogram_app.errors import choose
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.fused import matmul, rows
from ideogram_app.kernels.fused.heads import heads
from ideogram_app.kernels.fused.q4_k import Scratch

PRODUCTS = {"triton": matmul.matmul, "int_mm": matmul.int_mm}


def fused_kernels(products: str) -> Kernels:
    """A set of kernels with scratch of its own for decoded weights.

    Args:
        products: a key of `PRODUCTS`.

    Raises:
        RequestError: no such products; lists those that exist.
    """
    product, scratch = choose(PRODUCTS, products, "INT8 product"), Scratch()
    return Kernels(
        name=products,
        norm=rows.norm,
        add_norm=rows.add_norm,
        add=rows.add,
        swiglu=rows.swiglu,
        rows=rows.rows,
        heads=heads,
        weight=matmul.weight,
        matmul=product,
        decode_int8=scratch.decode_int8,
        decode=scratch.decode,
        rest=scratch.release,
    )
