"""The command line as a user runs it: what goes to standard output, what to standard error, and the exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ideogram_app.comparison.history import Comparison
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.planner import Plan
from ideogram_app.wire import from_plain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RTX_3060 = {
    "kind": "cuda",
    "name": "RTX 3060",
    "compute_capability": [8, 6],
    "device_memory_bytes": 12884901888,
    "device_free_bytes": 12000000000,
}


def command(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ideogram_app", *arguments]
    return subprocess.run(line, cwd=ROOT, input=text, capture_output=True, text=True, timeout=600)


def test_a_command_that_computes_nothing_does_not_wait_for_torch() -> None:
    asked = "import sys, ideogram_app.cli.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


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
    assert from_plain(Plan, answer["plan"]).recipe == "int8-w8a8-rotated"


def test_doctor_speaks_to_people() -> None:
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    assert "Device" in done.stdout and "Plan for Ideogram 4, 1024 x 1024" in done.stdout


def test_a_described_machine_is_planned_for(described: str) -> None:
    done = command("plan", "--hardware", described, "--model", "ideogram-4", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["plan"]["recipe"], answer["plan"]["residency"]) == ("int8-w8a8-rotated", "streamed")
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


def folders(tmp_path: Path) -> list[str]:
    return ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]


def test_compare_writes_the_sheet_and_the_json_and_prints_a_line_for_each_recipe(tmp_path: Path) -> None:
    sheet, numbers = tmp_path / "new" / "sheet.png", tmp_path / "numbers.json"
    done = command(
        "compare", "--model", "miniature", "--prompt", "a red circle", "--recipes", "reference,gguf-q8_0",
        "--preset", "turbo-12", "--out", str(sheet), "--json", str(numbers), *folders(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    comparison = from_plain(Comparison, json.loads(numbers.read_text(encoding="utf-8")))
    assert [result.recipe for result in comparison.results] == ["reference", "gguf-q8_0"]
    assert comparison.results[1].psnr and comparison.results[1].seconds_per_step
    assert all(Path(result.image or "").is_file() for result in comparison.results)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert len(done.stdout.strip().splitlines()) == 2 and "denoise" in done.stderr


def test_generate_draws_with_the_recipe_that_the_plan_chose(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    done = command(
        "generate", "--prompt", "-", "--out", str(picture), "--preset", "turbo-12", "--seed", "3", "--json",
        *folders(tmp_path), text="a blue square",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["engaged"] == result["recipe"] == "int8-w8a8-rotated" and result["seed"] == 3
    assert "a blue square" in result["caption"] and picture.read_bytes().startswith(b"\x89PNG")


def test_prepare_makes_recipes_ready_and_says_so(tmp_path: Path) -> None:
    done = command("prepare", "gguf-q8_0,fp8", *folders(tmp_path))
    assert done.returncode == 0 and "ready" in done.stdout, done.stderr
    assert {file.parent.name for file in (tmp_path / "data").rglob("manifest.json")} == {"gguf-q8_0", "fp8"}


def test_prepare_without_a_recipe_takes_the_plan_s_choice_and_tells_every_stage(tmp_path: Path) -> None:
    done = command("prepare", "--model", "miniature", *folders(tmp_path))
    assert done.returncode == 0 and done.stdout == "int8-w8a8-rotated ready for Miniature\n", done.stderr
    stages = [line.split(":")[0] for line in done.stderr.splitlines() if line[1:3] == "/7"]
    titles = ["This machine", "Plan", "Licence and token", "Fetch", "Quantize", "Smoke test"]
    assert stages == [f"{number}/7 {title}" for number, title in enumerate(titles, 1)]
    assert "to make" in done.stderr and "Passed: 18 parts compute" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "generate --model miniature --recipe int8-w8a8-rotated" in last and str(tmp_path / "data") in last


def test_prepare_without_anything_is_the_first_run_of_the_published_model(tmp_path: Path) -> None:
    done = command("prepare", "--offline", *folders(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    *told, last = done.stderr.splitlines()
    assert last.startswith("error: ") and any("27.5 GB" in line for line in told)
    assert not list((tmp_path / "data").rglob("*"))


def test_prepare_that_is_interrupted_stops_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "ideogram_app", "prepare", "gguf-q4_k", *folders(tmp_path)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for told in process.stderr:
            if told.startswith("gguf-q4_k: prepare"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 1
    assert "error: Stopped; what is done is kept." in rest.splitlines()[-1]
    assert list((tmp_path / "data").rglob("*.partial"))
    again = command("prepare", "gguf-q4_k", *folders(tmp_path))
    assert again.returncode == 0 and not list((tmp_path / "data").rglob("*.partial")), again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compare", "--prompt", "", "--recipes", "fp8"), "empty"),
        (("compare", "--prompt", "x", "--recipes", "int4"), "gguf-q4_k"),
        (("compare", "--prompt", "{oops", "--recipes", "fp8"), "line 1"),
        (("generate", "--prompt", "x", "--out", "p.png", "--recipe", "fp8", "--width", "100"), "multiple of 16"),
        (("generate", "--prompt", "x", "--out", "p.png", "--recipe", "fp8", "--preset", "slow"), "turbo-12"),
        (("generate", "--prompt", "x", "--out", "p.png", "--recipe", "fp8", "--model", "gpt"), "miniature"),
        (("prepare", "int8"), "int8-w8a8"),
        (("prepare", "gguf-q4_k", "--model", "ideogram-4", "--offline"), "works offline"),
    ],
)
def test_a_bad_flag_is_one_line_on_standard_error_and_exit_code_1(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = command(*arguments, *folders(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last, done.stderr
