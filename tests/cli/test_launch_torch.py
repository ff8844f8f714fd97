"""Which build of PyTorch the launcher takes: recorded answers of nvidia-smi and systems against the exact pip commands.

Answers stand here as nvidia-smi gives them, or as people have reported them (its words where it fails). Programs that
hang or print rubbish are small shell scripts; AMD's and Intel's cards are files in a folder laid out as Linux does it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import launch
import launch_torch
from launch_torch import BUILDS, Machine, NvidiaCard, choose, parse_cards
from tools import check_installs

ROOT = Path(__file__).resolve().parents[2]
INDEX = "https://download.pytorch.org/whl/"

# Answers to --query-gpu=name,driver_version,compute_cap --format=csv,noheader
GTX_1080, GTX_1080_NEW = "NVIDIA GeForce GTX 1080, 535.183.01, 6.1\n", "NVIDIA GeForce GTX 1080, 580.95.05, 6.1\n"
GTX_780 = "NVIDIA GeForce GTX 780, 470.256.02, 3.5\n"
V100 = "Tesla V100-SXM2-16GB, 550.54.15, 7.0\nTesla V100-SXM2-16GB, 550.54.15, 7.0\n"
RTX_2080_TI = "NVIDIA GeForce RTX 2080 Ti, 525.60.13, 7.5\n"
RTX_3060_EARLY, RTX_3060 = "NVIDIA GeForce RTX 3060, 525.53, 8.6\n", "NVIDIA GeForce RTX 3060, 560.94, 8.6\r\n"
RTX_3060_NEW = "NVIDIA GeForce RTX 3060, 580.95.05, 8.6\n"
RTX_4060 = "NVIDIA GeForce RTX 4060, 581.42, 8.9\r\n"
RTX_5090_OLD, RTX_5090 = "NVIDIA GeForce RTX 5090, 570.133.07, 12.0\n", "NVIDIA GeForce RTX 5090, 580.65.06, 12.0\n"
H100, H100_NEW = "NVIDIA H100 80GB HBM3, 535.216.03, 9.0\n", "NVIDIA H100 80GB HBM3, 580.105.08, 9.0\n"
BOTH_OLD = "NVIDIA GeForce RTX 5090, 570.133.07, 12.0\nNVIDIA GeForce RTX 3090, 570.133.07, 8.6\n"
BOTH_NEW = "NVIDIA GeForce GTX 1080, 580.95.05, 6.1\nNVIDIA GeForce RTX 4090, 580.95.05, 8.9\n"
# An old nvidia-smi beside a new driver, as in a snap: no field compute_cap, asked again without it.
SNAP_3060, SNAP_5070 = "NVIDIA GeForce RTX 3060, 560.35.03\n", "NVIDIA GeForce RTX 5070 Ti, 570.133.07\n"
SNAP_PRO = "NVIDIA RTX PRO 1000 Blackwell Generation Laptop GPU, 580.95.05\n"
ADA_5000 = "NVIDIA RTX 5000 Ada Generation, 550.90.07\n"

TABLE = [  # answer, system, build, whether the user can do something
    ("", "linux", "default", False),
    ("", "win32", "default", False),
    ("", "darwin", "default", False),
    (RTX_3060_NEW, "linux", "default", False),
    (RTX_4060, "win32", "cu130", False),
    (RTX_5090, "linux", "default", False),
    (RTX_5090, "win32", "cu130", False),
    (H100_NEW, "linux", "default", False),
    (RTX_3060, "linux", "cu126", False),
    (RTX_3060, "win32", "cu126", False),
    (RTX_2080_TI, "linux", "cu126", False),
    (RTX_2080_TI, "win32", "default", True),  # below 528.33, which CUDA 12 needs on Windows
    (RTX_3060_EARLY, "linux", "default", True),  # a beta below 525.60
    (H100, "linux", "cu126", False),
    (V100, "linux", "cu126", False),
    (GTX_1080, "linux", "cu126", False),
    (GTX_1080_NEW, "linux", "cu126", False),  # CUDA 13 has no kernels for Pascal, however new the driver
    (GTX_1080_NEW, "win32", "cu126", False),
    (GTX_780, "linux", "default", True),
    (RTX_5090_OLD, "linux", "default", True),  # CUDA 12.6 has no kernels for Blackwell
    (RTX_5090_OLD, "win32", "default", True),
    (BOTH_OLD, "linux", "cu126", False),  # for the RTX 3090
    (BOTH_NEW, "linux", "default", False),  # for the RTX 4090
    (SNAP_3060, "linux", "cu126", False),
    (SNAP_5070, "linux", "default", True),
    (SNAP_PRO, "linux", "default", False),
    (ADA_5000, "linux", "cu126", False),  # no Blackwell, for all that it is called 5000
]


def pip_command(build: str, root: Path = ROOT) -> list[str]:
    """The truth, written out: how pip is called for a build."""
    pip = ["python", "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "-r"]
    file = str(root / "requirements.txt")
    return (
        pip
        + {
            "default": [file],
            "cu130": [file, "torch==2.13.0+cu130", "--extra-index-url", INDEX + "cu130"],
            "cu126": [file, "torch==2.13.0+cu126", "--extra-index-url", INDEX + "cu126"],
            "cpu": [file, "torch==2.13.0+cpu", "--extra-index-url", INDEX + "cpu"],
            "rocm": [
                str(root / ".venv" / "requirements-rocm.txt"),
                "torch==2.13.0+rocm7.2",
                "--extra-index-url",
                INDEX + "rocm7.2",
            ],
            "xpu": [
                str(root / ".venv" / "requirements-xpu.txt"),
                "torch==2.13.0+xpu",
                "--extra-index-url",
                INDEX + "xpu",
            ],
        }[build]
    )


@pytest.mark.parametrize(("answer", "system", "build", "advised"), TABLE)
def test_a_recorded_answer_and_a_system_give_the_exact_command(
    answer: str, system: str, build: str, advised: bool
) -> None:
    choice = choose(Machine(system, nvidia=parse_cards(answer)))
    assert (choice.build, bool(choice.advice)) == (build, advised)
    command = launch.install_command(Path("python"), ROOT, "requirements.txt", choice.build)
    assert command == pip_command(build)


@pytest.mark.parametrize("build", BUILDS)
def test_torch_is_the_pinned_one_in_every_build_and_no_index_but_pytorchs_is_asked(build: str) -> None:
    command = launch.install_command(Path("python"), ROOT, "requirements.txt", build)
    assert command == pip_command(build)
    assert "--index-url" not in command and command.count("--extra-index-url") == (build != "default")


def test_several_cards_keep_their_own_capabilities() -> None:
    driver = "570.133.07"
    assert parse_cards(BOTH_OLD) == (
        NvidiaCard("NVIDIA GeForce RTX 5090", driver, (12, 0)),
        NvidiaCard("NVIDIA GeForce RTX 3090", driver, (8, 6)),
    )


@pytest.mark.parametrize("capability", ["[N/A]", "[Not Supported]", "", "9.0a", "one"])
def test_a_capability_that_is_no_number_is_unknown(capability: str) -> None:
    (card,) = parse_cards(f"NVIDIA H100 PCIe, 550.54.15, {capability}\n")
    assert card.capability is None and not card.blackwell


@pytest.mark.parametrize("name", ["RTX 5050 Laptop GPU", "RTX 5090", "RTX PRO 6000 Blackwell", "B200", "GB300", "GB10"])
def test_blackwell_is_known_by_name_where_its_capability_is_not(name: str) -> None:
    assert NvidiaCard(f"NVIDIA {name}", "570.10", None).blackwell


@pytest.mark.parametrize("name", ["RTX 5000 Ada Generation", "Quadro RTX 5000", "GeForce GTX 950", "H200", "A100"])
def test_older_cards_are_not_taken_for_blackwell(name: str) -> None:
    assert not NvidiaCard(f"NVIDIA {name}", "570.10", None).blackwell


# What nvidia-smi may do ---------------------------------------------------------------------------------------------

MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.65"
LOST = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest ..."


@pytest.fixture
def smi(tmp_path: Path) -> Callable[[str], str]:
    """A program that stands in for nvidia-smi, from the lines of a shell script."""

    def make(lines: str) -> str:
        file = tmp_path / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        file.chmod(0o755)
        return str(file)

    return make


def test_without_nvidia_smi_there_is_neither_card_nor_problem() -> None:
    assert launch_torch.nvidia_cards(None) == ((), "")


def test_an_old_nvidia_smi_is_asked_again_without_the_capability(smi: Callable[[str], str]) -> None:
    refusal = 'echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2'
    program = smi(f'case "$*" in *compute_cap*) {refusal};; esac\necho "GeForce GTX 1060 6GB, 470.182.03"')
    cards, problem = launch_torch.nvidia_cards(program)
    assert cards == (NvidiaCard("GeForce GTX 1060 6GB", "470.182.03", None),) and not problem
    assert choose(Machine("linux", nvidia=cards)).advice


def test_no_devices_is_an_answer_and_no_problem(smi: Callable[[str], str]) -> None:
    assert launch_torch.nvidia_cards(smi("echo 'No devices were found'; exit 6")) == ((), "")


@pytest.mark.parametrize("said", [MISMATCH, LOST, "<html>580.65</html>", "[N/A], [N/A], [N/A]", "\x1b[31m, 1, 2", ""])
def test_an_answer_without_a_card_is_a_problem_that_is_told(
    smi: Callable[[str], str], tmp_path: Path, said: str
) -> None:
    (tmp_path / "said").write_text(said, encoding="utf-8")
    cards, problem = launch_torch.nvidia_cards(smi(f"cat '{tmp_path}/said'; exit 9"))
    assert not cards and problem and problem.isprintable()
    choice = choose(Machine("win32", smi_problem=problem))
    assert (choice.build, choice.certain) == ("cu130", False) and problem in choice.advice
    assert choose(Machine("linux", smi_problem=problem)).build == "default"


def test_an_odd_code_page_and_warnings_between_do_not_hide_a_card(smi: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(
        "Ger\xe4t \xdcber\n".encode("latin-1") + b"\xff\xfe\nNVIDIA RTX A2000, 552.74, 8.6\r\n"
    )
    cards, problem = launch_torch.nvidia_cards(smi(f"cat '{tmp_path}/said'"))
    assert [card.name for card in cards] == ["NVIDIA RTX A2000"] and not problem


def test_one_that_hangs_is_given_up_and_told(smi: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_torch, "LIMIT", 0.2)
    cards, problem = launch_torch.nvidia_cards(smi("exec sleep 600"))
    assert not cards and "no answer" in problem


def test_one_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    file = tmp_path / "nvidia-smi"
    file.write_text("not a program", encoding="utf-8")
    cards, problem = launch_torch.nvidia_cards(str(file))
    assert not cards and problem


def test_this_machine_can_be_asked(tmp_path: Path) -> None:
    machine = launch_torch.look(tmp_path)
    assert machine.system == sys.platform and (machine.gfx, machine.displays) == ((), ())
    assert choose(machine).build in BUILDS


# AMD and Intel ------------------------------------------------------------------------------------------------------


def a_system(root: Path, gfx: Sequence[int] = (), displays: Sequence[tuple[str, str]] = (), kfd: bool = True) -> Path:
    """A folder laid out as Linux shows cards: compute nodes of AMD by gfx_target_version, displays by PCI numbers."""
    if kfd:
        (root / "dev").mkdir(parents=True, exist_ok=True)
        (root / "dev" / "kfd").touch()
    for index, version in enumerate((0, *gfx)):  # node 0 is the processor
        node = root / "sys/class/kfd/kfd/topology/nodes" / str(index)
        node.mkdir(parents=True)
        text = f"cpu_cores_count {0 if version else 16}\nsimd_count 80\ngfx_target_version {version}\nvendor_id 4098\n"
        (node / "properties").write_text(text, encoding="utf-8")
    for index, numbers in enumerate(displays, start=128):
        device = root / f"sys/class/drm/renderD{index}/device"
        device.mkdir(parents=True)
        for name, number in zip(("vendor", "device"), numbers, strict=True):
            (device / name).write_text(f"{number}\n", encoding="utf-8")
        (root / "dev/dri").mkdir(parents=True, exist_ok=True)
        (root / f"dev/dri/renderD{index}").touch()
    return root


def seen(root: Path, system: str = "linux") -> Machine:
    """What the launcher reads from such a folder."""
    gfx, displays = tuple(launch_torch.amd_nodes(root)), tuple(launch_torch.linux_displays(root))
    return Machine(system, gfx=gfx, displays=displays)


@pytest.mark.parametrize(
    ("number", "name"),
    [(90010, "gfx90a"), (90402, "gfx942"), (100300, "gfx1030"), (110000, "gfx1100"), (120001, "gfx1201")],
)
def test_amds_cards_that_the_wheels_have_kernels_for_get_rocm(tmp_path: Path, number: int, name: str) -> None:
    machine = seen(a_system(tmp_path, [number], [("0x1002", "0x744c")]))
    assert machine.gfx == (name,) and machine.displays == ((0x1002, 0x744C),)
    choice = choose(machine)
    assert (choice.build, choice.certain) == ("rocm", True) and name in choice.reason


def test_a_card_goes_before_the_graphics_of_the_processor(tmp_path: Path) -> None:
    assert choose(seen(a_system(tmp_path, [100306, 110000]))).build == "rocm"


@pytest.mark.parametrize("number", [100306, 100303, 110003])  # graphics of processors, for which no kernels are built
def test_amds_graphics_that_no_wheel_serves_are_named(tmp_path: Path, number: int) -> None:
    choice = choose(seen(a_system(tmp_path, [number])))
    assert choice.build == "default" and "--torch rocm" in choice.reason


def test_a_card_that_a_container_only_sees_in_sys_is_not_taken(tmp_path: Path) -> None:
    machine = seen(a_system(tmp_path, [110000], kfd=False))
    assert machine == Machine("linux") and choose(machine).build == "default"


def test_amd_without_its_compute_device_is_told_what_is_missing(tmp_path: Path) -> None:
    choice = choose(seen(a_system(tmp_path, displays=[("0x1002", "0x744c")], kfd=False)))
    assert choice.build == "default" and "/dev/kfd" in choice.reason


def test_amd_on_windows_is_told_that_there_is_no_build() -> None:
    choice = choose(Machine("win32", "AMD64", displays=((0x1002, 0x744C),)))
    assert choice.build == "default" and "AMD" in choice.reason


@pytest.mark.parametrize("device", ["0x56a0", "0xe20b", "0xe223", "0x0bda"])  # A770, B580, the last B, Max 1100
def test_intels_cards_get_xpu(tmp_path: Path, device: str) -> None:
    machine = seen(a_system(tmp_path, displays=[("0x8086", device)]))
    assert choose(machine).build == choose(replace(machine, system="win32")).build == "xpu"
    assert choose(replace(machine, processor="aarch64")).build == "default"


@pytest.mark.parametrize("device", ["0x9a49", "0x7d55", "0x46a6", "0xa780"])
def test_intels_graphics_inside_a_processor_are_not_taken_by_themselves(tmp_path: Path, device: str) -> None:
    choice = choose(seen(a_system(tmp_path, displays=[("0x8086", device)])))
    assert choice.build == "default" and "--torch xpu" in choice.reason


def test_nvidias_card_goes_before_amds_and_intels(tmp_path: Path) -> None:
    machine = seen(a_system(tmp_path, [110000], [("0x1002", "0x744c"), ("0x8086", "0x56a0")]))
    assert choose(replace(machine, nvidia=parse_cards(RTX_3060))).build == "cu126"


@pytest.mark.parametrize("text", ["", "rubbish", "0x8086 0x56a0", "gfx_target_version many"])
def test_files_of_the_kernel_that_say_nothing_are_no_card(tmp_path: Path, text: str) -> None:
    a_system(tmp_path, [110000], [("0x8086", "0x56a0")])
    for file in (*tmp_path.glob("sys/**/properties"), *tmp_path.glob("sys/**/device/vendor")):
        file.write_text(text, encoding="utf-8")
    assert seen(tmp_path) == Machine("linux")


class Registry(types.ModuleType):
    """Stands in for `winreg`: keys with their values; a key that is not there raises as Windows does."""

    HKEY_LOCAL_MACHINE = None

    def __init__(self, keys: dict[str, dict[str, str]]) -> None:
        super().__init__("winreg")
        self.keys = keys

    def OpenKey(self, _: None, path: str) -> Any:
        if path not in self.keys:
            raise FileNotFoundError(path)
        values = self.keys[path]

        class Key(dict[str, str]):
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None: ...

        return Key(values)

    @staticmethod
    def QueryInfoKey(key: dict[str, str]) -> tuple[int, int, int]:
        return 0, len(key), 0

    @staticmethod
    def EnumValue(key: dict[str, str], index: int) -> tuple[str, str, int]:
        return (*list(key.items())[index], 1)

    @staticmethod
    def QueryValueEx(key: dict[str, str], name: str) -> tuple[str, int]:
        if name not in key:
            raise FileNotFoundError(name)
        return key[name], 1


def test_windows_names_its_displays_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    video = r"System\CurrentControlSet\Control\Video"
    keys = {
        r"HARDWARE\DEVICEMAP\VIDEO": {
            r"\Device\Video0": rf"\Registry\Machine\{video}\{{A}}\0000",
            r"\Device\Video1": rf"\REGISTRY\MACHINE\{video}\{{A}}\0001",
            r"\Device\Video2": rf"\Registry\Machine\{video}\{{B}}\0000",
            r"\Device\Video3": rf"\Registry\Machine\{video}\gone\0000",
            "MaxObjectNumber": "3",
        },
        rf"{video}\{{A}}\0000": {"MatchingDeviceId": r"PCI\VEN_8086&DEV_E20B&SUBSYS_00001849"},
        rf"{video}\{{A}}\0001": {"MatchingDeviceId": r"pci\ven_8086&dev_e20b"},
        rf"{video}\{{B}}\0000": {"DriverDesc": "Microsoft Remote Display Adapter"},
    }
    monkeypatch.setitem(sys.modules, "winreg", Registry(keys))
    displays = tuple(launch_torch.windows_displays())
    assert displays == ((0x8086, 0xE20B),)
    assert choose(Machine("win32", "AMD64", displays=displays)).build == "xpu"
    monkeypatch.setitem(sys.modules, "winreg", Registry({}))
    assert tuple(launch_torch.windows_displays()) == ()


# Requirements without PyPI's Triton ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_a_build_with_its_own_triton_gets_all_requirements_but_pypis_triton(file: str) -> None:
    everything = launch_torch.requirement_lines(ROOT, file, ())
    without = launch_torch.requirement_lines(ROOT, file, launch_torch.TRITONS)
    assert [line for line in everything if line not in without] == [
        line for line in everything if line.startswith(("triton==", "triton-windows=="))
    ]
    assert len(everything) - len(without) == 2 and any(line.startswith("torch==") for line in without)
    assert ("pytest" in " ".join(without)) == (file == "requirements-dev.txt")


def test_both_tritons_of_the_requirements_are_of_one_release() -> None:
    lines = launch_torch.requirement_lines(ROOT, "requirements.txt", ())
    found = [match for line in lines if (match := re.match(r"(triton(?:-windows)?)==(\d+\.\d+\.\d+)", line))]
    assert {match[1] for match in found} == set(launch_torch.TRITONS) and len({match[2] for match in found}) == 1
    assert {line.partition("; ")[2] for line in lines if line.startswith("triton")} == {
        'sys_platform == "linux"',
        'sys_platform == "win32"',
    }


# From start to start ------------------------------------------------------------------------------------------------

LINUX = Machine("linux", nvidia=parse_cards(RTX_3060))


class Starts:
    """A project whose `.venv` is taken as working, started again and again; pip's calls are noted, never made."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch, self.calls = root, monkeypatch, []
        self.code = 0
        (root / "requirements.txt").write_text(
            'torch==2.13.0\ntriton==3.7.1; sys_platform == "linux"\n', encoding="utf-8"
        )
        (root / "requirements-dev.txt").write_text("-r requirements.txt\npytest==9\n", encoding="utf-8")
        python = launch.venv_python(root / ".venv", windows=False)
        python.parent.mkdir(parents=True)
        python.touch()
        monkeypatch.setattr(launch, "run", self.run)
        monkeypatch.setattr(launch.Environment, "_works", lambda _: True)
        monkeypatch.setattr(launch_torch, "missing_for_triton", lambda _: "")

    calls: list[list[str]]

    def run(self, command: Sequence[str], cwd: Path | None = None) -> int:
        self.calls.append(["python", *command[1:]])
        return self.code

    def start(self, machine: Machine, torch: str = "", file: str = "requirements.txt") -> list[list[str]]:
        """Prepare on a machine; the calls of pip that this made."""
        self.monkeypatch.setattr(launch_torch, "look", lambda: machine)
        self.calls = []
        launch.Environment(self.root, torch).prepare(file)
        return self.calls

    def installed(self, build: str) -> list[str]:
        return pip_command(build, self.root)


LEAVE = ["python", "-m", "pip", "uninstall", "--yes", "--disable-pip-version-check", *launch_torch.REPLACED]


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(tmp_path, monkeypatch)


def test_a_machine_without_a_card_is_installed_as_ever(starts: Starts, capsys: pytest.CaptureFixture[str]) -> None:
    assert starts.start(Machine("linux")) == [starts.installed("default")]
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and not said.err
    assert starts.start(Machine("linux")) == []
    assert starts.start(replace(LINUX, nvidia=parse_cards(RTX_3060_NEW))) == []  # the default is the build for it


def test_a_new_driver_brings_its_build_with_a_sentence_once(starts: Starts, capsys: pytest.CaptureFixture[str]) -> None:
    assert starts.start(LINUX) == [starts.installed("cu126")]
    assert starts.start(LINUX) == []
    capsys.readouterr()
    new = replace(LINUX, nvidia=parse_cards(RTX_3060_NEW))
    assert starts.start(new) == [LEAVE, starts.installed("default")]
    said = capsys.readouterr().out
    assert "CUDA 12.6 gives way" in said and "580.95.05" in said
    assert starts.start(new) == []


def test_a_new_card_brings_its_build(starts: Starts) -> None:
    starts.start(Machine("win32", "AMD64"))
    card = Machine("win32", "AMD64", nvidia=parse_cards(RTX_4060))
    assert starts.start(card) == [LEAVE, starts.installed("cu130")]


def test_a_card_of_another_maker_leaves_no_triton_of_the_first(starts: Starts) -> None:
    starts.start(LINUX)
    assert starts.start(Machine("linux", gfx=("gfx1100",))) == [LEAVE, starts.installed("rocm")]
    file = starts.root / ".venv" / "requirements-rocm.txt"
    assert file.read_text(encoding="utf-8") == "torch==2.13.0\n"
    assert {"triton", "triton-rocm", "triton-xpu", "triton-windows", "torch"} <= set(LEAVE)


@pytest.mark.parametrize(
    "machine",
    [
        Machine("linux"),
        Machine("linux", smi_problem="it gave no answer within 20 seconds"),
        replace(LINUX, nvidia=parse_cards(RTX_5090_OLD)),
        Machine("linux", gfx=("gfx1100",), smi_problem="it says nothing"),
    ],
    ids=["gone", "hangs", "useless", "hangs beside another"],
)
def test_a_card_that_does_not_answer_today_costs_no_installation(starts: Starts, machine: Machine) -> None:
    starts.start(LINUX)
    assert starts.start(machine) == []
    assert starts.start(LINUX) == []


def test_a_build_chosen_by_hand_stays_until_auto_is_asked_for(starts: Starts) -> None:
    assert starts.start(LINUX, "cpu") == [starts.installed("cpu")]
    assert starts.start(LINUX) == []
    assert starts.start(replace(LINUX, nvidia=parse_cards(RTX_3060_NEW))) == []
    assert starts.start(LINUX, "auto") == [LEAVE, starts.installed("cu126")]
    assert starts.start(LINUX) == []


def test_what_was_found_becomes_a_choice_by_hand_without_installing(starts: Starts) -> None:
    starts.start(LINUX)
    assert starts.start(LINUX, "cu126") == []
    assert starts.start(replace(LINUX, nvidia=parse_cards(RTX_3060_NEW))) == []


@pytest.mark.parametrize(("system", "build"), [("win32", "rocm"), ("darwin", "cu126"), ("darwin", "cpu")])
def test_a_build_that_does_not_exist_for_the_system_is_refused_before_anything(
    starts: Starts, system: str, build: str
) -> None:
    with pytest.raises(launch.LaunchError, match="default") as problem:
        starts.start(Machine(system, "arm64" if system == "darwin" else "AMD64"), build)
    assert problem.value.code == 2 and not starts.calls


def test_builds_that_exist_for_x86_alone_are_not_offered_on_arm() -> None:
    assert launch_torch.offered(Machine("linux", "aarch64")) == ["default", "cu130", "cu126", "cpu"]
    assert launch_torch.offered(Machine("linux")) == list(BUILDS)
    assert launch_torch.offered(Machine("darwin", "arm64")) == ["default"]


def test_a_change_that_was_interrupted_goes_on_and_may_go_elsewhere(starts: Starts) -> None:
    starts.start(LINUX)
    starts.code = 9
    with pytest.raises(launch.LaunchError):  # while the old build is leaving
        starts.start(Machine("linux", gfx=("gfx1100",)))
    assert starts.calls == [LEAVE]
    starts.code = 0
    assert starts.start(Machine("linux", gfx=("gfx1100",))) == [LEAVE, starts.installed("rocm")]
    starts.code = 9
    with pytest.raises(launch.LaunchError, match="--torch default") as problem:
        starts.start(LINUX, "xpu")
    assert problem.value.code == 9
    starts.code = 0
    assert starts.start(LINUX) == [LEAVE, starts.installed("cu126")]


def test_an_installation_by_hand_that_was_interrupted_is_still_by_hand(starts: Starts) -> None:
    starts.start(LINUX)
    run = starts.run

    def fails_at_install(command: Sequence[str], cwd: Path | None = None) -> int:
        run(command)
        return 9 if "install" in command else 0

    starts.monkeypatch.setattr(launch, "run", fails_at_install)
    with pytest.raises(launch.LaunchError):
        starts.start(LINUX, "cpu")
    starts.monkeypatch.setattr(launch, "run", run)
    assert starts.start(LINUX) == [starts.installed("cpu")]


@pytest.mark.parametrize("note", ["rubbish\n", "", "\x00\x01", "cu999 by hand"])
def test_a_damaged_note_is_made_again(starts: Starts, note: str) -> None:
    starts.start(LINUX)
    file = starts.root / ".venv" / "torch-build.txt"
    file.write_text(note, encoding="utf-8")
    assert starts.start(LINUX) == []
    assert file.read_text(encoding="utf-8") == "cu126\n"


def test_an_environment_of_an_older_launcher_keeps_its_torch_and_loses_its_triton_where_another_comes(
    starts: Starts,
) -> None:
    assert starts.start(LINUX) == [starts.installed("cu126")]
    (starts.root / ".venv" / "torch-build.txt").unlink()
    (starts.root / ".venv" / "installed-requirements.sha256").write_text("of an older launcher", encoding="utf-8")
    assert starts.start(Machine("linux", gfx=("gfx1100",))) == [LEAVE, starts.installed("rocm")]


def test_development_packages_come_in_the_same_build(starts: Starts) -> None:
    machine = Machine("linux", gfx=("gfx1100",))
    (command,) = [call for call in starts.start(machine, file="requirements-dev.txt") if "install" in call]
    file = starts.root / ".venv" / "requirements-dev-rocm.txt"
    assert str(file) in command and file.read_text(encoding="utf-8") == "torch==2.13.0\npytest==9\n"
    assert starts.start(machine) == []


# The flag -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (["--port", "7870"], ("", ["--port", "7870"])),
        (["--torch", "cu126", "--port", "7870"], ("cu126", ["--port", "7870"])),
        (["test", "--torch=cpu", "-k", "x"], ("cpu", ["test", "-k", "x"])),
        (["--torch", "cpu", "--torch", "auto"], ("auto", [])),
        (["--torches", "cpu"], ("", ["--torches", "cpu"])),
    ],
)
def test_the_flag_is_taken_and_everything_else_handed_on(arguments: list[str], taken: tuple[str, list[str]]) -> None:
    assert launch.take_torch(arguments) == taken


@pytest.mark.parametrize("arguments", [["--torch"], ["--torch="], ["--torch", "cu118"], ["--torch", "--port"]])
def test_a_build_that_nobody_makes_is_refused_with_those_there_are(arguments: list[str]) -> None:
    with pytest.raises(launch.LaunchError, match="cu130, cu126, rocm, xpu, cpu, auto") as problem:
        launch.take_torch(arguments)
    assert problem.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "problem", "code"), [(["--torch", "cu118"], None, 2), ([], PermissionError(13, "no", ".venv"), 1)]
)
def test_what_stops_a_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: OSError | None,
    code: int,
) -> None:
    def prepare(*_: object) -> None:
        assert problem
        raise problem

    monkeypatch.setattr(launch.Environment, "prepare", prepare)
    assert launch.main(arguments) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


# pip's resolver -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("build", list(check_installs.STAND_INS))
def test_pip_takes_the_build_beside_the_pin_and_the_triton_that_belongs_to_it(tmp_path: Path, build: str) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    check_installs.write_stand_ins(wheels, "2.13.0")
    for name in ("triton", *(re.split("[>=]", line)[0] for line in check_installs.OF_TORCH)):
        check_installs.write_wheel(wheels, name, {"triton": "3.7.1"}.get(name, "99.0"))
    (tmp_path / "requirements.txt").write_text(
        'torch==2.13.0\ntriton==3.7.1; sys_platform == "linux"\n', encoding="utf-8"
    )
    (tmp_path / ".venv").mkdir()
    without = launch_torch.requirement_lines(tmp_path, "requirements.txt", launch_torch.TRITONS)
    launch.own_triton_file(tmp_path, "requirements.txt", build).write_text("\n".join(without), encoding="utf-8")
    command = launch.install_command(Path(sys.executable), tmp_path, "requirements.txt", build)
    place = command.index("--extra-index-url")
    command[place : place + 2] = ["--no-index", "--find-links", str(wheels)]
    report = tmp_path / "report.json"
    command += ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    packages = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in entries}
    assert check_installs.wrong(check_installs.Row("linux", "3.11", build), packages, "2.13.0") == ""


def test_every_system_python_and_build_is_checked_with_the_launchers_command_and_no_index_but_the_default(
    tmp_path: Path,
) -> None:
    rows = list(check_installs.rows())
    assert {row.build for row in rows} == set(BUILDS) and len(rows) == len(set(rows)) == 4 * (6 + 5 + 1)
    for row in rows:
        command = check_installs.dry_run(row, tmp_path, tmp_path)
        assert not any(INDEX in word for word in command) and "--dry-run" in command
        assert (f"torch==2.13.0+{BUILDS[row.build].local}" in command) == (row.build != "default")


@pytest.mark.parametrize(
    ("row", "packages"),
    [
        (("linux", "3.11", "rocm"), {"torch": "2.13.0+rocm7.2", "triton-rocm": "3.7.1", "triton": "3.7.1"}),
        (("linux", "3.11", "cu126"), {"torch": "2.13.0", "triton": "3.7.1"}),
        (("win32", "3.11", "default"), {"torch": "2.13.0"}),
        (("darwin", "3.11", "default"), {}),
    ],
)
def test_a_set_with_another_torch_or_triton_is_noticed(row: tuple[str, str, str], packages: dict[str, str]) -> None:
    assert check_installs.wrong(check_installs.Row(*row), packages, "2.13.0")


# What Triton needs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manager", "compiler", "headers", "command"),
    [
        ("apt-get", False, False, "sudo apt install gcc python3.11-dev"),
        ("apt-get", True, False, "sudo apt install python3.11-dev"),
        ("apt-get", False, True, "sudo apt install gcc"),
        ("dnf", False, False, "sudo dnf install gcc python3.11-devel"),
        ("pacman", False, True, "sudo pacman -S gcc"),
        ("zypper", False, False, "sudo zypper install gcc python311-devel"),
        ("", False, False, "install gcc or clang and the headers of Python 3.11"),
    ],
)
def test_the_one_command_that_helps_is_told(manager: str, compiler: bool, headers: bool, command: str) -> None:
    assert f"{command}." in launch_torch.advice_for_triton(compiler, headers, manager, (3, 11))


def test_who_lacks_nothing_is_told_nothing() -> None:
    assert launch_torch.advice_for_triton(True, True, "apt-get", (3, 11)) == ""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with apt-get and neither compiler nor headers; what is made in the folder is on the search path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / scheme)})
    program(tmp_path / "apt-get")
    return tmp_path


def program(file: Path) -> None:
    file.touch(mode=0o755)


@pytest.mark.parametrize("machine", [LINUX, Machine("linux", gfx=("gfx1100",))])
def test_a_card_without_a_compiler_is_told_so(bare: Path, machine: Machine) -> None:
    told = launch_torch.missing_for_triton(machine)
    assert "sudo apt install gcc python3." in told
    program(bare / "clang")
    assert "gcc" not in launch_torch.missing_for_triton(machine)


@pytest.mark.parametrize("scheme", ["posix_local", "posix_prefix"])  # Debian's own scheme has its headers in the other
def test_compiler_and_headers_are_looked_for_where_triton_looks(
    bare: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: scheme)
    (bare / "posix_prefix").mkdir()
    (bare / "posix_prefix" / "Python.h").touch()
    monkeypatch.setenv("CC", "my-cc")
    assert launch_torch.missing_for_triton(LINUX)
    program(bare / "my-cc")
    assert launch_torch.missing_for_triton(LINUX) == ""


@pytest.mark.parametrize(
    "machine", [Machine("linux"), Machine("darwin"), Machine("win32", nvidia=parse_cards(RTX_4060))]
)
def test_who_has_no_card_for_triton_or_another_system_is_told_nothing(bare: Path, machine: Machine) -> None:
    assert launch_torch.missing_for_triton(machine) == ""


def test_advice_is_given_at_every_start_and_stops_nothing(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_torch, "missing_for_triton", lambda _: "Triton lacks a compiler.")
    for expected in ([starts.installed("cu126")], []):
        assert starts.start(LINUX) == expected
        assert capsys.readouterr().err == "note: Triton lacks a compiler.\n"
    starts.start(LINUX, "cpu")
    assert capsys.readouterr().err == ""
