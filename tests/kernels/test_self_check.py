"""The self-check finds a kernel that was broken on purpose, whatever is wrong, and the right one takes over."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ideogram_app.cli.output import describe_hardware
from ideogram_app.errors import DeviceError, RequestError
from ideogram_app.files import locked
from ideogram_app.kernels import attention, self_check, self_check_cases, self_check_trial
from ideogram_app.kernels.contract import Kernels, QuantizedActivations
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.kernels.processor import processor_kernels
from ideogram_app.kernels.self_check import Standing, check_kernels, ladder, pick
from ideogram_app.kernels.self_check_assembly import assembled
from ideogram_app.kernels.self_check_attention import OneBackend, attention_case
from ideogram_app.kernels.self_check_cases import Case, Trial, kernel_cases
from ideogram_app.kernels.self_check_record import FILE, TRYING, Checked, RecordFile, SelfCheck, with_check
from ideogram_app.kernels.self_check_truths import Verdict
from ideogram_app.machine.hardware import Hardware

CPU = torch.device("cpu")
TINY = replace(self_check_cases.ON_A_CPU, rows=9, timed_rows=9, tokens=19, most_columns=24)
NAMES = ("fast", "plain")
PATIENCE = 60.0  # seconds; for what is right, however busy the machine is
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true widths, few rows."""
    monkeypatch.setattr(self_check_cases, "ON_A_CPU", TINY)


def case_of(kernel: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    return next(case for case in kernel_cases(CPU, dtype, ("dense", "int8", "rotated")) if case.kernel == kernel)


def checked(case: Case, fast: Any, folder: Path, limit: float = PATIENCE) -> Checked:
    sets = {"fast": fast, "plain": PLAIN}
    (row,) = check_kernels([case], NAMES, sets.__getitem__, CPU, RecordFile(folder), limit)
    return row


ALL = [case.kernel for case in kernel_cases(CPU, torch.float32, ("dense", "int8", "rotated"))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kernel", ALL)
def test_what_is_right_in_a_computing_type_is_found_right(kernel: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Plain torch and the processor's kernels, which round elsewhere and multiply in another order."""
    for right in (PLAIN, processor_kernels()):
        row = checked(case_of(kernel, dtype), right, tmp_path)
        assert (row.engaged, row.error is not None) == ("fast", True), row.reason


# Broken on purpose ---------------------------------------------------------------------------------------------------


def step_up(x: Tensor) -> Tensor:
    """Every number one step of its own type further from zero."""
    whole = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return (x.contiguous().view(whole) + 1).view(x.dtype)


def one_step(values: Tensor) -> Tensor:
    """A single number of a middle row moved by one step: int8 by one, others by their last bit."""
    changed, old = values.clone(), values[..., 5, 11]
    changed[..., 5, 11] = torch.where(old > 0, old - 1, old + 1) if values.dtype == torch.int8 else step_up(old)
    return changed


def other_row(values: Tensor) -> Tensor:
    """One row is another row's."""
    changed = values.clone()
    changed[..., -1, :] = values[..., 4, :]
    return changed


def with_nan(values: Tensor) -> Tensor:
    changed = values.clone()
    changed[..., 0, 0] = float("nan")
    return changed


def spoiled(spoil: Callable[[Tensor], Tensor], part: str) -> Kernels:
    """Plain torch, a kernel of which gives something else."""
    right = getattr(PLAIN, part)

    def broken(*given: Any) -> Any:
        got = right(*given)
        if isinstance(got, QuantizedActivations):
            return replace(got, values=spoil(got.values))
        if isinstance(got, tuple):
            return (spoil(got[0]), *got[1:])
        return spoil(got)

    return replace(PLAIN, name="fast", **{part: broken})


DENSE = ["add", "heads", "norm, dense", "add_norm, dense", "swiglu, dense", "matmul", "decode"]
ROUNDED = ["norm, int8", "swiglu, rotated", "quantize, int8", "quantize, rotated", "decode_int8"]
BROKEN = [
    *((spoil, kernel) for spoil in (step_up, one_step, other_row, with_nan) for kernel in DENSE),
    *((spoil, kernel) for spoil in (one_step, other_row) for kernel in ROUNDED),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "kernel"), BROKEN, ids=lambda each: getattr(each, "__name__", each))
def test_a_kernel_that_gives_something_else_is_replaced(
    spoil: Callable[[Tensor], Tensor], kernel: str, tmp_path: Path
) -> None:
    row = checked(case_of(kernel), spoiled(spoil, kernel.partition(",")[0]), tmp_path)
    assert row.engaged == "plain" and row.reason.startswith("fast is wrong: ")


@pytest.mark.parametrize("kernel", ["norm, rotated", "add", "heads", "quantize, int8", "matmul"])
def test_on_a_card_few_rows_are_judged_and_as_many_as_a_picture_has_are_timed(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check_cases, "ON_A_CPU", replace(TINY, timed_rows=20, many_rows=12))
    seen: list[int] = []
    part = kernel.partition(",")[0]

    def watched(*given: Any) -> Any:
        first = given[0].values if isinstance(given[0], QuantizedActivations) else given[0]
        seen.append(len(first))
        return getattr(PLAIN, part)(*given)

    row = checked(case_of(kernel), replace(PLAIN, **{part: watched}), tmp_path)
    assert row.engaged == "fast" and row.seconds
    assert seen.count(9) <= 5 and seen.count(20) >= 2  # each shape judged once; once to warm up, then again and again


def test_scales_that_are_off_are_found(tmp_path: Path) -> None:
    def broken(x: Tensor, input_format: Any) -> Any:
        right = PLAIN.quantize(x, input_format)
        assert isinstance(right, QuantizedActivations)
        return replace(right, scale=right.scale * (1 + 1e-5))

    row = checked(case_of("quantize, int8"), replace(PLAIN, quantize=broken), tmp_path)
    assert row.engaged == "plain" and "scales" in row.reason


def test_the_row_that_is_wrong_is_named(tmp_path: Path) -> None:
    row = checked(case_of("norm, dense"), spoiled(one_step, "norm"), tmp_path)
    assert "1 of 41472 numbers differ, in row 5" in row.reason


@pytest.mark.parametrize("problem", [RuntimeError("Failed to find C compiler"), AssertionError(), KeyError("sm_75")])
def test_a_kernel_that_raises_is_replaced_by_the_next_with_what_it_said(problem: Exception, tmp_path: Path) -> None:
    def broken(*given: Any) -> Any:
        raise problem

    row = checked(case_of("norm, rotated"), replace(PLAIN, norm=broken), tmp_path)
    assert row.engaged == "plain" and type(problem).__name__ in row.reason


def test_a_set_that_cannot_be_built_is_replaced_by_the_next(tmp_path: Path) -> None:
    def build(name: str) -> Kernels:
        if name == "fast":
            raise ImportError("No module named 'triton'")
        return PLAIN

    kernels = ("add", "heads", "norm, dense", "add_norm, dense", "swiglu, dense")
    rows = check_kernels([case_of(kernel) for kernel in kernels], NAMES, build, CPU, RecordFile(tmp_path))
    assert all(row.engaged == "plain" and "triton" in row.reason for row in rows)
    made = assembled(rows, NAMES, build)
    assert made.add is PLAIN.add and made.name.startswith("plain in place of fast (") and "triton" in made.name


@pytest.mark.slow
def test_a_kernel_that_hangs_is_left_behind_after_its_limit(tmp_path: Path) -> None:
    release = threading.Event()

    def hanging(*given: Any) -> Any:
        release.wait()

    try:
        row = checked(trivial(), replace(PLAIN, add=hanging), tmp_path, limit=2.0)
    finally:
        release.set()
    assert row.engaged == "plain" and "not done after 2 s" in row.reason


def trivial(kernel: str = "add") -> Case:
    """A case that takes no time: one is two."""

    def trials() -> Iterator[Trial]:
        ones = torch.ones(2, 2)

        def judge(got: Any) -> Verdict:
            return Verdict("" if torch.equal(got, 2 * ones) else "one and one are not two", 0.0)

        yield Trial(lambda kernels: lambda: kernels.add(ones, ones, ones, 0.0), judge)

    return Case(kernel, "", trials)


@pytest.mark.parametrize(
    "problem", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_want_of_memory_says_nothing_about_a_kernel(problem: BaseException, tmp_path: Path) -> None:
    def broken(*given: Any) -> Any:
        raise problem

    sets = {"fast": replace(PLAIN, add=broken), "plain": PLAIN}
    assert check_kernels([trivial()], NAMES, sets.__getitem__, CPU, RecordFile(tmp_path)) == []


def test_a_device_that_stopped_ends_the_check_and_the_next_start_knows_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(self_check_trial, "_answers", lambda device: False)
        with pytest.raises(DeviceError, match="Restart"):
            checked(trivial(), replace(PLAIN, add=broken), tmp_path)
    assert RecordFile(tmp_path).tried() == ("add", "fast")
    row = checked(trivial(), PLAIN, tmp_path)
    assert row.engaged == "plain" and "did not come back" in row.reason
    assert not (tmp_path / TRYING).exists()


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"add"', "[]"])
def test_a_damaged_note_of_what_was_tried_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / TRYING).write_text(content, encoding="utf-8")
    assert RecordFile(tmp_path).tried() is None


def test_a_backend_that_pytorch_does_not_take_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("flash", "efficient", "math")
    monkeypatch.setattr(attention, "backends", lambda device, excluded: ())
    monkeypatch.setattr(attention, "ask", lambda *_: attention.MATH)
    case = attention_case(CPU, torch.bfloat16)
    build = partial(OneBackend.of, names=names)
    (row,) = check_kernels([case], names, build, CPU, RecordFile(tmp_path))
    assert row.engaged == "math" and "PyTorch takes math in runs in its place" in row.reason


# Choice --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("standings", "engaged"),
    [
        ([Standing("triton", seconds=1.0), Standing("int_mm", seconds=0.95)], "triton"),
        ([Standing("triton", seconds=1.0), Standing("int_mm", seconds=0.8)], "int_mm"),
        ([Standing("triton", seconds=1.0), Standing("plain", seconds=0.8)], "triton"),
        ([Standing("triton", seconds=1.0), Standing("plain", seconds=0.3)], "plain"),
        ([Standing("triton", "is wrong"), Standing("torch", seconds=2.0), Standing("plain", seconds=1.9)], "torch"),
        ([Standing("triton", "is wrong", seconds=0.1), Standing("plain", seconds=9.0)], "plain"),
        ([Standing("triton", "is wrong"), Standing("plain", "is wrong, too")], ""),
    ],
)
def test_the_fastest_that_is_right_is_taken_and_plain_torch_for_speed_alone_only_by_far(
    standings: list[Standing], engaged: str
) -> None:
    row = pick("matmul", standings)
    assert row.engaged == engaged
    assert all(each.name in row.reason for each in standings if each.wrong)


def test_sets_are_tried_from_the_one_of_the_device_on_and_end_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check.choice, "KERNEL_SETS", ("triton", "int_mm", "torch", "processor", "plain"))
    assert ladder("triton") == ("triton", "int_mm", "torch", "plain")
    assert ladder("torch") == ("torch", "plain")
    assert ladder("processor") == ("processor", "plain")
    assert ladder("plain") == ("plain",)


def test_kernels_are_replaced_one_by_one_and_their_name_says_why() -> None:
    freed: list[str] = []
    fast = replace(
        processor_kernels(), name="fast, by far", release_scratch=lambda: freed.append("fast"), decode=lambda *_: "fast"
    )
    plain = replace(PLAIN, release_scratch=lambda: freed.append("plain"))
    rows = [
        Checked("norm, rotated", "plain", "fast is wrong"),
        Checked("norm, dense", "fast", "right"),
        Checked("matmul", "plain", "fast is wrong"),
        Checked("heads", "fast", "right"),
        Checked("swiglu, int8", "", "no implementation is right here"),
    ]
    made = assembled(rows, NAMES, {"fast": fast, "plain": plain}.__getitem__)
    assert made.matmul is PLAIN.matmul and made.weight is PLAIN.weight and made.heads is fast.heads
    assert made.name == (
        "fast, by far; norm, rotated and matmul by plain (fast is wrong); "
        "swiglu, int8 by plain (no implementation is right here)"
    )
    x = torch.randn(2, 256)
    assert isinstance(made.norm(x, torch.ones(256), 1e-5, "rotated"), QuantizedActivations)
    assert isinstance(made.norm(x, torch.ones(256), 1e-5, "dense"), Tensor)
    made.release_scratch()
    assert sorted(freed) == ["fast", "plain"]


def test_where_everything_is_right_the_set_itself_is_used() -> None:
    fast = replace(PLAIN, name="fast")
    assert assembled([Checked("add", "fast", "right")], NAMES, {"fast": fast, "plain": PLAIN}.__getitem__) is fast


# Record --------------------------------------------------------------------------------------------------------------

CHECK = SelfCheck("A card", "bfloat16", {"torch": "2.13.0", "driver": "580.1"}, (Checked("add", "triton", "right"),))


def test_a_check_is_found_again_for_the_same_device_type_and_versions_alone(tmp_path: Path) -> None:
    RecordFile(tmp_path).keep(CHECK)
    record = RecordFile(tmp_path)
    assert record.find(CHECK.device, CHECK.dtype, CHECK.versions) == CHECK
    assert record.find("Another card", CHECK.dtype, CHECK.versions) is None
    assert record.find(CHECK.device, "float16", CHECK.versions) is None
    for name in CHECK.versions:
        assert record.find(CHECK.device, CHECK.dtype, {**CHECK.versions, name: "newer"}) is None
    assert record.notes == []


def test_the_machine_says_what_was_found_on_it_and_nothing_of_others(tmp_path: Path) -> None:
    hardware = Hardware(kind="cuda", name="A card", torch="2.13.0")
    assert with_check(hardware, tmp_path) == hardware
    rows = (*CHECK.kernels, Checked("matmul", "torch", "triton is wrong: row 3 differs"))
    RecordFile(tmp_path).keep(replace(CHECK, kernels=rows))
    said = with_check(hardware, tmp_path).self_check
    assert said == "1 of 2 kernels are right in bfloat16; replaced: matmul by torch: triton is wrong: row 3 differs."
    assert any(said in line for line in describe_hardware(with_check(hardware, tmp_path)))
    for other in (replace(hardware, name="Another"), replace(hardware, torch="2.14.0"), Hardware(cpu_name="A CPU")):
        assert with_check(other, tmp_path) == other


def test_each_device_and_type_keeps_its_last_check(tmp_path: Path) -> None:
    record, newer = RecordFile(tmp_path), replace(CHECK, versions={"torch": "2.14.0"})
    for check in (CHECK, replace(CHECK, device="Another"), newer):
        record.keep(check)
    assert {(each.device, each.versions["torch"]) for each in record.read().checks} == {
        ("A card", "2.14.0"),
        ("Another", "2.13.0"),
    }


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"checks": 3}', b'{"checks": [{"device": "A card"}]}', b"[" * 100_000],
)
def test_a_damaged_or_foreign_record_is_words_and_no_record(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    record = RecordFile(tmp_path)
    assert record.find(CHECK.device, CHECK.dtype, CHECK.versions) is None
    assert len(record.notes) == 1 and "made again" in record.notes[0]
    record.keep(CHECK)
    assert RecordFile(tmp_path).find(CHECK.device, CHECK.dtype, CHECK.versions) == CHECK


def test_a_record_that_cannot_be_written_is_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    record = RecordFile(tmp_path / "file")
    record.keep(CHECK)
    record.trying("add", "triton")
    with record.alone():
        pass
    assert any("not kept" in note for note in record.notes)


def test_a_second_check_at_the_same_time_waits_and_then_goes_on_with_a_word(tmp_path: Path) -> None:
    record = RecordFile(tmp_path)
    with locked(record.path, "The self-check is made"), record.alone(seconds=0):
        record.keep(CHECK)
    assert json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["checks"]
    assert any("at the same time" in note for note in record.notes)


def test_an_error_inside_the_lock_is_not_taken_for_one_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="inside"), RecordFile(tmp_path).alone():
        raise RequestError("inside")
