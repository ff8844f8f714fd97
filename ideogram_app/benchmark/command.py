"""`python -m ideogram_app benchmark`: the flags, the table, one JSON line at the end.

Progress goes to standard error. The last line of standard output is the whole run as one JSON object; with `--out` it
is also written, indented, into a file or, under a name of its own, into a folder. Nothing is written otherwise. Exit
code 1 where a row failed; one that did not fit, or whose packages are missing, is no failure.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ideogram_app.benchmark.receipts import receipt_of_benchmark, write_receipt
from ideogram_app.benchmark.report import Benchmark, file_name, table
from ideogram_app.benchmark.rows import rows_for
from ideogram_app.benchmark.shapes import DTYPE_LABELS, ask, choose_dtype
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.errors import RequestError
from ideogram_app.files import data_folder, write_text
from ideogram_app.machine.clocks import read_clocks
from ideogram_app.machine.hardware import Hardware, detect
from ideogram_app.wire import to_json, to_plain

USUAL = ("int8-w8a8-rotated", "gguf-q4_k")


def benchmark(
    shape: Annotated[str, typer.Option(help="ideogram-4, miniature, or layers=N: the published widths.")] = "miniature",
    recipes: Annotated[
        str, typer.Option(help=f"With commas, as name[@w4a8 or @w4a16][+compiled]: {', '.join(RECIPES)}.")
    ] = ",".join(USUAL),
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 1024,
    steps: Annotated[int, typer.Option(help="That count, of each row; warm-up apart.")] = 4,
    text_tokens: Annotated[int, typer.Option(help="Of the caption.")] = 300,
    padding: Annotated[int, typer.Option(help="Text tokens that stock pads the caption to: its own default.")] = 2048,
    against: Annotated[str, typer.Option(help="stock, none, or names of stock rows with commas.")] = "stock",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or another as torch names it.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(DTYPE_LABELS)}.")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds for everything; rows are shortened or dropped to keep it.")] = (
        420.0
    ),
    out: Annotated[Path | None, typer.Option(help="A JSON file, or a folder in which it gets a name.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="A JSON file of it without names, to send to others.")] = None,
) -> None:
    """Time a step of our recipes beside stock diffusers, on the true shapes with random weights."""
    import torch

    from ideogram_app.benchmark.session import BenchmarkSession

    print("Looking at this machine ...", file=sys.stderr)
    hardware = detect(data_folder())
    chosen = torch.device(choose_device(hardware, device))
    computing, reason = choose_dtype(hardware, chosen.type, dtype)
    workload = ask(shape, size, text_tokens, padding, steps, computing)
    here = replace(hardware, kind="cpu") if chosen.type == "cpu" else hardware
    rows = rows_for([name.strip() for name in recipes.split(",") if name.strip()], against, computing, here)
    run = BenchmarkSession(workload, chosen, budget, lambda line: print(line, file=sys.stderr, flush=True))
    run.notes.append(reason)
    found = run.all(rows, hardware)
    print(table(found))
    if out:
        print(f"{_write(found, out)} written", file=sys.stderr)
    if receipt:
        write_receipt(receipt, receipt_of_benchmark(found, read_clocks()))
    print(json.dumps(to_plain(found), ensure_ascii=False), flush=True)
    if any(gone.failed for gone in found.missing):
        raise typer.Exit(1)


def choose_device(hardware: Hardware, asked: str) -> str:
    """The device as torch names it; RequestError where it is not there."""
    usable = "cuda" if hardware.kind == "rocm" else hardware.kind
    if asked == "auto":
        return f"{usable}:{hardware.device_index}" if hardware.device_index else usable
    if asked.split(":")[0] not in (usable, "cpu"):
        problem = f" {hardware.problem}" if hardware.problem else ""
        raise RequestError(f"There is no {asked!r:.40} here.{problem}", expected=f"auto, cpu or {usable}")
    return asked


def _write(found: Benchmark, out: Path) -> Path:
    path = out / file_name(found) if out.is_dir() or not out.suffix else out
    write_text(path, to_json(found) + "\n")
    return path
