"""Receipts: nothing private in them, a changed byte is noticed, and what strangers wrote stays text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ideogram_app.benchmark import receipts
from ideogram_app.benchmark.receipts import (
    Receipt,
    ReceiptMachine,
    ReceiptRow,
    add,
    digest_of,
    flags,
    kernels_hash,
    read_all,
    read_receipt,
    receipt_of_comparison,
    table,
    write_receipt,
)
from ideogram_app.comparison.history import Comparison
from ideogram_app.errors import RequestError
from ideogram_app.machine import clocks
from ideogram_app.machine.clocks import Clocks, hindrances, read_clocks
from ideogram_app.machine.hardware import DeviceUser, Hardware
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import plan
from ideogram_app.records import Request, Result

CARDS = ("NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090", "AMD Radeon RX 7900 XTX")
ROW = ReceiptRow("int8-w8a8-rotated", "int8-w8a8-rotated", 1024, 1024, 20, 3.4, 3.1, 11 * 10**9, 12 * 10**9)


def receipt_of(name: str = CARDS[0], **changes: object) -> Receipt:
    machine = ReceiptMachine("cuda", name, (8, 6), 12 * 10**9, 1, 32 * 10**9, "A processor", 8, "580.1", "Linux 6")
    made = Receipt(
        "comparison", machine, {"torch": "2.13.0"}, "abc", "ideogram-4", {"fp8": "w"}, kernels_hash(), None, 0, (ROW,)
    )
    made = replace(made, **changes)  # type: ignore[arg-type]
    return replace(made, digest=digest_of(made))


@pytest.fixture
def drawn() -> Comparison:
    hardware = Hardware(
        kind="cuda", name=CARDS[0], compute_capability=(8, 6), device_memory_bytes=12 * 10**9,
        device_users=(DeviceUser("secret-game.exe", 10**9),),
    )  # fmt: skip
    request = Request("miniature", '{"secret": "caption"}', ("reference", "fp8"))
    good = Result(
        "fp8", "fp8", "/home/secret/picture.png", 128, 128, 0, "turbo-12", 12, request.caption, seconds_per_step=0.5,
        peak_memory_bytes=7, peak_device_bytes=7, predicted_device_bytes=8, versions={"torch": "2.13.0"},
    )  # fmt: skip
    failed = Result.failed(request, "reference", "secret reason")
    return Comparison(request, hardware, plan(PlanInputs.of(hardware, "miniature")), (failed, good))


def test_a_receipt_of_a_comparison_has_numbers_and_nothing_private(drawn: Comparison, tmp_path: Path) -> None:
    write_receipt(tmp_path / "r.json", receipt_of_comparison(drawn, {"fp8": "0" * 16}, None))
    assert "secret" not in (tmp_path / "r.json").read_text(encoding="utf-8")
    found = read_receipt(tmp_path / "r.json")
    failed, good = found.rows
    assert (failed.note, failed.seconds_per_step) == ("failed", None)
    assert (good.seconds_per_step, good.peak_bytes, good.predicted_peak_bytes) == (0.5, 7, 8)
    assert found.others == 1 and found.versions == {"torch": "2.13.0"}


def test_every_changed_value_is_noticed(tmp_path: Path) -> None:
    write_receipt(tmp_path / "r.json", receipt_of(clocks=Clocks(1800, 1900, 170.0, 170.0, 170.0, 60)))
    whole = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))

    def changed(value: object) -> list[object]:
        if isinstance(value, dict):
            return [{**value, name: other} for name, inner in value.items() for other in changed(inner)]
        if isinstance(value, list):
            return [[*value[:at], other, *value[at + 1 :]] for at in range(len(value)) for other in changed(value[at])]
        return [value + 1 if isinstance(value, int | float) else f"{value}x"]

    for other in changed(whole):
        (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(RequestError):
            read_receipt(tmp_path / "other.json")


def test_every_flipped_byte_is_refused_or_means_the_same(tmp_path: Path) -> None:
    receipt = receipt_of()
    write_receipt(tmp_path / "r.json", receipt)
    raw = (tmp_path / "r.json").read_bytes()
    for place in range(0, len(raw), 7):
        (tmp_path / "f.json").write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        try:
            assert read_receipt(tmp_path / "f.json") == receipt
        except RequestError:
            continue


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"kind": 1}', b"[" * 10_000, b" " * 2_000_000])
def test_what_is_no_receipt_is_refused_in_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(RequestError):
        read_receipt(tmp_path / "r.json")


def test_a_missing_receipt_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.json"):
        add(tmp_path / "nowhere.json", tmp_path / "folder")


def test_strangers_rows_stand_in_one_table(tmp_path: Path) -> None:
    for card in (*CARDS, CARDS[0]):
        write_receipt(tmp_path / "sent.json", receipt_of(card))
        add(tmp_path / "sent.json", tmp_path / "kept")
    kept = read_all(tmp_path / "kept")
    assert [receipt.machine.name for receipt in kept] == sorted(CARDS)  # the same twice is one
    assert len(table(kept)) == 2 + len(CARDS)


def test_a_strangers_text_stays_text(tmp_path: Path) -> None:
    name = "../../x | <script>alert(1)</script>\n[a](http://b) `c` \x1b[31m"
    write_receipt(tmp_path / "sent.json", receipt_of(name))
    kept = add(tmp_path / "sent.json", tmp_path / "kept")
    assert kept.parent == tmp_path / "kept" and kept.is_file()
    (row,) = table([read_receipt(kept)])[2:]
    assert row.count(" | ") == 9 and "<" not in row and "\n" not in row and "\x1b" not in row


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"clocks": Clocks(held_down_by=("thermal limit",))}, "throttled"),
        ({"clocks": Clocks(limit_watts=120.0, default_limit_watts=170.0)}, "limited"),
        ({"others": 2}, "shared"),
        ({"kernels": "0" * 16}, "kernels"),
    ],
)
def test_what_cannot_be_compared_is_flagged(changes: dict[str, object], word: str) -> None:
    (said,) = flags(receipt_of(**changes))
    assert word in said and flags(receipt_of()) == ()


def test_other_kernels_have_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.py").write_text("one", encoding="utf-8")
    monkeypatch.setattr(receipts, "KERNELS", tmp_path)
    before = kernels_hash()
    (tmp_path / "rows.py").write_text("two", encoding="utf-8")
    assert kernels_hash() != before


class NvmlError(Exception):
    """pynvml's."""


def nvml(**answers: object) -> SimpleNamespace:
    """A pynvml that answers these questions and refuses all others."""

    def refuse(*_: object) -> int:
        raise NvmlError("not supported")

    questions = (
        "nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature",
        "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksThrottleReasons",
    )  # fmt: skip
    asked = {name: (lambda *_, value=answers[name]: value) if name in answers else refuse for name in questions}
    made = SimpleNamespace(NVMLError=NvmlError, NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, **asked)
    made.nvmlInit = answers.get("nvmlInit", lambda: None)
    made.nvmlDeviceGetHandleByIndex = lambda index: index
    return made


def test_clocks_are_what_the_driver_says_and_unknown_where_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"nvmlDeviceGetClockInfo": 1755, "nvmlDeviceGetPowerUsage": 170_400}
    answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x24
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml(**answers))
    found = read_clocks()
    assert found and (found.sm_mhz, found.watts, found.celsius) == (1755, 170.4, None)
    assert found.held_down_by == ("power limit", "thermal limit") == hindrances(0x24)


def test_without_a_driver_there_are_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NvmlError("driver not loaded")

    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml(nvmlInit=refuse))
    assert read_clocks() is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert clocks.read_clocks() is None
