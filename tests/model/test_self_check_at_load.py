"""The self-check when a recipe is loaded: made once for a device and its versions, and what it found is what draws."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.errors import DeviceError
from ideogram_app.files import write_text
from ideogram_app.kernels import choice
from ideogram_app.kernels import self_check as kernel_check
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.kernels.self_check_cases import Case, Trial
from ideogram_app.kernels.self_check_record import FILE, Checked, RecordFile, SelfCheck
from ideogram_app.kernels.self_check_truths import Verdict
from ideogram_app.machine.copies import BlockingCopyStream
from ideogram_app.model import loader, self_check, self_check_cases
from ideogram_app.model.loader import load_transformers
from ideogram_app.model.offload.packed_block import PackedBlock
from ideogram_app.model.self_check import Found, Uses, checked, uses_of
from ideogram_app.model.self_check_cases import BLOCK, RING, ring_trials

CPU = torch.device("cpu")
DENSE = Uses(("dense",), (), ())


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One case that takes no time, and a line for every try; a processor is checked as a GPU would be."""
    made: list[str] = []

    def case(kernel: str) -> Case:
        def trials() -> Iterator[Trial]:
            made.append(kernel)
            yield Trial(lambda candidate: lambda: candidate, lambda got: Verdict("", 0.0), timed=False)

        return Case(kernel, "", trials, timed=False)

    monkeypatch.setattr(self_check, "kernel_cases", lambda *_: [case("add")])
    monkeypatch.setattr(self_check, "attention_case", lambda *_: case("attention"))
    monkeypatch.setattr(self_check, "ring_trials", lambda device: case(RING).trials())
    real = self_check._checked
    monkeypatch.setattr(self_check, "_checked", lambda *given, only_known=False, **rest: real(*given, **rest))
    return made


def load(folder: Path) -> Found:
    RecordFile(folder).keep(
        SelfCheck("Somebody else's card", "float32", {})
    )  # a processor is asked for its record only
    return checked("processor", CPU, torch.float32, folder, DENSE)


def test_a_known_device_is_not_checked_again(tmp_path: Path, tries: list[str]) -> None:
    first = load(tmp_path)
    assert tries == ["add", "attention", RING] and first.kernels.name.startswith("processor")
    again = load(tmp_path)
    assert len(tries) == 3 and again.check == first.check


@pytest.mark.parametrize("what", ["program_hash", "driver_version"])
def test_another_version_is_checked_anew(
    what: str, tmp_path: Path, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path)
    monkeypatch.setattr(self_check, "identity", lambda device, sets: ("A card", {what: "newer"}))
    found = load(tmp_path)
    assert len(tries) == 6 and found.check is not None and found.check.versions == {what: "newer"}


def test_what_another_recipe_needs_is_added_to_the_record(
    tmp_path: Path, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path)
    more = self_check.kernel_cases(), self_check.kernel_cases()
    monkeypatch.setattr(self_check, "kernel_cases", lambda *_: [*more[0], replace(more[1][0], part="heads")])
    found = load(tmp_path)
    assert tries == ["add", "attention", RING, "add"]
    assert found.check is not None and {row.kernel for row in found.check.kernels} == {
        "add",
        "heads",
        "attention",
        RING,
    }


def test_a_row_of_implementations_that_are_not_there_is_checked_again(tmp_path: Path, tries: list[str]) -> None:
    known = load(tmp_path).check
    assert known is not None
    RecordFile(tmp_path).keep(replace(known, kernels=(Checked("add", "cutlass", "right"), *known.kernels[1:])))
    found = load(tmp_path).check
    assert tries[3:] == ["add"] and found is not None and found.row("add") == known.row("add")


@pytest.mark.parametrize("content", ["{", "[]", '{"checks": [7]}'])
def test_a_damaged_record_is_words_and_the_check_is_made_again(
    content: str, tmp_path: Path, tries: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / FILE, content)
    with caplog.at_level(logging.WARNING):
        found = checked("processor", CPU, torch.float32, tmp_path, DENSE)
    assert found.check is not None and tries == ["add", "attention", RING]
    assert "made again" in caplog.text and "Traceback" not in caplog.text


def test_another_process_that_checked_meanwhile_has_the_word(
    tmp_path: Path, tries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = load(tmp_path).check
    assert known is not None
    (tmp_path / FILE).unlink()

    class Meanwhile(RecordFile):
        def alone(self, seconds: float = 0) -> Any:
            RecordFile(tmp_path).keep(known)
            return super().alone(seconds)

    monkeypatch.setattr(self_check, "RecordFile", Meanwhile)
    assert load(tmp_path).check == known and len(tries) == 3


def test_a_check_that_fails_itself_keeps_nobody_from_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **rest: Any) -> Any:
        raise ZeroDivisionError

    write_text(tmp_path / FILE, "{}")
    monkeypatch.setattr(self_check, "_checked", broken)
    found = checked("processor", CPU, torch.float32, tmp_path, DENSE)
    assert found.kernels is choice.kernels("processor") and "ZeroDivisionError" in found.notes[0]


def test_a_device_that_stopped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **rest: Any) -> Any:
        raise DeviceError("cuda:0 stopped in the self-check", do="Restart the program")

    write_text(tmp_path / FILE, "{}")
    monkeypatch.setattr(self_check, "_checked", broken)
    with pytest.raises(DeviceError, match="Restart"):
        checked("triton", CPU, torch.float32, tmp_path, DENSE)


def test_a_processor_is_checked_only_when_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "check_kernels", lambda *_: pytest.fail("checked"))
    assert checked("processor", CPU, torch.float32, tmp_path, DENSE).check is None
    write_text(tmp_path / FILE, "{}")
    assert checked("processor", CPU, torch.float32, tmp_path, DENSE).kernels is choice.kernels("processor")
    assert list(tmp_path.iterdir()) == [tmp_path / FILE]


def test_what_was_replaced_on_a_processor_stays_replaced(tmp_path: Path) -> None:
    name, versions = self_check.identity(CPU, kernel_check.ladder("processor"))
    row = Checked("matmul", "plain", "processor is wrong: row 3")
    RecordFile(tmp_path).keep(SelfCheck(name, "float32", versions, (row,)))
    found = checked("processor", CPU, torch.float32, tmp_path, Uses(("int8",)))
    assert found.kernels.matmul is choice.kernels("plain").matmul
    assert (
        found.kernels.name.startswith("processor, ")
        and "; matmul by plain (processor is wrong: row 3)" in found.kernels.name
    )


@pytest.mark.parametrize(
    ("recipe", "arithmetic", "uses"),
    [
        ("reference", "", Uses(("dense",), (), ("dense",))),
        ("fp8", "", Uses(("dense",), (), ("fp8",))),
        ("int8-w8a8-naive", "", Uses(("int8",), (), ("int8",))),
        ("int8-w8a8", "", Uses(("int8", "dense"), (), ("int8",))),  # protected layers stay dense
        ("int8-w8a8-rotated", "", Uses(("rotated",), (), ("rotated",))),
        ("gguf-q8_0", "", Uses(("dense",), (), ("Q8_0",))),
        ("gguf-q4_k", "", Uses(("dense",), ("dense",), ("Q4_K",))),
        ("gguf-q4_k", "w4a8", Uses(("rotated",), ("int8",), ("Q4_K w4a8",))),
    ],
)
def test_a_recipe_is_checked_for_what_it_runs(recipe: str, arithmetic: str, uses: Uses) -> None:
    assert uses_of(RECIPES[recipe].protecting(), "ideogram-4", arithmetic) == uses


@pytest.mark.slow
def test_a_copy_that_brings_other_bytes_is_found_and_copies_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(RING, "", partial(ring_trials, CPU), timed=False)
    real, spoiled = PackedBlock.bind_device, []

    class Late(BlockingCopyStream):
        """Every copy from the fourth on comes too late to be seen."""

        copies = 0

        def copy_async(self, source: Any, target: Any, after: Any) -> None:
            self.copies += 1
            if self.copies < 4:
                super().copy_async(source, target, after)

    sets = {"streams": Late, "blocking": BlockingCopyStream}
    (row,) = kernel_check.check_kernels([case], tuple(sets), sets.__getitem__, CPU, RecordFile(tmp_path))
    assert row.engaged == "blocking" and "copies differ" in row.reason
    assert PackedBlock.bind_device is real and not spoiled


@pytest.mark.slow
def test_a_block_of_wrong_kernels_is_drawn_by_plain_torch(tmp_path: Path) -> None:
    swapped = replace(PLAIN, heads=lambda *given: (lambda q, k, v: (k, q, v.flip(0)))(*PLAIN.heads(*given)))
    case = Case(BLOCK, "int8", partial(self_check_cases.block_trials, "int8", CPU, torch.float32, ()), timed=False)
    sets = {"as chosen": swapped, "plain": PLAIN}
    (row,) = kernel_check.check_kernels([case], tuple(sets), sets.__getitem__, CPU, RecordFile(tmp_path))
    assert row.engaged == "plain" and "of their length" in row.reason


@pytest.mark.slow
def test_what_was_found_is_what_draws_and_what_the_result_names(
    prepared_miniature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = replace(PLAIN, name="triton; matmul by torch (triton is wrong: row 3)")
    asked: list[Uses] = []

    def found(first: str, device: torch.device, dtype: torch.dtype, data: Path, uses: Uses) -> Found:
        asked.append(uses)
        return Found(named, ("flash",), blocking="streams is wrong: 2 of 6 copies differ")

    monkeypatch.setattr(loader, "checked", found)
    loaded = load_transformers(prepared_miniature, "miniature", "int8-w8a8-rotated", "cpu", torch.float32)
    try:
        assert loaded.kernels == named.name and asked == 2 * [Uses(("rotated",), (), ("rotated",))]
        assert loaded.conditional.trunk.kernels is named
        assert loaded.unconditional.trunk.attention.excluded == {"flash"}
        assert any("2 of 6 copies differ" in note for note in loaded.notes)
    finally:
        loaded.close()
