"""SHA-256 of what the program makes, in one file: the yardstick of changes that must change nothing.

    python tools/golden.py --write             make everything and record it in tools/golden.json
    python tools/golden.py [--keep FOLDER]     make everything again, print what differs; exit code 1 if anything does

What is recorded: every file of the miniature packed in all recipes, one picture per recipe, what a result says of it,
the JSON of `plan` for cards as they are sold, and the help of every command. Everything is made by the command line in
processes of its own, so the yardstick does not know how the program is built inside and survives its rebuilding.

Left out: times, dates, peaks of memory and paths, which differ from run to run. Pictures depend on the processor's
arithmetic: compare only on the machine that wrote the file (`machine` in it says which).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.cards import CARDS, described  # noqa: E402

RECORD = ROOT / "tools" / "golden.json"
RECIPES = (
    "reference",
    "fp8",
    "int8-w8a8-naive",
    "int8-w8a8-smooth",
    "int8-w8a8-protected",
    "int8-w8a8",
    "int8-w8a8-rotated",
    "gguf-q8_0",
    "gguf-q4_k",
)
COMMANDS = ("doctor", "plan", "prepare", "quantize", "calibrate", "generate", "compare", "benchmark")
CAPTIONS = ROOT / "assets" / "prompts" / "calibration-miniature.jsonl"
# The width of help, its default folders, and the order in which a sum is made.
SAME_EVERYWHERE = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "OMP_NUM_THREADS": "1"} | {
    "IDEOGRAM_APP_DATA": "/data",
    "IDEOGRAM_APP_OUTPUT_DIR": "/outputs",
}
VARYING = {"created", "app_version", "changed", "source"}  # of a manifest: dates, version, where the source lay
# Of a result: what a clock or a meter says, and paths.
MEASURED = {"seconds", "seconds_per_step", "image", "versions", "warm"} | {
    f"{prefix}_bytes" for prefix in ("peak_memory", "peak_device", "peak_device_reserved", "peak_host")
}


def run(*arguments: str, folder: Path | None = None) -> str:
    """The standard output of a command of the program, with paths of this machine taken out."""
    environment = {**os.environ, **SAME_EVERYWHERE}
    answer = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with {answer.returncode}:\n{answer.stderr}")
    text = answer.stdout.replace(str(ROOT), "ROOT")
    return text.replace(str(folder), "FOLDER") if folder else text


def command(*arguments: str, folder: Path | None = None) -> str:
    return run("-m", "ideogram_app", *arguments, folder=folder)


def without(value: Any, names: set[str]) -> Any:
    """A JSON value without the fields of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def helps() -> dict[str, str]:
    made = {f"help/{name}": command(name, "--help") for name in COMMANDS}
    return {"help": command("--help"), "help/app.py": run("app.py", "--help"), **made}


def plans(work: Path) -> dict[str, str]:
    """The JSON of `plan` for every card."""
    made = {}
    for card in CARDS:
        file = work / "machine.json"
        file.write_text(json.dumps(described(card)), encoding="utf-8")
        name = f"plan/{card[4]} x {card[0]}, {card[2]} GB, RAM {card[3]} GB"
        made[name] = command("plan", "--hardware", str(file), "--json")
    return made


def packed(data: Path) -> dict[str, str | bytes]:
    """Every file that preparing all recipes of the miniature makes."""
    made: dict[str, str | bytes] = {}
    for path in sorted(path for path in (data / "checkpoints").rglob("*") if path.is_file()):
        name = f"packed/{path.relative_to(data / 'checkpoints').as_posix()}"
        content = path.read_bytes()
        if path.name == "manifest.json":
            content = json.dumps(without(json.loads(content), VARYING), indent=1).encode()
        made[name] = content
    return made


def pictures(data: Path, work: Path) -> dict[str, str | bytes]:
    """One picture per recipe, by its pixels, and what its result says of itself."""
    numbers, output = work / "numbers.json", work / "outputs"
    caption, names = CAPTIONS.read_text(encoding="utf-8").splitlines()[0], ",".join(RECIPES)
    where = ("--data-dir", str(data), "--output-dir", str(output))
    command("compare", "--prompt", caption, "--recipes", names, "--preset", "turbo-12", "--json", str(numbers), *where)
    comparison = json.loads(numbers.read_text(encoding="utf-8"))
    folder = next(output.rglob("*.png")).parent
    made: dict[str, str | bytes] = {}
    for result in comparison["results"]:
        path = Path(result["image"])
        with Image.open(path if path.is_absolute() else folder / path.name) as picture:
            made[f"picture/{result['recipe']}"] = picture.convert("RGB").tobytes()
        made[f"result/{result['recipe']}"] = json.dumps(without(result, MEASURED), indent=1)
    made["result/fields"] = "\n".join(comparison["results"][0])
    return made


def everything(work: Path) -> dict[str, str | bytes]:
    data = work / "data"
    command("prepare", ",".join(RECIPES), "--model", "miniature", "--data-dir", str(data), "--output-dir", str(work))
    return {**helps(), **plans(work), **packed(data), **pictures(data, work)}


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {_processor()}"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="record what is made in place of comparing it")
    parser.add_argument("--keep", type=Path, help="a folder that gets everything that was made, to look at")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = everything(Path(folder))
    contents = {name: content if isinstance(content, bytes) else content.encode() for name, content in made.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(contents.items())}
    for name, content in contents.items() if flags.keep else ():
        path = flags.keep / name.replace(" ", "_")
        path = path.with_name(path.name + ".txt") if name == "help" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if flags.write:
        RECORD.write_text(json.dumps({"machine": machine(), "sha256": hashes}, indent=1) + "\n", encoding="utf-8")
        print(f"{len(hashes)} hashes in {RECORD.relative_to(ROOT)}")
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    before: dict[str, str] = record["sha256"]
    differing = [name for name in sorted({*before, *hashes}) if before.get(name) != hashes.get(name)]
    print("\n".join(["Differs:", *differing] if differing else [f"All {len(hashes)} are equal."]))
    if differing and record["machine"] != machine():
        print(f"The record was made on another machine: {record['machine']}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
