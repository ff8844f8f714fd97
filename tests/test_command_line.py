"""The command line as a user runs it: what goes to standard output, what to standard error, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ideogram_app.hardware import Hardware
from ideogram_app.planner import Plan
from ideogram_app.wire import from_plain

ROOT = Path(__file__).resolve().parents[1]
RTX_3060 = {
    "kind": "cuda",
    "name": "RTX 3060",
    "compute_capability": [8, 6],
    "device_memory_bytes": 12884901888,
    "device_free_bytes": 12000000000,
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ideogram_app", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def described(tmp_path: Path) -> str:
    file = tmp_path / "rtx3060.json"
    file.write_text(json.dumps(RTX_3060), encoding="utf-8")
    return str(file)


def test_doctor_prints_one_json_object_and_nothing_else() -> None:
    done = command("doctor", "--json", "--model", "miniature")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert from_plain(Hardware, answer["hardware"]).name
    assert from_plain(Plan, answer["plan"]).recipe == "int8-w8a8"


def test_doctor_speaks_to_people() -> None:
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    assert "Device" in done.stdout and "Plan for Ideogram 4, 1024 x 1024" in done.stdout


def test_a_described_machine_is_planned_for(described: str) -> None:
    done = command("plan", "--hardware", described, "--model", "ideogram-4", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["plan"]["recipe"] == "gguf-q4_k"
    assert answer["hardware"]["architecture"] == "Ampere"


def test_the_output_of_doctor_is_itself_a_description(described: str, tmp_path: Path) -> None:
    first = command("plan", "--hardware", described, "--json").stdout
    again = tmp_path / "again.json"
    again.write_text(first, encoding="utf-8")
    assert command("plan", "--hardware", str(again), "--json").stdout == first


def test_size_and_recipe_reach_the_plan(described: str) -> None:
    flags = ["--width", "512", "--height", "768", "--recipe", "gguf-q8_0"]
    answer = json.loads(command("plan", "--hardware", described, *flags, "--json").stdout)["plan"]
    assert (answer["width"], answer["height"], answer["recipe"]) == (512, 768, "gguf-q8_0")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "ideogram-5"], "ideogram-4 or miniature"),
        (["--recipe", "int4"], "int8-w8a8"),
        (["--width", "1000"], "multiple of 16"),
    ],
)
def test_a_wrong_wish_is_one_line_on_standard_error_and_exit_code_1(
    described: str, flags: list[str], says: str
) -> None:
    done = command("plan", "--hardware", described, *flags, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"kind": 3}', '{"hardware": {"kind": []}}'])
def test_a_file_that_describes_no_machine_is_refused_without_a_traceback(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content, encoding="utf-8")
    done = command("plan", "--hardware", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_missing_file_is_named() -> None:
    done = command("plan", "--hardware", "nowhere.json")
    assert done.returncode == 1 and "nowhere.json" in done.stderr
