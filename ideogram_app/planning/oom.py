"""Out-of-memory errors, classified: the device, RAM, pinned memory (page-locked), or Windows' commit limit.

    oom = classify(problem, phase="denoise", now=memory_now(hardware))
    oom.sentence()     what happened, when, how much was wanted and free, and what helps

Libraries report one and the same lack in a dozen ways, and two lacks in one: `CUDA error: out of memory` is raised for
the device, for pinned memory and for Windows' commit limit alike. What the message does not settle, the memory that was
free at that moment does. What can be drawn with less is planning/fallbacks.py. ComfyUI and WebUIs match one exception
type and say "CUDA out of memory" for all four. torch is not imported: exceptions are known by their bases and their
words.

Left out: the kernel's OOM killer, which leaves nothing to catch, and a kernel's shared memory.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

from ideogram_app.machine.memory import MemoryNow
from ideogram_app.text import gb

# What says so, in the words of torch's allocators, CUDA, ROCm, Metal, oneAPI, DirectML, Triton, NumPy, the C++ library,
# the kernel and Windows. The first that is found counts. "unclear" is the driver's word for three of the four; "scarce"
# is what a library says that could not be set up, or found no way to compute: want of memory only where little is free.
LIBRARIES = "blas|blaslt|dnn|solver|sparse|fft|rand"  # cu- and hip-: each names its states alike
SIGNS: tuple[tuple[str, str], ...] = (
    ("commit", r"paging file is too small|winerror 1455|os error 1455"),
    ("locked", r"(cuda|hip)host(alloc|malloc|register)|pinned memory.*(out of memory|fail|cannot)"),
    ("host", r"out_of_host_memory|host_allocation_failed|cpuallocator|c10 out of memory|bad_alloc|bad allocation"),
    ("host", r"cannot allocate memory|not enough memory|unable to allocate .* for an array|nvrtc_error_out_of_memory"),
    ("unclear", r"(cuda|hip)( driver)? error: out of memory|(cuda|hip)error(memoryallocation|outofmemory)"),
    ("unclear", r"(cuda|hip)_error_out_of_memory"),
    ("device", r"(cuda|hip|xpu|mps backend) out of memory|triton error \[\w+\]:.{0,40}out of memory"),
    ("device", rf"({LIBRARIES})_(status_)?alloc_failed|device_allocation_failed|out_of_device_memory"),
    ("device", r"(ur|pi|cl|hsa)_((result|status)_)?(error_)?out_of_resources|mem_object_allocation_failure"),
    ("device", r"roc(blas|sparse|solver|fft)_status_memory_error|miopenstatusallocfailed"),
    ("device", r"invalid buffer size|callbackerroroutofmemory|failed to (allocate|create) .*(mtlbuffer|metal buffer)"),
    ("device", r"failed to allocate memory for requested buffer|not enough gpu (video )?memory"),
    ("device", r"would exceed allowed memory|can ?not allocate memory block"),
    ("scarce", rf"({LIBRARIES})_(status_)?(not_initialized|internal_error|execution_failed)"),
    ("scarce", r"unable to find an engine to execute|unable to find a valid cudnn algorithm|no suitable algorithm"),
    ("scarce", r"roc(blas|sparse|solver)_status_internal_error|miopenstatus(notinitialized|(internal|unknown)error)"),
)
UNITS = {"bytes": 1, "b": 1} | {f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", 1)}
AMOUNT = r"([\d.]+) ?(bytes|[kmgtp]ib|b)\b"
WANTED = re.compile(rf"(?:allocat\w*|mmap|requested :|invalid buffer size:) {AMOUNT}")
FREE = re.compile(rf"of which {AMOUNT} is free")
ALLOWED = re.compile(rf"{AMOUNT} allowed;")
HELD = re.compile(rf"of the allocated memory {AMOUNT}")
METAL = re.compile(rf"mps allocated: {AMOUNT}, other allocations: {AMOUNT}, max allowed: {AMOUNT}")
# What libraries take beside torch's allocator (a context, workspaces, kernels) is below this; where more is free, it
# was not the device that ran out.
PLENTY_BYTES = 1_000_000_000

HAPPENED = {
    "device": "The device ran out of memory",
    "host": "RAM ran out",
    "locked": "The system would not lock as much RAM as was asked for",
    "commit": "Windows would not promise more memory: RAM and page file together are given away",
}
HELPS = {
    "device": "Close other programs that use the device; a smaller picture or GGUF Q4_K needs less of it.",
    "host": "Close other programs, or draw with a smaller precision; in a container or in WSL, allow it more RAM.",
    "locked": "Blocks that are streamed rest in locked RAM: stream less of them, by a smaller precision, or read them "
    "from disk. In WSL, allow it more RAM (memory= in .wslconfig); in a container, lift its limit on locked memory.",
    "commit": "Enlarge the page file (System, Advanced system settings, Performance, Virtual memory) or let Windows "
    "manage its size; closing other programs helps as well.",
}
PHASE_WORDS = {
    "prepare": "while weights were prepared",
    "load": "while the weights were loaded",
    "encode": "while the caption was read",
    "denoise": "while drawing",
    "decode": "while the picture was decoded",
}

Known = tuple[bool | None, ...]
EITHER: Known = (True, False, None)
# What ran out, where the message leaves several kinds of memory open and the numbers decide: the kind of the message,
# whether Windows counts what it has promised, whether plenty of device memory and of RAM was free (None: not known),
# and the kind that it was then: "" for no want of memory. The first row that matches counts.
SETTLED: tuple[tuple[str, Known, Known, Known, str], ...] = (
    ("scarce", EITHER, (False,), EITHER, "device"),
    ("scarce", EITHER, (True, None), EITHER, ""),
    ("unclear", EITHER, (False, None), EITHER, "device"),
    ("unclear", (True,), (True,), EITHER, "commit"),
    ("unclear", (False,), (True,), (True, None), "locked"),  # RAM is there, or not known: the system sets a limit
    ("unclear", (False,), (True,), (False,), "host"),
    ("device", (True,), (True,), EITHER, "commit"),
    ("host", (True,), EITHER, (True,), "commit"),
)


@dataclass(frozen=True)
class OutOfMemory:
    """Memory that was wanted and not to be had.

    Attributes:
        kind: device, host (RAM), locked (pinned memory) or commit (Windows' limit).
        wanted_bytes: by the request that failed; None where nobody said. It is the last of many, not all of them.
        phase: of the picture, as in `records.Event`; "" where it is not known.
        free_bytes: of the memory that ran out, at that moment; of a commit limit, of the device.
    """

    kind: str
    wanted_bytes: int | None = None
    phase: str = ""
    free_bytes: int | None = None

    def happened(self) -> str:
        """What, when, and the numbers, as one sentence without its full stop."""
        when = f" {PHASE_WORDS[self.phase]}" if self.phase in PHASE_WORDS else ""
        parts = []
        if self.wanted_bytes:
            parts.append(f"{gb(self.wanted_bytes)} more were asked for")
        if self.free_bytes is not None and self.kind == "commit":
            parts.append(f"the device still had {gb(self.free_bytes)}")
        elif self.free_bytes is not None:
            whole = self.wanted_bytes is None or self.free_bytes < self.wanted_bytes
            pieces = "" if whole or self.kind != "device" else ", in pieces too small"
            parts.append(f"{gb(self.free_bytes)} were free{pieces}")
        numbers = f" ({', '.join(parts)})" if parts else ""
        return f"{HAPPENED[self.kind]}{when}{numbers}"

    def sentence(self) -> str:
        """For people: what happened, and what to do."""
        return f"{self.happened()}. {HELPS[self.kind]}"

    def account(self, done: str) -> str:
        """For `Result.given_up`: what happened, and what was done with less instead."""
        return f"{self.happened()}. Went on with less: {done}."


def classify(
    problem: BaseException, phase: str = "", now: MemoryNow | None = None, windows: bool = os.name == "nt"
) -> OutOfMemory | None:
    """What kind of memory ran out; None where the problem is another one.

    Args:
        now: what was free then, read before anything is released; without it, what the driver leaves open counts as
            the device's, and what a library says only for want of memory among others counts as another problem.
        windows: whether Windows counts what it has promised, as no other system does.
    """
    cause: BaseException | None = problem
    while cause is not None:
        text = " ".join(str(cause).lower().split())
        kind = _kind(cause, text)
        found = _settled(kind, text, phase, now or MemoryNow(), windows) if kind else None
        if found:
            return found
        cause = cause.__cause__
    return None


def _kind(problem: BaseException, text: str) -> str:
    """What the exception says by itself; "" where it is another problem."""
    if isinstance(problem, OSError):
        if getattr(problem, "winerror", None) == 1455 or re.search(SIGNS[0][1], text):
            return "commit"
        return "host" if problem.errno == errno.ENOMEM else ""
    foreign = type(problem).__module__.startswith("safetensors")  # its errors derive from Exception alone
    if not foreign and not isinstance(problem, RuntimeError | MemoryError | ImportError):  # a DLL is memory, too
        return ""
    found = next((kind for kind, sign in SIGNS if re.search(sign, text)), "")
    by_type = "host" if isinstance(problem, MemoryError) else ""
    if type(problem).__name__ == "OutOfMemoryError":  # torch's, whatever allocator worded it
        by_type = "device"
    return found or by_type


def _settled(kind: str, text: str, phase: str, now: MemoryNow, windows: bool) -> OutOfMemory | None:
    """The kind that the numbers leave, with those numbers; None where they say that it was something else."""
    wanted = _amount(WANTED.search(text))
    free = _free(text)
    device_free = now.device_free if free is None else free
    plenty = max(PLENTY_BYTES, wanted or 0)
    device = None if device_free is None else device_free > plenty
    ram = None if now.host_free is None else now.host_free > plenty
    promises = windows and not ALLOWED.search(text)  # a limit that the process was given is no promise of Windows'
    for said, counts, of_device, of_ram, settled in SETTLED:
        if said == kind and promises in counts and device in of_device and ram in of_ram:
            kind = settled
            break
    if not kind:
        return None
    return OutOfMemory(kind, wanted, phase, device_free if kind in ("device", "commit") else now.host_free)


def _free(text: str) -> int | None:
    """Free device memory as torch reports it in the message; within a share that the process was limited to."""
    metal = METAL.search(text)
    if metal:
        ours, others, most = (_bytes(*metal.group(at, at + 1)) for at in (1, 3, 5))
        return max(0, most - ours - others)
    free, allowed, held = (_amount(sign.search(text)) for sign in (FREE, ALLOWED, HELD))
    if free is not None and allowed is not None and held is not None:
        return max(0, min(free, allowed - held))
    return free


def _amount(found: re.Match[str] | None) -> int | None:
    return _bytes(found.group(1), found.group(2)) if found else None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * UNITS[unit])
