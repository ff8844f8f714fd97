"""Time tiles of the INT8 product at the true shapes: `python benchmarks/tiles.py`, a few minutes on any CUDA card.

The tiles of `kernels/fused/tiles.py` for this card and their neighbours, each for every matrix of a block and several
numbers of tokens, beside torch's INT8 product with the same scales and beside 16-bit weights. Every result is compared
with torch's INT8 product before it is timed. What a card has no room for is a row without a time.

One line a shape, one file in results/: medians and the spread between the fifth and the ninety-fifth percentile over
`seconds` of runs each, caches of the card cleared in between. `lost_percent` is what the table's tile is slower than
the best one found; the table wants a new row where it is much above the spread. Needs torch and triton alone. Left out:
a search over all tiles there are, and clocks and temperatures: let nothing else run on the card.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.kernels.contract import QuantizedActivations  # noqa: E402
from ideogram_app.kernels.fused import matmul  # noqa: E402
from ideogram_app.kernels.fused.tiles import Tile, choices_of, multiplies_int8, tile_for  # noqa: E402
from ideogram_app.machine.versions import commit  # noqa: E402

# Matrices of a block, (N, K), and tokens: 300 words and none beside 48 x 48, 64 x 64 and 128 x 128 of the picture.
MATRICES = {"qkv": (13824, 4608), "o": (4608, 4608), "w1, w3": (24576, 4608), "w2": (4608, 12288)}
TOKENS = (300, 1324, 2304, 2604, 4096, 4396, 16684)
CANDIDATES = (
    Tile(64, 128, 128, 8, 4, 4),
    Tile(64, 256, 64, 8, 4, 4),
    Tile(128, 128, 64, 8, 4, 4),
    Tile(128, 128, 64, 8, 4, 5),
    Tile(128, 128, 64, 8, 8, 4),
    Tile(128, 128, 128, 8, 4, 3),
    Tile(128, 128, 128, 8, 8, 3),
    Tile(128, 256, 32, 8, 8, 5),
    Tile(128, 256, 64, 8, 8, 3),
    Tile(128, 256, 64, 8, 8, 4),
    Tile(128, 256, 64, 4, 8, 4),
    Tile(128, 256, 64, 16, 8, 4),
    Tile(128, 256, 64, 8, 8, 5),
    Tile(128, 256, 128, 8, 8, 3),
    Tile(128, 256, 128, 8, 8, 4),
    Tile(256, 128, 64, 8, 8, 4),
    Tile(256, 128, 128, 8, 8, 3),
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tiles.json")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=0.2, help="of runs for one number")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a CUDA card, and there is none here.")
    card = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "device": card.name,
        "compute_capability": [card.major, card.minor],
        "multiprocessors": card.multi_processor_count,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "seconds": options.seconds,
        "rows": [],
    }
    print(f"{card.name}, {card.multi_processor_count} SMs")
    for m in options.tokens:
        for name, (n, k) in MATRICES.items():
            row = shape_row(name, m, n, k, (card.major, card.minor), options.seconds)
            report["rows"].append(row)
            print(line(row), flush=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def shape_row(name: str, m: int, n: int, k: int, card: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Every tile at one shape, and what it stands against."""
    x, weight, scale = operands(m, n, k)
    dense = torch.bfloat16 if card >= (8, 0) else torch.float16
    expected = matmul.int_mm(x, weight, scale, None, dense)
    row: dict[str, Any] = {"matrix": name, "m": m, "n": n, "k": k, "tiles": []}
    row["int_mm"] = timed(lambda: matmul.int_mm(x, weight, scale, None, dense), m * n * k, seconds)
    left, right = x.values.to(dense), weight.to(dense)
    row[str(dense).removeprefix("torch.")] = timed(lambda: functional.linear(left, right), m * n * k, seconds)
    if not multiplies_int8(card):
        return row
    chosen = tile_for(card, m, n)
    for tile in dict.fromkeys((*(choice.tile for choice in choices_of(card)), *CANDIDATES)):
        found = {**asdict(tile), "chosen": tile == chosen}
        row["tiles"].append(found | tile_time(tile, x, weight, scale, expected, seconds))
    times = {found["chosen"]: found["milliseconds"] for found in by_time(row)}
    if True in times:
        row["lost_percent"] = round(100 * (times[True] / by_time(row)[-1]["milliseconds"] - 1), 1)
    return row


def operands(m: int, n: int, k: int) -> tuple[QuantizedActivations, Tensor, Tensor]:
    """Random rows, weight and scale: what multiplies zeros draws less power than a model does."""
    x, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
    return QuantizedActivations(x, torch.rand(m, 1, device="cuda") * 1e-3), weight, torch.rand(n, device="cuda") * 1e-3


def tile_time(
    tile: Tile, x: QuantizedActivations, weight: Tensor, scale: Tensor, expected: Tensor, seconds: float
) -> dict[str, float | str]:
    """The time of one tile, or why there is none."""
    try:
        y = matmul.matmul_with(tile, x, weight, scale, None, expected.dtype)
    except OutOfResources as problem:
        return {"problem": str(problem)}
    if not torch.equal(y, expected):
        return {"problem": "another product than torch's"}
    work = x.values.numel() * weight.shape[0]
    return timed(lambda: matmul.matmul_with(tile, x, weight, scale, None, expected.dtype), work, seconds)


def timed(run: Any, multiply_adds: int, seconds: float) -> dict[str, float | str]:
    """Milliseconds, their spread in percent, and operations in units of 10^12 a second."""
    low, median, high = do_bench(run, warmup=25, rep=round(1000 * seconds), quantiles=[0.05, 0.5, 0.95])
    return {
        "milliseconds": round(median, 4),
        "spread_percent": round(100 * (high - low) / median, 1),
        "tera_operations": round(2 * multiply_adds / median / 1e9, 1),
    }


def by_time(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The tiles that ran, the fastest last."""
    return sorted(
        (found for found in row["tiles"] if "milliseconds" in found), key=lambda found: -found["milliseconds"]
    )


def line(row: dict[str, Any]) -> str:
    """A shape for people: torch's product, the table's tile, the best one."""
    shape = f"{row['matrix']:7} {row['m']:6} x {row['n']:5} x {row['k']:5}"
    text = f"{shape}  int_mm {row['int_mm']['milliseconds']:8.3f} ms"
    done = by_time(row)
    for label, chosen in (("table", [found for found in done if found["chosen"]]), ("best", done)):
        for found in chosen[-1:]:
            tile = "x".join(str(found[key]) for key in ("block_m", "block_n", "block_k"))
            rest = "/".join(str(found[key]) for key in ("group_m", "warps", "stages"))
            text += f"  {label} {tile}/{rest} {found['milliseconds']:8.3f} ms {found['tera_operations']:6.1f} Tera/s"
    return text + (f"  lost {row['lost_percent']} %" if "lost_percent" in row else "")


if __name__ == "__main__":
    main()
