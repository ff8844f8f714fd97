"""Out of memory in the words of every library, and which memory it was; then what is offered instead."""

from __future__ import annotations

import errno

import pytest
import torch

from ideogram_app.errors import CheckpointError, DeviceError
from ideogram_app.machine.memory import MemoryNow
from ideogram_app.planning.oom import HAPPENED, PHASE_WORDS, OutOfMemory, classify

GIB, MIB = 2**30, 2**20
TORCH = (
    "CUDA out of memory. Tried to allocate 2.14 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.02 GiB is free."
    " Including non-PyTorch memory, this process has 22.41 GiB memory in use. {}Of the allocated memory 21.00 GiB is "
    "allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
METAL = (
    "MPS backend out of memory (MPS allocated: 17.00 GiB, other allocations: 512.00 MiB, max allowed: 18.00 GiB). "
    "Tried to allocate 1.50 GiB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit."
)
RAW = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call."
)
# Enough of everything, but for what the name says.
ROOMY = MemoryNow(24 * GIB, 14 * GIB, 9 * GIB, 32 * GIB, 20 * GIB, 6 * GIB)
FULL_DEVICE = MemoryNow(24 * GIB, 200 * MIB, 22 * GIB, 32 * GIB, 20 * GIB, 6 * GIB)
FULL_RAM = MemoryNow(24 * GIB, 14 * GIB, 9 * GIB, 32 * GIB, 300 * MIB, 28 * GIB)


class WindowsError1455(OSError):
    """What Python raises on Windows, where OSError has this attribute."""

    winerror = 1455


class _ArrayMemoryError(MemoryError):
    """NumPy's, which is a MemoryError with words."""


class SafetensorError(Exception):
    """Its real home is `safetensors_rust`."""


SafetensorError.__module__ = "safetensors_rust"

# What says so only where little device memory is free: a library found no room to be set up, or no way to compute.
SCARCE = (
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`",
    "cuFFT error: CUFFT_INTERNAL_ERROR",
    "miopenStatusInternalError",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
)

# problem, memory at that moment, Windows or not -> kind, bytes wanted, bytes free
WORDS: list[tuple[BaseException, MemoryNow | None, bool, str, int | None, int | None]] = [
    (torch.OutOfMemoryError(TORCH.format("")), None, False, "device", round(2.14 * GIB), round(1.02 * GIB)),
    (torch.cuda.OutOfMemoryError(TORCH.format("")), ROOMY, True, "device", round(2.14 * GIB), round(1.02 * GIB)),
    (RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."), None, False, "device", 20 * MIB, None),
    (RuntimeError(METAL), None, False, "device", round(1.5 * GIB), GIB // 2),
    (torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB."), None, False, "device", 2 * GIB, None),
    (RuntimeError("Native API failed: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"), None, False, "device", None, None),
    (RuntimeError("level_zero error 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), None, False, "device", None, None),
    (RuntimeError("level_zero error (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)"), None, False, "host", None, None),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        FULL_DEVICE,
        False,
        "device",
        None,
        200 * MIB,
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None, False, "device", None, None),
    (RuntimeError("Triton Error [CUDA]: out of memory"), None, False, "device", None, None),
    (RuntimeError("Triton Error [HIP]:  Code: 2, Messsage: out of memory"), None, False, "device", None, None),
    (RuntimeError("hipErrorOutOfMemory"), FULL_DEVICE, False, "device", None, 200 * MIB),
    (RuntimeError("hipErrorOutOfMemory"), FULL_RAM, False, "host", None, 300 * MIB),
    (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), ROOMY, False, "locked", None, 20 * GIB),
    (RuntimeError("HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate`"), None, False, "device", None, None),
    (RuntimeError("rocblas_status_memory_error"), None, False, "device", None, None),
    (RuntimeError("miopenStatusAllocFailed"), None, False, "device", None, None),
    (RuntimeError("Invalid buffer size: 19.38 GiB"), None, False, "device", round(19.38 * GIB), None),
    (RuntimeError("(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"), None, False, "device", None, None),
    (RuntimeError("Failed to allocate private MTLBuffer for size 4294967296"), None, False, "device", None, None),
    (RuntimeError("Failed to allocate memory for requested buffer of size 1024"), None, False, "device", None, None),
    (RuntimeError("API returns: -4 (PI_ERROR_MEM_OBJECT_ALLOCATION_FAILURE)"), None, False, "device", None, None),
    (RuntimeError("UR error: ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), None, False, "device", None, None),
    (RuntimeError("HSA_STATUS_ERROR_OUT_OF_RESOURCES: The runtime failed"), None, False, "device", None, None),
    (RuntimeError("Allocation on device 0 would exceed allowed memory."), None, False, "device", None, None),
    (
        ImportError("DLL load failed while importing _C: The paging file is too small for this operation to complete."),
        None,
        True,
        "commit",
        None,
        None,
    ),
    *((RuntimeError(said), FULL_DEVICE, False, "device", None, 200 * MIB) for said in SCARCE),
    (torch.OutOfMemoryError("Allocation on device\nRequested : 1.00 GiB"), None, False, "device", GIB, None),
    (RuntimeError(RAW), FULL_DEVICE, False, "device", None, 200 * MIB),
    (RuntimeError(RAW), FULL_DEVICE, True, "device", None, 200 * MIB),
    (RuntimeError(RAW), None, False, "device", None, None),
    (torch.AcceleratorError(RAW), ROOMY, False, "locked", None, 20 * GIB),
    (RuntimeError(RAW), FULL_RAM, False, "host", None, 300 * MIB),
    (RuntimeError(RAW), ROOMY, True, "commit", None, 14 * GIB),
    (RuntimeError("cudaHostAlloc of 512 bytes failed: out of memory"), ROOMY, True, "locked", None, 20 * GIB),
    (RuntimeError("CUDA driver error: out of memory"), FULL_DEVICE, False, "device", None, 200 * MIB),
    (MemoryError(), None, False, "host", None, None),
    (MemoryError(), FULL_RAM, True, "host", None, 300 * MIB),
    (MemoryError(), ROOMY, True, "commit", None, 14 * GIB),
    (
        _ArrayMemoryError("Unable to allocate 1.50 GiB for an array with shape (402653184,) and data type float32"),
        None,
        False,
        "host",
        round(1.5 * GIB),
        None,
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
        ),
        FULL_RAM,
        False,
        "host",
        3 * GIB,
        300 * MIB,
    ),
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
            "1048576 bytes."
        ),
        ROOMY,
        True,
        "commit",
        MIB,
        14 * GIB,
    ),
    (
        RuntimeError("unable to mmap 512 bytes from file <a>: Cannot allocate memory (12)"),
        None,
        False,
        "host",
        512,
        None,
    ),
    (RuntimeError("std::bad_alloc"), None, False, "host", None, None),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), FULL_RAM, False, "host", None, 300 * MIB),
    (WindowsError1455(22, "Die Auslagerungsdatei ist zu klein"), ROOMY, True, "commit", None, 14 * GIB),
    (
        SafetensorError("The paging file is too small for this operation to complete. (os error 1455)"),
        None,
        True,
        "commit",
        None,
        None,
    ),
]


@pytest.mark.parametrize(
    ("problem", "now", "windows", "kind", "wanted", "free"), WORDS, ids=lambda value: str(value)[:40]
)
def test_every_way_of_saying_it_is_understood(
    problem: BaseException, now: MemoryNow | None, windows: bool, kind: str, wanted: int | None, free: int | None
) -> None:
    assert classify(problem, "load", now, windows) == OutOfMemory(kind, wanted, "load", free)


@pytest.mark.parametrize(
    "problem",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
        RuntimeError("pin_memory=True requires a CUDA or other accelerator backend"),
        RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ValueError("CUDA out of memory"),
        DeviceError("INT8 does not fit this machine"),
        KeyboardInterrupt(),
    ],
    ids=lambda problem: str(problem)[:40],
)
def test_other_problems_are_not_taken_for_it(problem: BaseException) -> None:
    assert classify(problem, "denoise", FULL_DEVICE) is None


@pytest.mark.parametrize("said", SCARCE)
@pytest.mark.parametrize("now", [ROOMY, FULL_RAM, None], ids=["much is free", "RAM is full", "not known"])
def test_a_library_that_cannot_be_set_up_is_no_want_of_memory_where_much_is_free(
    said: str, now: MemoryNow | None
) -> None:
    assert classify(RuntimeError(said), "denoise", now, windows=False) is None
    assert classify(RuntimeError(said), "denoise", now, windows=True) is None


def test_what_the_allocators_of_this_machine_really_say_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15, dtype=torch.uint8)
    assert classify(caught.value, windows=False) == OutOfMemory("host", 10**15)


def test_a_cause_counts_behind_an_error_that_was_raised_from_it() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as inner:
            raise CheckpointError("The file could not be read") from inner
    except CheckpointError as outer:
        assert classify(outer, windows=False) == OutOfMemory("host")


def test_within_a_share_of_the_device_free_is_what_the_share_leaves() -> None:
    """14 GiB are free on the card; 22 GiB were allowed and 21 are taken."""
    told = TORCH.replace("1.02 GiB is free", "14.00 GiB is free").format("22.00 GiB allowed; ")
    for windows in (False, True):  # a share is no commit limit
        assert classify(torch.OutOfMemoryError(told), "denoise", ROOMY, windows) == OutOfMemory(
            "device", round(2.14 * GIB), "denoise", GIB
        )


def test_free_memory_in_pieces_is_called_that_and_is_a_commit_limit_on_windows() -> None:
    told = torch.OutOfMemoryError(TORCH.replace("1.02 GiB is free", "14.00 GiB is free").format(""))
    here = classify(told, "denoise", ROOMY, windows=False)
    there = classify(told, "denoise", ROOMY, windows=True)
    assert here and here.kind == "device" and "in pieces too small" in here.sentence()
    assert there and there.kind == "commit" and "the device still had 15.0 GB" in there.sentence()


@pytest.mark.parametrize("kind", HAPPENED)
@pytest.mark.parametrize("phase", ["", *PHASE_WORDS])
@pytest.mark.parametrize(("wanted", "free"), [(None, None), (2 * 10**9, None), (None, 10**9), (2 * 10**9, 10**9)])
def test_every_sentence_says_what_happened_when_how_much_and_what_to_do(
    kind: str, phase: str, wanted: int | None, free: int | None
) -> None:
    shortage = OutOfMemory(kind, wanted, phase, free)
    text = shortage.sentence()
    assert text.startswith(HAPPENED[kind]) and text.endswith(".") and "None" not in text and "()" not in text
    assert PHASE_WORDS.get(phase, "") in text
    assert ("2.0 GB more were asked for" in text) is (wanted is not None)
    assert ("1.0 GB" in text) is (free is not None)
    helps = {"device": "use the device", "host": "Close other programs", "locked": "stream less", "commit": "page file"}
    assert helps[kind] in text
    account = shortage.account("decode in tiles of 512")
    assert account.startswith(HAPPENED[kind]) and account.endswith("Went on with less: decode in tiles of 512.")
