"""How fast weights come from disk, beside the disk itself: `python benchmarks/loading.py`, on a machine at rest.

    disk      the file read from its beginning to its end into one buffer of 16 MB: what there is to be had
    one       tensor by tensor, each when it is asked for, into memory of its own (`SafetensorsFile.tensor`)
    host      prefetched into the host memory in which the weights stay
    ring      prefetched through staging buffers, as towards a device; the copies to the device, which its own engine
              does beside the reading, are left out

The file has the published model's blocks in INT8, 254.8 MB each. Every run is a process of its own, whose memory is as
new as that of a program that has just been started; starting it is not counted. Before every run that counts as cold,
the system is told to forget the file (`POSIX_FADV_DONTNEED`); below it may lie caches that nobody can clear from here,
so `disk` is measured in the same rounds, and shares of it are what counts. A first round is not counted.
Prints a table and one JSON line, writes one JSON file.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.models import find_model  # noqa: E402
from ideogram_app.checkpoints.prefetch import Prefetcher, prefetched  # noqa: E402
from ideogram_app.checkpoints.safetensors import SafetensorsFile, SafetensorsTensor, layout  # noqa: E402
from ideogram_app.checkpoints.span import Span  # noqa: E402
from ideogram_app.machine.copies import BlockingCopyStream, Event  # noqa: E402
from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.staging import BUFFERS, CHUNK  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

LEAST_SHARE = 0.7  # of the disk's rate
Way = Callable[[Path, Sequence[Span]], None]


def main(
    blocks: Annotated[int, typer.Option(help="Blocks of the published model in the file.")] = 12,
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one that is not.")] = 5,
    out: Path = Path("benchmarks/results/loading.json"),
    way: Annotated[str, typer.Option(hidden=True)] = "",
    file: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure and write."""
    if way:
        print(run_once(way, file))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write(path, blocks)
        size = path.stat().st_size
        rates = {kind: measure(path, size, rounds, forget) for kind, forget in (("cold", True), ("warm", False))}
    rows = [{"name": name, **{kind: row(rates[kind][name], rates[kind]["disk"]) for kind in rates}} for name in WAYS]
    report = {
        "hardware": to_plain(detect(ROOT)),
        "versions": versions(),
        "commit": commit(),
        "rounds": rounds,
        "bytes": size,
        "chunk_bytes": CHUNK,
        "buffers": BUFFERS,
        "least_share": LEAST_SHARE,
        "rows": rows,
    }
    for made in rows:
        print(f"{made['name']:5s}" + "".join(f"  {kind} {shown(made[kind])}" for kind in rates))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows}))


def write(path: Path, blocks: int) -> None:
    """A file of INT8 matrices with random bytes, on the disk and not only on its way there."""
    branch = find_model("ideogram-4").branches[0]
    inside = [linear for linear in branch.linears() if linear.name.startswith("layers.0.")]
    names = {
        linear.name.replace("layers.0.", f"layers.{index}."): (linear.rows, linear.columns)
        for index in range(blocks)
        for linear in inside
    }
    header, placed = layout([SafetensorsTensor(f"{name}.weight", "I8", shape) for name, shape in names.items()], {})
    noise = torch.randint(-128, 128, (2**26,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    with path.open("wb") as file:
        file.write(header)
        left = sum(info.size for info in placed.values())
        while left:
            left -= file.write(noise[: min(left, len(noise))].numpy().data)
        file.flush()
        os.fsync(file.fileno())


def measure(path: Path, size: int, rounds: int, forget: bool) -> dict[str, list[float]]:
    """Bytes per second of each way, in each round; the ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name in WAYS:
            if forget:
                forget_file(path)
            command = [sys.executable, __file__, "--way", name, "--file", str(path)]
            seconds = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            if turn:
                found[name].append(size / seconds)
    return found


def run_once(way: str, path: Path) -> float:
    """Seconds that one way takes in this process."""
    torch.set_num_threads(1)
    file = SafetensorsFile(path)
    spans = [file.span(name) for name in file.infos]
    began = time.perf_counter()
    WAYS[way](path, spans)
    return time.perf_counter() - began


def forget_file(path: Path) -> None:
    """Have the system drop what it keeps of a file."""
    if not hasattr(os, "posix_fadvise"):
        raise SystemExit("This system cannot be told to forget a file; measure on Linux")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_disk(path: Path, spans: Sequence[Span]) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_one_by_one(path: Path, spans: Sequence[Span]) -> None:
    kept = [span.read() for span in spans]
    assert len(kept) == len(spans)


def read_to_host(path: Path, spans: Sequence[Span]) -> None:
    with prefetched(spans, "cpu") as reader:
        kept = [reader(span) for span in spans]
    assert len(kept) == len(spans)


def read_through_ring(path: Path, spans: Sequence[Span]) -> None:
    with Prefetcher(spans, DeviceElsewhere(spans)) as prefetcher:
        for span in spans:
            prefetcher.take(span)


class DeviceElsewhere(BlockingCopyStream):
    """A device to which copies cost this processor nothing."""

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__(torch.device("cpu"))
        self.in_place = False
        self._memory = torch.empty(max(span.size for span in spans), dtype=torch.uint8)

    def device_buffer(self, size: int) -> Tensor:
        return self._memory[:size]

    def pinned_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        return None


WAYS: dict[str, Way] = {
    "disk": read_disk,
    "one": read_one_by_one,
    "host": read_to_host,
    "ring": read_through_ring,
}


def row(rates: list[float], disk: list[float]) -> dict[str, float]:
    """Median and spread, (largest - smallest) / median, in GB/s, and the share of the disk's median."""
    median = statistics.median(rates)
    spread = (max(rates) - min(rates)) / median
    return {"gb_s": median / 1e9, "spread": spread, "share": median / statistics.median(disk)}


def shown(made: dict[str, Any]) -> str:
    return f"{made['gb_s']:5.2f} GB/s +-{50 * made['spread']:.0f} % ({made['share']:.2f} of the disk)"


if __name__ == "__main__":
    typer.run(main)
