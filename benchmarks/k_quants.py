"""How fast and how close the GGUF encoders are: `python benchmarks/k_quants.py`, on a machine that does nothing else.

    speed    Mweights/s of bf16 matrices into packed rows, plain torch and compiled, for each number of threads
    error    relative RMSE in % on Gaussian, Student-t5 and the miniature's trained weights, beside the algorithm of
             llama.cpp (`llama_search.py`; for Q8_0, which has nothing to search, gguf-py)
    output   relative error in % of a layer's output where its input channels have energies over four orders of
             magnitude, without and with importance

Rounds visit every format, search and number of threads in turn, so that a drift of the machine's speed meets all of
them; a first round compiles and warms up and is not counted. Before anything is timed, both searches must give the
same bytes.
Prints a table and one JSON line, writes one JSON file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import gguf
import numba
import numpy as np
import safetensors.torch
import torch
import typer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.llama_search import requantize  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.quantization import k_quants  # noqa: E402
from ideogram_app.quantization.k_fast import NUMBA  # noqa: E402
from ideogram_app.quantization.k_search import TORCH, Search  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

FORMATS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
COLUMNS = 4608  # the width of Ideogram 4's transformers
ROWS = {"numba": 3640, "torch": 455}  # 16.8 and 2.1 million weights
BLOCK_WEIGHTS = 17.3e9  # in the blocks of both transformers: what `gguf-q4_k` packs
MINIATURE = ROOT / "assets/miniature/transformer/diffusion_pytorch_model.safetensors"


def main(
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one that warms up.")] = 5,
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas.")] = "1,2",
    out: Path = Path("benchmarks/results/k-quants-cpu.json"),
) -> None:
    """Measure and write."""
    check_same_bytes()
    speeds = measure_speed(rounds, [int(count) for count in threads.split(",")])
    errors = measure_errors()
    rows = [{"name": gguf_type, "speed": speeds[gguf_type], **errors[gguf_type]} for gguf_type in FORMATS]
    report = {
        "hardware": to_plain(detect(ROOT)),
        "versions": {**versions(), "numba": numba.__version__},
        "commit": commit(),
        "rounds": rounds,
        "rows": rows,
    }
    for row in rows:
        print_row(row)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows}))


def check_same_bytes() -> None:
    """Stop where the compiled search differs from its truth."""
    for draw in (gaussian, student):
        weight = draw(64, COLUMNS)
        for gguf_type in FORMATS:
            for importance in (None, energies(COLUMNS)):
                plain, fast = (k_quants.encode(weight, gguf_type, importance, search) for search in (TORCH, NUMBA))
                if not torch.equal(plain, fast):
                    raise SystemExit(f"{gguf_type}: Numba and torch give different bytes")


def measure_speed(rounds: int, threads: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Medians over the rounds; spread is (largest - smallest) / median."""
    sources = {name: gaussian(rows, COLUMNS).bfloat16() for name, rows in ROWS.items()}
    cases = [(gguf_type, search, count) for gguf_type in FORMATS for search in (NUMBA, TORCH) for count in threads]
    found: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for gguf_type, search, count in cases:
            speed = time_once(sources[search.name], gguf_type, search, count)
            if turn:
                found.setdefault((gguf_type, search.name, count), []).append(speed)
    made: dict[str, list[dict[str, Any]]] = {gguf_type: [] for gguf_type in FORMATS}
    for (gguf_type, name, count), values in found.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        made[gguf_type].append({"search": name, "threads": count, "mweights_per_second": median, "spread": spread})
    return made


def time_once(weight: Tensor, gguf_type: str, search: Search, threads: int) -> float:
    """Mweights/s of one call."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    k_quants.encode(weight, gguf_type, search=search)
    return weight.numel() / (time.perf_counter() - began) / 1e6


def measure_errors() -> dict[str, dict[str, Any]]:
    """Relative errors in %: ours and theirs for each kind of weights, the output's with and without importance."""
    kinds = {"gaussian": gaussian(1024, COLUMNS), "student-t5": student(1024, COLUMNS), "miniature": trained()}
    importance = energies(COLUMNS)
    made = {}
    for gguf_type in FORMATS:
        errors = {}
        for kind, weight in kinds.items():
            errors[kind] = {
                "ours": relative_error(weight, encoded(weight, gguf_type)),
                "llama.cpp": relative_error(weight, theirs(weight, gguf_type)),
            }
        weight = kinds["student-t5"]
        output = {
            name: relative_error(weight, encoded(weight, gguf_type, given), importance)
            for name, given in (("without", None), ("with", importance))
        }
        output["llama.cpp without"] = relative_error(weight, theirs(weight, gguf_type), importance)
        made[gguf_type] = {"rmse_percent": errors, "output_error_percent": output}
    return made


def encoded(weight: Tensor, gguf_type: str, importance: Tensor | None = None) -> Tensor:
    return k_quants.decode(k_quants.encode(weight, gguf_type, importance), gguf_type)


def theirs(weight: Tensor, gguf_type: str) -> Tensor:
    if gguf_type != "Q8_0":
        return torch.from_numpy(requantize(weight.numpy(), gguf_type))
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))


def relative_error(weight: Tensor, made: Tensor, importance: Tensor | None = None) -> float:
    """In %: of the weights, or of `weight @ x` for inputs of these mean squares that are independent of each other."""
    scale = 1.0 if importance is None else importance.sqrt()
    return 100 * float(((made - weight) * scale).norm() / (weight * scale).norm())


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def student(rows: int, columns: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(5, (rows, columns)).astype(np.float32)) * 0.02


def energies(columns: int) -> Tensor:
    return torch.exp(2 * torch.randn(columns, generator=torch.Generator().manual_seed(1)))


def trained() -> Tensor:
    """The matrices of the miniature whose rows are whole blocks, as rows of 256."""
    found = [tensor.float() for tensor in safetensors.torch.load_file(MINIATURE).values() if tensor.dim() == 2]
    return torch.cat([tensor.reshape(-1, 256) for tensor in found if tensor.shape[1] % 256 == 0])


def print_row(row: dict[str, Any]) -> None:
    print(row["name"])
    for speed in row["speed"]:
        minutes = BLOCK_WEIGHTS / speed["mweights_per_second"] / 60e6
        print(
            f"  {speed['search']:5s} {speed['threads']} threads  {speed['mweights_per_second']:7.1f} Mweights/s"
            f"  +-{50 * speed['spread']:.0f} %  all blocks in {minutes:.1f} min"
        )
    for kind, error in row["rmse_percent"].items():
        print(f"  {kind:12s} {error['ours']:.3f} %, llama.cpp {error['llama.cpp']:.3f} %")
    output = row["output_error_percent"]
    print("  output       " + ", ".join(f"{name} {value:.3f} %" for name, value in output.items()))


if __name__ == "__main__":
    typer.run(main)
