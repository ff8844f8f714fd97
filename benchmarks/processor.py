"""How fast a processor multiplies INT8, and what that leaves of a block: `python benchmarks/processor.py`, 4 minutes.

    products   one matrix: float32, bfloat16, and every INT8 product of `kernels/processor.py`
    between    what stands between two matrices: plain.py against processor.py
    attention  `scaled_dot_product_attention` by type, backend and the order of its operands in memory
    q4_k       one Q4_K matrix decoded at every use: to float32, bfloat16, or INT8
    blocks     a whole block of the miniature, by size of the picture, storage, computing type and kernels

Blocks are the table that is measured with several threads too. Those in float32 are measured once more in processes of
their own: with older instructions only, and with threads that sleep while they wait for each other. Rounds visit every
case of a table in turn, so that a drift of the machine's speed meets all of them; a first round warms up and is not
counted. `ms` is the median time on the clock, of the samples that no other program interrupted where there are three of
them; `cpu_ms` and `least_cpu_ms` are the median and the least of all threads' processor time, which other programs
disturb less: read them at one thread, and at more to see what waiting for each other costs.

Prints tables and one JSON line, writes one JSON file. Left out: Windows, which does not count interruptions.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.checkpoints.prepared.packed_file import PackedWeight  # noqa: E402
from ideogram_app.kernels import plain, processor  # noqa: E402
from ideogram_app.kernels.contract import InputFormat, Kernels, QuantizedActivations  # noqa: E402
from ideogram_app.kernels.plain import PLAIN  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.model.transformer.backbone import Block  # noqa: E402
from ideogram_app.model.transformer.layers import W4A8, merged  # noqa: E402
from ideogram_app.quantization import int8, k_quants  # noqa: E402
from ideogram_app.quantization.rotation import rotate  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
HIDDEN, WIDE, HEADS, HEAD = 256, 768, 4, 64  # the miniature's blocks
TOKENS = {"128 x 128": 94, "512 x 512": 1054, "1024 x 1024": 4126}  # 30 of text
LARGER = (TOKENS["512 x 512"], TOKENS["1024 x 1024"])
# (M, N, K): qkv, o, w1 over w3 and w2 of the miniature at 1024 x 1024, then o of the published model at 512 x 512.
MATRICES = ((4126, 768, 256), (4126, 256, 256), (4126, 1536, 256), (4126, 256, 768), (1024, 4608, 4608))
EPSILON = 1e-5
SAMPLE_SECONDS = 0.004  # short calls are repeated for so long: longer ones are interrupted more often
LONG_SECONDS = 0.1  # of calls that take longer, three rounds must do
# Processes of their own: environment, threads. What processors without this one's instructions would run: of oneDNN
# (products), MKL (float32 products) and torch (the rest). What threads of OpenMP do while they wait: spin, or sleep.
AVX2_OF_THE_REST = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
APART: dict[str, tuple[dict[str, str], int]] = {
    "AVX2 with VNNI": ({"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", **AVX2_OF_THE_REST}, 1),
    "AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2", **AVX2_OF_THE_REST}, 1),
    "two threads that spin": ({}, 2),
    "two threads that sleep": ({"OMP_WAIT_POLICY": "PASSIVE"}, 2),
}
# Name, storage, computing type, arithmetic of Q4_K.
STORAGES = (
    ("float32", "dense", F32, ""),
    ("bfloat16", "dense", BF16, ""),
    ("int8, float32", "int8", F32, ""),
    ("int8, bfloat16", "int8", BF16, ""),
    ("rotated int8, float32", "rotated", F32, ""),
    ("q4_k w4a16, float32", "gguf", F32, ""),
    ("q4_k w4a8, float32", "gguf", F32, W4A8),
)
INPUT_FORMATS: tuple[InputFormat, ...] = ("dense", "int8", "rotated")
SECTIONS = "products,between,attention,q4_k,blocks,apart"

Call = Callable[[], Any]
Tables = Iterator[tuple[str, dict[str, Call]]]  # shape, and what is compared at it
attend = functional.scaled_dot_product_attention


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one that warms up.")] = 5,
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas.")] = "1,2",
    sections: Annotated[str, typer.Option(help="Tables, with commas.")] = SECTIONS,
    out: Path = Path("benchmarks/results/processor.json"),
) -> None:
    """Measure and write."""
    chosen, rows, before = sections.split(","), [], os.getloadavg()
    for table in (name for name in TABLES if name in chosen):
        for count in threads.split(",") if table.startswith("blocks") else ["1"]:
            torch.set_num_threads(int(count))
            for shape, calls in TABLES[table]():
                rows += race({"table": table, "shape": shape, "threads": int(count)}, calls, rounds)
    report = {
        "hardware": to_plain(detect(ROOT)),
        "versions": versions(),
        "commit": commit(),
        "rounds": rounds,
        "load": {"before": before, "after": os.getloadavg()},
        "product": processor.choose_product(processor.findings())[1],
        "kept_weights": kept_weights(),
        "rows": rows,
        "apart": {name: apart(*about, rounds) for name, about in APART.items()} if "apart" in chosen else {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows}))


@torch.inference_mode()
def race(about: dict[str, Any], calls: dict[str, Call], rounds: int) -> list[dict[str, Any]]:
    """A row for each call; prints them."""
    samples: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        seconds = sample(call, 1)[0]
        repeats[name] = max(1, int(SAMPLE_SECONDS / seconds)) if seconds < LONG_SECONDS else 0
    for turn in range(rounds):
        for name, call in calls.items():
            if repeats[name] or turn < 3:
                samples[name].append(sample(call, max(1, repeats[name])))
    return [row({**about, "name": name}, found) for name, found in samples.items()]


def sample(call: Call, repeats: int) -> tuple[float, float, bool]:
    """Seconds a call on the clock and of all threads' processor time, and whether no other program came between."""
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    began, used = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    seconds, busy = time.perf_counter() - began, time.process_time() - used
    undisturbed = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == switches
    return seconds / repeats, busy / repeats, undisturbed


def row(about: dict[str, Any], found: list[tuple[float, float, bool]]) -> dict[str, Any]:
    clean = [seconds for seconds, _, undisturbed in found if undisturbed]
    clock = clean if len(clean) >= 3 else [seconds for seconds, _, _ in found]
    milliseconds = round(1e3 * statistics.median(clock), 4)
    times = [1e3 * seconds for _, seconds, _ in found]
    busy, least = round(statistics.median(times), 4), round(min(times), 4)
    print(
        f"{about['table']:9s} {about['shape']:20s} {about['threads']} {about['name']:36s} {milliseconds:10.3f} ms"
        f" {busy:10.3f} cpu {least:10.3f} least  {len(clean)}/{len(found)}"
    )
    counts = {"samples": len(found), "undisturbed": len(clean)}
    return {**about, "ms": milliseconds, "cpu_ms": busy, "least_cpu_ms": least, **counts}


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def whole(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def products() -> Tables:
    for m, n, k in MATRICES:
        values, weight, row_scale, scale = whole(m, k), whole(n, k), torch.full((m, 1), 0.01), torch.full((n,), 0.01)
        calls: dict[str, Call] = {
            "float32": partial(functional.linear, values.float(), weight.float()),
            "bfloat16": partial(functional.linear, values.to(BF16), weight.to(BF16)),
            "keep": partial(processor.processor_kernels().weight, weight),
        }
        for product in processor.PROCESSOR_PRODUCTS:
            if not processor.findings()[product.name]:
                given = (product, QuantizedActivations(values, row_scale), product.prepare(weight), scale, None, F32)
                calls[f"int8 {product.name}"] = partial(processor._matmul, *given)
        calls["int8 plain"] = partial(plain.matmul, QuantizedActivations(values, row_scale), weight, scale, None, F32)
        yield f"{m} x {n} x {k}", calls


def kept_weights() -> list[dict[str, int]]:
    """Bytes of weights as they are kept."""
    keep = processor.processor_kernels().weight
    shapes = [(n, k) for _, n, k in MATRICES]
    return [{"rows": n, "columns": k, "held": processor.held_bytes(keep(whole(n, k)))} for n, k in shapes]


def between() -> Tables:
    shapes = [(tokens, HEADS, HEAD, WIDE) for tokens in LARGER]
    for tokens, heads, head, wide in (*shapes, (1024, 18, 256, 12288)):  # the last one is the published model's
        hidden, gate_up = gaussian(tokens, heads * head), gaussian(tokens, 2 * wide)
        qkv, angles = gaussian(tokens, 3 * heads * head), gaussian(tokens, head // 2)
        vector, ones = gaussian(heads * head), torch.ones(head)
        calls: dict[str, Call] = {}
        for kernels in (PLAIN, processor.processor_kernels()):
            for input_format in INPUT_FORMATS:
                given = (vector, EPSILON, input_format)
                calls[f"norm {input_format}, {kernels.name}"] = partial(kernels.norm, hidden, *given)
                calls[f"add_norm {input_format}, {kernels.name}"] = partial(
                    kernels.add_norm, hidden, hidden, vector, *given
                )
                calls[f"swiglu {input_format}, {kernels.name}"] = partial(kernels.swiglu, gate_up, input_format)
                if input_format != "dense":
                    calls[f"quantize {row}"] = partial(kernels.quantize, hidden, input_format)
            calls[f"heads, {kernels.name}"] = partial(turned, kernels, qkv, ones, ones, angles, angles, EPSILON)
        yield f"{tokens} x {heads * head}", calls


def turned(kernels: Kernels, qkv: Tensor, *given: Any) -> Any:
    """A copy is turned, for what was turned in place before would be turned again."""
    return kernels.heads(qkv.clone(), *given)


def attention() -> Tables:
    for tokens in LARGER:
        calls: dict[str, Call] = {}
        for name, dtype in (("float32", F32), ("bfloat16", BF16)):
            strided = gaussian(tokens, 3 * HIDDEN).to(dtype).unflatten(-1, (3, 1, HEADS, HEAD)).permute(1, 2, 3, 0, 4)
            close = strided.contiguous()  # each (1, H, M, D)
            calls[f"{name}, strided"] = partial(attend, *strided)
            calls[f"{name}, v contiguous"] = partial(attend, *strided[:2], close[2])
            calls[f"{name}, all contiguous"] = partial(attend, *close)
            if tokens < 2000:
                calls[f"{name}, three axes"] = partial(attend, *close[:, 0])
                calls[f"{name}, math"] = partial(by_math, *close)
        yield str(tokens), calls


def by_math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return attend(query, key, value)


def q4_k() -> Tables:
    for m, n, k in ((1054, 1536, 256), (4126, 1536, 256), (1024, 4608, 4608)):
        x, scale = gaussian(m, k), torch.full((n,), 0.03)
        packed = k_quants.encode(gaussian(1536, k), "Q4_K").repeat(n // 1536, 1)
        rows = plain.quantize(x, "rotated")
        calls: dict[str, Call] = {}
        for kernels in (PLAIN, processor.processor_kernels()):
            calls[f"decode, {kernels.name}"] = partial(kernels.decode, packed, F32)
            calls[f"decode_int8, {kernels.name}"] = partial(kernels.decode_int8, packed, scale, True)
            calls[f"float32, {kernels.name}"] = partial(decoded, kernels, x, packed)
            calls[f"bfloat16, {kernels.name}"] = partial(decoded, kernels, x.to(BF16), packed)
            calls[f"int8, {kernels.name}"] = partial(decoded_int8, kernels, rows, packed, scale)
        yield f"{m} x {n} x {k}", calls


def decoded(kernels: Kernels, x: Tensor, packed: Tensor) -> Tensor:
    return functional.linear(x, kernels.decode(packed, x.dtype))


def decoded_int8(kernels: Kernels, rows: QuantizedActivations, packed: Tensor, scale: Tensor) -> Tensor:
    return kernels.matmul(rows, kernels.decode_int8(packed, scale, True), scale, None, F32)


def blocks(sizes: Iterable[int] = TOKENS.values(), dtypes: tuple[torch.dtype, ...] = (F32, BF16)) -> Tables:
    for tokens in sizes:
        calls: dict[str, Call] = {}
        for name, storage, dtype, arithmetic in (each for each in STORAGES if each[2] in dtypes):
            for kernels in (PLAIN, processor.processor_kernels()):
                calls[f"{name}, {kernels.name}"] = block_call(tokens, storage, dtype, kernels, arithmetic)
        yield str(tokens), calls


def block_call(tokens: int, storage: str, dtype: torch.dtype, kernels: Kernels, arithmetic: str) -> Call:
    """A norm and the block behind it, on random weights."""
    matrices = [(HIDDEN, HIDDEN)] * 4 + [(WIDE, HIDDEN)] * 2 + [(HIDDEN, WIDE)]
    weights = [pack(gaussian(n, k) * k**-0.5, storage) for n, k in matrices]
    parts = [merged(weights[a:b], dtype, kernels, arithmetic) for a, b in ((0, 3), (3, 4), (4, 6), (6, 7))]
    block = Block(parts[0], torch.ones(HEAD), torch.ones(HEAD), *parts[1:])
    hidden, vectors, angles = gaussian(tokens, HIDDEN).to(dtype), gaussian(4, HIDDEN), gaussian(tokens, HEAD // 2)
    prepared: Any = SimpleNamespace(cos=angles.cos(), sin=angles.sin())
    input_format: InputFormat = block.qkv.input_format

    def call() -> Tensor:
        x = kernels.norm(hidden, vectors[0], EPSILON, input_format)
        return block(hidden, x, vectors, vectors[1], input_format, prepared, kernels, ())[0]

    return call


def pack(weight: Tensor, storage: str) -> Tensor | PackedWeight:
    if storage == "dense":
        return weight
    if storage == "gguf":
        return PackedWeight("gguf", k_quants.encode(weight, "Q4_K"), None, "Q4_K", False)
    values, scale = int8.quantize_rows(rotate(weight) if storage == "rotated" else weight)
    return PackedWeight("int8", values, scale, "", storage == "rotated")


def apart(environment: dict[str, str], threads: int, rounds: int) -> dict[str, Any]:
    """The blocks in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "apart.json"
        command = [sys.executable, __file__, "--sections", "blocks apart", "--threads", str(threads)]
        everything = {**os.environ, **environment}
        subprocess.run([*command, "--rounds", str(rounds), "--out", str(out)], env=everything, cwd=ROOT, check=True)
        report = json.loads(out.read_text(encoding="utf-8"))
    return {"environment": environment, "product": report["product"], "rows": report["rows"]}


TABLES: dict[str, Callable[[], Tables]] = {
    "products": products,
    "between": between,
    "attention": attention,
    "q4_k": q4_k,
    "blocks": blocks,
    "blocks apart": partial(blocks, (TOKENS["128 x 128"], TOKENS["512 x 512"]), (F32,)),
}

if __name__ == "__main__":
    typer.run(main)
