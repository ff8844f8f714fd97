"""INT8 matrix product (W8A8) in Triton: rows times weights, both scales and the bias, in one launch.

    y[m, n] = sum_k x[m, k] * w[n, k]  *  row_scale[m] * scale[n]  +  bias[n]

The sum is exact in INT32: 12288 products of -128 * -128 are 2e8. The weight stays (N, K) in row order and is read as
the second factor column by column, which is the order the matrix instructions want: nothing is transposed or copied.
Every program makes one tile of the result; programs of a group share the tiles of the weight while these are in the
second-level cache. Which tile: `tiles.py`, a table. The number of rows is a run-time argument that is specialised on
nothing, so another prompt length never compiles anything.

Scales and bias are applied in the order of `kernels.plain`, each result rounded, so the numbers are the same to the
last bit. Two more functions serve cards whose INT8 product Triton cannot compile (Turing): `int_mm` is torch's product,
a run of rows at a time, and `epilogue` the scales; the sums pass through memory between the two.

A card without room for a tile (`OutOfResources` at its first launch) gets a smaller one, and is not asked again.

Left out: search at run time, split or streamed K (`tiles.py` says why), float scales per group of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ideogram_app.kernels import runs, torch_products
from ideogram_app.kernels.contract import QuantizedActivations
from ideogram_app.kernels.fused.signature import Compilable
from ideogram_app.kernels.fused.tiles import Capability, Tile, choices_of, multiplies_int8, smaller_tiles, tile_for

INTERPRETED: Capability = (8, 6)  # whose tiles the interpreter takes; it has no hardware
EPILOGUE_COLUMNS = 1024  # of one program of `epilogue`: two loads of 16 bytes for each of 128 threads


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One tile. x: (M, K); weight: (N, K); row_scale: (M,); scale, bias: (N,); out: (M, N)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + program % (GROUP_M * tiles_n) % height
    tile_n = program % (GROUP_M * tiles_n) // height

    # Bases in 64 bits, offsets inside a tile in 32: M * N passes 2^31 at 87,000 rows of the widest matrix.
    first_row, first_column = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    x_ptr += first_row * K
    weight_ptr += first_column * K
    # Rows and columns past the edge read the last one again: no mask in the loop, and the store leaves them out.
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    rows_left = (M - first_row).to(tl.int32)
    columns_left = (N - first_column).to(tl.int32)
    safe_row = tl.minimum(row, rows_left - 1)
    safe_column = tl.minimum(column, columns_left - 1)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + safe_row[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + safe_column[None, :] * K + k[:, None]

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            left = K - step * BLOCK_K
            x = tl.load(x_ptrs, mask=k[None, :] < left, other=0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < left, other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    row_scale = tl.load(row_scale_ptr + first_row + safe_row)
    scale = tl.load(scale_ptr + first_column + safe_column)
    y = sums.to(tl.float32) * row_scale[:, None] * scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + first_column + safe_column).to(tl.float32)[None, :]
    out_ptrs = out_ptr + first_row * N + first_column + row[:, None] * N + column[None, :]
    inside = (row[:, None] < rows_left) & (column[None, :] < columns_left)
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def epilogue_kernel(
    sums_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """BLOCK_N columns of one row. sums, out: (M, N); row_scale: (M,); scale, bias: (N,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    sums = tl.load(sums_ptr + row * N + column, mask=inside, other=0)
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
    y = sums.to(tl.float32) * tl.load(row_scale_ptr + row) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass
class Matmul:
    """`matmul`, which remembers the tiles that a card refused: one set of `Kernels` asks for each once."""

    _refused: set[tuple[torch.device, Tile]] = field(default_factory=set, repr=False)

    def __call__(
        self, x: QuantizedActivations, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        m, n, device = x.values.shape[0], values.shape[0], values.device
        capability = torch.cuda.get_device_capability(device) if values.is_cuda else INTERPRETED
        amd = values.is_cuda and torch.version.hip is not None
        first = tile_for(capability, m, n, amd)
        tiles = [first, *smaller_tiles(choices_of(capability, amd), first)]
        for tile in tiles:
            if (device, tile) in self._refused and tile is not tiles[-1]:
                continue
            try:
                return matmul_with(tile, x, values, scale, bias, dtype)
            except OutOfResources:  # more shared memory or threads than this card gives a program
                if tile is tiles[-1]:
                    raise
                self._refused.add((device, tile))
        raise AssertionError("there is always a last tile")


def matmul(x: QuantizedActivations, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """INT8 (M, K) times INT8 (N, K), summed exactly, with scales and bias: (M, N) of `dtype`.

    All contiguous; K and N are multiples of 16 for 16-byte loads, other values are right but slow. A card that has no
    room for a tile gets the next smaller one. Raises DeviceError on NVIDIA cards older than compute capability 8.0.
    """
    return Matmul()(x, values, scale, bias, dtype)


def matmul_with(
    tile: Tile, x: QuantizedActivations, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`matmul` by a tile of the caller's choice."""
    (m, k), n = x.values.shape, values.shape[0]
    out = torch.empty(m, n, dtype=dtype, device=values.device)
    programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    launch |= _constants(tile, k, bias is not None)
    matmul_kernel[(programs,)](
        x.values, values, x.scale, scale, scale if bias is None else bias, out, m, n, k, **launch
    )
    return out


def int_mm(x: QuantizedActivations, values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`matmul` by torch's own INT8 product and `epilogue`, for cards whose INT8 product Triton cannot compile."""
    finish: torch_products.Finish = epilogue if values.is_cuda else runs.epilogue
    return torch_products.int_mm(x, values, scale, bias, dtype, finish)


def epilogue(
    sums: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """INT32 sums (M, N) to numbers: times row_scale (M, 1) and scale (N,), plus bias (N,); into `out` if given."""
    m, n = sums.shape
    out = torch.empty(m, n, dtype=dtype, device=sums.device) if out is None else out
    launch = {"HAS_BIAS": bias is not None, "BLOCK_N": EPILOGUE_COLUMNS, "enable_fp_fusion": False}
    grid = m, triton.cdiv(n, EPILOGUE_COLUMNS)
    epilogue_kernel[grid](sums, row_scale, scale, scale if bias is None else bias, out, n, **launch)
    return out


def _constants(tile: Tile, k: int, has_bias: bool) -> dict[str, int | bool]:
    """Everything the machine code of `matmul_kernel` depends on besides types and tile."""
    return {
        "HAS_BIAS": has_bias,
        "EVEN_K": k % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }


def signatures(capability: Capability, amd: bool = False) -> Iterator[Compilable]:
    """What runs on cards of a capability: every tile of its table, the last one also with bias and a ragged K."""
    scales = {"row_scale_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": "*fp32"}
    if amd or multiplies_int8(capability):
        types = {"x_ptr": "*i8", "weight_ptr": "*i8", **scales, "M": "i32", "N": "i32", "K": "i32"}
        tiles = [choice.tile for choice in choices_of(capability, amd)]
        variants = [(tile, 0, False, "bf16") for tile in tiles]
        variants += [(tiles[-1], 1, True, "bf16"), (tiles[-1], 0, False, "fp16")]
        for tile, left, has_bias, kind in variants:
            size = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
            name = f"matmul, {size}{', bias, ragged K' if has_bias else ''}, {kind}"
            constants = _constants(tile, tile.block_k + left, has_bias)
            signature = {**types, "out_ptr": f"*{kind}"}
            launch = {"warps": tile.warps, "stages": tile.stages}
            yield Compilable(name, matmul_kernel, signature, constants, fuses=False, **launch)
    constants = {"HAS_BIAS": False, "BLOCK_N": EPILOGUE_COLUMNS}
    for kind in ("bf16", "fp16"):
        signature = {"sums_ptr": "*i32", **scales, "out_ptr": f"*{kind}", "N": "i32"}
        yield Compilable(f"epilogue, {kind}", epilogue_kernel, signature, constants, fuses=False)
