"""Sticky device errors: those after which a device computes nothing more in this process, known by their words.

    lost = lost_device(problem, phase="denoise")
    lost.sentence()     what happened, and that the program has to be restarted
    lost.again()        the same for what was not even tried any more

A kernel that writes where it may not, fails an assertion or hangs takes the process's context on that device with it:
every later call there fails with the same error, whatever it does, and nothing but a new process helps. Other errors
(a wrong argument, a kernel that needs more than there is) leave the device usable. PyTorch raises both as RuntimeError,
and scripts built on it go on trying; here what comes after is refused with the reason. torch is not imported.

Left out: faults that end the process themselves, as most of ROCm's do, and resetting the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ideogram_app.planning.oom import PHASE_WORDS

# Which of torch's kinds of device is lost ("" for any but the processor), and what says so. CUDA: the errors of which
# its manual says "the process must be terminated and relaunched" (Runtime API, cudaError_t), as words, as names of the
# runtime's (HIP has the same) and of the driver's; "unknown error" is what a reset of the driver leaves behind. oneAPI:
# ze_result_t and ur_result_t. Metal: MTLCommandBufferError, in the words that macOS puts into its descriptions.
SIGNS: tuple[tuple[str, str], ...] = (
    ("cuda", r"illegal memory access|illegal instruction was encountered|misaligned address|invalid program counter"),
    ("cuda", r"device-side assert|unspecified launch failure|hardware stack error|launch timed out and was terminated"),
    ("cuda", r"operation not supported on global/shared address space|uncorrectable (ecc|nvlink) error"),
    ("cuda", r"context is destroyed|((cuda|hip)( driver)? error|triton error \[\w+\]):.{0,40}\bunknown error"),
    ("cuda", r"(cuda|hip)error(illegal(address|instruction)|misalignedaddress|invalid(pc|addressspace)|assert)\b"),
    ("cuda", r"(cuda|hip)error(launch(failure|timeout)|hardwarestackerror|contextisdestroyed|contained|unknown)\b"),
    ("cuda", r"(cuda|hip)error((ecc|nvlink)(uncorrectable|notcorrectable)|tensormemoryleak)\b"),
    ("cuda", r"cuda_error_(illegal_(address|instruction)|misaligned_address|invalid_(pc|address_space)|assert)\b"),
    ("cuda", r"cuda_error_(launch_(failed|timeout)|hardware_stack_error|(ecc|nvlink)_uncorrectable|unknown)\b"),
    ("cuda", r"hsa_status_error_(exception|fatal|memory_fault|memory_aperture_violation|illegal_instruction)"),
    ("xpu", r"(ur|pi|ze)_(result_)?error_device_(lost|requires_reset)"),
    ("mps", r"callbackerror(hang|timeout|pagefault|submissionsignored|accessrevoked|blacklisted|devicereset)"),
    ("mps", r"caused gpu (hang|timeout|address fault) error|for causing prior/excessive gpu errors"),
    ("", r"device[ _](is |was )?(lost|removed|hung)\b|gpu is lost|fallen off the bus"),
)
LONGEST = 200  # characters of the library's words


@dataclass(frozen=True)
class LostDevice:
    """A device that computes nothing more in this process.

    Attributes:
        kind: torch's word for it: cuda (ROCm's too), xpu or mps; "" where the message does not say.
        words: of the library that failed.
        phase: of the picture, as in `records.Event`; "" where it is not known.
    """

    kind: str
    words: str
    phase: str = ""

    def takes(self, device: str) -> bool:
        """Whether it can have been this device; the processor goes on computing whatever others do."""
        found = device.partition(":")[0]
        return found == self.kind if self.kind else found != "cpu"

    def sentence(self) -> str:
        """For people: what happened, and what to do."""
        when = f" {PHASE_WORDS[self.phase]}" if self.phase in PHASE_WORDS else ""
        return (
            f"The device failed{when} and computes nothing more until you restart the program: {self.words}. "
            "What was drawn before is kept. If the same happens again, draw with another recipe, or update the "
            "device's driver."
        )

    def again(self) -> str:
        """For people, of what was not tried any more."""
        return f"Not tried, for this reason. {self.sentence()}"


def lost_device(problem: BaseException, phase: str = "") -> LostDevice | None:
    """Whether a device is lost by this error or by one behind it; None where devices are still usable."""
    for cause in chain(problem):
        if isinstance(cause, RuntimeError):  # what torch and Triton raise, torch.AcceleratorError included
            text = " ".join(str(cause).lower().split())
            kind = next((kind for kind, sign in SIGNS if re.search(sign, text)), None)
            if kind is not None:
                first = next(iter(str(cause).strip().splitlines()), "")  # advice on debugging follows
                return LostDevice(kind, one_line(first, LONGEST).rstrip("."), phase)
    return None


def chain(problem: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or while handling, the last first."""
    cause: BaseException | None = problem
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        yield cause
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def one_line(text: str, longest: int) -> str:
    """The text on one line; of a long one both ends, because compilers say at the end what was wrong."""
    line = " ".join(text.split())
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half].rstrip()} ... {line[-half:].lstrip()}"
