"""Hardware detection: `detect(disk) -> Hardware`; devices.py asks for the devices, this file for all the rest.

A `Hardware` is plain data, so a machine can as well be described in a JSON file and planned for from afar; only
`kind`, `name`, `compute_capability` and the memory sizes matter there, the rest has defaults. None means "not known",
and the planner then assumes nothing against the user. Every question to torch, NVML and the operating system is asked
by itself (`asked`): one that fails, however it fails, costs its own field, and `detect` never raises. What the answers
say is read by pure functions, tested without hardware.

Left out: speed tests (machine/microbench.py), NVLink and PCIe widths. Unlike ComfyUI's `model_management.py` nothing is
asked at import and nothing is global.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ideogram_app.files import disk_free
from ideogram_app.machine.triton_support import usable_triton

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Default = TypeVar("Default")
PATIENCE = 10  # seconds for a program that answers in one; a driver that is being installed can hang for good

# Compute capability -> generation, from NVIDIA's table of CUDA GPUs. 16-series cards are Turing without tensor cores.
NVIDIA_GENERATIONS: dict[tuple[int, int], str] = {
    **dict.fromkeys(((5, 0), (5, 2)), "Maxwell"),
    **dict.fromkeys(((6, 0), (6, 1)), "Pascal"),
    (7, 0): "Volta",
    (7, 5): "Turing",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    **dict.fromkeys(((8, 0), (8, 6), (8, 7)), "Ampere"),
    **dict.fromkeys(((10, 0), (10, 3), (11, 0), (12, 0), (12, 1)), "Blackwell"),
}
AMD_GENERATIONS = {9: "CDNA", 10: "RDNA 2", 11: "RDNA 3", 12: "RDNA 4"}  # by the first number of gfx1100, gfx90a, ...
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "neon", "asimddp")
_ARM_NAMES = {"asimd": "neon", "FEAT_DotProd": "asimddp", "AdvSIMD": "neon"}  # Linux and macOS say the same in two ways


@dataclass(frozen=True)
class DeviceUser:
    """Another program that holds memory of the first device. Windows drivers often do not say how much."""

    name: str
    bytes: int | None = None


@dataclass(frozen=True)
class Hardware:
    """One machine. Sizes are bytes. What is singular is of one device, the first that works and that torch serves.
    A plural has an entry for every device, in torch's order, or none: the others are then like the first. A device that
    cannot be used has no free memory.

    Attributes:
        kind: cuda, rocm, mps, xpu or cpu.
        device_index: which device that is.
        compute_capability: NVIDIA's (8, 6), or the first two numbers of an AMD gfx name.
        device_free_bytes: free now, what this process already holds included: it can be given back.
        torch_supports_device: whether the installed torch has kernels for the device.
        device_users: other programs that hold device memory.
        cpu_allowed: processors' worth of time that a container may use; None without a limit.
        self_check: what the self-check found on it, for people (kernels/self_check_record.py); "" where none was made.
        problem: what keeps a device from being used, if something does.
        problem_kind: what helps against it, a key of `capabilities.REMEDIES`; "" for another PyTorch or driver.
        triton_problem: what keeps Triton from working on it, and what would help (machine/triton_support.py).

    Raises:
        ValueError: `device_index` names none of the devices.
    """

    kind: str = "cpu"
    name: str = "unknown"
    compute_capability: tuple[int, int] | None = None
    architecture: str = ""
    device_count: int = 0
    device_index: int = 0
    device_memory_bytes: int | None = None
    device_free_bytes: int | None = None
    devices_free_bytes: tuple[int, ...] = ()
    device_names: tuple[str, ...] = ()
    devices_memory_bytes: tuple[int | None, ...] = ()
    device_capabilities: tuple[tuple[int, int] | None, ...] = ()
    devices_supported: tuple[bool | None, ...] = ()
    host_memory_bytes: int | None = None
    host_free_bytes: int | None = None
    disk_free_bytes: int | None = None
    torch_supports_device: bool | None = None
    device_users: tuple[DeviceUser, ...] = ()
    cpu_name: str = ""
    cpu_features: tuple[str, ...] = ()
    cpu_cores: int | None = None
    cpu_allowed: float | None = None
    driver: str = ""
    os: str = ""
    torch: str = ""
    self_check: str = ""
    problem: str = ""
    problem_kind: str = ""
    triton_problem: str = ""

    def __post_init__(self) -> None:
        """Fill in what follows from the rest, so that a described machine need not repeat it."""
        if not self.architecture:
            object.__setattr__(self, "architecture", architecture_name(self.kind, self.compute_capability))
        if self.kind != "cpu" and self.device_count == 0:
            object.__setattr__(self, "device_count", 1)
        if not 0 <= self.device_index < max(1, self.device_count):
            raise ValueError(f"device_index is 0 to {max(1, self.device_count) - 1}")

    @property
    def spills(self) -> bool:
        """Whether the driver, where device memory runs out, goes on in RAM in silence: Windows' and WSL's do."""
        return self.kind == "cuda" and (self.os.startswith("Windows") or "microsoft" in self.os.lower())


def architecture_name(kind: str, capability: tuple[int, int] | None) -> str:
    """The generation of a device; `sm_XY` where the table does not know it, "" where there is none to know."""
    if capability is None:
        return ""
    if kind == "rocm":
        return AMD_GENERATIONS.get(capability[0], f"gfx{capability[0]}{capability[1]}")
    return NVIDIA_GENERATIONS.get(capability, f"sm_{capability[0]}{capability[1]}")


def has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether a torch built for these targets runs on a device of this compute capability.

    Machine code (`sm_86`) runs on the same major number from its minor on; `sm_90a` on exactly its own; PTX
    (`compute_80`) is translated for anything as new or newer.
    """
    for target in built_for:
        form, _, digits = target.partition("_")
        number = digits.rstrip("af")
        if not number.isdigit():
            continue
        major, minor = built = divmod(int(number), 10)
        if form == "compute":
            runs = built <= capability
        elif digits.endswith("a"):
            runs = built == capability
        else:
            runs = major == capability[0] and minor <= capability[1]
        if runs and form in ("sm", "compute"):
            return True
    return False


def parse_device_users(text: str, own_pid: int) -> tuple[DeviceUser, ...]:
    """Read `nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv,noheader,nounits`."""
    users = []
    for line in text.splitlines():
        pid, _, rest = line.partition(",")
        path, _, mebibytes = rest.rpartition(",")
        if not pid.strip().isdigit() or int(pid) == own_pid or not path:
            continue
        name, mebibytes = path.strip().replace("\\", "/").rsplit("/", 1)[-1], mebibytes.strip()
        users.append(DeviceUser(name, int(mebibytes) * 2**20 if mebibytes.isdigit() else None))
    return tuple(users)


def parse_cpu_features(words: str) -> tuple[str, ...]:
    """Those words of a flags line that matter for INT8 and bfloat16 arithmetic, in the order of `CPU_FEATURES`."""
    found = {_ARM_NAMES.get(word, word) for word in words.replace("avx512vnni", "avx512_vnni").split()}
    return tuple(feature for feature in CPU_FEATURES if feature in found)


def parse_cpuinfo(text: str) -> tuple[str, str]:
    """Name and flags line of Linux's /proc/cpuinfo; ARM has no name there."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    return fields.get("model name", ""), fields.get("flags", "") or fields.get("features", "")


def parse_quota(text: str) -> float | None:
    """Linux's cpu.max, `200000 100000`: processors' worth of time a container may use; None for `max` or nothing."""
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def usable_cores() -> tuple[int, int | None]:
    """Processors and cores that this process may run on; cores are None where they are not known."""
    import psutil

    logical, physical = os.cpu_count() or 1, psutil.cpu_count(logical=False)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return allowed, min(allowed, physical) if physical else None


def detect(disk: Path) -> Hardware:
    """Ask this machine; never raises. disk: a folder on the disk for weights, which need not exist yet."""
    from ideogram_app.machine import devices  # which reads and names what it finds by this file

    total, free = asked(host_memory, (None, None))
    cpu_name, cpu_features = asked(_processor, ("", ()))
    device = devices.device_fields()
    if device["kind"] == "mps":  # one memory for both: no more is free for the GPU than for anyone
        sizes = [size for size in (device["device_free_bytes"], free) if size is not None]
        device["device_free_bytes"] = min(sizes, default=None)
    if device["kind"] == "cpu":
        device["name"] = cpu_name or "processor"
    return Hardware(
        host_memory_bytes=total,
        host_free_bytes=free,
        disk_free_bytes=asked(lambda: disk_free(disk), None),
        cpu_name=cpu_name,
        cpu_features=cpu_features,
        cpu_cores=os.cpu_count(),
        cpu_allowed=asked(lambda: parse_quota(_text(Path("/sys/fs/cgroup/cpu.max"))), None),
        os=asked(lambda: f"{platform.system()} {platform.release()}", ""),
        triton_problem=asked(lambda: usable_triton(device["kind"], disk), ""),
        **device,
    )


def asked(question: Callable[[], Answer], otherwise: Default) -> Answer | Default:
    """The answer to one question to the machine; `otherwise` where it raises, whatever that is."""
    try:
        return question()
    except Exception:  # torch, drivers and their libraries raise what they like, and a field less is no failure
        log.info("a question to the machine had no answer", exc_info=True)
        return otherwise


def compute_capability(device: Any) -> tuple[int, int] | None:
    """NVIDIA's compute capability of a `torch.device`; None of any other kind of device."""
    import torch

    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def _processor() -> tuple[str, tuple[str, ...]]:
    """Name and features of the processor, by the means of each operating system."""
    if platform.system() == "Linux":
        name, flags = parse_cpuinfo(_text(Path("/proc/cpuinfo")))
    elif platform.system() == "Darwin":
        name = answer_of("sysctl", "-n", "machdep.cpu.brand_string").strip()
        arm = answer_of("sysctl", "-n", "hw.optional.arm.FEAT_DotProd").strip() == "1"
        flags = "AdvSIMD FEAT_DotProd" if arm else answer_of("sysctl", "-n", "machdep.cpu.leaf7_features").lower()
    else:
        import torch  # Windows keeps no list of flags; torch has asked the processor itself

        name, capability = os.environ.get("PROCESSOR_IDENTIFIER", ""), torch.backends.cpu.get_cpu_capability()
        flags = {"AVX2": "avx2", "AVX512": "avx2 avx512f"}.get(capability, "")
    return name or platform.processor() or platform.machine(), parse_cpu_features(flags)


def host_memory() -> tuple[int, int]:
    """Memory of the machine and what is free of it; inside a container no more than the container may use."""
    import psutil

    memory = psutil.virtual_memory()
    limit = _text(Path("/sys/fs/cgroup/memory.max")).strip()
    used = _text(Path("/sys/fs/cgroup/memory.current")).strip()
    if limit.isdigit() and used.isdigit() and int(limit) < memory.total:
        return int(limit), min(memory.available, max(0, int(limit) - int(used)))
    return memory.total, memory.available


def answer_of(*command: str) -> str:
    """What a program prints; "" where it is missing, fails or hangs. Bytes of another code page become U+FFFD."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError:
        return ""
    try:
        answer, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: where a driver hangs, its programs cannot even be killed
        return ""
    return answer if process.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
