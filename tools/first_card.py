"""The first ten minutes on a card: `python tools/first_card.py [--out FILE] [--budget 600] [--only NAME,NAME]`.

Runs, in the order in which an answer is worth most, everything that a machine without a card cannot show: the
self-check, seconds of streamed steps, the GPU tests, every recipe, what happens without a compiler and without Triton,
the benchmark, tiles, attention, and NVIDIA's own checkers. Each step is a process of its own with a limit of its own;
after every step the file is written, so it can be stopped anywhere, and what hangs costs its limit and no more. Files
that a step writes stand beside the report, in a folder of the report's name.

Left out: judging. A step passes by its exit code; what the numbers mean is for people, and `benchmarks/LOG.md`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.recipes import RECIPES  # noqa: E402
from ideogram_app.files import write_json  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.text import duration  # noqa: E402

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; from ideogram_app.__main__ import main; main()"
TAIL = 6000  # characters of what a step printed that are kept
RECIPES_DRAWN = "--recipes int8-w8a8-rotated,gguf-q4_k"
# What the words in braces of a command stand for; {out} is the folder for the files of the steps.
STANDS_FOR = {
    "{program}": "{python} -m ideogram_app",
    "{tests}": "{python} -m pytest -m gpu -q -p no:cacheprovider",
    "{compare}": "compare --model miniature --prompt circle --preset turbo-12",
    "{all}": ",".join(RECIPES),
}


@dataclass(frozen=True)
class Step:
    """One question to the card, for at most so many seconds."""

    name: str
    asks: str
    limit: float
    command: str
    environment: dict[str, str] = field(default_factory=dict)

    def words(self, folder: Path) -> list[str]:
        """The command, word by word."""
        command = self.command
        for name, text in STANDS_FOR.items():
            command = command.replace(name, text)
        inside = {"{python}": sys.executable, "{without_triton}": WITHOUT_TRITON}
        return [inside.get(word, word.replace("{out}", str(folder))) for word in command.split()]


NO_COMPILER = {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "TRITON_CACHE_DIR": "{out}/fresh-cache"}
STEPS = (
    Step("doctor", "what the machine is and what is planned for it", 60, "{program} doctor --json"),
    Step("check", "which kernels are true here, and how long the check takes", 120, "{program} check --json"),
    Step(
        "streamed",
        "seconds of a step resident, half streamed and streamed, and peaks beside the plan's, under caps",
        150,
        "{python} benchmarks/memory.py --sides 1024 --out {out}/memory.json",
    ),
    Step("kernels", "every kernel against plain torch", 120, "{tests} tests/kernels"),
    Step("devices", "pinned memory, resident = streamed = disk", 90, "{tests} tests/machine tests/model"),
    Step(
        "recipes",
        "one picture in every recipe",
        120,
        "{program} {compare} --recipes {all} --out {out}/sheet.png --json {out}/comparison.json",
    ),
    Step(
        "no compiler",
        "a machine without gcc: words, and pictures all the same",
        60,
        f"{{program}} {{compare}} {RECIPES_DRAWN} --out {{out}}/no-compiler.png",
        NO_COMPILER,
    ),
    Step(
        "no triton",
        "Windows without triton-windows: pictures all the same",
        60,
        f"{{python}} -c {{without_triton}} {{compare}} {RECIPES_DRAWN} --out {{out}}/no-triton.png",
    ),
    Step(
        "attention",
        "which backend is fastest and true at heads of 256",
        60,
        "{python} benchmarks/attention.py --out {out}/attention.json",
    ),
    Step(
        "benchmark",
        "a step of our recipes at the published shapes, 1024 x 1024",
        180,
        "{program} benchmark --shape ideogram-4 --recipes reference,int8-w8a8-rotated,gguf-q4_k --against none"
        " --budget 150 --out {out}/benchmark.json",
    ),
    Step(
        "tiles",
        "whether the table's tiles are the fastest",
        120,
        "{python} benchmarks/tiles.py --tokens 4396 --out {out}/tiles.json",
    ),
    Step(
        "stream races",
        "torch's own detector of races between streams",
        120,
        "{tests} tests/model/test_offload.py -k gpu_draws",
        {"TORCH_CUDA_SANITIZER": "1"},
    ),
    Step(
        "memory errors",
        "NVIDIA's compute-sanitizer over the row kernels",
        120,
        "compute-sanitizer --tool memcheck --error-exitcode 9 {tests} tests/kernels/test_fused_rows.py -k rounded",
    ),
)


def run_step(step: Step, folder: Path, limit: float) -> dict[str, Any]:
    """Run one step, with all that it starts, for at most `limit` seconds; what came of it, as plain values."""
    words = step.words(folder)
    environment = {name: text.replace("{out}", str(folder)) for name, text in step.environment.items()}
    began, output = time.monotonic(), folder / f"{step.name.replace(' ', '-')}.txt"
    row: dict[str, Any] = {"name": step.name, "asks": step.asks, "command": [Path(words[0]).name, *words[1:]]}
    with output.open("w+", encoding="utf-8", errors="replace") as printed:
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, **environment}, stdout=printed, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as problem:
            return row | {"exit": None, "seconds": 0.0, "problem": f"cannot be started: {problem.strerror}"}
        try:
            code: int | None = process.wait(limit)
            problem = ""
        except subprocess.TimeoutExpired:
            code, problem = None, f"stopped after its limit of {duration(limit)}"
        finally:
            stop(process)
        printed.seek(0)
        tail = printed.read()[-TAIL:]
    return row | {"exit": code, "seconds": time.monotonic() - began, "problem": problem, "output": tail}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step that is not over, and whatever it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def chosen(only: str) -> tuple[Step, ...]:
    """The steps of those names, in the order of the table; all where none is named."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    unknown = names - {step.name for step in STEPS}
    if unknown:
        raise typer.BadParameter(f"no step is called {', '.join(sorted(unknown))}; there are "
                                 + ", ".join(step.name for step in STEPS))  # fmt: skip
    return tuple(step for step in STEPS if not names or step.name in names)


def answers(steps: tuple[Step, ...], folder: Path, budget: float) -> Iterator[dict[str, Any]]:
    """A row for every step; those that the budget leaves no time for are named and not run."""
    end = time.monotonic() + budget
    for step in steps:
        left = end - time.monotonic()
        if left <= 0:
            yield {"name": step.name, "asks": step.asks, "exit": None, "seconds": 0.0, "problem": "no time was left"}
        else:
            yield run_step(step, folder, min(step.limit, left))


def main(
    out: Annotated[Path, typer.Option(help="The report; files of the steps go into a folder beside it.")] = Path(
        "first-card.json"
    ),
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 900.0,
    only: Annotated[str, typer.Option(help="Names of steps, with commas.")] = "",
) -> None:
    """Ask everything, and write after every answer."""
    steps = chosen(only)
    folder = out.absolute().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"versions": versions(), "commit": commit(), "finished": False, "steps": []}
    try:
        for row in answers(steps, folder, budget):
            report["steps"].append(row)
            write_json(out, report)
            mark = "passed" if row["exit"] == 0 else row["problem"] or f"exit {row['exit']}"
            print(f"{row['name']:<14} {duration(row['seconds']):>8}  {mark}", flush=True)
        report["finished"] = True
    except KeyboardInterrupt:
        print("Stopped; what was answered is kept.")
    write_json(out, report)
    failed = [row for row in report["steps"] if row["exit"] != 0]
    raise SystemExit(1 if failed or not report["finished"] else 0)


if __name__ == "__main__":
    typer.run(main)
