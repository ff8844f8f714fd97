"""What a kind of device can and cannot do, each answer with its sentence: computing type, INT8 units, obstacles.

Generations and names are judged here and nowhere else, so that planning/placement.py only counts bytes and
planning/planner.py only chooses. Answers are pairs or sentences; an empty sentence means that nothing speaks against
it.

Left out: FP8 and FP4 units, which no recipe of this program uses.
"""

from __future__ import annotations

from ideogram_app.catalog.recipes import Recipe
from ideogram_app.machine.gpu_specs import Flops
from ideogram_app.machine.hardware import Hardware
from ideogram_app.text import gb

USE_MINIATURE = "Use the miniature (--model miniature), a small model of the same build that runs on any machine."
PROCESSOR_FLOPS = 1e12  # a good desktop processor in float32: 16 cores x 4 GHz x 16 products; most have less
SMALL_GAIN = 3.0  # INT8 products over 16-bit ones: 4 on GeForce cards, 2 on A100, H100, B200 (NVIDIA's datasheets)


def compute_type(hardware: Hardware) -> tuple[str, str]:
    """The type of everything that is not packed, and why."""
    capability = hardware.compute_capability
    if hardware.kind == "cpu":
        return "float32", "Computes in float32: what every processor does exactly."
    if hardware.kind == "cuda" and capability is not None and capability < (8, 0):
        return "float16", f"Computes in float16: {_generation(hardware)} has no bfloat16 units (from sm_80 on)."
    return "bfloat16", "Computes in bfloat16, the checkpoint's own type."


def int8_units(hardware: Hardware) -> str:
    """Why INT8 arithmetic gains nothing on this device, or ""."""
    capability = hardware.compute_capability
    if hardware.kind == "mps":
        return "Apple GPUs have no INT8 matrix products in PyTorch, and Q4_K is the smaller."
    if hardware.kind == "xpu":
        return "the INT8 kernels here are made for NVIDIA and AMD, not for Intel GPUs, and Q4_K is the smaller."
    if hardware.kind == "rocm":
        return "RDNA 2 has no matrix units." if capability and capability[0] == 10 else ""
    if "GTX 16" in hardware.name.upper():
        return "GTX 16 cards are Turing without tensor cores, so INT8 has no units to run on."
    if hardware.kind == "cuda" and capability is not None and capability < (7, 5):
        return f"{_generation(hardware)} has no INT8 matrix units (they begin with Turing, sm_75)."
    return ""


def arithmetic(hardware: Hardware, recipe: Recipe) -> tuple[str, str]:
    """How a recipe's matrices are multiplied here (`w4a8` for 4-bit weights and 8-bit activations, ...), and why.

    The reason is "" where there was nothing to decide. Blocks decoded to INT8 meet rotated activations, so that what
    Q4_K saves in memory costs no time where INT8 units do the work; on a processor the decoding itself takes longer.
    """
    if recipe.gguf_type != "Q4_K":
        return recipe.arithmetic, ""
    units = int8_units(hardware)
    if hardware.kind == "cpu":
        return recipe.arithmetic, ""
    if hardware.kind == "cuda" and not units:
        return "w4a8", "Q4_K is decoded to INT8 one matrix at a time and multiplied on INT8 units, activations rotated."
    why = units or f"no INT8 kernels of this program have been tried on {hardware.kind} devices."
    return recipe.arithmetic, f"Q4_K is decoded to the computing type at every use: {why}"


def products(hardware: Hardware) -> str:
    """Whose INT8 product runs: triton's, or PyTorch's `int_mm` (kernels/choice.py decides by the same rule)."""
    return "int_mm" if hardware.kind == "cuda" and hardware.compute_capability == (7, 5) else "triton"


def product_note(hardware: Hardware, recipe: Recipe) -> str:
    """A word on the INT8 product where it is not Triton's; "" elsewhere."""
    if not arithmetic(hardware, recipe)[0].endswith("a8") or products(hardware) == "triton":
        return ""
    return "INT8 products are PyTorch's own: Triton compiles none for Turing. All that stands between them is fused."


def obstacle(hardware: Hardware, work: Flops) -> tuple[str, str] | None:
    """What rules the published model out before any byte is counted: the reason, and what to do."""
    if hardware.kind == "cpu":
        operations = work.matrices + work.attention
        minutes = operations / PROCESSOR_FLOPS / 60
        reason = f"{hardware.problem} " if hardware.problem else ""
        reason += (
            f"No GPU to compute on. A step is {operations / 1e12:.0f} trillion operations: about {minutes:.0f} minutes "
            f"on a fast processor, and a picture takes 12 to 48 of them."
        )
        return reason, f"{torch_advice(hardware)} {USE_MINIATURE}".strip()
    if hardware.torch_supports_device is False:
        torch = f"PyTorch {hardware.torch}" if hardware.torch else "PyTorch"
        reason = f"The installed {torch} has no kernels for the {hardware.name}, {_generation(hardware)}."
        return reason, torch_advice(hardware)
    return None


def torch_advice(hardware: Hardware) -> str:
    """Which PyTorch to install for this device; "" where the installed one is right or there is no device."""
    if hardware.kind == "cpu":
        return "Install a PyTorch built for CUDA and a driver to match it." if hardware.problem else ""
    if hardware.kind != "cuda" or hardware.compute_capability is None:
        return "Install a PyTorch built for this device."
    if hardware.compute_capability < (7, 5):
        return "Install a PyTorch built for CUDA 12.6: CUDA 13 no longer serves cards before Turing."
    if hardware.compute_capability >= (10, 0):
        return "Install a PyTorch built for CUDA 12.8 or newer, the first to know Blackwell."
    return "Install a newer PyTorch built for CUDA."


def build_note(hardware: Hardware) -> str:
    """A warning for cards that need another than the usual PyTorch, where it is not known which one is there."""
    old = hardware.kind == "cuda" and hardware.compute_capability is not None and hardware.compute_capability < (7, 5)
    return torch_advice(hardware) if old and hardware.torch_supports_device is None else ""


def users_note(hardware: Hardware) -> str:
    """Who else holds device memory, largest first; "" where nobody is known to."""
    users = sorted(hardware.device_users, key=lambda user: -(user.bytes or 0))[:3]
    if not users:
        return ""
    held = ", ".join(f"{user.name} ({gb(user.bytes)})" if user.bytes else user.name for user in users)
    return f"Device memory is also held by {held}."


def _generation(hardware: Hardware) -> str:
    """Turing (sm_75), gfx11, or the name where nothing is known."""
    if hardware.compute_capability is None:
        return hardware.name
    if hardware.kind == "rocm":
        return hardware.architecture
    major, minor = hardware.compute_capability
    mark = f"sm_{major}{minor}"
    return mark if hardware.architecture == mark else f"{hardware.architecture} ({mark})"
