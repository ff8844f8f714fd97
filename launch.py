"""Make everything ready and start: `python launch.py [flags of app.py]`, or `python launch.py test [flags of pytest]`.

`test` runs the linters and every test that needs no GPU; `test --fast`, for after each change, those that take a
minute in all.

The first run makes `.venv` beside this file, installs the pinned packages into it and starts the app. Later runs see
from a stamp inside `.venv` that nothing has changed and start at once, without the network. An installation that was
interrupted has no stamp and is taken up again; a `.venv` that does not work is made anew. Exit codes are passed on.

PyTorch comes in the build for this computer's card and driver (launch_torch.py chooses); another card or driver means
another build. `--torch cu130|cu126|rocm|xpu|cpu|default` takes that one and keeps it, until `--torch auto` is given.

Needs only the standard library of Python 3.10 to 3.13, on Linux, macOS and Windows. Left out, unlike in the launchers
of Fooocus and Stable Diffusion web UI: fetching models (the app does, visibly), cloning, patching, updating itself,
and anything outside this folder but pip's own cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import launch_torch
from launch_torch import AUTO, BUILDS, DEFAULT, Choice

ROOT = Path(__file__).resolve().parent
OLDEST, NEWEST = (3, 10), (3, 13)
RUNTIME, DEVELOPMENT = "requirements.txt", "requirements-dev.txt"
BY_HAND = "by hand"  # in the note of the build: --torch chose it, so what the machine has does not change it
TORCH_FLAG = "--torch"
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


def fingerprint(files: Sequence[Path], version: tuple[int, int], build: str) -> str:
    """What an installation is made of: the contents of the requirement files, the Python version, PyTorch's build."""
    digest = hashlib.sha256(f"python {version[0]}.{version[1]}\ntorch {build}\n".encode())
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


def take_torch(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The value of `--torch` ("" without one) and all other arguments.

    Raises:
        LaunchError: a build that nobody makes, or none.
    """
    asked, rest, waiting = "", [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, sign, value = argument.partition("=")
        if flag != TORCH_FLAG:
            rest.append(argument)
            continue
        asked = value if sign else "".join(waiting[:1])
        del waiting[: 0 if sign else 1]
        if asked not in (*BUILDS, AUTO):
            names = ", ".join((*BUILDS, AUTO))
            raise LaunchError(f"{TORCH_FLAG} takes one of {names}; given was {asked or 'nothing'}.", 2)
    return asked, rest


def install_command(python: Path, root: Path, file: str, build: str) -> list[str]:
    """The pip call that installs one requirements file with a build of PyTorch.

    The build is named exactly, so no index can give another. PyTorch's own index stands beside the default one, because
    alone it has lacked packages that torch needs (pytorch/pytorch#172926).
    """
    row = BUILDS[build]
    requirements = own_triton_file(root, file, build) if row.triton else root / file
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["-r", str(requirements)]
    if row.local:
        torch = pinned((root / RUNTIME).read_text(encoding="utf-8"), "torch")
        command += [f"{torch}+{row.local}", "--extra-index-url", f"{launch_torch.WHEELS}{row.local}"]
    return command


def leave_command(python: Path) -> list[str]:
    """The pip call after which no build of PyTorch is there: pip would take any for `==2.13.0`, and keep its Triton."""
    pip = [str(python), "-m", "pip", "uninstall", "--yes", "--disable-pip-version-check"]
    return [*pip, *launch_torch.REPLACED]


def own_triton_file(root: Path, file: str, build: str) -> Path:
    """Where the requirements stand without PyPI's Triton, for a build that brings its own."""
    return root / ".venv" / f"{Path(file).stem}-{build}.txt"


class Environment:
    """`.venv` in one folder: what state it is in, and how it gets ready.

    Stamps are removed before anything is changed and written after everything has worked, so a stamp that is there
    and matches means that the installation is complete. A note says which build of PyTorch is in it, or half in it.
    """

    def __init__(self, root: Path, torch: str = "") -> None:
        """`torch` is the value of `--torch`, or "" without that flag."""
        self.root = root
        self.asked = torch
        self.venv = root / ".venv"
        self.note = self.venv / "torch-build.txt"
        self.python = venv_python(self.venv, os.name == "nt")
        self.version = sys.version_info[:2]

    def prepare(self, file: str) -> None:
        """Install a requirements file unless its stamp says that this is done."""
        files = [self.root / RUNTIME] if file == RUNTIME else [self.root / RUNTIME, self.root / file]
        before, by_hand = self._noted()
        choice, by_hand = self._choose(before, by_hand)
        wanted = fingerprint(files, self.version, choice.build)
        if not self.python.exists() or self._stamped(file) != wanted:
            self._install(file, choice, before, by_hand)
            # The development packages include those of the program, so both stamps hold then.
            if file != RUNTIME:
                runtime = fingerprint(files[:1], self.version, choice.build)
                self._stamp(RUNTIME).write_text(runtime, encoding="utf-8")
            self._stamp(file).write_text(wanted, encoding="utf-8")
        self._note(choice.build, by_hand)
        if choice.advice:
            print(f"note: {choice.advice}", file=sys.stderr, flush=True)

    def _choose(self, before: str, by_hand: bool) -> tuple[Choice, bool]:
        """The build of PyTorch, and whether a person chose it: now, or at an earlier start."""
        machine = launch_torch.look()
        chosen = self.asked or (before if by_hand else AUTO)
        if chosen != AUTO:
            offered = launch_torch.offered(machine)
            if chosen not in offered:
                names = ", ".join(offered)
                raise LaunchError(
                    f"PyTorch has no build {chosen} for this system; {TORCH_FLAG} takes here: {names}.", 2
                )
            choice = Choice(chosen, f"{TORCH_FLAG} {chosen} was given")
        else:
            choice = launch_torch.choose(machine)
            if before and not choice.certain:
                choice = replace(choice, build=before, reason="what is installed stays")
        lacks = launch_torch.missing_for_triton(machine) if choice.build != "cpu" else ""
        return replace(choice, advice=choice.advice or lacks), chosen != AUTO

    def _install(self, file: str, choice: Choice, before: str, by_hand: bool) -> None:
        """Run pip, after the environment is there and without what another build has left."""
        build, row = choice.build, BUILDS[choice.build]
        made = self._make_usable()
        for stamp in (RUNTIME, DEVELOPMENT):
            self._stamp(stamp).unlink(missing_ok=True)
        # Without a note an older launcher was here, whose Triton came from PyPI.
        if not made and (before != build if before else row.triton):
            if before:
                say(f"The card, its driver or {TORCH_FLAG} has changed: PyTorch {BUILDS[before].what} gives way.")
            self._pip(leave_command(self.python), build)
        self._note(build, by_hand)
        say(f"Installing the packages of {file} into {self.venv} (the first time this takes some minutes) ...")
        if choice.reason:
            say(f"PyTorch {row.what} is taken: {choice.reason}.")
        if row.triton:
            lines = launch_torch.requirement_lines(self.root, file, launch_torch.TRITONS)
            own_triton_file(self.root, file, build).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._pip(install_command(self.python, self.root, file, build), build)

    def _pip(self, command: list[str], build: str) -> None:
        code = run(command)
        if code:
            way_on = f" {TORCH_FLAG} {DEFAULT} needs no index but the default one." if BUILDS[build].local else ""
            sentence = f"pip failed with exit code {code}; its reason is above. Run the same command again to continue."
            raise LaunchError(sentence + way_on, code)

    def _note(self, build: str, by_hand: bool) -> None:
        """Note the build before it is installed, so that one that was interrupted is known too."""
        if self._noted() != (build, by_hand):
            self.note.write_text(f"{build} {BY_HAND if by_hand else ''}".strip() + "\n", encoding="utf-8")

    def _noted(self) -> tuple[str, bool]:
        """The build that is installed or was to be, and whether a person chose it; "" where none is noted."""
        try:
            build, _, chosen = self.note.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        except OSError:
            return "", False
        return (build, chosen == BY_HAND) if build in BUILDS else ("", False)

    def _stamp(self, file: str) -> Path:
        return self.venv / f"installed-{Path(file).stem}.sha256"

    def _stamped(self, file: str) -> str:
        try:
            return self._stamp(file).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def _make_usable(self) -> bool:
        """Make the environment, or make it anew where it is broken or belongs to another Python; whether it did."""
        if self._works():
            return False
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
        return True

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
        torch, arguments = take_torch(arguments)
        environment = Environment(ROOT, torch)
        if arguments[:1] == ["test"]:
            return test(environment, arguments[1:])
        environment.prepare(RUNTIME)
        return become([str(environment.python), str(ROOT / "app.py"), *arguments])
    except LaunchError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.code
    except OSError as problem:  # a full disk, a folder that may not be written, a program that does not start
        print(f"error: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
