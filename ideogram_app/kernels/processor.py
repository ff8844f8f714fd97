"""CPU kernels: INT8 products by oneDNN on prepacked weights, the rest in runs of rows that fit a cache.

    product     made of                                        exact and fast on (measured)
    prepacked   onednn.qlinear_pointwise on reordered weights  x86 with VNNI or AMX
    int_mm      torch._int_mm on weights as they come          x86 with VNNI or AMX
    float32     float32 products of whole numbers              everywhere

Without VNNI oneDNN adds pairs of products in 16 bits, which overflow silently; and types that it has no code for it
multiplies number by number, hundreds of times slower than float32. So each product is tried once, with the largest
numbers there are, and the first that is exact and fast serves. Its operands are those that have code everywhere: uint8
rows around a zero point of 128 (int8 rows on reordered weights need AMX) and float32 results (bfloat16 ones are
multiplied number by number where VNNI comes with AVX2).

What stands between two matrices is the arithmetic of plain.py, a run of rows after the other, each so short that what
lies between its first operation and its last one stays in the second-level cache: a third less time at the miniature's
widths, two thirds less at the published model's. One pass over the first-level cache, compiled by Numba, took up to a
third less again, for ten seconds of compilation and twice the code.

Left out: attention in a narrower type, which is most of a large picture's time, and computing in bfloat16, which with
AMX is ahead of INT8 where matrices are as narrow as the miniature's. Functions that say nothing of themselves do what
those of their names in plain.py do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ideogram_app.kernels import plain
from ideogram_app.kernels.contract import InputFormat, Kernels, Operand, QuantizedActivations
from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rotation import rotate
from ideogram_app.quantization.rows import EXACT_RUN

# Numbers that a run reads for each thread: 1 MB in float32. Of 2^15 to 2^19, from 2^17 on nearly all kernels are within
# a fifth of their best at (1054 and 4126, 256 to 1536) and (1024, 4608 to 24576). Second-level caches hold 0.5 to 2 MB.
CACHE_CHUNK = 2**18
DECODED_RUN = 2**19  # of weights: as fast at (4608, 4608), and a matrix of the miniature is one run
# Times as long as in float32: (32, 256) by (64, 256) takes oneDNN 770 where it has no code, 2 where it has.
SLOWEST = 10.0
# Reordering a weight that serves once costs 5 ns a number of it, `torch._int_mm` and its INT32 sums 2 to 3 ns a number
# of the result: worth it from so many rows for each column on.
ROWS_WORTH_REORDERING = 2
ZERO_POINT = 128  # of uint8 rows: int8 with its sign bit turned over


@dataclass(frozen=True)
class Product:
    """One way to multiply: (int8 (M, K), what `prepare` makes of int8 (N, K), scales (N,)) -> float32 (M, N)."""

    name: str
    prepare: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]


def processor_kernels() -> Kernels:
    """The kernels with the best product of this processor, which is looked for once."""
    return _kernels(choose_product(findings())[0])


def choose_product(found: Mapping[str, str]) -> tuple[str, str]:
    """The name of the product to use, and why; `found` is what `findings` gives."""
    rejected = [f"{name} {wrong}" for name, wrong in found.items() if wrong]
    name = next((name for name, wrong in found.items() if not wrong), FLOAT.name)
    return name, f"{name} products" + (f": {', '.join(rejected)}" if rejected else " are exact on this processor")


def held_bytes(weight: Tensor) -> int:
    """Bytes of what `Kernels.weight` made. Reordered weights fill up tiles of 64 x 64 and hold 4 bytes more a row."""
    if weight.is_mkldnn:
        return int(torch.ops.mkldnn._nbytes(weight))
    return weight.numel() * weight.element_size()


def threads(logical: int | None, physical: int | None, allowed: float | None) -> tuple[int, str]:
    """How many threads torch should use, and why.

    Args:
        logical, physical: processors and cores that this process may run on; None where unknown.
        allowed: processors' worth of time that a container may use (its quota / its period); None without a limit.
    """
    cores = physical or logical or 1
    if allowed is not None and allowed < cores:
        return max(1, int(allowed)), f"the container is given the time of {allowed:g} processors, of {cores}"
    if logical is not None and logical > cores:
        return cores, f"one for each core: {logical} processors share the multipliers of {cores}"
    return cores, "one for each core"


def norm(x: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat) -> Operand:
    return _in_runs(lambda part: _normed(part, epsilon).mul_(vector), (x,), input_format)


def add_norm(
    hidden: Tensor, update: Tensor, gate: Tensor, vector: Tensor, epsilon: float, input_format: InputFormat
) -> tuple[Tensor, Operand]:
    made = torch.empty_like(hidden)

    def both(old: Tensor, change: Tensor, new: Tensor) -> Tensor:
        new.copy_(_normed(change, epsilon).mul_(gate).add_(old))
        return _normed(new, epsilon).mul_(vector)

    return made, _in_runs(both, (hidden, update, made), input_format)


def add(hidden: Tensor, update: Tensor, gate: Tensor, epsilon: float) -> Tensor:
    return _normed(update, epsilon).mul_(gate).add_(hidden).to(hidden.dtype)


def swiglu(gate_up: Tensor, input_format: InputFormat) -> Operand:
    def mixed(part: Tensor) -> Tensor:
        gate, up = part.float().chunk(2, -1)
        return functional.silu(gate).mul_(up)

    return _in_runs(mixed, (gate_up,), input_format)


def quantize(x: Tensor, input_format: InputFormat) -> Operand:
    return (
        x if input_format == "dense" else _in_runs(lambda part: part.to(torch.float32, copy=True), (x,), input_format)
    )


def heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain.heads`, in place of q and k.

    PyTorch's attention reads v again and again: where its rows stand side by side, (4, 4126, 64) takes 148 ms a thread
    in place of 154, and the copy half a millisecond. For q and k it makes no difference.
    """
    parts = qkv.unflatten(-1, (3, -1, norm_q.shape[0]))  # (M, 3, H, D)
    weights = torch.stack((norm_q, norm_k)).unsqueeze(1)
    run = _rows_of(CACHE_CHUNK, qkv.shape[1])
    for part, cosines, sines in zip(parts[:, :2].split(run), cos.split(run), sin.split(run), strict=True):
        cosines, sines = cosines[:, None, None], sines[:, None, None]
        first, second = _normed(part, epsilon).mul_(weights).chunk(2, -1)
        turned_first, turned_second = part.chunk(2, -1)
        turned_first.copy_((first * cosines).sub_(second * sines))
        turned_second.copy_((second * cosines).add_(first * sines))
    query, key, value = parts.permute(1, 2, 0, 3)
    return query, key, value.contiguous()


def decode_int8(packed: Tensor, scale: Tensor, rotated: bool) -> Tensor:
    columns = k_quants.unpacked_columns(packed.shape[1], "Q4_K")
    values, run = torch.empty(packed.shape[0], columns, dtype=torch.int8), _rows_of(DECODED_RUN, columns)
    for part, step, target in zip(packed.split(run), scale.split(run), values.split(run), strict=True):
        target.copy_(plain.decode_int8(part, step, rotated))
    return values


def _in_runs(make: Callable[..., Tensor], given: tuple[Tensor, ...], input_format: InputFormat) -> Operand:
    """An operand of what `make` makes, float32 (m, K) in a tensor of its own, of all these in runs of m rows."""
    length, dtype = len(given[0]), given[0].dtype
    # A dense float32 result is itself what temporaries would be, and joining its runs is one pass more.
    run = length if input_format == "dense" and dtype == torch.float32 else _rows_of(CACHE_CHUNK, given[0].shape[1])
    parts = [_operand(make(*part), dtype, input_format) for part in zip(*(x.split(run) for x in given), strict=True)]
    if len(parts) == 1:
        return parts[0]
    rounded = [part for part in parts if isinstance(part, QuantizedActivations)]
    if rounded:
        return QuantizedActivations(
            torch.cat([part.values for part in rounded]), torch.cat([part.scale for part in rounded])
        )
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _operand(x: Tensor, dtype: torch.dtype, input_format: InputFormat) -> Operand:
    """float32 (m, K), overwritten: `int8.quantize_tokens` in place, whose two reductions never write |x|."""
    if input_format == "dense":
        return x.to(dtype)
    x = rotate(x) if input_format == "rotated" else x
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    scale = largest.div_(int8.ACTIVATION_LEVELS).clamp_(min=int8.SMALLEST_ACTIVATION_SCALE)
    return QuantizedActivations(x.mul_(1.0 / scale).round_().clamp_(max=127).to(torch.int8), scale)


def _normed(x: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) along the last axis, in float32, in a tensor of its own."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * torch.rsqrt(length.square_().div_(x.shape[-1]).add_(epsilon))


def _rows_of(numbers: int, columns: int) -> int:
    """Rows of a run that is to read so many numbers for each thread, at least one."""
    return max(1, numbers * torch.get_num_threads() // columns)


def _multiply_prepacked(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight that was not reordered is one that serves once."""
    if not weight.is_mkldnn:
        if len(values) < ROWS_WORTH_REORDERING * values.shape[1] and not findings()["int_mm"]:
            return _multiply_int_mm(values, weight, scale)
        weight = _prepack(weight)
    turned = values.view(torch.uint8) ^ ZERO_POINT
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        turned, 1.0, ZERO_POINT, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _multiply_int_mm(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch._int_mm(values, weight.t()).float().mul_(scale)


def _multiply_float(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if values.shape[1] <= EXACT_RUN:
        return functional.linear(values.float(), weight.float()).mul_(scale)
    return int8.int32_product(values, weight).float().mul_(scale)


def _prepack(weight: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(weight, None)


FLOAT = Product("float32", plain.weight, _multiply_float)
PROCESSOR_PRODUCTS = (
    Product("prepacked", _prepack, _multiply_prepacked),
    Product("int_mm", plain.weight, _multiply_int_mm),
    FLOAT,
)


@cache
def findings() -> dict[str, str]:
    """What is wrong with each product on this processor, "" where nothing is."""
    return {product.name: _judge(product) for product in PROCESSOR_PRODUCTS}


def _judge(product: Product) -> str:
    """Small products against the time that float32 takes, then the largest sums there are against the truth."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-128, 128, (32, 256), dtype=torch.int8, generator=generator)
    right = torch.randint(-127, 128, (64, 256), dtype=torch.int8, generator=generator)
    try:
        if _best_seconds(product, left, right) > SLOWEST * _best_seconds(FLOAT, left, right):
            return "are slow"
        for low, high in ((-128, 127), (127, 127), (-128, -127)):
            left, right = torch.full((32, 4608), low, dtype=torch.int8), torch.full((64, 4608), high, dtype=torch.int8)
            made = product.multiply(left, product.prepare(right), torch.ones(64))
            if not torch.equal(made, torch.full((32, 64), float(low * high * 4608))):
                return "are not exact"
    except (AttributeError, RuntimeError):  # an operator that this PyTorch was built without
        return "are not there"
    return ""


def _best_seconds(product: Product, left: Tensor, right: Tensor) -> float:
    weight, scale, best = product.prepare(right), torch.ones(len(right)), float("inf")
    for _ in range(4):  # the first one builds the code
        began = time.perf_counter()
        product.multiply(left, weight, scale)
        best = min(best, time.perf_counter() - began)
    return best


def _matmul(
    product: Product, x: QuantizedActivations, weight: Any, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`plain.matmul`, up to the order of the two scales."""
    y = product.multiply(x.values, weight, scale).mul_(x.scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


@cache
def _kernels(name: str) -> Kernels:
    product = next(product for product in PROCESSOR_PRODUCTS if product.name == name)
    return replace(
        plain.PLAIN,
        name=f"processor, {name}",
        norm=norm,
        add_norm=add_norm,
        add=add,
        swiglu=swiglu,
        quantize=quantize,
        heads=heads,
        weight=product.prepare,
        matmul=partial(_matmul, product),
        decode_int8=decode_int8,
    )
