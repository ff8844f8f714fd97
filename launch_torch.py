"""Which build of PyTorch an environment gets: CUDA 13.0, CUDA 12.6, ROCm, XPU, CPU or what the default index serves.

`look` asks the machine: `nvidia-smi` for driver and compute capability, the kernel's files (on Windows the registry)
for AMD's and Intel's cards. `choose` is pure: a machine in, a build and its reason out. `missing_for_triton` says the
one command that a Linux machine needs before Triton can compile. launch.py imports this file and does what it says.

Left out, unlike in `uv pip install --torch-backend=auto`: every other version of PyTorch and CUDA (one is pinned, so a
row of `BUILDS` is enough), and AMD's own wheels for Windows. Only the standard library is used.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT = 20.0  # seconds for one answer of nvidia-smi: without its persistence daemon a server of eight cards takes some
SMI_ELSEWHERE = ("/usr/lib/wsl/lib/nvidia-smi", r"C:\Windows\System32\nvidia-smi.exe")  # not always on the search path
DEFAULT, AUTO = "default", "auto"
WHEELS = "https://download.pytorch.org/whl/"
X86 = ("x86_64", "AMD64")


@dataclass(frozen=True)
class Build:
    """One build of the pinned PyTorch: its name for people, its local version, who has it, what it must not meet.

    Attributes:
        local: the local version, `torch==2.13.0+cu126`, and where PyTorch's own index keeps it; "" for what the default
            index serves.
        systems: of `sys.platform`; none named where every system has it.
        triton: whether it brings a Triton of its own, which one from PyPI would overwrite: both are `triton/`.
    """

    what: str
    local: str = ""
    systems: tuple[str, ...] = ()
    x86_only: bool = False
    triton: bool = False


# PyTorch's release matrix for 2.13: CUDA 12.6 and 13.0, ROCm 7.2, XPU, CPU (the release page of pytorch/pytorch).
BUILDS = {
    DEFAULT: Build("from the default index"),  # CUDA 13.0 on Linux, CPU on Windows, Metal on macOS
    "cu130": Build("for CUDA 13.0", "cu130", ("linux", "win32")),
    "cu126": Build("for CUDA 12.6", "cu126", ("linux", "win32")),
    "rocm": Build("for ROCm 7.2", "rocm7.2", ("linux",), x86_only=True, triton=True),
    "xpu": Build("for Intel's XPU", "xpu", ("linux", "win32"), x86_only=True, triton=True),
    "cpu": Build("for processors alone", "cpu", ("linux", "win32")),
}
TRITONS = ("triton", "triton-windows")  # of the requirements; left out where the build brings its own
REPLACED = ("torch", "triton", "triton-windows", "triton-rocm", "triton-xpu")  # leave before another build comes

CUDA_13_DRIVER = (580,)  # CUDA 13's first driver branch, on Linux and Windows (CUDA release notes, table 3)
CUDA_12_DRIVER = {"linux": (525, 60), "win32": (528, 33)}  # minor version compatibility of CUDA 12.x (same table)
# Architectures of the wheels (same page): 12.6 from Maxwell to Hopper, 13.0 from Turing on.
CUDA_12_OLDEST, CUDA_13_OLDEST, BLACKWELL = (5, 0), (7, 5), (10, 0)
# A snap may hold a nvidia-smi far older than the driver, which knows names but no capabilities.
BLACKWELL_NAME = re.compile(r"RTX 50[5-9]0|Blackwell|\bG?B[123]00\b|\bGB10\b")

# PYTORCH_ROCM_ARCH of the wheels for ROCm 7.2 (.ci/docker/manywheel/build.sh of pytorch/pytorch).
ROCM_ARCHITECTURES = frozenset(
    "gfx900 gfx906 gfx908 gfx90a gfx942 gfx950 gfx1030 gfx1100 gfx1101 gfx1102 gfx1150 gfx1151 gfx1200 gfx1201".split()
)
AMD, INTEL = 0x1002, 0x8086  # PCI vendors
# Cards, not the graphics of a processor: Alchemist and Flex, Battlemage, Max (include/drm/intel/pciids.h of Linux).
INTEL_CARDS = (range(0x5690, 0x56C3), range(0xE202, 0xE224), range(0x0BD4, 0x0BE6))


@dataclass(frozen=True)
class NvidiaCard:
    """One line of nvidia-smi; `capability` is None where that nvidia-smi does not know it."""

    name: str
    driver: str
    capability: tuple[int, int] | None

    @property
    def release(self) -> tuple[int, ...]:
        """The driver's version as numbers, which can be compared."""
        return tuple(int(part) for part in self.driver.split("."))

    @property
    def blackwell(self) -> bool:
        if self.capability is None:
            return bool(BLACKWELL_NAME.search(self.name))
        return self.capability >= BLACKWELL

    def runs(self, oldest: tuple[int, int]) -> bool:
        """Whether it is at least this new, as far as is known."""
        return self.capability is None or self.capability >= oldest


@dataclass(frozen=True)
class Machine:
    """What decides: the system, NVIDIA's cards, AMD's compute nodes by gfx name, PCI vendor and device of displays.

    `smi_problem` says why a nvidia-smi that is there gave no answer; such a machine may have cards all the same.
    """

    system: str
    processor: str = "x86_64"
    nvidia: tuple[NvidiaCard, ...] = ()
    smi_problem: str = ""
    gfx: tuple[str, ...] = ()
    displays: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A row of `BUILDS`, why, and what the user can do about it.

    Attributes:
        reason: said when the build is installed; "" where nothing was found that could decide.
        advice: said at every start; "" where nothing is to be done.
        certain: whether another build that is installed gives way to this one. A card that is not there now (a dock, a
            driver that hangs) is no reason to fetch gigabytes: builds for cards run on processors too.
    """

    build: str
    reason: str
    advice: str = ""
    certain: bool = True


# Decisions: pure ------------------------------------------------------------------------------------------------------


def choose(machine: Machine) -> Choice:
    """The build for a machine. NVIDIA's card goes before AMD's before Intel's."""
    if machine.nvidia:
        return _for_nvidia(machine)
    x86, certain = machine.processor in X86, not machine.smi_problem
    supported = [gfx for gfx in machine.gfx if gfx in ROCM_ARCHITECTURES]
    if supported and x86 and machine.system == "linux":
        return Choice("rocm", f"AMD's {supported[0]} is among the cards of PyTorch's ROCm build", certain=certain)
    if x86 and machine.system in BUILDS["xpu"].systems and any(map(_intel_card, machine.displays)):
        return Choice("xpu", "there is an Intel Arc or data centre card", certain=certain)
    if machine.smi_problem:
        build = "cu130" if machine.system == "win32" else DEFAULT
        advice = (
            f"nvidia-smi is there, but {machine.smi_problem}; if this computer has an NVIDIA card, look at its driver."
        )
        return Choice(build, "the NVIDIA card could not be asked", advice, certain=False)
    return Choice(DEFAULT, _no_card(machine), certain=False)


def _for_nvidia(machine: Machine) -> Choice:
    """The build for NVIDIA's cards: one driver serves them all, so the newest that it can serve decides."""
    cards, newest = machine.nvidia, DEFAULT if machine.system == "linux" else "cu130"
    first, driver = cards[0], cards[0].driver
    lowest = CUDA_12_DRIVER.get(machine.system, CUDA_13_DRIVER)
    if first.release >= CUDA_13_DRIVER:
        if any(card.runs(CUDA_13_OLDEST) for card in cards):
            return Choice(newest, f"driver {driver} serves CUDA 13.0")
        if any(card.runs(CUDA_12_OLDEST) for card in cards):
            return Choice("cu126", f"the {first.name} is older than Turing, with which CUDA 13 begins")
    elif first.release >= lowest and any(card.runs(CUDA_12_OLDEST) and not card.blackwell for card in cards):
        return Choice("cu126", f"driver {driver} serves CUDA 12.6; from 580 on it is CUDA 13.0")
    if not any(card.runs(CUDA_12_OLDEST) for card in cards):
        words = f"The {first.name} is older than every card that PyTorch 2.13 has kernels for; the processor computes."
    elif first.release >= lowest:  # only Blackwell is left, and CUDA 12.6 has no kernels for it
        words = (
            f"The {first.name} needs NVIDIA's driver 580 or newer, this is {driver}; the processor computes until then."
        )
    else:
        least = ".".join(map(str, lowest))
        words = f"NVIDIA's driver {driver} is too old for PyTorch 2.13: install 580 or newer (at least {least})."
    return Choice(DEFAULT, "no build for CUDA can use this card with this driver", words, certain=False)


def _intel_card(display: tuple[int, int]) -> bool:
    vendor, device = display
    return vendor == INTEL and any(device in devices for devices in INTEL_CARDS)


def _no_card(machine: Machine) -> str:
    """Why the default: what was found that no build serves by itself; "" where there is nothing to say."""
    amd = machine.gfx or any(vendor == AMD for vendor, _ in machine.displays)
    if amd and machine.system == "win32":
        return "PyTorch has no build for AMD's cards on Windows"
    if machine.gfx:
        return f"PyTorch's ROCm build has no kernels for {machine.gfx[0]}; `--torch rocm` takes it all the same"
    if amd and machine.system == "linux":
        return "AMD's graphics offer no /dev/kfd here, which ROCm needs; `--torch rocm` takes ROCm all the same"
    if any(vendor == INTEL for vendor, _ in machine.displays):
        return "Intel's graphics inside a processor are not chosen by themselves; `--torch xpu` takes them"
    return ""


def offered(machine: Machine) -> list[str]:
    """What `--torch` takes on this system."""
    return [
        name
        for name, build in BUILDS.items()
        if machine.system in (build.systems or (machine.system,)) and (machine.processor in X86 or not build.x86_only)
    ]


def requirement_lines(root: Path, file: str, without: Sequence[str]) -> list[str]:
    """The lines of a requirements file and of those it names with `-r`, but for some packages."""
    lines: list[str] = []
    for line in (root / file).read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            lines += requirement_lines(root, text.removeprefix("-r ").strip(), without)
        elif text and re.split(r"[=<>!~; \[]", text)[0] not in without:
            lines.append(text)
    return lines


# What nvidia-smi says -------------------------------------------------------------------------------------------------

CARD_LINE = re.compile(r"(?P<name>[^,]+),\s*(?P<driver>\d{3,4}(?:\.\d{1,4}){1,3})\s*(?:,\s*(?P<capability>.*))?")


def parse_cards(answer: str) -> tuple[NvidiaCard, ...]:
    """The cards of `--query-gpu=name,driver_version[,compute_cap] --format=csv,noheader`; other lines are left out."""
    cards = []
    for line in answer.splitlines():
        found = CARD_LINE.fullmatch(line.strip())
        if found:
            known = re.fullmatch(r"(\d{1,2})\.(\d)", (found["capability"] or "").strip())
            capability = (int(known[1]), int(known[2])) if known else None
            cards.append(NvidiaCard(found["name"].strip(), found["driver"], capability))
    return tuple(cards)


def ask(command: Sequence[str]) -> str | None:
    """What a program prints, in whatever code page; None where it hangs, "" where it cannot be started.

    One that hangs is killed and not waited for: inside a driver that is stuck it does not even die.
    """
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError:
        return ""
    try:
        answer, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return None
    return answer.decode("utf-8", errors="replace")


def nvidia_cards(program: str | None) -> tuple[tuple[NvidiaCard, ...], str]:
    """NVIDIA's cards, and why a nvidia-smi that is there named none."""
    if program is None:
        return (), ""
    answer: str | None = ""
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # before R510 it knows no compute_cap
        answer = ask([program, f"--query-gpu={fields}", "--format=csv,noheader"])
        if answer is None:
            return (), f"it gave no answer within {LIMIT:.0f} seconds"
        cards = parse_cards(answer)
        if cards:
            return cards, ""
    said = next((line.strip() for line in (answer or "").splitlines() if line.strip()), "")
    if said.startswith("No devices were found"):
        return (), ""
    return (), f"it says: {_printable(said)}" if said else "it says nothing"


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)[:200].rstrip(".")


# What the system says -------------------------------------------------------------------------------------------------


def look(root: Path = Path("/")) -> Machine:
    """Ask this machine; never raises. `root` is where the kernel's files are, for tests."""
    program = shutil.which("nvidia-smi") or next((place for place in SMI_ELSEWHERE if Path(place).exists()), None)
    cards, problem = nvidia_cards(program)
    return Machine(
        system=sys.platform,
        processor=platform.machine(),
        nvidia=cards,
        smi_problem=problem,
        gfx=tuple(amd_nodes(root)),
        displays=tuple(windows_displays() if sys.platform == "win32" else linux_displays(root)),
    )


def amd_nodes(root: Path) -> Iterator[str]:
    """The gfx names of AMD's compute nodes, where this process may have them: a container may see them only in /sys."""
    if not (root / "dev/kfd").exists():
        return
    for file in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        found = re.search(r"^gfx_target_version (\d{5,6})$", _text(file), re.MULTILINE)
        if found:  # a node that is a processor says 0
            number = int(found[1])
            yield f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}"  # 90010 is gfx90a


def linux_displays(root: Path) -> Iterator[tuple[int, int]]:
    """PCI vendor and device of every display that has a render node here."""
    for node in sorted((root / "dev/dri").glob("renderD*")):
        device = root / "sys/class/drm" / node.name / "device"
        numbers = [_text(device / name).strip() for name in ("vendor", "device")]
        if all(re.fullmatch(r"0x[0-9a-f]{4}", number) for number in numbers):
            yield int(numbers[0], 16), int(numbers[1], 16)


def windows_displays() -> Iterator[tuple[int, int]]:
    """The same from the registry: `HARDWARE\\DEVICEMAP\\VIDEO` names the adapters of this start of Windows."""
    winreg = importlib.import_module("winreg")
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DEVICEMAP\VIDEO") as video:
            values = [winreg.EnumValue(video, index)[1] for index in range(winreg.QueryInfoKey(video)[1])]
    except OSError:
        return
    seen = set()
    for value in values:
        key = re.sub(r"(?i)^\\Registry\\Machine\\", "", str(value))
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as adapter:
                matching = str(winreg.QueryValueEx(adapter, "MatchingDeviceId")[0])
        except OSError:
            continue  # a mirror or remote display
        found = re.search(r"(?i)VEN_([0-9a-f]{4})&DEV_([0-9a-f]{4})", matching)
        display = (int(found[1], 16), int(found[2], 16)) if found else None
        if display and display not in seen:  # each output of a card is listed
            seen.add(display)
            yield display


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# What Triton needs ----------------------------------------------------------------------------------------------------

# The program that tells the system, how it installs, and what it calls a compiler and Python's headers.
PACKAGE_MANAGERS = (
    ("apt-get", "sudo apt install", "gcc", "python{major}.{minor}-dev"),
    ("dnf", "sudo dnf install", "gcc", "python{major}.{minor}-devel"),
    ("pacman", "sudo pacman -S", "gcc", "python"),
    ("zypper", "sudo zypper install", "gcc", "python{major}{minor}-devel"),
)


def advice_for_triton(compiler: bool, headers: bool, manager: str, version: tuple[int, int]) -> str:
    """The one command that gives Triton what it lacks, by package manager ("": unknown); "" if it lacks nothing."""
    lacks = [name for name, there in (("a C compiler", compiler), ("Python's headers", headers)) if not there]
    if not lacks:
        return ""
    needs = f"Triton, which compiles the fast kernels, lacks {' and '.join(lacks)}"
    for program, install, gcc, python in PACKAGE_MANAGERS:
        if program == manager:
            packages = [*([] if compiler else [gcc])]
            packages += [] if headers else [python.format(major=version[0], minor=version[1])]
            return f"{needs}; this helps: {install} {' '.join(packages)}. Without it slower kernels are used."
    return f"{needs}; install gcc or clang and the headers of Python {version[0]}.{version[1]}. " + (
        "Without them slower kernels are used."
    )


def missing_for_triton(machine: Machine) -> str:
    """What Triton lacks, in words, where a card on Linux would use it; it looks where Triton 3.7 itself does."""
    if machine.system != "linux" or not (machine.nvidia or machine.gfx):
        return ""
    chosen = os.environ.get("CC")
    compiler = shutil.which(chosen) if chosen else shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    managers = [row[0] for row in PACKAGE_MANAGERS if shutil.which(row[0])]
    headers = (Path(include) / "Python.h").exists()
    return advice_for_triton(bool(compiler), headers, next(iter(managers), ""), sys.version_info[:2])
