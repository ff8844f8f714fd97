"""Quantizing at full size: seconds, weights a second, peak memory, and what ten kills change.

    python tools/make_replica.py --layout fp8-fused --size full --out /somewhere/source
    python benchmarks/quantize.py --source /somewhere/source --recipes gguf-q4_k,int8-w8a8 --kills 10

Every recipe runs as the command `python -m ideogram_app quantize` in a process of its own, whose resident memory is
sampled from outside and whose own peak the operating system reports when it ends. Once it runs undisturbed; then it is
killed with SIGKILL as many times as asked, at moments drawn over the time that the undisturbed run took, and left to
finish: the hashes of all weights must be the same. Outputs are deleted once their hashes are known, so the disk needs
the source and one output.

Run it alone: other work on the machine shows in every number. Left out: the GPU, unless --device names one.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.machine.hardware import detect  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

SAMPLING_SECONDS = 0.05
BOUND_BYTES = 2_500_000_000  # what the process may hold at most
RSS_UNIT = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True)
class Run:
    """One process: its exit code, seconds, highest resident memory as sampled, and what it printed."""

    code: int
    seconds: float
    sampled_bytes: int
    output: str


def main(
    source: Annotated[Path, typer.Option(help="Weights in any layout the program reads.")],
    recipes: str = "gguf-q4_k,int8-w8a8",
    kills: Annotated[int, typer.Option(help="How often the second run is killed; 0 leaves it out.")] = 0,
    unconditional: Path | None = None,
    device: str = "cpu",
    work: Annotated[Path | None, typer.Option(help="Where outputs go; a temporary folder beside the source.")] = None,
    keep: Annotated[bool, typer.Option(help="Leave the undisturbed outputs there.")] = False,
    seed: int = 0,
    out: Path = Path("benchmarks/results/quantize-full-cpu.json"),
) -> None:
    """Measure and write."""
    folder = work or Path(tempfile.mkdtemp(prefix="quantize-", dir=source.resolve().parent))
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        for recipe in recipes.split(","):
            command = [sys.executable, "-m", "ideogram_app", "quantize", str(source), "--recipe", recipe]
            command += ["--device", device, "--json"] + (
                ["--unconditional", str(unconditional)] if unconditional else []
            )
            rows.append(measured(command, recipe, folder, kills, keep, random.Random(seed)))
            print(summary(rows[-1]), flush=True)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    report = {
        "hardware": to_plain(detect(source)),
        "versions": versions(),
        "commit": commit(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "source_bytes": sum(path.stat().st_size for path in source.rglob("*") if path.is_file()),
        # Of all processes so far, so of the largest; the operating system's own count, which no spike escapes.
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT,
        "rows": rows,
    }
    report["within_bound"] = report["peak_resident_bytes"] <= BOUND_BYTES
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows, "peak_resident_bytes": report["peak_resident_bytes"]}))


def measured(
    command: list[str], recipe: str, folder: Path, kills: int, keep: bool, chance: random.Random
) -> dict[str, Any]:
    """One recipe, undisturbed and then killed."""
    undisturbed = finished(run([*command, "--out", str(folder / recipe)]))
    report = json.loads(undisturbed.output)
    row = {
        "recipe": recipe,
        "seconds": report["seconds"],
        "seconds_with_start": undisturbed.seconds,
        "passes": report["passes"],
        "weights": report["weights"],
        "weights_per_second": report["weights_per_second"],
        "weights_per_second_overall": report["weights"] / report["seconds"],
        "peak_resident_bytes_sampled": max(undisturbed.sampled_bytes, report["peak_resident_bytes"]),
        "bytes_written": sum(file["size"] for file in report["files"]),
        "smoke": report["smoke"],
        "sha256": weights_of(report),
    }
    if not keep:
        shutil.rmtree(folder / recipe)
    if kills:
        row["killed"] = killed(command, folder / f"{recipe}-killed", kills, undisturbed.seconds, chance)
        row["killed"]["same_hashes"] = row["killed"].pop("sha256") == row["sha256"]
    return row


def killed(command: list[str], out: Path, kills: int, seconds: float, chance: random.Random) -> dict[str, Any]:
    """Kill a run again and again, let it finish, and say what came of it.

    Every life lasts a random share of the time that an undisturbed run would need for as many lives.
    """
    lives: list[Run] = []
    while len(lives) < kills:
        lives.append(run([*command, "--out", str(out)], kill_after=chance.uniform(0.2, 2) * seconds / (kills + 1)))
        if lives[-1].code == 0:  # done before its time: nothing is left to kill
            break
    last = lives.pop() if lives and lives[-1].code == 0 else finished(run([*command, "--out", str(out)]))
    report = json.loads(last.output)
    shutil.rmtree(out)
    return {
        "kills": len(lives),
        "seconds": sum(life.seconds for life in lives) + last.seconds,
        "kept_by_the_last": report["kept"],
        "peak_resident_bytes_sampled": max(life.sampled_bytes for life in [*lives, last]),
        "sha256": weights_of(report),
    }


def run(command: list[str], kill_after: float | None = None) -> Run:
    """Run a command in the project's folder, watch its memory, and kill it after so many seconds."""
    started, highest = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    printed: list[str] = []
    reader = threading.Thread(target=lambda: printed.append(process.stdout.read() if process.stdout else ""))
    reader.start()
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        if kill_after is not None and time.monotonic() - started > kill_after:
            process.kill()
        try:
            highest = max(highest, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(SAMPLING_SECONDS)
    code = process.wait()
    reader.join()
    return Run(code, time.monotonic() - started, highest, "".join(printed))


def finished(done: Run) -> Run:
    """The same, unless it failed; its own words are on standard error."""
    if done.code:
        raise SystemExit(f"The command ended with {done.code}")
    return done


def weights_of(report: dict[str, Any]) -> dict[str, str]:
    """Hash of every file but the notice, which names the day."""
    return {file["path"]: file["sha256"] for file in report["files"] if file["path"] != "NOTICE"}


def summary(row: dict[str, Any]) -> str:
    speed = f"{row['weights_per_second'] / 1e6:6.1f} M weights/s"
    line = (
        f"{row['recipe']:<18} {row['seconds']:7.1f} s {speed}, peak {row['peak_resident_bytes_sampled'] / 1e9:.2f} GB"
    )
    if "killed" in row:
        same = "the same hashes" if row["killed"]["same_hashes"] else "OTHER HASHES"
        line += f"; killed {row['killed']['kills']} times: {same} after {row['killed']['seconds']:.1f} s in all"
    return line


if __name__ == "__main__":
    typer.run(main)
