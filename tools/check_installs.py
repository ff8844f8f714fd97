"""Ask pip's resolver whether it takes every set of packages that launch.py may install. Reaches the package index.

    python tools/check_installs.py                          every system, Python and build: some gigabytes are fetched
    python tools/check_installs.py --system win32 --python 3.12 --build cu126

For each row it runs what launch.py runs (`launch.install_command`) as a dry run for that system and Python: `pip
install --dry-run --ignore-installed --target --platform --python-version --only-binary=:all:`. Then it holds the
answer: torch in the pinned version and build, and exactly the one Triton that belongs to it. Exit code 1 where a row
fails.

Only the default index is asked. What PyTorch's own index holds is stood in for by empty wheels with that name, version
and Triton (`STAND_INS`), so those rows show that the set has a solution, not that the index has the wheel. Unlike
`pip install --platform`, which reads environment markers for the Python that runs it, they are read for the row here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import launch  # noqa: E402
import launch_torch  # noqa: E402

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@dataclass(frozen=True)
class System:
    """How pip and environment markers call a system."""

    machine: str
    tags: tuple[str, ...]
    markers: dict[str, str]


MANYLINUX = (*(f"_2_{minor}" for minor in range(28, 4, -1)), "2014", "2010", "1")  # glibc 2.28, as PyTorch's wheels
SYSTEMS = {
    "linux": System(
        "x86_64",
        tuple(f"manylinux{glibc}_x86_64" for glibc in MANYLINUX),
        {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    ),
    "win32": System(
        "AMD64",
        ("win_amd64",),
        {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
    ),
    "darwin": System(
        "arm64",
        ("macosx_14_0_arm64",),
        {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    ),
}
# Which Triton each build of torch 2.13.0 asks for: package and system (Requires-Dist of PyTorch's wheels).
STAND_INS = {
    "cu130": 'triton==3.7.1; sys_platform == "linux"',
    "cu126": 'triton==3.7.1; sys_platform == "linux"',
    "rocm": "triton-rocm==3.7.1",
    "xpu": "triton-xpu==3.7.1",
    "cpu": "",
}
OF_TORCH = (
    "setuptools",
    "filelock",
    "typing-extensions>=4.10.0",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "jinja2",
    "fsspec>=0.8.5",
)
# pip as a program, which reads environment markers for another system; its own copy of `packaging` is the one it uses.
PIP = """
import json, sys
from pip._vendor.packaging import markers
there = {**markers.default_environment(), **json.loads(sys.argv.pop(1))}
markers.default_environment = lambda: dict(there)
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Row:
    """One environment that launch.py may make."""

    system: str
    python: str
    build: str

    @property
    def triton(self) -> set[str]:
        """The packages of that kind which belong there."""
        if launch_torch.BUILDS[self.build].triton:
            return {f"triton-{self.build}"}
        return {"linux": {"triton"}, "win32": {"triton-windows"}}.get(self.system, set())


def rows() -> Iterator[Row]:
    """Every system, Python and build that exists."""
    for system, about in SYSTEMS.items():
        for python in PYTHONS:
            for build in launch_torch.offered(launch_torch.Machine(system, about.machine)):
                yield Row(system, python, build)


def write_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """An empty wheel for every system: only what a resolver reads."""
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires if line]
    wheel = ["Wheel-Version: 1.0", "Generator: stand-in", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "\n".join(wheel) + "\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def write_stand_ins(folder: Path, torch: str) -> None:
    """What PyTorch's own index would serve: torch in each build, and the Tritons that only it has."""
    for build, triton in STAND_INS.items():
        write_wheel(folder, "torch", f"{torch}+{launch_torch.BUILDS[build].local}", (*OF_TORCH, triton))
        if launch_torch.BUILDS[build].triton:
            name, _, version = triton.partition("==")
            write_wheel(folder, name, version)


def dry_run(row: Row, wheels: Path, folder: Path) -> list[str]:
    """What launch.py calls, as a dry run for another system; the index that is not asked becomes a folder."""
    command = launch.install_command(Path(sys.executable), ROOT, launch.RUNTIME, row.build)
    arguments = command[command.index("install") :]
    if "--extra-index-url" in arguments:
        place = arguments.index("--extra-index-url")
        arguments[place : place + 2] = ["--find-links", str(wheels)]
    if launch_torch.BUILDS[row.build].triton:
        lines = launch_torch.requirement_lines(ROOT, launch.RUNTIME, launch_torch.TRITONS)
        file = folder / "requirements.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        arguments[arguments.index("-r") + 1] = str(file)
    version = {"python_version": row.python, "python_full_version": f"{row.python}.9"}
    markers = json.dumps(SYSTEMS[row.system].markers | version)
    target = ["--target", str(folder / "packages"), "--python-version", row.python, "--only-binary=:all:"]
    platforms = [part for tag in SYSTEMS[row.system].tags for part in ("--platform", tag)]
    dry = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(folder / "report.json")]
    return [sys.executable, "-c", PIP, markers, *arguments, *dry, *target, *platforms]


def wrong(row: Row, packages: dict[str, str], torch: str) -> str:
    """What is not as it should be in the packages that pip would install; "" where all is right."""
    local = launch_torch.BUILDS[row.build].local
    found = packages.get("torch", "none")
    right = found == f"{torch}+{local}" if local else found.partition("+")[0] == torch
    if not right:
        return f"torch would be {found}"
    tritons = {name for name in packages if name.startswith(("triton", "pytorch-triton"))}
    return "" if tritons == row.triton else f"the Triton would be {sorted(tritons)}, expected {sorted(row.triton)}"


def check(row: Row, wheels: Path, torch: str) -> tuple[bool, str]:
    """Resolve one row: whether it is right, and the sentence about it."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(dry_run(row, wheels, Path(folder)), capture_output=True, text=True, check=False)
        if done.returncode:
            return False, "pip refuses:\n" + done.stderr.strip()[-2000:]
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    found = {entry["metadata"]["name"].lower(): entry["metadata"]["version"] for entry in report["install"]}
    problem = wrong(row, found, torch)
    triton = ", ".join(f"{name} {found[name]}" for name in sorted(row.triton & found.keys()))
    return not problem, problem or f"{len(found)} packages, torch {found['torch']}, {triton or 'no Triton'}"


def main() -> int:
    """Check the rows that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for flag, values in (("system", tuple(SYSTEMS)), ("python", PYTHONS), ("build", tuple(launch_torch.BUILDS))):
        parser.add_argument(f"--{flag}", choices=values, action="append")
    asked = vars(parser.parse_args())
    chosen = [
        row for row in rows() if all(not values or getattr(row, name) in values for name, values in asked.items())
    ]
    torch = launch.pinned((ROOT / launch.RUNTIME).read_text(encoding="utf-8"), "torch").partition("==")[2]
    failed = 0
    with tempfile.TemporaryDirectory() as wheels:
        write_stand_ins(Path(wheels), torch)
        for row in chosen:
            right, sentence = check(row, Path(wheels), torch)
            failed += not right
            print(
                f"{'ok    ' if right else 'FAILED'} {row.system:6} {row.python:4} {row.build:7} {sentence}", flush=True
            )
    print(f"{len(chosen) - failed} of {len(chosen)} sets are taken")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
