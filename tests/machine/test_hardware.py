"""Hardware: the pure readers with texts that real machines print, and one look at the machine that runs the test."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ideogram_app.errors import RequestError
from ideogram_app.machine.hardware import (
    DeviceUser,
    Hardware,
    architecture_name,
    detect,
    has_kernels,
    parse_cpu_features,
    parse_cpuinfo,
    parse_device_users,
    parse_quota,
    usable_cores,
)
from ideogram_app.wire import from_json, to_json

CUDA_13_WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((6, 1), "Pascal"),
        ((7, 5), "Turing"),
        ((8, 6), "Ampere"),
        ((8, 9), "Ada"),
        ((9, 0), "Hopper"),
        ((12, 0), "Blackwell"),
        ((13, 7), "sm_137"),
    ],
)
def test_a_generation_is_named_and_an_unknown_one_is_not_guessed(capability: tuple[int, int], name: str) -> None:
    assert architecture_name("cuda", capability) == name


def test_amd_generations_are_their_own_and_no_capability_has_none() -> None:
    assert architecture_name("rocm", (11, 0)) == "RDNA 3"
    assert architecture_name("mps", None) == ""


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (CUDA_13_WHEEL, (8, 9), True),  # machine code of sm_86 runs on sm_89
        (CUDA_13_WHEEL, (6, 1), False),  # Pascal was dropped
        (CUDA_13_WHEEL, (7, 0), False),  # an older minor number of the same major
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),  # PTX is translated for newer cards
        (["compute_90"], (8, 6), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),  # an "a" target runs on exactly its own card
        (["gfx1100"], (11, 0), False),
        ([], (8, 6), False),
    ],
)
def test_kernels_match_a_card_by_cudas_compatibility_rules(
    built_for: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert has_kernels(built_for, capability) is runs


def test_other_programs_on_the_card_are_named_without_their_folders_and_without_us() -> None:
    text = (
        "812, /usr/lib/chromium/chromium, 2300\n77, /home/me/us/python, 900\n5, C:\\Games\\a, b.exe, [N/A]\n"
        "No running processes\n\n"
    )
    assert parse_device_users(text, own_pid=77) == (
        DeviceUser("chromium", 2300 * 2**20),
        DeviceUser("a, b.exe", None),
    )


def test_cpu_features_are_found_under_every_systems_spelling() -> None:
    assert parse_cpu_features("fpu avx2 avx512f avx512_vnni amx_int8 sse") == (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "amx_int8",
    )
    assert parse_cpu_features("fp asimd asimddp") == ("neon", "asimddp")
    assert parse_cpu_features("AdvSIMD FEAT_DotProd") == ("neon", "asimddp")
    assert parse_cpu_features("avx512vnni") == ("avx512_vnni",)
    assert parse_cpu_features("") == ()


def test_cpuinfo_gives_the_first_processors_name_and_flags() -> None:
    text = "processor\t: 0\nmodel name\t: Ryzen 5\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: other\n"
    assert parse_cpuinfo(text) == ("Ryzen 5", "fpu avx2")
    assert parse_cpuinfo("processor : 0\nFeatures : asimd\n") == ("", "asimd")
    assert parse_cpuinfo("") == ("", "")


def test_a_machine_described_in_five_fields_is_enough() -> None:
    described = {
        "kind": "cuda",
        "name": "RTX 3060",
        "compute_capability": [8, 6],
        "device_memory_bytes": 12884901888,
        "device_free_bytes": 12000000000,
    }
    machine = from_json(Hardware, json.dumps(described))
    assert machine.architecture == "Ampere"
    assert machine.device_count == 1
    assert machine.host_free_bytes is None


def test_a_described_machine_may_name_all_its_devices_and_survives_the_wire() -> None:
    described = {"kind": "cuda", "name": "RTX 3060", "device_count": 2, "device_index": 1}
    described |= {"device_capabilities": [[7, 0], None], "devices_supported": [False, None]}
    machine = from_json(Hardware, json.dumps(described))
    assert machine.device_capabilities == ((7, 0), None) and machine.devices_supported == (False, None)
    assert from_json(Hardware, to_json(machine)) == machine


@pytest.mark.parametrize("index", [-1, 2])
def test_a_described_machine_whose_device_is_none_of_its_own_is_refused(index: int) -> None:
    with pytest.raises(RequestError, match="device_index"):
        from_json(Hardware, json.dumps({"kind": "cuda", "device_count": 2, "device_index": index}))


@pytest.mark.parametrize(
    ("kind", "system", "spills"),
    [
        ("cuda", "Windows 11", True),
        ("cuda", "Linux 5.15.167.4-microsoft-standard-WSL2", True),
        ("cuda", "Linux 6.8.0-45-generic", False),
        ("rocm", "Windows 11", False),
        ("cpu", "Windows 11", False),
    ],
)
def test_drivers_that_go_on_in_ram_are_those_of_windows_and_wsl(kind: str, system: str, spills: bool) -> None:
    assert Hardware(kind, os=system).spills is spills


def test_a_described_machine_with_a_wrong_type_names_the_field() -> None:
    with pytest.raises(RequestError, match="device_memory_bytes"):
        from_json(Hardware, '{"kind": "cuda", "device_memory_bytes": "much"}')


def test_this_machine_is_detected_and_survives_the_wire(tmp_path: Path) -> None:
    machine = detect(tmp_path / "not" / "there" / "yet")
    assert machine.kind in ("cuda", "rocm", "mps", "xpu", "cpu")
    assert machine.name
    assert machine.host_memory_bytes and machine.host_free_bytes
    assert machine.host_free_bytes <= machine.host_memory_bytes
    assert machine.disk_free_bytes and machine.cpu_cores
    assert from_json(Hardware, to_json(machine)) == machine


@pytest.mark.gpu
def test_a_card_tells_its_memory_and_whether_torch_serves_it(tmp_path: Path) -> None:
    machine = detect(tmp_path)
    assert machine.kind != "cpu"
    assert machine.device_memory_bytes and machine.device_free_bytes
    assert 0 < machine.device_free_bytes <= machine.device_memory_bytes
    assert machine.torch_supports_device is not False


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("200000 100000\n", 2.0), ("150000 100000", 1.5), ("max 100000", None), ("", None), ("1 0", None)],
)
def test_the_share_of_a_container_is_read_from_its_quota(text: str, allowed: float | None) -> None:
    assert parse_quota(text) == allowed


def test_a_process_runs_on_at_least_one_core_and_on_no_more_than_there_are() -> None:
    logical, physical = usable_cores()
    assert 1 <= logical <= (os.cpu_count() or 1) and (physical is None or 1 <= physical <= logical)
