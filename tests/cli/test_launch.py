"""The launcher: its pure parts, its stamps with a pip that only takes notes, and one real run without the network.

Which build of PyTorch it takes is in test_launch_torch.py.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import launch
import launch_torch

ROOT = Path(__file__).resolve().parents[2]


def test_pythons_from_3_10_to_3_13_are_taken_and_others_refused_with_the_range() -> None:
    assert all(not launch.refusal((3, minor)) for minor in (10, 11, 12, 13))
    for version in ((3, 9), (3, 14), (2, 7)):
        assert "3.10 to 3.13" in launch.refusal(version)


@pytest.mark.parametrize("file", ["launch.py", "launch_torch.py"])
def test_only_the_standard_library_is_imported(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "launch_torch"}


@pytest.mark.parametrize("file", ["launch.py", "launch_torch.py"])
def test_the_launcher_s_files_have_at_most_400_lines(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 400


def test_the_fingerprint_changes_with_contents_python_and_build(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("a==1\n", encoding="utf-8")
    first = launch.fingerprint([file], (3, 11), "default")
    assert launch.fingerprint([file], (3, 11), "default") == first
    assert launch.fingerprint([file], (3, 12), "default") != first
    assert launch.fingerprint([file], (3, 11), "cu126") != first
    file.write_text("a==2\n", encoding="utf-8")
    assert launch.fingerprint([file], (3, 11), "default") != first


def test_an_environments_python_is_found_on_every_system() -> None:
    assert launch.venv_python(Path("v"), windows=True) == Path("v/Scripts/python.exe")
    assert launch.venv_python(Path("v"), windows=False) == Path("v/bin/python")


def test_a_pin_is_read_past_comments_and_markers() -> None:
    assert launch.pinned("# torch==1\ntorchao==3\ntorch==2; x  # y\n", "torch") == "torch==2"
    with pytest.raises(launch.LaunchError, match="pins no torch"):
        launch.pinned("torchao==3\n", "torch")


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        assert all("==" in line or line.startswith("-r ") for line in lines if line)


def test_exit_codes_are_passed_on() -> None:
    assert launch.run([sys.executable, "-c", "import sys; sys.exit(7)"]) == 7


class Notebook:
    """Stands in for `launch.run`: notes calls of pip instead of running them, lets everything else run."""

    def __init__(self, run: Callable[[Sequence[str]], int]) -> None:
        self.run = run
        self.pip: list[list[str]] = []
        self.made = 0
        self.code = 0

    def __call__(self, command: Sequence[str], cwd: Path | None = None) -> int:
        if "pip" in command:
            self.pip.append(list(command))
            return self.code
        self.made += "venv" in command
        return self.run(command)


@pytest.fixture(scope="module")
def ready_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One environment for all tests here: making it takes seconds."""
    root = tmp_path_factory.mktemp("project")
    subprocess.run([sys.executable, "-m", "venv", str(root / ".venv")], check=True)
    return root / ".venv"


@pytest.fixture
def project(ready_venv: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[launch.Environment, Notebook]:
    root = ready_venv.parent
    (root / "requirements.txt").write_text("torch==1\n", encoding="utf-8")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\n", encoding="utf-8")
    for left in (*ready_venv.glob("installed-*"), ready_venv / "torch-build.txt"):
        left.unlink(missing_ok=True)
    notebook = Notebook(launch.run)
    monkeypatch.setattr(launch, "run", notebook)
    monkeypatch.setattr(launch_torch, "look", lambda: launch_torch.Machine("linux"))
    return launch.Environment(root), notebook


Project = tuple[launch.Environment, Notebook]


@pytest.mark.slow
def test_a_second_run_installs_nothing(project: Project) -> None:
    environment, notebook = project
    environment.prepare("requirements.txt")
    environment.prepare("requirements.txt")
    assert (len(notebook.pip), notebook.made) == (1, 0)


def test_changed_requirements_are_installed_again(project: Project) -> None:
    environment, notebook = project
    environment.prepare("requirements.txt")
    (environment.root / "requirements.txt").write_text("torch==2\n", encoding="utf-8")
    environment.prepare("requirements.txt")
    assert len(notebook.pip) == 2


def test_installing_for_tests_also_serves_the_app(project: Project) -> None:
    environment, notebook = project
    environment.prepare("requirements-dev.txt")
    environment.prepare("requirements.txt")
    assert len(notebook.pip) == 1


def test_a_failed_installation_leaves_no_stamp_and_passes_on_the_code(project: Project) -> None:
    environment, notebook = project
    environment.prepare("requirements.txt")
    (environment.root / "requirements.txt").write_text("torch==3\n", encoding="utf-8")
    notebook.code = 23
    with pytest.raises(launch.LaunchError) as problem:
        environment.prepare("requirements.txt")
    assert problem.value.code == 23
    assert not list(environment.venv.glob("installed-*"))
    notebook.code = 0
    environment.prepare("requirements.txt")
    assert len(notebook.pip) == 3


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [([], []), (["--fast"], ["-m", "fast"]), (["-k", "x", "--fast"], ["-m", "fast", "-k", "x"])],
)
def test_tests_are_all_but_those_of_a_gpu_or_with_a_flag_the_fast_ones(
    project: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], chosen: list[str]
) -> None:
    environment, _ = project
    asked: list[list[str]] = []

    def note(command: Sequence[str], cwd: Path | None = None) -> int:
        asked.append(list(command))
        return 0

    monkeypatch.setattr(launch, "run", note)
    assert launch.test(environment, arguments) == 0
    checks = [command[2:] for command in asked if "pip" not in command]
    assert checks == [*map(list, launch.CHECKS), [*launch.TESTS, *chosen]]


@pytest.mark.slow
def test_a_half_made_environment_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("torch==1\n", encoding="utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "rubbish").write_text("left behind", encoding="utf-8")
    notebook = Notebook(launch.run)
    monkeypatch.setattr(launch, "run", notebook)
    monkeypatch.setattr(launch_torch, "look", lambda: launch_torch.Machine("linux"))
    launch.Environment(tmp_path).prepare("requirements.txt")
    assert (len(notebook.pip), notebook.made) == (1, 1)
    assert not (tmp_path / ".venv" / "rubbish").exists()


def test_a_link_in_place_of_the_environment_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept", encoding="utf-8")
    root = tmp_path / "project"
    root.mkdir()
    (root / "requirements.txt").write_text("torch==1\n", encoding="utf-8")
    (root / ".venv").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(launch.LaunchError, match="link"):
        launch.Environment(root).prepare("requirements.txt")
    assert (elsewhere / "precious").exists()


@pytest.mark.slow
def test_the_app_gets_its_flags_and_its_exit_code_comes_back_wherever_it_is_started(
    ready_venv: Path, tmp_path: Path
) -> None:
    root = ready_venv.parent
    for file in ("launch.py", "launch_torch.py"):
        shutil.copy(ROOT / file, root)
    (root / "requirements.txt").write_text("# nothing to fetch\n", encoding="utf-8")
    (root / "app.py").write_text("import sys; print('app', sys.argv[1:], flush=True); sys.exit(3)\n", encoding="utf-8")
    arguments = [sys.executable, str(root / "launch.py"), "--no-browser", "--torch", "default", "--port", "7870"]
    first, second = (
        subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=tmp_path) for _ in range(2)
    )
    assert first.returncode == second.returncode == 3, first.stderr
    assert "Installing" in first.stdout and "Installing" not in second.stdout
    assert second.stdout.strip() == "app ['--no-browser', '--port', '7870']"
