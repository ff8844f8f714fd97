"""Devices that answer oddly, or not at all: detection never raises, and one question costs one field."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ideogram_app.cli.app import app
from ideogram_app.machine import devices, hardware
from ideogram_app.machine.devices import ListedCard, hides_all, parse_listed, why_unused
from ideogram_app.machine.hardware import DeviceUser, Hardware, answer_of, detect
from ideogram_app.machine.memory import memory_now
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import plan

GIB = 2**30
NO_ROOM = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"
CUDA_13_WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
V100, RTX_3060, RTX_3090 = "Tesla V100-SXM2-32GB", "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 3090"


@dataclass(frozen=True)
class Pretended:
    """A card that is not there. error: what asking for its memory raises; `contexts` counts who was asked."""

    name: str = RTX_3060
    capability: tuple[int, int] = (8, 6)
    free: int = 10 * GIB
    total: int = 12 * GIB
    error: str = ""
    contexts: list[int] = field(default_factory=list)


def raising(text: str) -> Callable[..., Any]:
    def question(*asked: Any) -> Any:
        raise RuntimeError(text)

    return question


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *cards: Pretended) -> None:
    """torch as it is on a machine with these NVIDIA cards; nvidia-smi and NVML are not there."""

    def memory(index: int = 0) -> tuple[int, int]:
        cards[index].contexts.append(index)
        if cards[index].error:
            raise RuntimeError(cards[index].error)
        return cards[index].free, cards[index].total

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: len(cards),
        "mem_get_info": memory,
        "memory_reserved": lambda index=0: 0,
        "get_device_name": lambda index=0: cards[index].name,
        "get_device_capability": lambda index=0: cards[index].capability,
        "get_device_properties": lambda index=0: SimpleNamespace(total_memory=cards[index].total, uuid=f"0000-{index}"),
        "get_arch_list": lambda: CUDA_13_WHEEL,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices, "answer_of", lambda *command: "")
    monkeypatch.setitem(sys.modules, "pynvml", None)


def plan_of(machine: Hardware, model: str) -> Any:
    return plan(PlanInputs.of(machine, model))


# A card that cannot be used.


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (NO_ROOM, "full", "free_for_context"),
        (BUSY, "busy", "leave_exclusive"),
        ("CUDA unknown error - this may be due to an incorrectly set up environment", "driver", "restart_driver"),
        ("", "driver", "restart_driver"),
    ],
)
def test_a_card_without_room_for_a_context_leaves_the_processor_and_says_so(
    error: str, kind: str, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended(error=error or "\n"))
    machine = detect(tmp_path)
    assert (machine.kind, machine.problem_kind, machine.torch) == ("cpu", kind, torch.__version__)
    assert machine.problem.startswith(f"The {RTX_3060} cannot be used: ") and machine.problem.endswith(".")
    published, miniature = plan_of(machine, "ideogram-4"), plan_of(machine, "miniature")
    assert published.reasons[0].code == "problem+no_gpu" and published.suggestion.code == f"{code}+use_miniature"
    assert miniature.fits and miniature.device == "cpu"


def test_doctor_speaks_where_the_card_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cuda(monkeypatch, Pretended(error=NO_ROOM))
    done = CliRunner().invoke(app, ["doctor", "--model", "miniature", "--data", str(tmp_path)])
    assert done.exit_code == 0 and "Traceback" not in done.output
    assert f"Problem  The {RTX_3060}" in done.output and "on cpu" in done.output


def test_where_the_first_card_is_full_the_other_one_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_cuda(monkeypatch, Pretended(RTX_3090, error=NO_ROOM), Pretended())
    machine = detect(tmp_path)
    assert (machine.kind, machine.name, machine.device_index) == ("cuda", RTX_3060, 1)
    assert machine.devices_free_bytes == (0, 10 * GIB) and RTX_3090 in machine.problem
    decided = plan_of(machine, "ideogram-4")
    assert decided.fits and decided.branch_devices == ("cuda:1", "cuda:1")


def test_the_card_that_torch_serves_is_taken_before_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA 13 wheels hold nothing for Volta, which CUDA may well number first."""
    cards = Pretended(V100, (7, 0), 30 * GIB, 32 * GIB), Pretended()
    pretend_cuda(monkeypatch, *cards)
    machine = detect(tmp_path)
    assert (machine.name, machine.torch_supports_device, machine.devices_supported) == (RTX_3060, True, (False, True))
    assert not cards[0].contexts  # of no use, so no context on it
    assert plan_of(machine, "ideogram-4").branch_devices == ("cuda:1", "cuda:1")


def test_a_machine_whose_only_card_torch_does_not_serve_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended(V100, (7, 0)))
    machine = detect(tmp_path)
    assert machine.kind == "cuda" and machine.torch_supports_device is False
    assert plan_of(machine, "ideogram-4").suggestion.code == "torch_cuda_12_6"


@pytest.mark.parametrize(
    "question",
    ["memory_reserved", "get_device_name", "get_device_capability", "get_device_properties", "get_arch_list"],
)
def test_a_question_that_fails_costs_its_own_field(
    question: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended())
    whole = detect(tmp_path)
    monkeypatch.setattr(torch.cuda, question, raising("unforeseen"))
    machine = detect(tmp_path)
    assert (machine.kind, machine.device_free_bytes) == ("cuda", 10 * GIB) and not machine.problem
    assert machine.device_memory_bytes == whole.device_memory_bytes and machine.name


def test_a_torch_that_cannot_count_its_cards_leaves_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended())
    monkeypatch.setattr(torch.cuda, "device_count", raising("driver shutting down"))
    assert detect(tmp_path).kind == "cpu"


def test_no_question_to_the_host_ends_detection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("host_memory", "_processor", "disk_free", "parse_quota"):
        monkeypatch.setattr(hardware, name, raising("unforeseen"))
    machine = detect(tmp_path)
    assert machine.name and machine.host_free_bytes is None and machine.disk_free_bytes is None


# Cards beside the first.


def test_cards_beside_the_first_are_asked_through_nvml_by_their_uuid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A context on every card takes 0.3 to 0.5 GB of each; and NVML counts cards in another order than CUDA."""
    cards = Pretended(), Pretended(free=GIB)
    pretend_cuda(monkeypatch, *cards)
    used = SimpleNamespace(pid=1, usedGpuMemory=3 * GIB)
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(free={"GPU-0000-1": 7 * GIB}[card]),
        nvmlDeviceGetComputeRunningProcesses=lambda card: [used] if card == "GPU-0000-0" else [],
        nvmlDeviceGetGraphicsRunningProcesses=lambda card: [],
        nvmlSystemGetProcessName=lambda pid: b"/opt/games/\xff game",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine = detect(tmp_path)
    assert machine.devices_free_bytes == (10 * GIB, 7 * GIB) and not cards[1].contexts
    assert machine.device_users == (DeviceUser("\ufffd game", 3 * GIB),)


def test_without_nvml_or_where_it_fails_they_are_asked_through_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended(), Pretended(free=GIB))
    assert detect(tmp_path).devices_free_bytes == (10 * GIB, GIB)
    refuses = SimpleNamespace(nvmlInit=raising("Driver/library version mismatch"))
    monkeypatch.setitem(sys.modules, "pynvml", refuses)
    assert detect(tmp_path).devices_free_bytes == (10 * GIB, GIB)


def test_a_second_card_that_is_full_has_nothing_free_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended(), Pretended(RTX_3090, error=NO_ROOM))
    machine = detect(tmp_path)
    assert (machine.kind, machine.device_index, machine.devices_free_bytes) == ("cuda", 0, (10 * GIB, 0))
    assert RTX_3090 in machine.problem
    assert plan_of(machine, "ideogram-4").branch_devices == ("cuda:0", "cuda:0")


# Intel, Apple.


def pretend_xpu(monkeypatch: pytest.MonkeyPatch, total: int | None) -> None:
    refusal = "The device (Intel(R) Arc(TM) B580 Graphics) doesn't support querying the available free memory."
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "mem_get_info", raising(refusal))
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: "Intel Arc B580")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    properties = raising(refusal) if total is None else lambda index: SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.xpu, "get_device_properties", properties)


def test_an_intel_gpu_that_cannot_say_what_is_free_is_planned_for_by_its_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_xpu(monkeypatch, 12 * GIB)
    machine = detect(tmp_path)
    assert (machine.kind, machine.device_memory_bytes, machine.device_free_bytes) == ("xpu", 12 * GIB, None)
    assert plan_of(machine, "miniature").device == "xpu:0"
    assert 0 < PlanInputs.of(machine, "ideogram-4").device_free < 12 * GIB
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "memory_reserved", lambda index: GIB)
    now = memory_now(machine)  # asked for after an error, so it must not raise another
    assert (now.device_total, now.device_free, now.device_ours) == (12 * GIB, None, GIB)


def test_an_intel_card_is_not_paired_with_the_processors_own_graphics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_xpu(monkeypatch, 12 * GIB)
    names = ("Intel Arc B580", "Intel Graphics")
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: names[index])
    machine = replace(detect(tmp_path), host_free_bytes=30 * GIB, disk_free_bytes=500 * GIB)
    assert machine.device_names == names
    assert plan_of(machine, "ideogram-4").branch_devices == ("xpu:0", "xpu:0")


def test_an_intel_gpu_that_says_nothing_leaves_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_xpu(monkeypatch, None)
    machine = detect(tmp_path)
    assert machine.kind == "cpu" and "Intel Arc B580" in machine.problem
    assert plan_of(machine, "miniature").device == "cpu"


def test_a_mac_that_does_not_say_what_its_gpu_may_use_is_planned_for_by_its_ram(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", raising("no Metal in this virtual machine"))
    machine = detect(tmp_path)
    assert machine.kind == "mps" and machine.device_free_bytes == machine.host_free_bytes
    assert plan_of(machine, "miniature").fits


# nvidia-smi.

LISTED = "NVIDIA GeForce RTX 3060, 535.183.01, GPU-1b2c\nTesla T4, 535.183.01, GPU-77aa\n"


def test_what_nvidia_smi_lists_is_read_and_rubbish_is_none() -> None:
    first, second = parse_listed(LISTED)
    assert first == ListedCard("NVIDIA GeForce RTX 3060", "535.183.01", "GPU-1b2c") and second.name == "Tesla T4"
    for rubbish in ("", "No devices were found\n", "a, b, c\n", "\ufffd\ufffd,,\n", "NVIDIA-SMI has failed, 5.1, x"):
        assert parse_listed(rubbish) == ()


def test_a_program_that_prints_foreign_bytes_fails_or_hangs_costs_its_answer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(*statements: str) -> str:
        return answer_of(sys.executable, "-S", "-c", ";".join(statements))

    assert "game.exe" in answer("import sys", "sys.stdout.buffer.write(b'7, C:/\\xff\\xfe/game.exe, 400')")
    assert answer("print('half')", "raise SystemExit(9)") == ""
    assert answer_of("no-such-program-anywhere") == ""
    monkeypatch.setattr(hardware, "PATIENCE", 0.5)
    assert answer("import time", "print('begun', flush=True)", "time.sleep(600)") == ""


@pytest.mark.parametrize("printed", ["", "garbage\n" * 3, "\ufffd, \ufffd, \ufffd", "8, 9"])
def test_a_card_is_found_whatever_nvidia_smi_prints(
    printed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cuda(monkeypatch, Pretended())
    monkeypatch.setattr(devices, "answer_of", lambda *command: printed)
    machine = detect(tmp_path)
    assert (machine.kind, machine.driver, machine.device_users) == ("cuda", "", ())


@pytest.mark.parametrize(
    ("visible", "hidden"),
    [
        *((value, True) for value in ("", "-1", "none", "2", "7,0", "GPU-9")),
        *((value, False) for value in ("0", "1,0", "GPU-77", "MIG-5f", " 1 ")),
    ],
)
def test_cuda_visible_devices_hides_all_where_its_first_entry_is_no_card(visible: str, hidden: bool) -> None:
    assert hides_all(visible, ["GPU-1b2c", "GPU-77aa"]) is hidden


CU130 = ("2.13.0+cu130", "13.0")


@pytest.mark.parametrize(
    ("card", "driver", "torch_cuda", "visible", "windows", "kind", "says"),
    [
        (RTX_3060, "535.183.01", CU130, None, False, "driver_or_wheel", ("580", "535.183.01", "--torch cu126")),
        (RTX_3060, "527.41", CU130, None, True, "old_driver", ("580",)),  # Windows: cu126 needs 528
        (RTX_3060, "527.41", CU130, None, False, "driver_or_wheel", ("--torch cu126",)),
        (RTX_3060, "525.53", CU130, None, False, "old_driver", ("580",)),
        (RTX_3060, "470.256.02", CU130, None, False, "old_driver", ("580",)),
        ("NVIDIA GeForce RTX 5090", "570.86.16", CU130, None, False, "old_driver", ("580",)),  # not in cu126
        (RTX_3060, "512.77", ("2.13.0+cu126", "12.6"), None, False, "old_driver", ("525",)),
        (RTX_3060, "580.82.07", CU130, None, False, "driver", ("580.82.07",)),
        (RTX_3060, "580.82.07", CU130, "", False, "hidden", ('CUDA_VISIBLE_DEVICES=""',)),
        (RTX_3060, "535.183.01", CU130, "-1", False, "hidden", ('CUDA_VISIBLE_DEVICES="-1"',)),
        (RTX_3060, "580.82.07", ("2.13.0+cpu", None), "", False, "", ("without CUDA",)),
        (RTX_3060, "535.183.01", ("2.13.0+cpu", None), None, False, "driver_or_wheel", ("--torch cu126",)),
    ],
)
def test_a_card_that_is_listed_and_not_used_is_told_why_and_which_pytorch_helps(
    card: str,
    driver: str,
    torch_cuda: tuple[str, str | None],
    visible: str | None,
    windows: bool,
    kind: str,
    says: Sequence[str],
) -> None:
    text, found = why_unused([ListedCard(card, driver, "GPU-1")], *torch_cuda, visible, windows)
    assert found == kind and card in text and text.endswith((".", ").")) and all(each in text for each in says)
    assert ("cu126" in text) is (kind == "driver_or_wheel") or torch_cuda[1] == "12.6"
    assert why_unused([], *torch_cuda, visible, windows) == ("", "")


def test_hidden_cards_are_told_by_detection_with_what_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "answer_of", lambda *command: LISTED if "--query-gpu" in command[1] else "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = detect(tmp_path)
    assert (machine.kind, machine.problem_kind) == ("cpu", "hidden")
    assert plan_of(machine, "ideogram-4").suggestion.code == "show_device+use_miniature"
