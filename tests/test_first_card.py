"""The script for the first minutes on a card: limits hold, failures are named, every answer is written at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from ideogram_app.cli.app import app
from tests.waiting import wait_until
from tools import first_card
from tools.first_card import STEPS, Step, chosen, main, run_step

ROOT = Path(__file__).resolve().parents[1]
SAYS = Step("says", "whether output is kept", 60, "{python} -c print('caf\\u00e9')")
FAILS = Step("fails", "what a failure leaves", 60, "{python} -c 1/0")
MISSING = Step("missing", "a program that is not there", 60, "no-such-program --flag")
CHILD = "__import__('subprocess').Popen([__import__('sys').executable,'-c','__import__(\"time\").sleep(600)']).wait()"
HANGS = Step("hangs", "whether limits hold", 60, f"{{python}} -c {CHILD}")


def report_of(steps: tuple[Step, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> dict[str, Any]:
    monkeypatch.setattr(first_card, "STEPS", steps)
    with pytest.raises(SystemExit):
        main(tmp_path / "card.json", flags.pop("budget", 60.0), "")
    return json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_what_fails_is_kept_and_the_next_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of((FAILS, MISSING, SAYS), tmp_path, monkeypatch)
    failed, missing, said = report["steps"]
    assert report["finished"] and failed["exit"] == 1 and "ZeroDivisionError" in failed["output"]
    assert missing["exit"] is None and missing["problem"]
    assert said["exit"] == 0 and "café" in said["output"]


@pytest.mark.slow
def test_a_step_that_hangs_ends_with_everything_it_started(tmp_path: Path) -> None:
    row = run_step(HANGS, tmp_path, 3.0)
    assert row["exit"] is None and "limit" in row["problem"]

    def sleepers() -> list[Any]:
        lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return [line for line in lines if '__import__("time").sleep(600)' in line]

    wait_until(lambda: not sleepers(), what="the end of what the step started")


def test_every_answer_is_written_before_the_next_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(step: Step, folder: Path, limit: float) -> dict[str, Any]:
        if step is FAILS:
            raise KeyboardInterrupt
        return run_step(step, folder, limit)

    monkeypatch.setattr(first_card, "run_step", stopped)
    report = report_of((SAYS, FAILS), tmp_path, monkeypatch)
    assert [row["name"] for row in report["steps"]] == ["says"] and not report["finished"]


def test_what_no_time_is_left_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of((SAYS,), tmp_path, monkeypatch, budget=0.0)
    assert report["steps"][0]["problem"] == "no time was left"


def test_steps_are_chosen_by_name() -> None:
    assert [step.name for step in chosen("tiles, doctor")] == ["doctor", "tiles"]
    with pytest.raises(typer.BadParameter):
        chosen("everything")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_asks_a_command_or_a_file_that_exists(step: Step, tmp_path: Path) -> None:
    words = step.words(tmp_path)
    assert not [word for word in words if "{" in word and word != first_card.WITHOUT_TRITON]
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    if words[:3] == [sys.executable, "-m", "ideogram_app"]:
        assert words[3] in commands
    for word in words:
        if word.startswith(("tests/", "benchmarks/")):
            assert (ROOT / word).exists()
