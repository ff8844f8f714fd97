"""Record of the self-check: what was found on which device with which versions, one JSON file in the data folder.

    `FILE`      the last check of every device and computing type
    `TRYING`    the implementation that is being tried; left behind where the program did not come back from it

A check is good for as long as nothing changes that it depends on: card, driver, torch, Triton, and the program's own
sources. What is damaged, foreign or of other versions counts as no record, and the check is made again. Left out: times
of other machines, and a history; comparisons and benchmarks keep those.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ideogram_app.errors import RequestError
from ideogram_app.files import hash_sources, locked, project_folder, write_text
from ideogram_app.machine.hardware import Hardware, parse_cpuinfo
from ideogram_app.machine.versions import driver_version
from ideogram_app.wire import from_json, to_json

RIGHT = "right"  # what the reason of a row begins with that runs what was planned
FILE, TRYING = "self-check.json", "self-check.trying"
# Whose bytes decide what is computed: kernels, formats, and the blocks and copies that are checked as a whole.
SOURCES = ("kernels", "quantization", "model/transformer", "model/offload", "model/self_check.py", "machine/copies.py")
TRITON_PACKAGES = ("triton", "triton-windows", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-rocm", "triton-xpu")
WAIT_SECONDS = 60.0  # for another process that checks: about as long as that takes


@dataclass(frozen=True)
class Checked:
    """One row: which implementation of a kernel runs here, and why.

    Attributes:
        kernel: an operation, and its input format where it has several.
        engaged: the name of its implementation; "" where none is right.
        error: the largest distance from the truth, as a share of the largest number of its row.
        seconds: the fastest run of it, all sizes that were timed together.
    """

    kernel: str
    engaged: str
    reason: str
    error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class SelfCheck:
    """One device in one computing type."""

    device: str
    dtype: str
    versions: dict[str, str]
    kernels: tuple[Checked, ...] = ()

    @property
    def summary(self) -> str:
        """For people: how many kernels are right, and which were replaced, by what and why."""
        replaced = [row for row in self.kernels if not row.reason.startswith(RIGHT)]
        said = [f"{row.kernel} by {row.engaged or 'nothing'}: {row.reason}" for row in replaced]
        right = f"{len(self.kernels) - len(replaced)} of {len(self.kernels)} kernels are right in {self.dtype}"
        return f"{right}; replaced: {'; '.join(said)}" if said else right

    def row(self, kernel: str) -> Checked | None:
        return next((row for row in self.kernels if row.kernel == kernel), None)


@dataclass(frozen=True)
class Record:
    """Everything in the file."""

    checks: tuple[SelfCheck, ...] = field(default=())


def with_check(hardware: Hardware, data: Path) -> Hardware:
    """The machine with what its record says; "" where there is none, or where torch is another one by now.

    The driver is not asked for again, so a check that the next picture makes anew may still be shown.
    """
    name = hardware.cpu_name if hardware.kind == "cpu" else hardware.name
    checks = [
        check
        for check in RecordFile(data).read().checks
        if name and check.device.startswith(name) and check.versions.get("torch") == hardware.torch
    ]
    return replace(hardware, self_check=" ".join(f"{check.summary}." for check in checks))


def identity(device: Any, sets: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Name of a `torch.device`, and what a check on it depends on; sets: the implementations there are."""
    import torch

    known = {"torch": str(torch.__version__), "triton": _triton_version()}
    known |= {"program": program_hash(), "sets": ", ".join(sets)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        known |= {"capability": f"{major}.{minor}", "driver": driver_version()}
        return torch.cuda.get_device_name(device), known
    if device.type == "xpu":
        return torch.xpu.get_device_name(device), known
    if device.type == "mps":
        return f"Apple GPU, macOS {platform.mac_ver()[0]}", known
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}", known


def _triton_version() -> str:
    """Of whichever package brings it here; "" where none does."""
    for package in TRITON_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package) + ("" if package == "triton" else f" ({package})")
    return ""


def _processor() -> str:
    """Its name, where the system tells; else its family."""
    try:
        name = parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))[0]
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine() or "processor"


@cache
def program_hash() -> str:
    """SHA-256 of the sources that a check depends on, its first 16 digits."""
    package = project_folder() / "ideogram_app"
    return hash_sources(package, [package / name for name in SOURCES])


class RecordFile:
    """The record of a data folder. Nothing here raises for what is on disk: what went wrong is in `notes`."""

    def __init__(self, data: Path) -> None:
        self.path, self._trying = data / FILE, data / TRYING
        self.notes: list[str] = []

    def read(self) -> Record:
        """What is there; nothing where it is missing, damaged or foreign."""
        try:
            return from_json(Record, self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Record()
        except (OSError, UnicodeDecodeError, RequestError, RecursionError) as problem:
            self._note(f"{self.path} is not a record of the self-check, which is made again: {problem}")
            return Record()

    def find(self, device: str, dtype: str, known: dict[str, str]) -> SelfCheck | None:
        """The check of a device with exactly these versions."""
        wanted = SelfCheck(device, dtype, known)
        return next((check for check in self.read().checks if replace(check, kernels=()) == wanted), None)

    def keep(self, check: SelfCheck) -> None:
        """Put a check in the place of the last one of its device and type."""
        others = [each for each in self.read().checks if (each.device, each.dtype) != (check.device, check.dtype)]
        try:
            write_text(self.path, to_json(Record((*others, check))) + "\n")
        except OSError as problem:
            self._note(f"The self-check was not kept, and will be made again: {problem}")

    @contextmanager
    def alone(self, seconds: float = WAIT_SECONDS) -> Iterator[None]:
        """Keep other processes from checking at the same time; where that is impossible, say so and go on."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path, "The self-check is made", seconds))
            except (RequestError, OSError) as problem:
                self._note(f"Another check may run at the same time: {problem}")
            yield

    def tried(self) -> tuple[str, str] | None:
        """Kernel and implementation from which the program did not come back; None where it always did."""
        try:
            kernel, name = json.loads(self._trying.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):  # missing, or damaged by the same crash
            return None
        return (kernel, name) if isinstance(kernel, str) and isinstance(name, str) else None

    def trying(self, kernel: str, name: str) -> None:
        """Note what is tried next, before it is tried; not synced: the program may end in it, hardly the machine."""
        with suppress(OSError):
            self._trying.parent.mkdir(parents=True, exist_ok=True)
            self._trying.write_text(json.dumps([kernel, name]), encoding="utf-8")

    def came_back(self) -> None:
        with suppress(OSError):
            self._trying.unlink(missing_ok=True)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
