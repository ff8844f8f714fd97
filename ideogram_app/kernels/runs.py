"""Plain kernels in runs of rows: what stands between two matrices where there is no Triton, in bounded memory.

The arithmetic is plain.py's own, called on one run of rows after the other, each of at most 2^24 numbers: a row needs
no other row, so every number is the same, and what is float32 for a moment is some 64 MB a copy and not a gigabyte.
Results go where the input was wherever the contract lets them: the residual and qkv are overwritten, as Triton's are.

Left out: speed; each operation is 5 to 20 launches that pass over memory again and again. On processors, whose runs
must fit a cache, processor.py does the same. Functions that say nothing of themselves do what those of their names in
plain.py do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ideogram_app.kernels import plain
from ideogram_app.kernels.contract import InputFormat, Operand, QuantizedActivations
from ideogram_app.quantization import k_quants
from ideogram_app.quantization.rows import DECODED_AT_ONCE, WIDENED_AT_ONCE, row_runs


def norm(x: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat) -> Operand:
    return _in_runs(lambda part: plain.norm(part, vector, epsilon, input_format), x, x.shape[1], input_format)


def add_norm(
    hidden: Tensor, update: Tensor, gate: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat
) -> tuple[Tensor, Operand]:
    """`hidden` is overwritten and returned."""
    hidden = add(hidden, update, gate, epsilon)
    return hidden, norm(hidden, vector, epsilon, input_format)


def add(hidden: Tensor, update: Tensor, gate: Tensor, epsilon: float) -> Tensor:
    """`hidden` is overwritten and returned."""
    for rows in row_runs(hidden.shape, WIDENED_AT_ONCE):
        hidden[rows] = plain.add(hidden[rows], update[rows], gate, epsilon)
    return hidden


def swiglu(gate_up: Tensor, input_format: InputFormat) -> Operand:
    return _in_runs(lambda part: plain.swiglu(part, input_format), gate_up, gate_up.shape[1] // 2, input_format)


def quantize(x: Tensor, input_format: InputFormat) -> Operand:
    if input_format == "dense":
        return x
    return _in_runs(lambda part: plain.quantize(part, input_format), x, x.shape[1], input_format)


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k are turned where they stand in qkv."""
    parts = qkv.unflatten(-1, (3, -1, norm_q.shape[0]))  # (M, 3, H, D)
    for rows in row_runs(qkv.shape, WIDENED_AT_ONCE):
        query, key, _ = plain.heads(qkv[rows], norm_q, norm_k, cos[rows], sin[rows], epsilon)
        parts[rows, 0], parts[rows, 1] = query.transpose(0, 1), key.transpose(0, 1)
        del query, key  # never beside what the next run takes
    query, key, value = parts.permute(1, 2, 0, 3)
    return query, key, value


def decode_int8(packed: Tensor, scale: Tensor, rotated: bool) -> Tensor:
    columns = k_quants.unpacked_columns(packed.shape[1], "Q4_K")
    values = torch.empty(packed.shape[0], columns, dtype=torch.int8, device=packed.device)
    for rows in row_runs(values.shape, DECODED_AT_ONCE):
        values[rows] = plain.decode_int8(packed[rows], scale[rows], rotated)
    return values


def epilogue(
    sums: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor
) -> None:
    """`plain.epilogue` into `out` (M, N)."""
    for rows in row_runs(sums.shape, WIDENED_AT_ONCE):
        out[rows] = plain.epilogue(sums[rows], row_scale[rows], scale, bias, dtype)


def _in_runs(make: Callable[[Tensor], Operand], x: Tensor, columns: int, input_format: InputFormat) -> Operand:
    """What `make` makes of runs of the rows of x, as one operand (M, columns)."""
    if input_format == "dense":
        dense = x.new_empty(len(x), columns)
        for rows in row_runs(x.shape, WIDENED_AT_ONCE):
            written = make(x[rows])
            assert isinstance(written, Tensor)
            dense[rows] = written
            del written  # never beside what the next run takes
        return dense
    made = QuantizedActivations(
        x.new_empty(len(x), columns, dtype=torch.int8), x.new_empty(len(x), 1, dtype=torch.float32)
    )
    for rows in row_runs(x.shape, WIDENED_AT_ONCE):
        part = make(x[rows])
        assert isinstance(part, QuantizedActivations)
        made.values[rows], made.scale[rows] = part.values, part.scale
        del part  # never beside what the next run takes
    return made
