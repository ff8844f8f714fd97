"""Devices: what torch, NVML and the driver say of each GPU, question by question, as the fields of `Hardware`.

    device_fields()     never raises: a device that cannot be used is passed over, its `problem` in words

The first kind of which a device works is taken: CUDA or ROCm, XPU, MPS. Of several cards the first is described that
torch has kernels for and that works, the rest have a place in the plurals of `Hardware`. Asked through torch, a card
gets a context, 0.3 to 0.5 GB that stay; so the others are asked through NVML, where pynvml is installed.

ComfyUI's `model_management.py` asks at import, and ends there where a card has no room for a context. Left out: cards
that torch does not list (but for NVIDIA's, of which it says why), amdsmi, and what is free on a card that fills later.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ideogram_app.machine.gpu_specs import published_capability
from ideogram_app.machine.hardware import DeviceUser, answer_of, asked, has_kernels, parse_device_users

log = logging.getLogger(__name__)
# What torch says of a card on which it cannot make a context -> in words, and what helps (`Hardware.problem_kind`).
UNUSABLE: tuple[tuple[str, str, str], ...] = (
    ("out of memory", "other programs hold its memory, so that not even a driver's context has room", "full"),
    ("busy or unavailable|exclusive", "it is in exclusive mode or busy, and another program has it", "busy"),
)
# CUDA's major version -> the oldest driver that it runs with, on Linux and on Windows: NVIDIA's release notes of the
# CUDA toolkit, table of minor version compatibility. Wheels for CUDA 12.6 hold no machine code for Blackwell.
OLDEST_DRIVERS = {12: ((525, 60), (528, 33)), 13: ((580, 0), (580, 0))}
WHEEL_FOR_OLD_DRIVERS, BLACKWELL = "cu126", (10, 0)


@dataclass(frozen=True)
class Card:
    """One device; None where that is not known.

    Attributes:
        total, free: bytes of its memory; what this process caches of it counts as free.
        supported: whether torch has kernels for it.
        problem: why nothing can run on it, "" where something can; problem_kind: as in `Hardware`.
    """

    name: str
    capability: tuple[int, int] | None = None
    total: int | None = None
    free: int | None = None
    supported: bool | None = None
    problem: str = ""
    problem_kind: str = ""


@dataclass(frozen=True)
class ListedCard:
    """A card as nvidia-smi lists it, whether torch can use it or not; driver: its version, 535.183.01."""

    name: str
    driver: str
    uuid: str


def device_fields() -> dict[str, Any]:
    """The fields of `Hardware` that torch and the driver know."""
    try:
        import torch
    except Exception as problem:  # a half-installed torch fails in its libraries: OSError, RuntimeError, ...
        log.warning("torch cannot be imported", exc_info=True)
        return {"kind": "cpu", "problem": f"PyTorch cannot be loaded: {first_line(problem)}"}
    fields: dict[str, Any] = {}
    for is_there, ask in KINDS:
        if not asked(partial(is_there, torch), False):
            continue
        found: dict[str, Any] = asked(partial(ask, torch), {})
        if found.get("kind", "cpu") != "cpu":
            return found | {"torch": torch.__version__}
        fields = fields or found
    if not fields:
        why, kind = asked(partial(_unused_nvidia, torch), ("", ""))
        fields = {"kind": "cpu", "problem": why, "problem_kind": kind}
    return fields | {"torch": torch.__version__}


def described(kind: str, cards: Sequence[Card], main: int | None) -> dict[str, Any]:
    """The fields of several cards; main: the one to describe, None where none can be used."""
    refused = [card for card in cards if card.problem]
    problem, problem_kind = " ".join(card.problem for card in refused), next((c.problem_kind for c in refused), "")
    if main is None:
        return {"kind": "cpu", "problem": problem, "problem_kind": problem_kind}
    own = cards[main]
    if any(card.problem for card in cards[:main]):
        problem += f" The {own.name} is used instead."
    return {
        "kind": kind,
        "name": own.name,
        "compute_capability": own.capability,
        "device_count": len(cards),
        "device_index": main,
        "device_memory_bytes": own.total,
        "device_free_bytes": own.free,
        "devices_free_bytes": tuple(card.free or 0 for card in cards),
        "devices_memory_bytes": tuple(card.total for card in cards),
        "device_names": tuple(card.name for card in cards),
        "device_capabilities": tuple(card.capability for card in cards),
        "devices_supported": tuple(card.supported for card in cards),
        "torch_supports_device": own.supported,
        "problem": problem,
        "problem_kind": problem_kind,
    }


def candidates(cards: Sequence[Card]) -> list[int]:
    """The cards that may be the main one, in order: those that torch has kernels for, else all."""
    served = [index for index, card in enumerate(cards) if card.supported is not False]
    return served or list(range(len(cards)))


def unusable(card: Card, problem: BaseException) -> Card:
    """The card, with what torch said of it in words."""
    text = str(problem).lower()
    words, kind = next(((words, kind) for sign, words, kind in UNUSABLE if re.search(sign, text)), ("", "driver"))
    why = f"{words}." if words else first_line(problem)
    return replace(card, free=None, problem=f"The {card.name} cannot be used: {why}", problem_kind=kind)


def first_line(problem: BaseException) -> str:
    """The first line of an error that a library raised, as a sentence."""
    line = next(iter(str(problem).strip().splitlines()), "") or type(problem).__name__
    return f"{line.strip().rstrip('.'):.200}."


def parse_listed(text: str) -> tuple[ListedCard, ...]:
    """Read `nvidia-smi --query-gpu=name,driver_version,uuid --format=csv,noheader`; lines of another form are none."""
    rows = (tuple(part.strip() for part in line.split(",")) for line in text.splitlines())
    return tuple(
        ListedCard(*row)
        for row in rows
        if len(row) == 3 and re.fullmatch(r"\d+(\.\d+)+", row[1]) and row[2].startswith("GPU-")
    )


def hides_all(visible: str, uuids: Sequence[str]) -> bool:
    """Whether a value of CUDA_VISIBLE_DEVICES leaves none of the cards; CUDA reads it up to the first that is not."""
    first = visible.split(",")[0].strip()
    if first.isdigit():
        return int(first) >= len(uuids)
    if first.startswith("GPU-"):
        return not any(uuid.startswith(first) for uuid in uuids)
    return not first.startswith("MIG-")  # "", -1 and words


def why_unused(
    listed: Sequence[ListedCard], torch: str, cuda: str | None, visible: str | None, windows: bool
) -> tuple[str, str]:
    """Why torch uses none of the cards that the driver lists, and the kind of that; ("", "") where there are none.

    Args:
        torch: its version; cuda: the CUDA that it was built for, None without one.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    if not listed:
        return "", ""
    card = listed[0]
    major, minor = (int(part) for part in card.driver.split(".")[:2])
    driver = major, minor
    says = f"The driver lists an {card.name}, but"
    helps = driver >= OLDEST_DRIVERS[12][windows] and (published_capability(card.name) or (0, 0)) < BLACKWELL
    wheel = f"that for CUDA 12.6 runs with it (python launch.py --torch {WHEEL_FOR_OLD_DRIVERS})."
    if cuda is None:
        new = driver >= OLDEST_DRIVERS[13][windows]
        which = "" if new or not helps else f" The driver, {card.driver}, is too old for CUDA 13; {wheel}"
        return f"{says} this PyTorch ({torch}) was built without CUDA.{which}", "driver_or_wheel" if which else ""
    if visible is not None and hides_all(visible, [each.uuid for each in listed]):
        return f'{says} CUDA_VISIBLE_DEVICES="{visible:.40}" hides it from this program.', "hidden"
    oldest = OLDEST_DRIVERS.get(int(cuda.split(".")[0]), ((0, 0), (0, 0)))[windows]
    if driver >= oldest:
        return f"{says} PyTorch {torch} cannot use it, although driver {card.driver} is new enough.", "driver"
    needs = (
        f"{says} PyTorch {torch} cannot use it: CUDA {cuda} needs driver {oldest[0]} or newer, this is {card.driver}"
    )
    if helps and oldest > OLDEST_DRIVERS[12][windows]:
        return f"{needs}; {wheel}", "driver_or_wheel"
    return f"{needs}.", "old_driver"


# The questions themselves.


def _cuda_like(torch: Any) -> dict[str, Any]:
    """Cards of a CUDA or ROCm build of torch, which answers for both under one name."""
    kind = "rocm" if torch.version.hip else "cuda"
    targets: Sequence[str] = asked(torch.cuda.get_arch_list, ())
    cards = [_card(torch, kind, index, targets) for index in range(torch.cuda.device_count())]
    rest, main = list(range(len(cards))), None
    for index in candidates(cards):
        rest.remove(index)
        cards[index] = _with_memory(torch, index, cards[index])
        if not cards[index].problem:
            main = index
            break
    for index in rest:
        cards[index] = _beside(torch, kind, index, cards[index])
    fields = described(kind, cards, main)
    if kind == "rocm" or main is None:
        return fields
    listed = asked(_listed, ())
    return fields | {"driver": listed[0].driver if listed else "", "device_users": _users(torch, main, bool(listed))}


def _card(torch: Any, kind: str, index: int, targets: Sequence[str]) -> Card:
    """What a card is, without making a context on it."""
    names = {"cuda": "NVIDIA GPU", "rocm": "AMD GPU"}
    capability = asked(partial(torch.cuda.get_device_capability, index), None)
    properties = asked(partial(torch.cuda.get_device_properties, index), None)
    supported: bool | None = None
    if kind == "rocm":
        gfx = str(getattr(properties, "gcnArchName", "")).split(":")[0]
        supported = gfx in targets if gfx and targets else None
    elif capability and targets:
        supported = has_kernels(list(targets), capability)
    name = asked(partial(torch.cuda.get_device_name, index), names[kind])
    total = getattr(properties, "total_memory", None)
    return Card(name, tuple(capability) if capability else None, total, supported=supported)


def _with_memory(torch: Any, index: int, card: Card) -> Card:
    """The card with its memory as torch reports it, which makes a context on it."""
    try:
        free, total = torch.cuda.mem_get_info(index)
    except Exception as problem:  # whatever it is, this card cannot be used and another one may be
        log.info("device %d cannot be used", index, exc_info=True)
        return unusable(card, problem)
    return replace(card, free=free + asked(partial(torch.cuda.memory_reserved, index), 0), total=total)


def _beside(torch: Any, kind: str, index: int, card: Card) -> Card:
    """A card that is not the main one: by NVML, else through torch, unless torch cannot use it anyway."""
    free = asked(lambda: int(_nvml_memory(torch, index).free), None) if kind == "cuda" and _nvml() else None
    if free is not None:
        return replace(card, free=free + asked(partial(torch.cuda.memory_reserved, index), 0))
    return card if card.supported is False else _with_memory(torch, index, card)


def _xpu_device(torch: Any) -> dict[str, Any]:
    """The first Intel GPU, and the names of all. Many cannot say what is free (pytorch #194576), and none in WSL."""
    total = asked(lambda: int(torch.xpu.get_device_properties(0).total_memory), None)
    free, total = asked(partial(torch.xpu.mem_get_info, 0), (None, total))
    name = asked(partial(torch.xpu.get_device_name, 0), "Intel GPU")
    if total is None:
        problem = f"The {name} cannot be used: it does not say how much memory it has."
        return {"kind": "cpu", "problem": problem, "problem_kind": "driver"}
    if free is not None:
        free += asked(partial(torch.xpu.memory_reserved, 0), 0)
    count = max(1, asked(torch.xpu.device_count, 1))
    return {
        "kind": "xpu",
        "name": name,
        "device_count": count,
        "device_names": tuple(asked(partial(torch.xpu.get_device_name, index), "Intel GPU") for index in range(count)),
        "device_memory_bytes": total,
        "device_free_bytes": free,
    }


def _mps_device(torch: Any) -> dict[str, Any]:
    # What macOS lets the GPU use, about three quarters of all memory; None, and its RAM counts alone.
    most = asked(lambda: int(torch.mps.recommended_max_memory()), None)
    name = asked(lambda: answer_of("sysctl", "-n", "machdep.cpu.brand_string").strip(), "") or "Apple GPU"
    return {
        "kind": "mps",
        "name": name,
        "device_count": 1,
        "device_memory_bytes": most,
        "device_free_bytes": most,
    }


Question = Callable[[Any], Any]
KINDS: tuple[tuple[Question, Question], ...] = (
    (lambda torch: torch.cuda.is_available(), _cuda_like),
    (lambda torch: hasattr(torch, "xpu") and torch.xpu.is_available(), _xpu_device),
    (lambda torch: torch.backends.mps.is_available(), _mps_device),
)


def _unused_nvidia(torch: Any) -> tuple[str, str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return why_unused(_listed(), torch.__version__, torch.version.cuda, visible, platform.system() == "Windows")


def _listed() -> tuple[ListedCard, ...]:
    return parse_listed(answer_of("nvidia-smi", "--query-gpu=name,driver_version,uuid", "--format=csv,noheader"))


def _users(torch: Any, index: int, listed: bool) -> tuple[DeviceUser, ...]:
    """Who else holds memory of a card: by NVML, which sees graphics programs too, else by nvidia-smi if it answers."""
    found = asked(partial(_nvml_users, torch, index), ()) if _nvml() else ()
    if found or not listed:
        return found
    command = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits")
    return asked(lambda: parse_device_users(answer_of(*command), os.getpid()), ())


def _nvml() -> Any:
    """The module pynvml, ready to be asked; None where it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    return asked(lambda: pynvml.nvmlInit() or pynvml, None)


def _nvml_handle(torch: Any, index: int) -> Any:
    """NVML's own number of a card is another than torch's, so it is found by its UUID."""
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return _nvml().nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _nvml_memory(torch: Any, index: int) -> Any:
    return _nvml().nvmlDeviceGetMemoryInfo(_nvml_handle(torch, index))


def _nvml_users(torch: Any, index: int) -> tuple[DeviceUser, ...]:
    nvml, card = _nvml(), _nvml_handle(torch, index)
    processes = [*nvml.nvmlDeviceGetComputeRunningProcesses(card), *nvml.nvmlDeviceGetGraphicsRunningProcesses(card)]
    held = {process.pid: process.usedGpuMemory for process in processes if process.pid != os.getpid()}
    names = {pid: asked(partial(nvml.nvmlSystemGetProcessName, pid), f"process {pid}") for pid in held}
    paths = {
        pid: name.decode(errors="replace") if isinstance(name, bytes) else str(name) for pid, name in names.items()
    }
    return tuple(DeviceUser(Path(paths[pid]).name, size) for pid, size in held.items())
