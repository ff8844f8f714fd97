"""The kernels for processors: products are exact whatever multiplies, runs of rows compute what the whole would."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ideogram_app.kernels import plain, processor
from ideogram_app.kernels.contract import InputFormat, Operand, QuantizedActivations
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.kernels.processor import FLOAT, PROCESSOR_PRODUCTS, Product
from ideogram_app.model.transformer.layers import Int8Linear
from ideogram_app.quantization import k_quants

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
USABLE = [product for product in PROCESSOR_PRODUCTS if not processor.findings()[product.name]]
INPUT_FORMATS: tuple[InputFormat, ...] = ("dense", "int8", "rotated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = 1e-5
# Both sides round a handful of float32 operations and sums of up to 512 squares, in another order: 2^-24 each, of which
# far fewer than 32 add up. A narrower type may then fall on the other side of a middle: one unit of its last place.
CLOSE = 32 * 2.0**-24


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def exact(left: Tensor, right: Tensor) -> Tensor:
    """The product in NumPy's int64, rounded to float32 once."""
    product = left.numpy().astype(np.int64) @ right.numpy().astype(np.int64).T
    return torch.from_numpy(product.astype(np.float32))


def agree(ours: Operand, theirs: Operand, dtype: torch.dtype) -> None:
    """Dense numbers within `CLOSE` and one unit of the type, rounded ones within a step where they lie between two."""
    if isinstance(ours, QuantizedActivations):
        assert isinstance(theirs, QuantizedActivations)
        assert ours.values.dtype == torch.int8 and ours.scale.dtype == torch.float32
        # bfloat16 sums that fell on another side move a row's largest number, and all of its steps, by 2^-8.
        step = CLOSE if dtype == torch.float32 else torch.finfo(dtype).eps
        assert torch.allclose(ours.scale, theirs.scale, rtol=step, atol=0)
        apart = (ours.values.int() - theirs.values.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < (0.01 if dtype == torch.float32 else 0.1)
        return
    assert isinstance(theirs, Tensor) and ours.dtype == theirs.dtype == dtype
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    largest = float(theirs.float().abs().max())
    assert torch.allclose(ours.float(), theirs.float(), rtol=CLOSE + unit, atol=CLOSE * largest)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a few rows, the last one shorter."""
    monkeypatch.setattr(processor, "CACHE_CHUNK", 2**12)
    monkeypatch.setattr(processor, "DECODED_RUN", 2**12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize("product", USABLE, ids=lambda product: product.name)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1, 48, 256), (33, 129, 257), (70, 64, 4608), (2, 9, 12288)])
def test_products_are_exact_for_every_shape(product: Product, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    left, right, scale = whole(m, k), whole(n, k, seed=1), gaussian(n).abs() + 0.1
    assert torch.equal(product.multiply(left, product.prepare(right), scale), exact(left, right) * scale)


@pytest.mark.parametrize("product", USABLE, ids=lambda product: product.name)
@pytest.mark.parametrize("low, high", [(-128, 127), (-128, -127), (127, 127)])
@pytest.mark.parametrize("columns", [256, 768, 4608, 12288])
def test_the_largest_sums_do_not_overflow(product: Product, low: int, high: int, columns: int) -> None:
    left, right = torch.full((17, columns), low, dtype=torch.int8), torch.full((33, columns), high, dtype=torch.int8)
    made = product.multiply(left, product.prepare(right), torch.ones(33))
    assert torch.equal(made, torch.full((17, 33), float(low * high * columns)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 37])
def test_matmul_is_that_of_plain_torch(dtype: torch.dtype, biased: bool, tokens: int) -> None:
    values, scale = whole(96, 256, seed=1), gaussian(96, seed=2).abs() / 2000
    x = QuantizedActivations(whole(tokens, 256), gaussian(tokens, 1, seed=3).abs() / 100)
    bias = gaussian(96, seed=4) if biased else None
    kernels = processor.processor_kernels()
    ours = kernels.matmul(x, kernels.weight(values), scale, bias, dtype)
    agree(ours, plain.matmul(x, values, scale, bias, dtype), dtype)


@pytest.mark.parametrize("tokens", [5, 600])  # fewer than twice the columns, and more
def test_a_weight_that_serves_once_need_not_be_kept(tokens: int) -> None:
    values, scale, x = (
        whole(64, 256, seed=1),
        torch.full((64,), 0.01),
        QuantizedActivations(whole(tokens, 256), torch.ones(tokens, 1)),
    )
    kernels = processor.processor_kernels()
    kept = kernels.matmul(x, kernels.weight(values), scale, None, torch.float32)
    assert torch.equal(kernels.matmul(x, values, scale, None, torch.float32), kept)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_layer_computes_what_it_computes_in_plain_torch(rotated: bool) -> None:
    values, scale = whole(96, 256, seed=1), gaussian(96, seed=2).abs() / 2000
    x = gaussian(5, 7, 256)
    layers = [
        Int8Linear(values, scale, gaussian(96, seed=3), rotated=rotated, kernels=kernels)
        for kernels in (processor.processor_kernels(), PLAIN)
    ]
    ours, theirs = (layer(x) for layer in layers)
    # Of 256 rounded inputs one or two may lie between two steps: an error of a step, a hundredth of their spread.
    assert torch.allclose(ours, theirs, rtol=0, atol=0.01 * float(theirs.std()))


def test_a_kept_weight_takes_the_bytes_that_are_counted() -> None:
    values = whole(1536, 256)
    held = processor.held_bytes(processor.processor_kernels().weight(values))
    assert 1536 * 256 <= held <= 1536 * (256 + 8)
    assert processor.held_bytes(values) == 1536 * 256


@pytest.mark.parametrize(
    "found, name, words",
    [
        ({"prepacked": "", "int_mm": "", "float32": ""}, "prepacked", "exact"),
        ({"prepacked": "are not there", "int_mm": "", "float32": ""}, "int_mm", "prepacked are not there"),
        ({"prepacked": "are slow", "int_mm": "are not exact", "float32": ""}, "float32", "int_mm are not exact"),
        ({}, "float32", "float32"),
    ],
)
def test_the_first_product_without_a_fault_serves(found: dict[str, str], name: str, words: str) -> None:
    chosen, reason = processor.choose_product(found)
    assert chosen == name and words in reason


def test_the_kernels_name_their_product() -> None:
    chosen, _ = processor.choose_product(processor.findings())
    assert processor.processor_kernels().name == f"processor, {chosen}"
    assert processor.processor_kernels() is processor.processor_kernels()


def test_a_product_that_is_missing_wrong_or_slow_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-4  # what a product of that size takes
        return now[0]

    def missing(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError("no such operator")

    def saturating(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return FLOAT.multiply(values, weight, scale).clamp(max=2.0**22)

    def slow(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        now[0] += 0.1
        return FLOAT.multiply(values, weight, scale)

    monkeypatch.setattr(processor, "time", SimpleNamespace(perf_counter=clock))
    faults = [processor._judge(Product("", FLOAT.prepare, multiply)) for multiply in (missing, saturating, slow)]
    assert faults == ["are not there", "are not exact", "are slow"]
    assert processor._judge(FLOAT) == ""


CHILD = """
import numpy, torch
from ideogram_app.kernels.contract import QuantizedActivations
from ideogram_app.kernels.processor import choose_product, findings, processor_kernels
kernels = processor_kernels()
left, right = torch.full((32, 4608), 127, dtype=torch.int8), torch.full((64, 4608), 127, dtype=torch.int8)
rounded = QuantizedActivations(left, torch.ones(32, 1))
made = kernels.matmul(rounded, kernels.weight(right), torch.ones(64), None, torch.float32)
print(choose_product(findings())[0], bool((made == 127 * 127 * 4608).all()))
"""


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="instruction sets of x86")
@pytest.mark.parametrize("instructions", ["AVX2", "AVX2_VNNI"])
def test_older_processors_multiply_exactly_too(instructions: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    name, right = done.stdout.split()
    assert right == "True"
    if instructions == "AVX2":  # no VNNI: pairs of products overflow their 16 bits
        assert name == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_format", INPUT_FORMATS)
@pytest.mark.usefixtures("short_runs")
def test_what_stands_between_two_matrices_is_that_of_plain_torch(input_format: InputFormat, dtype: torch.dtype) -> None:
    hidden, update = gaussian(37, 512).to(dtype), (10 * gaussian(37, 512, seed=1)).to(dtype)
    gate, vector = gaussian(512, seed=2), gaussian(512, seed=3)
    agree(
        processor.norm(hidden, vector, EPSILON, input_format), plain.norm(hidden, vector, EPSILON, input_format), dtype
    )
    agree(processor.quantize(hidden, input_format), plain.quantize(hidden, input_format), dtype)
    agree(processor.swiglu(update, input_format), plain.swiglu(update, input_format), dtype)
    agree(processor.add(hidden, update, gate, EPSILON), plain.add(hidden, update, gate, EPSILON), dtype)
    ours = processor.add_norm(hidden, update, gate, vector, EPSILON, input_format)
    theirs = plain.add_norm(hidden, update, gate, vector, EPSILON, input_format)
    agree(ours[0], theirs[0], dtype)
    agree(ours[1], theirs[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("short_runs")
def test_heads_are_normed_and_turned_as_in_plain_torch(dtype: torch.dtype) -> None:
    qkv, norms, angles = gaussian(37, 3 * 4 * 64).to(dtype), gaussian(2, 64, seed=1), gaussian(37, 32, seed=2)
    given = (norms[0], norms[1], angles.cos(), angles.sin(), EPSILON)
    theirs = plain.heads(qkv.clone(), *given)
    for one, other in zip(processor.heads(qkv, *given), theirs, strict=True):
        assert one.shape == (4, 37, 64)
        agree(one, other, dtype)


@pytest.mark.parametrize("input_format", INPUT_FORMATS)
def test_the_length_of_a_run_changes_nothing(input_format: InputFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, vector = gaussian(64, 1024), gaussian(1024, seed=1)
    made: list[tuple[Operand, Operand]] = []
    for run in (2**10, 2**13, 2**20):
        monkeypatch.setattr(processor, "CACHE_CHUNK", run)
        made.append((processor.swiglu(gate_up, input_format), processor.norm(gate_up, vector, EPSILON, input_format)))
    for other in made[1:]:
        agree(other[0], made[0][0], torch.float32)
        agree(other[1], made[0][1], torch.float32)


@pytest.mark.parametrize("input_format", INPUT_FORMATS)
@pytest.mark.usefixtures("short_runs")
def test_inputs_are_left_as_they_were(input_format: InputFormat) -> None:
    hidden, update, vector = gaussian(37, 512), gaussian(37, 512, seed=1), gaussian(512, seed=2)
    processor.norm(hidden, vector, EPSILON, input_format)
    processor.quantize(hidden, input_format)
    processor.swiglu(hidden, input_format)
    processor.add(hidden, update, vector, EPSILON)
    processor.add_norm(hidden, update, vector, vector, EPSILON, input_format)
    assert torch.equal(hidden, gaussian(37, 512)) and torch.equal(update, gaussian(37, 512, seed=1))


@pytest.mark.parametrize("input_format", INPUT_FORMATS[1:])
def test_rows_of_zeros_stay_zeros(input_format: InputFormat) -> None:
    made = processor.quantize(torch.zeros(3, 256), input_format)
    assert isinstance(made, QuantizedActivations) and not made.values.any() and made.scale.isfinite().all()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.usefixtures("short_runs")
def test_q4_k_becomes_the_int8_of_plain_torch(rotated: bool) -> None:
    packed = k_quants.encode(gaussian(37, 512), "Q4_K")
    scale = k_quants.decode(packed, "Q4_K").abs().amax(-1) / 127
    ours, theirs = processor.decode_int8(packed, scale, rotated), plain.decode_int8(packed, scale, rotated)
    apart = (ours.int() - theirs.int()).abs()
    assert apart.max() <= (1 if rotated else 0)  # products of another number of rows may be summed in another order


@pytest.mark.parametrize(
    "logical, physical, allowed, count, words",
    [
        (16, 8, None, 8, "16 processors share"),
        (8, 8, None, 8, "one for each core"),
        (16, 8, 2.0, 2, "the time of 2 processors"),
        (16, 8, 2.5, 2, "2.5"),
        (16, 8, 0.5, 1, "0.5"),
        (4, 4, 64.0, 4, "one for each core"),
        (6, None, None, 6, "one for each core"),
        (None, None, None, 1, "one for each core"),
    ],
)
def test_threads_are_cores_or_what_a_container_is_given(
    logical: int | None, physical: int | None, allowed: float | None, count: int, words: str
) -> None:
    made, reason = processor.threads(logical, physical, allowed)
    assert made == count and words in reason
