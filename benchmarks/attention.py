"""Time attention's backends at this model's shapes: `python benchmarks/attention.py`, half a minute on any CUDA card.

18 heads of 256 without a mask, queries, keys and values strided as `kernels.heads` gives them, each backend of PyTorch
alone: milliseconds, teraflops, and the error against float64 on the processor for the first tokens. A backend that
refuses is a row with its words. Prints a line a row, writes one JSON file.

Left out: INT8 and FP8 attention, and the text encoder's grouped queries.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.files import write_json  # noqa: E402
from ideogram_app.kernels.attention import attend  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.microbench import fastest  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

HEADS, HEAD_DIM = 18, 256
TOKENS = (1324, 4396, 16684)  # 300 words beside 512 x 512, 1024 x 1024 and 2048 x 2048
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CHECKED = 64  # queries whose sums are held against float64
MATH_AT_MOST = 4396  # tokens: its scores are n x n, 18 times over


def strided(tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, each (H, M, D), views of one (M, 3 H D) as the fused projection leaves them."""
    generator = torch.Generator().manual_seed(tokens)
    joined = torch.randn(tokens, 3 * HEADS * HEAD_DIM, generator=generator).to(device, dtype)
    return tuple(joined.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(1, 2, 0, 3))


def measured(backend: SDPBackend, parts: tuple[Tensor, ...], seconds: float) -> dict[str, Any]:
    """One row."""
    query, key, value = parts
    tokens = query.shape[1]
    row: dict[str, Any] = {"backend": backend.name, "tokens": tokens}
    if backend is SDPBackend.MATH and tokens > MATH_AT_MOST:
        return row | {"problem": "left out: scores of n x n"}
    try:
        found = attend(query, key, value, (backend,))
        spent = fastest(lambda: attend(query, key, value, (backend,)), query.device, seconds)
    except RuntimeError as problem:
        return row | {"problem": str(problem).splitlines()[0]}
    exact = scaled_dot_product_attention(query[:, :CHECKED].double().cpu(), key.double().cpu(), value.double().cpu())
    exact = exact.transpose(0, 1).flatten(1)
    error = float((found[:CHECKED].double().cpu() - exact).norm() / exact.norm())
    operations = 4 * HEADS * HEAD_DIM * tokens**2
    return row | {"ms": spent * 1e3, "tflops": operations / spent / 1e12, "error": error}


def main(
    tokens: Annotated[str, typer.Option(help="Numbers with commas.")] = ",".join(map(str, TOKENS)),
    seconds: Annotated[float, typer.Option(help="Of runs for one number.")] = 0.5,
    out: Path = ROOT / "benchmarks" / "results" / "attention.json",
) -> None:
    """Measure and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for count in map(int, tokens.split(",")):
        parts = strided(count, device, dtype)
        for backend in BACKENDS:
            rows.append(measured(backend, parts, seconds))
            print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in
                            rows[-1].items()), flush=True)  # fmt: skip
    report = {"hardware": to_plain(detect(ROOT)), "versions": versions(), "commit": commit(), "dtype": str(dtype)}
    write_json(out, {**report, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
