"""Temporaries of kernels without Triton, in bytes: what kernels/runs.py and torch_products.py hold for a moment.

Triton's kernels hold nothing beside what they read and write, so for "triton" everything here is 0; "int_mm" takes the
INT32 sums of a run of rows. The other two, "torch" and "plain", go over runs of rows, and what they hold is a number of
float32 copies of a run: counted operation by operation as benchmarks/counting counts, held to it by tests.

Left out: what the operations read and make, which planning/activations.py adds up.
"""

from __future__ import annotations

from ideogram_app.quantization.rows import DECODED_AT_ONCE, EXACT_RUN, INT32_ROWS, WIDENED_AT_ONCE

WITHOUT_TRITON = ("torch", "plain")
WIDTH = 4  # of float32 and INT32
# Float32 copies of a run: of what a norm or a rounding reads, by the format it makes ...
OPERAND_COPIES = {"dense": 2.0, "int8": 2.25, "rotated": 3.25}
# ... of gate and up together, of the residual, of q, k and v together, of a run of Q4_K that becomes INT8.
SWIGLU_COPIES = {"dense": 2.0, "int8": 2.125, "rotated": 2.625}
ADD_COPIES, HEADS_COPIES, DECODING_COPIES = 3.0, 1.17, 3.0
EPILOGUE_COPIES, EPILOGUE_COPIES_WITH_BIAS = 2.0, 2.5  # of a run of sums


def operand_bytes(kernels: str, input_format: str, tokens: int, columns: int) -> int:
    """Of `norm` and `quantize`; a dense `quantize` is none."""
    return _copies(kernels, OPERAND_COPIES[input_format], tokens, columns)


def swiglu_bytes(kernels: str, input_format: str, tokens: int, inner: int) -> int:
    """Of `swiglu`, inner: columns of its result."""
    return _copies(kernels, SWIGLU_COPIES[input_format], tokens, 2 * inner)


def add_bytes(kernels: str, tokens: int, hidden: int) -> int:
    """Of `add`, with which `add_norm` begins."""
    return _copies(kernels, ADD_COPIES, tokens, hidden)


def heads_bytes(kernels: str, tokens: int, hidden: int) -> int:
    """Of `heads`."""
    return _copies(kernels, HEADS_COPIES, tokens, 3 * hidden)


def decoding_bytes(kernels: str, weights: int) -> int:
    """Of `decode_int8`, for a matrix of so many weights; its result is not scratch that stays, and not in here."""
    return round(DECODING_COPIES * WIDTH * min(weights, DECODED_AT_ONCE)) if kernels in WITHOUT_TRITON else 0


def product_bytes(kernels: str, tokens: int, rows: int, biased: bool = False) -> int:
    """Of `matmul`, for a weight of so many rows: sums, and what makes numbers of them."""
    copies = EPILOGUE_COPIES_WITH_BIAS if biased else EPILOGUE_COPIES
    if kernels == "plain":
        run = min(tokens, max(1, WIDENED_AT_ONCE // rows))
        sums, widened = run * rows * WIDTH, (run + rows) * EXACT_RUN * WIDTH
        return round(max(2 * sums + widened, (1 + copies) * sums))
    if kernels not in ("int_mm", "torch"):
        return 0
    sums = min(tokens, INT32_ROWS) * rows * WIDTH
    return sums + (round(copies * min(sums, WIDTH * WIDENED_AT_ONCE)) if kernels == "torch" else 0)


def _copies(kernels: str, copies: float, tokens: int, columns: int) -> int:
    numbers = min(tokens * columns, max(columns, WIDENED_AT_ONCE))
    return round(copies * WIDTH * numbers) if kernels in WITHOUT_TRITON else 0
