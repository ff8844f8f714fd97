"""Sticky errors in the words of every driver, told apart from those that leave a device usable."""

from __future__ import annotations

import pytest
import torch

from ideogram_app.errors import CheckpointError, DeviceError
from ideogram_app.planning.lost_device import LONGEST, LostDevice, lost_device, one_line
from ideogram_app.planning.oom import PHASE_WORDS

WORDS = [
    ("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`", "cuda"),
    ("CUDA error: an illegal memory access", "cuda"),
    ("CUDA error: device-side assert triggered", "cuda"),
    ("CUDA error: unspecified launch failure", "cuda"),
    ("CUDA error: the launch timed out and was terminated", "cuda"),
    ("CUDA error: misaligned address", "cuda"),
    ("CUDA error: an illegal instruction was encountered", "cuda"),
    ("CUDA error: invalid program counter", "cuda"),
    ("CUDA error: hardware stack error", "cuda"),
    ("CUDA error: operation not supported on global/shared address space", "cuda"),
    ("CUDA error: uncorrectable ECC error encountered", "cuda"),
    ("CUDA error: unknown error", "cuda"),
    ("CUDA driver error: CUDA_ERROR_ILLEGAL_ADDRESS", "cuda"),
    ("CUDA_ERROR_LAUNCH_FAILED", "cuda"),
    ("Search for `cudaErrorIllegalAddress' in the documentation", "cuda"),
    ("Triton Error [CUDA]: an illegal memory access was encountered", "cuda"),
    ("Triton Error [HIP]:  Code: 719, Messsage: unspecified launch failure", "cuda"),
    ("hipErrorIllegalAddress", "cuda"),
    ("HIP error: unspecified launch failure", "cuda"),
    ("hipErrorLaunchTimeOut", "cuda"),
    ("HSA_STATUS_ERROR_EXCEPTION: An HSAIL operation resulted in a hardware exception.", "cuda"),
    ("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)", "xpu"),
    ("ZE_RESULT_ERROR_DEVICE_LOST", "xpu"),
    ("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)", "mps"),
    ("Ignored (for causing prior/excessive GPU errors)", "mps"),
    ("(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored)", "mps"),
    ("GPU is lost. Reboot the system to recover this GPU", ""),
    ("DXGI_ERROR_DEVICE_REMOVED", ""),
]


@pytest.mark.parametrize(("said", "kind"), WORDS, ids=[said[:40] for said, _ in WORDS])
def test_every_way_of_saying_it_is_understood(said: str, kind: str) -> None:
    lost = lost_device(RuntimeError(said), "denoise")
    assert lost and lost.kind == kind and lost.phase == "denoise"
    accelerated = lost_device(torch.AcceleratorError(said))
    assert accelerated and accelerated.kind == kind


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.14 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("CUDA error: too many resources requested for launch"),
        RuntimeError("CUDA error: invalid argument"),
        RuntimeError("cudaErrorLaunchOutOfResources"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("Native API returns: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
        RuntimeError("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        TypeError("CUDA error: an illegal memory access was encountered"),
        DeviceError("INT8 does not fit this machine"),
        KeyboardInterrupt(),
    ],
    ids=lambda problem: str(problem)[:40],
)
def test_errors_that_leave_the_device_usable_are_not_taken_for_it(problem: BaseException) -> None:
    assert lost_device(problem) is None


def test_it_is_found_behind_an_error_that_was_raised_from_it_or_while_handling_it() -> None:
    for way in ("from", "while"):
        try:
            try:
                raise RuntimeError("CUDA error: device-side assert triggered")
            except RuntimeError as inner:
                if way == "from":
                    raise CheckpointError("The file could not be read") from inner
                raise TypeError("while closing")  # noqa: B904
        except (CheckpointError, TypeError) as outer:
            assert lost_device(outer) == LostDevice("cuda", "CUDA error: device-side assert triggered")


def test_errors_that_are_one_anothers_cause_come_to_an_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert lost_device(one) is None


@pytest.mark.parametrize(
    ("kind", "device", "taken"),
    [
        ("cuda", "cuda:1", True),
        ("cuda", "cuda", True),
        ("cuda", "cpu", False),
        ("cuda", "xpu:0", False),
        ("mps", "mps", True),
        ("", "xpu:0", True),
        ("", "cpu", False),
    ],
)
def test_only_devices_of_its_kind_are_taken_and_never_the_processor(kind: str, device: str, taken: bool) -> None:
    assert LostDevice(kind, "").takes(device) is taken


@pytest.mark.parametrize("phase", ["", *PHASE_WORDS])
def test_the_sentence_says_when_what_and_to_restart(phase: str) -> None:
    said = RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")
    lost = lost_device(said, phase)
    assert lost
    for text in (lost.sentence(), lost.again()):
        assert "restart the program" in text and "CUDA error: unspecified launch failure." in text
        assert PHASE_WORDS.get(phase, "") in text and "Compile" not in text and text.endswith(".")
    assert lost.again() != lost.sentence()


def test_a_long_message_keeps_both_its_ends_on_one_line() -> None:
    text = one_line("at 12:4:\n" + "x\n" * 1000 + "incompatible type", LONGEST)
    assert "\n" not in text and len(text) <= LONGEST + 5
    assert text.startswith("at 12:4:") and text.endswith("incompatible type")
