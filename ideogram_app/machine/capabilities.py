"""Device capabilities: computing type, INT8 units, kernels, obstacles, each answer with its reason.

Generations and names are judged here and nowhere else, so that planning/placement.py only counts bytes and
planning/planner.py only chooses. `NOTHING` means that nothing speaks against it.

Left out: FP8 and FP4 units, which no recipe of this program uses.
"""

from __future__ import annotations

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.machine.gpu_specs import Flops
from ideogram_app.machine.hardware import Hardware
from ideogram_app.text import gb

PROCESSOR_FLOPS = 1e12  # a good desktop processor in float32: 16 cores x 4 GHz x 16 products; most have less
SMALL_GAIN = 3.0  # INT8 products over 16-bit ones: 4 on GeForce cards, 2 on A100, H100, B200 (NVIDIA's datasheets)


def compute_type(hardware: Hardware) -> tuple[str, Reason]:
    """The type of everything that is not packed, and why."""
    capability = hardware.compute_capability
    if hardware.kind == "cpu":
        return "float32", reason("computes_float32")
    if hardware.kind == "cuda" and capability is not None and capability < (8, 0):
        return "float16", reason("computes_float16", generation=_generation(hardware))
    return "bfloat16", reason("computes_bfloat16")


def int8_units(hardware: Hardware) -> Reason:
    """Why INT8 arithmetic gains nothing on this device."""
    capability = hardware.compute_capability
    if hardware.kind == "mps":
        return reason("int8_apple")
    if hardware.kind == "xpu":
        return reason("int8_intel")
    if hardware.kind == "rocm":
        return reason("int8_rdna_2") if capability and capability[0] == 10 else NOTHING
    if "GTX 16" in hardware.name.upper():
        return reason("int8_gtx_16")
    if hardware.kind == "cuda" and capability is not None and capability < (7, 5):
        return reason("int8_before_turing", generation=_generation(hardware))
    return NOTHING


def arithmetic(hardware: Hardware, recipe: Recipe) -> tuple[str, Reason]:
    """How a recipe's matrices are multiplied here (`w4a8` for 4-bit weights and 8-bit activations, ...), and why.

    There is no reason where there was nothing to decide. Blocks decoded to INT8 meet rotated activations, so that what
    Q4_K saves in memory costs no time where INT8 units do the work; on a processor the decoding itself takes longer.
    """
    if recipe.gguf_type != "Q4_K":
        return recipe.arithmetic, NOTHING
    units = int8_units(hardware)
    if hardware.kind == "cpu":
        return recipe.arithmetic, NOTHING
    if hardware.kind == "cuda" and not units:
        return "w4a8", reason("q4_k_to_int8")
    why = units or reason("int8_untried", kind=hardware.kind)
    return recipe.arithmetic, reason("q4_k_to_dense", why=why)


def products(hardware: Hardware) -> str:
    """Which set of kernels runs, named after its INT8 product: triton, int_mm, torch, plain or processor.

    kernels/choice.py decides by the same rule, for a device that it can ask.
    """
    capability = hardware.compute_capability
    if hardware.kind == "cpu":
        return "processor"
    if hardware.kind not in ("cuda", "rocm"):
        return "plain"
    nvidias = capability if hardware.kind == "cuda" else None
    if nvidias is not None and nvidias < (7, 5):
        return "plain"
    if hardware.triton_problem:
        return "torch"
    return "int_mm" if nvidias == (7, 5) else "triton"


def product_note(hardware: Hardware, recipe: Recipe) -> Reason:
    """A word on the kernels where they are not Triton's and could be: on its absence, or on the INT8 product alone."""
    runs = products(hardware)
    if runs == "torch":
        return reason("no_triton", problem=hardware.triton_problem)
    return reason("int8_of_pytorch") if runs == "int_mm" and arithmetic(hardware, recipe)[0].endswith("a8") else NOTHING


def obstacle(hardware: Hardware, work: Flops) -> tuple[Reason, Reason] | None:
    """What rules the published model out before any byte is counted: the reason, and what to do."""
    if hardware.kind == "cpu":
        operations = work.matrices + work.attention
        minutes = operations / PROCESSOR_FLOPS / 60
        problem = reason("problem", problem=hardware.problem) if hardware.problem else NOTHING
        no_gpu = reason("no_gpu", trillions=operations / 1e12, minutes=minutes)
        return problem + no_gpu, torch_advice(hardware) + reason("use_miniature")
    if hardware.torch_supports_device is False:
        torch = f"PyTorch {hardware.torch}" if hardware.torch else "PyTorch"
        generation = _generation(hardware)
        return reason("no_kernels", torch=torch, device=hardware.name, generation=generation), torch_advice(hardware)
    return None


def torch_advice(hardware: Hardware) -> Reason:
    """Which PyTorch to install for this device; nothing where the installed one is right or there is no device."""
    if hardware.kind == "cpu":
        return reason("torch_for_cuda") if hardware.problem else NOTHING
    if hardware.kind != "cuda" or hardware.compute_capability is None:
        return reason("torch_for_device")
    if hardware.compute_capability < (7, 5):
        return reason("torch_cuda_12_6")
    return reason("torch_cuda_12_8" if hardware.compute_capability >= (10, 0) else "torch_newer")


def build_note(hardware: Hardware) -> Reason:
    """A warning for cards that need another than the usual PyTorch, where it is not known which one is there."""
    old = hardware.kind == "cuda" and hardware.compute_capability is not None and hardware.compute_capability < (7, 5)
    return torch_advice(hardware) if old and hardware.torch_supports_device is None else NOTHING


def users_note(hardware: Hardware) -> Reason:
    """Who else holds device memory, largest first; nothing where nobody is known to."""
    users = sorted(hardware.device_users, key=lambda user: -(user.bytes or 0))[:3]
    if not users:
        return NOTHING
    held = ", ".join(f"{user.name} ({gb(user.bytes)})" if user.bytes else user.name for user in users)
    return reason("device_users", users=held)


def _generation(hardware: Hardware) -> str:
    """Turing (sm_75), gfx11, or the name where nothing is known."""
    if hardware.compute_capability is None:
        return hardware.name
    if hardware.kind == "rocm":
        return hardware.architecture
    major, minor = hardware.compute_capability
    mark = f"sm_{major}{minor}"
    return mark if hardware.architecture == mark else f"{hardware.architecture} ({mark})"
