"""Cases of the self-check: every kernel on the published widths, odd row counts and outliers, beside its truth.

    norm, add_norm, add, swiglu, quantize   by input format, 4608 and 12288 columns; 53248 for the text projection
    heads                                   18 heads of 256
    matmul                                  the five Linears; few rows, odd ones, and as many as take the largest tiles
    decode, decode_int8                     blocks of Q4_K with every bit pattern

Inputs are drawn on the host from fixed seeds, so that a case is the same on every machine; large weights on the device.
Left out: attention (self_check_attention.py); whole
blocks and the offload ring, which know the model (model/self_check_cases.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import MODELS
from ideogram_app.kernels import self_check_truths as truths
from ideogram_app.kernels.contract import InputFormat, Kernels, QuantizedActivations
from ideogram_app.kernels.self_check_truths import Truth, Verdict
from ideogram_app.quantization import int8, k_quants

EPSILON = 1e-5  # of every norm inside a block
OUTLIER_COLUMNS, OUTLIER = (7, -3), 60.0  # "massive activations": a few channels of a row, tens of times the rest
# oneDNN turns int8 rows into uint8 ones around 128 and takes 128 times the sum of the weights off again in float32,
# which holds whole numbers to 2^24: of the largest sum, so much is rounded away, for each number that is summed.
ROUNDED_AWAY_ON_A_CPU = 2.0**8 * 2.0**7 / 2.0**24


@dataclass(frozen=True)
class Sizes:
    """How large the trials are. The depth K of a product is always the true one; its columns end at `most_columns`."""

    rows: int  # odd: no multiple of any tile
    few_rows: int  # fewer than `torch._int_mm` takes on CUDA
    many_rows: int  # enough for the largest tiles
    timed_rows: int  # on a card those of 1024 x 1024 pixels and 300 words
    tokens: int  # of attention
    timed_tokens: int
    most_columns: int


ON_A_CARD = Sizes(301, 5, 2311, 4396, 333, 1301, 2**30)
ON_A_CPU = Sizes(33, 5, 0, 33, 77, 0, 1024)  # some seconds of one core


@dataclass(frozen=True)
class Trial:
    """prepare: what a candidate does once -> the work; judge: of what the work gives, None where it is only timed."""

    prepare: Callable[[Any], Callable[[], Any]]
    judge: Callable[[Any], Verdict] | None
    timed: bool = True


@dataclass(frozen=True)
class Case:
    """One kernel in one form. part: the attribute of `Kernels`, or a name of its own; variant: an input format or "".

    trials are made one after another, each freed before the next; timed: whether candidates are compared by time, or
    the first that is right is taken.
    """

    part: str
    variant: str
    trials: Callable[[], Iterator[Trial]]
    timed: bool = True

    @property
    def kernel(self) -> str:
        return f"{self.part}, {self.variant}" if self.variant else self.part


def kernel_cases(
    device: torch.device, dtype: torch.dtype, formats: Sequence[InputFormat], q4_k: Sequence[str] = ("int8", "dense")
) -> list[Case]:
    """Of everything in `Kernels` that runs with these input formats; q4_k: what its blocks are decoded to."""
    make = _Cases(device, dtype, sizes_for(device))
    cases = [Case("add", "", make.add), Case("heads", "", make.heads)]
    for each in formats:
        cases += [
            Case("norm", each, lambda each=each: make.norm(each)),  # type: ignore[misc]
            Case("add_norm", each, lambda each=each: make.add_norm(each)),  # type: ignore[misc]
            Case("swiglu", each, lambda each=each: make.swiglu(each)),  # type: ignore[misc]
        ]
        if each != "dense":
            cases.append(Case("quantize", each, lambda each=each: make.quantize(each)))  # type: ignore[misc]
    if any(each != "dense" for each in formats):
        cases.append(Case("matmul", "", lambda: make.matmul("int8" in formats)))
    if "int8" in q4_k:
        cases.append(Case("decode_int8", "", make.decode_int8))
    if "dense" in q4_k:
        cases.append(Case("decode", "", make.decode))
    return cases


def sizes_for(device: torch.device) -> Sizes:
    return ON_A_CPU if device.type == "cpu" else ON_A_CARD


class _Cases:
    """Makes trials for one device and computing type."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        model = MODELS["ideogram-4"].conditional
        self.hidden, self.inner, self.text = model.hidden_size, model.intermediate_size, model.llm_features_dim
        self.head, self.heads_count = model.attention_head_dim, model.num_attention_heads

    def rows(self, columns: int, seed: int, rows: int | None = None, size: float = 1.0) -> Tensor:
        """(rows, columns) with outliers, a row of zeros, one that is nearly silent and a loud one."""
        x = noise(rows or self.sizes.rows, columns, seed) * size
        x[:, list(OUTLIER_COLUMNS)] *= OUTLIER
        for row, factor in ((1, 0.0), (2, 1e-6), (3, 100.0)):
            x[row] *= factor
        return x.to(self.device, self.dtype)

    def vector(self, columns: int, seed: int) -> Tensor:
        return noise(1, columns, seed)[0].to(self.device)

    def both(
        self, inputs: tuple[Tensor, ...], run: Callable[..., Any], judge: Callable[[Any], Verdict]
    ) -> Iterator[Trial]:
        """`run(kernels, *inputs)` to be judged; then on as many rows as a picture has to be timed, for with few of them
        only launches would be."""
        apart = self.sizes.timed_rows > len(inputs[0])
        yield Trial(lambda kernels: lambda: run(kernels, *inputs), judge, timed=not apart)
        if apart:
            many = [_repeated(x, self.sizes.timed_rows) for x in inputs]
            yield Trial(lambda kernels: lambda: run(kernels, *many), None)

    def norm(self, each: InputFormat) -> Iterator[Trial]:
        x, vector = self.rows(self.hidden, 1), self.vector(self.hidden, 2)

        def judge(got: Any) -> Verdict:
            return truths.judge_operand(got, truths.norm_truth(x, vector, EPSILON), each)

        yield from self.both((x,), lambda kernels, rows: kernels.norm(rows, vector, EPSILON, each), judge)

    def add(self) -> Iterator[Trial]:
        hidden, update, gate = self.rows(self.hidden, 3), self.rows(self.hidden, 4), self.vector(self.hidden, 5)

        def run(kernels: Kernels, old: Tensor, change: Tensor) -> Tensor:
            return kernels.add(old.clone(), change, gate, EPSILON)  # kernels may write over the residual

        def judge(got: Any) -> Verdict:
            return truths.judge_dense(got, truths.add_truth(hidden, update, gate, EPSILON))

        yield from self.both((hidden, update), run, judge)

    def add_norm(self, each: InputFormat) -> Iterator[Trial]:
        hidden, update = self.rows(self.hidden, 6), self.rows(self.hidden, 7)
        gate, vector = self.vector(self.hidden, 8), self.vector(self.hidden, 9)

        def run(kernels: Kernels, old: Tensor, change: Tensor) -> Any:
            return kernels.add_norm(old.clone(), change, gate, vector, EPSILON, each)

        def judge(got: Any) -> Verdict:
            added, operand = got  # the norm is that of what was added and rounded, so of what came out
            return truths.first_wrong(
                lambda: truths.judge_dense(added, truths.add_truth(hidden, update, gate, EPSILON)),
                lambda: truths.judge_operand(operand, truths.norm_truth(added, vector, EPSILON), each),
            )

        yield from self.both((hidden, update), run, judge)

    def swiglu(self, each: InputFormat) -> Iterator[Trial]:
        gate_up = self.rows(2 * self.inner, 10, size=0.3)
        truth = cache(lambda: truths.swiglu_truth(gate_up))  # the candidates share it

        def judge(got: Any) -> Verdict:
            return truths.judge_operand(got, truth(), each)

        yield from self.both((gate_up,), lambda kernels, rows: kernels.swiglu(rows, each), judge)

    def quantize(self, each: InputFormat) -> Iterator[Trial]:
        """What attention mixed; of text features, of which a caption has few, only whether they are right."""
        x = self.rows(self.hidden, 11)

        def run(kernels: Kernels, rows: Tensor) -> Any:
            return kernels.quantize(rows, each)

        yield from self.both((x,), run, lambda got: truths.judge_operand(got, truths.exact_truth(x), each))
        if each == "int8":
            text = self.rows(self.text, 12, rows=17)
            judge = partial(truths.judge_operand, truth=truths.exact_truth(text), input_format=each)
            yield Trial(lambda kernels: lambda: run(kernels, text), judge, timed=False)

    def heads(self) -> Iterator[Trial]:
        qkv, half = self.rows(3 * self.hidden, 13), self.head // 2
        norms = self.vector(self.head, 14), self.vector(self.head, 15)
        angles = noise(self.sizes.rows, half, 16) * 3
        cos, sin = angles.cos().to(self.device), angles.sin().to(self.device)
        truth = cache(lambda: truths.heads_truth(qkv, *norms, cos, sin, EPSILON))

        def run(kernels: Kernels, rows: Tensor, cosines: Tensor, sines: Tensor) -> Any:
            return kernels.heads(rows.clone(), *norms, cosines, sines, EPSILON)

        def judge(got: Any) -> Verdict:
            pairs = zip(got, truth(), strict=True)
            return truths.first_wrong(*(partial(truths.judge_dense, made, truth) for made, truth in pairs))

        yield from self.both((qkv, cos, sin), run, judge)

    def matmul(self, with_text: bool) -> Iterator[Trial]:
        """The Linears (N, K) of a block, and the text projection where it is packed: the published shapes."""
        hidden, inner, sizes = self.hidden, self.inner, self.sizes
        shapes = [(3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
        for seed, (columns, depth) in enumerate(shapes, 20):
            yield self._product(sizes.rows, columns, depth, seed)
            if columns == depth:
                yield self._product(sizes.few_rows, columns, depth, seed)
                if sizes.many_rows:
                    yield self._product(sizes.many_rows, columns, depth, seed)
            if sizes.timed_rows != sizes.rows:
                yield self._product(sizes.timed_rows, columns, depth, seed, judged=False)
        if with_text:
            yield self._product(sizes.rows, hidden, self.text, 25, bias=True)

    def _product(
        self, rows: int, columns: int, depth: int, seed: int, bias: bool = False, judged: bool = True
    ) -> Trial:
        columns = min(columns, self.sizes.most_columns)
        generator = torch.Generator(self.device).manual_seed(seed)
        make = {"dtype": torch.int8, "device": self.device, "generator": generator}
        left = torch.randint(-128, 128, (rows, depth), **make)  # type: ignore[call-overload]
        weight = torch.randint(-127, 128, (columns, depth), **make)  # type: ignore[call-overload]
        left[1], left[2] = -128, 127  # the largest sums there are
        weight[0], weight[1], weight[-1] = -127, 127, 0
        scales = (noise(1, rows + columns, seed)[0].abs() * 1e-3 + 1e-4).to(self.device)
        x, scale = QuantizedActivations(left, scales[:rows, None].contiguous()), scales[rows:].contiguous()
        added = noise(1, columns, seed + 100)[0].to(self.device, self.dtype) if bias else None

        @cache
        def truth() -> Truth:
            inexact = depth * ROUNDED_AWAY_ON_A_CPU if self.device.type == "cpu" else 0.0
            return truths.product_truth(int8.int32_product(left, weight), x.scale, scale, added, inexact)

        def prepare(kernels: Kernels) -> Callable[[], Tensor]:
            own = kernels.weight(weight)
            return lambda: kernels.matmul(x, own, scale, added, self.dtype)

        timed = not judged or rows == self.sizes.timed_rows == self.sizes.rows
        return Trial(prepare, (lambda got: truths.judge_dense(got, truth())) if judged else None, timed)

    def decode_int8(self) -> Iterator[Trial]:
        packed = _q4_k(301, self.hidden, 30)
        exact = truths.rotated(_decoded(packed))
        scale = (exact.values.abs().amax(-1) / int8.WEIGHT_LEVELS).float()
        there, scales = packed.to(self.device), scale.to(self.device)
        yield Trial(
            lambda kernels: lambda: kernels.decode_int8(there, scales, True),
            lambda got: truths.judge_steps(got, exact, scale.double()[:, None]),
        )

    def decode(self) -> Iterator[Trial]:
        packed = _q4_k(301, self.hidden, 31)
        there, exact = packed.to(self.device), _decoded(packed)
        yield Trial(
            lambda kernels: lambda: kernels.decode(there, self.dtype),
            lambda got: truths.judge_dense(got, exact),
        )


def _repeated(x: Tensor, rows: int) -> Tensor:
    """(M, K) -> (rows, K), the same rows again and again."""
    return x.repeat(-(-rows // len(x)), 1)[:rows]


def noise(rows: int, columns: int, seed: int) -> Tensor:
    """float32 (rows, columns), on the host."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _q4_k(rows: int, columns: int, seed: int) -> Tensor:
    """uint8 (rows, bytes): any bits are a block, as long as its two steps are finite."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, columns // 256, 144), dtype=torch.uint8, generator=generator)
    steps = torch.rand(rows, columns // 256, 2, generator=generator) * 1e-3
    blocks[..., :4] = steps.half().view(torch.uint8)
    return blocks.flatten(1)


def _decoded(packed: Tensor) -> Truth:
    """In float32, which is exact but for the roundings of two products and a difference."""
    values = k_quants.decode(packed, "Q4_K").double()
    largest = values.unflatten(-1, (-1, 256)).abs().amax(-1, keepdim=True).expand(-1, -1, 256).flatten(1)
    return Truth.of(values, largest, truths.FEW_ROUNDINGS)
