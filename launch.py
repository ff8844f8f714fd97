"""Make everything ready and start: `python launch.py [flags of app.py]`, or `python launch.py test [flags of pytest]`.

`test` runs the linters and every test that needs no GPU; `test --fast`, for after each change, those that take a
minute in all.

The first run makes `.venv` beside this file, installs the pinned packages into it and starts the app. Later runs see
from a stamp inside `.venv` that nothing has changed and start at once, without the network. An installation that was
interrupted has no stamp and is taken up again; a `.venv` that does not work is made anew. Exit codes are passed on.

Needs only the standard library of Python 3.10 to 3.13, on Linux, macOS and Windows. Left out, unlike in the launchers
of Fooocus and Stable Diffusion web UI: fetching models (the app does, visibly), cloning, patching, updating itself,
and anything outside this folder but pip's own cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 10), (3, 13)
RUNTIME, DEVELOPMENT = "requirements.txt", "requirements-dev.txt"
# The default index serves Windows a torch without CUDA; this one is PyTorch's own, for drivers from R580 on.
WINDOWS_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
CHECKS = (("ruff", "check", "."), ("mypy",))
# The tests of a file share what they have prepared; files go in order, those that drive a browser, the slowest, first.
TESTS = ("pytest", "--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
FAST, FAST_TESTS = "--fast", ("-m", "fast")


class LaunchError(Exception):
    """Something the user can act upon: the sentence to print, and the exit code."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


def refusal(version: tuple[int, int]) -> str:
    """Why this Python cannot be used, or ""."""
    if OLDEST <= version <= NEWEST:
        return ""
    wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return f"Python {wanted} is needed, this is {version[0]}.{version[1]}. Run launch.py with one of those."


def venv_python(venv: Path, windows: bool) -> Path:
    """The interpreter inside an environment."""
    return venv / ("Scripts/python.exe" if windows else "bin/python")


def fingerprint(files: Sequence[Path], version: tuple[int, int]) -> str:
    """What an installation is made of: the contents of the requirement files and the Python version."""
    digest = hashlib.sha256(f"python {version[0]}.{version[1]}\n".encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def pinned(requirements: str, package: str) -> str:
    """The line of a requirements file that pins a package: `torch==2.13.0`."""
    for line in requirements.splitlines():
        requirement = line.split("#")[0].split(";")[0].strip()
        if requirement.partition("==")[0].strip() == package:
            return requirement
    raise LaunchError(f"{RUNTIME} pins no {package}.")


def install_commands(python: Path, root: Path, file: str, windows_nvidia: bool) -> list[list[str]]:
    """The pip calls that install one requirements file."""
    pip = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    commands = [[*pip, "-r", str(root / file)]]
    if windows_nvidia:
        torch = pinned((root / RUNTIME).read_text(encoding="utf-8"), "torch")
        commands.insert(0, [*pip, "--index-url", WINDOWS_CUDA_INDEX, torch])
    return commands


class Environment:
    """`.venv` in one folder: what state it is in, and how it gets ready.

    Stamps are removed before anything is changed and written after everything has worked, so a stamp that is there
    and matches means that the installation is complete.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = venv_python(self.venv, os.name == "nt")
        self.version = sys.version_info[:2]

    def prepare(self, file: str) -> None:
        """Install a requirements file unless its stamp says that this is done."""
        files = [self.root / RUNTIME] if file == RUNTIME else [self.root / RUNTIME, self.root / file]
        wanted = fingerprint(files, self.version)
        if self.python.exists() and self._stamped(file) == wanted:
            return
        self._make_usable()
        for stamp in (RUNTIME, DEVELOPMENT):
            self._stamp(stamp).unlink(missing_ok=True)
        say(f"Installing the packages of {file} into {self.venv} (the first time this takes some minutes) ...")
        windows_nvidia = os.name == "nt" and shutil.which("nvidia-smi") is not None
        for command in install_commands(self.python, self.root, file, windows_nvidia):
            code = run(command)
            if code:
                raise LaunchError(
                    f"pip failed with exit code {code}; its reason is above. Run the same command again to continue.",
                    code,
                )
        # The development packages include those of the program, so both stamps hold then.
        if file != RUNTIME:
            self._stamp(RUNTIME).write_text(fingerprint(files[:1], self.version), encoding="utf-8")
        self._stamp(file).write_text(wanted, encoding="utf-8")

    def _stamp(self, file: str) -> Path:
        return self.venv / f"installed-{Path(file).stem}.sha256"

    def _stamped(self, file: str) -> str:
        try:
            return self._stamp(file).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def _make_usable(self) -> None:
        """Make the environment, or make it anew where it is broken or belongs to another Python."""
        if self._works():
            return
        if self.venv.is_symlink():
            raise LaunchError(f"{self.venv} is a link to another place and does not work; remove the link first.")
        if Path(sys.prefix).resolve() == self.venv.resolve():
            raise LaunchError(f"{self.venv} does not work and cannot replace itself; use the Python it was made with.")
        say(f"{'Repairing' if self.venv.exists() else 'Making'} {self.venv} ...")
        if run([sys.executable, "-m", "venv", "--clear", str(self.venv)]) or not self._works():
            raise LaunchError(
                "The virtual environment could not be made; the reason is above. "
                "On Debian and Ubuntu the package python3-venv may be missing."
            )

    def _works(self) -> bool:
        """Whether its interpreter starts, has pip, and is the same Python as this one."""
        code = "import sys, pip; print(sys.version_info[0], sys.version_info[1])"
        try:
            answer = subprocess.run(
                [str(self.python), "-c", code], capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return answer.returncode == 0 and answer.stdout.split() == [str(part) for part in self.version]


def say(sentence: str) -> None:
    """Print progress at once, in order with what pip prints."""
    print(sentence, flush=True)


def run(command: Sequence[str], cwd: Path | None = None) -> int:
    """Run to the end and give the exit code; Ctrl+C reaches the program itself, so wait for how it ends."""
    with subprocess.Popen(list(command), cwd=cwd) as process:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:
                continue
            return code if code >= 0 else 128 - code


def become(command: Sequence[str]) -> int:
    """Run as the last act. Where the system can, replace this process, so that signals reach the program."""
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(command[0], list(command))
    return run(command)


def test(environment: Environment, arguments: Sequence[str]) -> int:
    """All checks, then the tests, with `--fast` the fast ones; the exit code of the first that failed."""
    environment.prepare(DEVELOPMENT)
    chosen = FAST_TESTS if FAST in arguments else ()
    given = [argument for argument in arguments if argument != FAST]
    failed: list[tuple[str, int]] = []
    for check in (*CHECKS, (*TESTS, *chosen, *given)):
        say(f"== {' '.join(check)}")
        code = run([str(environment.python), "-m", *check], cwd=environment.root)
        if code:
            failed.append((check[0], code))
    if failed:
        say(f"Failed: {', '.join(name for name, _ in failed)}.")
        return failed[0][1]
    say("All checks passed.")
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command line; what the user can act upon becomes one line on standard error."""
    try:
        reason = refusal(sys.version_info[:2])
        if reason:
            raise LaunchError(reason)
        environment = Environment(ROOT)
        if arguments[:1] == ["test"]:
            return test(environment, arguments[1:])
        environment.prepare(RUNTIME)
        return become([str(environment.python), str(ROOT / "app.py"), *arguments])
    except LaunchError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
