"""`check`: a table for people, one JSON object for programs, and exit code 1 where nothing is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from ideogram_app.cli.app import app
from ideogram_app.cli.check import describe
from ideogram_app.kernels.self_check_record import FILE, Checked, RecordFile, SelfCheck
from ideogram_app.model import self_check
from ideogram_app.wire import from_plain, to_plain

ROOT = Path(__file__).resolve().parents[2]
RIGHT = Checked("norm, rotated", "triton", "right; torch takes 4.0 times as long", 3.9e-3, 2.1e-5)
WRONG = Checked("matmul", "torch", "triton is wrong: 3 of 9 numbers differ, in row 2", 1e-7, 1.2e-3)
CHECK = SelfCheck("A card", "bfloat16", {"torch": "2.13.0", "driver": ""}, (RIGHT, WRONG))


@pytest.mark.slow
def test_on_a_processor_every_kernel_is_right_and_the_record_is_kept(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "ideogram_app", "check", "--json", "--device", "cpu", "--data", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) >= {"device", "versions", "kernels"} and answer["versions"]["torch"]
    assert all(set(row) == {"kernel", "engaged", "reason", "error", "seconds"} for row in answer["kernels"])
    parts = {row["kernel"].partition(",")[0] for row in answer["kernels"]}
    assert parts >= {"norm", "matmul", "heads", "decode_int8", "attention", "offload ring", "block"}
    assert RecordFile(tmp_path).read().checks == (from_plain(SelfCheck, answer),)
    assert "Traceback" not in done.stderr and sorted(path.name for path in tmp_path.iterdir())[0] == FILE


def run(monkeypatch: pytest.MonkeyPatch, check: SelfCheck, *flags: str) -> Any:
    found = SimpleNamespace(check=check, notes=("A note.",))
    monkeypatch.setattr(self_check, "check_all", lambda *_: found)
    return CliRunner().invoke(app, ["check", "--device", "cpu", *flags])


def test_json_is_the_record_of_this_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run(monkeypatch, CHECK, "--json", "--data", str(tmp_path))
    assert done.exit_code == 0 and json.loads(done.stdout) == to_plain(CHECK)
    assert "A note." in done.stderr


def test_a_kernel_without_any_right_implementation_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing = SelfCheck("A card", "bfloat16", {}, (RIGHT, Checked("matmul", "", "no implementation is right here")))
    assert run(monkeypatch, nothing, "--data", str(tmp_path)).exit_code == 1


def test_people_read_a_line_for_each_kernel() -> None:
    title, right, wrong = describe(CHECK)
    assert title == "A card, bfloat16 (torch 2.13.0)"
    assert right.split()[:4] == ["norm,", "rotated", "triton", "3.9e-03"]
    assert "torch" in wrong and "row 2" in wrong


@pytest.mark.slow
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "ideogram_app", "check", "--device", "tpu", "--data", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "tpu" in done.stderr and "Traceback" not in done.stderr
