"""Device capabilities: computing type, INT8 units, kernels, pairs, obstacles, each answer with its reason.

Generations and names are judged here and nowhere else, so that planning/placement.py only counts bytes and
planning/planner.py only chooses. `NOTHING` means that nothing speaks against it.

Left out: FP8 and FP4 units, which no recipe of this program uses.
"""

from __future__ import annotations

from dataclasses import replace

from ideogram_app.catalog.reasons import NOTHING, Reason, reason
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.machine.gpu_specs import Flops, find_rates, published_capability
from ideogram_app.machine.hardware import Hardware
from ideogram_app.text import gb

PROCESSOR_FLOPS = 1e12  # a good desktop processor in float32: 16 cores x 4 GHz x 16 products; most have less
Capability = tuple[int, int]
BFLOAT16_UNITS: Capability = (8, 0)  # NVIDIA's, from Ampere on
# NVIDIA cards before Ampere: from capability, computing type, row of reasons; the first row that fits is taken. float16
# alone is out of the question, as in ComfyUI (its Ideogram4 takes bfloat16 or float32): `o` and `down`
# feed a norm, so nothing bounds what they make. Turing stores bfloat16, for which every row kernel compiles. Before it
# nothing of bfloat16 is sure (cuBLAS refuses it on sm_52 and sm_60, pytorch #57773), so all is float32.
BEFORE_AMPERE: tuple[tuple[Capability, str, str], ...] = (
    ((7, 5), "bfloat16", "computes_bfloat16_turing"),
    ((0, 0), "float32", "computes_float32_old"),
)
SMALL_GAIN = 3.0  # INT8 products over 16-bit ones: 4 on GeForce cards, 2 on A100, H100, B200 (NVIDIA's datasheets)
# Turing without tensor cores (TU116, TU117), by a word of the driver's name: capability 7.5 like an RTX 20, but float16
# gives wrong numbers there (ComfyUI's model_management.py, `nvidia_16_series`; Forge has the same list), and there are
# no units for INT8 products. T400 is the same chip and in no list.
BROKEN_FLOAT16 = frozenset(
    "1660 1650 1630 T400 T500 T550 T600 MX450 MX550 T1000 T1200 T2000 30HX".split()  # the last is sold as CMP 30HX
)
# What helps where a device is there and cannot be used: `Hardware.problem_kind` -> a row of `reasons.SENTENCES`.
REMEDIES = {
    "": "torch_for_cuda",
    "full": "free_for_context",
    "busy": "leave_exclusive",
    "hidden": "show_device",
    "driver": "restart_driver",
    "old_driver": "newer_driver",
    "driver_or_wheel": "newer_driver_or_wheel",
}


def compute_type(hardware: Hardware) -> tuple[str, Reason]:
    """The type of everything that is not packed, and why."""
    capability = hardware.compute_capability
    if hardware.kind == "cpu":
        return "float32", reason("computes_float32")
    if without_tensor_cores(hardware):
        return "float32", reason("computes_float32_turing", device=hardware.name)
    if hardware.kind == "cuda" and capability is not None and capability < BFLOAT16_UNITS:
        dtype, row = next(row[1:] for row in BEFORE_AMPERE if capability >= row[0])
        return dtype, reason(row, generation=_generation(hardware))
    return "bfloat16", reason("computes_bfloat16")


def multiplies_bfloat16(capability: Capability | None) -> bool:
    """Whether a device has units for it; None stands for all that are not NVIDIA's."""
    return capability is None or capability >= BFLOAT16_UNITS


def type_in_attention(dtype: str, capability: Capability | None) -> str:
    """Of q, k and v, where a model computes in `dtype`: no fused kernel takes bfloat16 on cards without its units."""
    return "float16" if dtype == "bfloat16" and not multiplies_bfloat16(capability) else dtype


def type_of_decoder(dtype: str, capability: Capability | None) -> str:
    """Of the VAE: in float16 its pictures are black, and bfloat16 convolutions need units."""
    return dtype if multiplies_bfloat16(capability) else "float32"


def attention_type(hardware: Hardware) -> str:
    """`type_in_attention` on a described machine."""
    return type_in_attention(compute_type(hardware)[0], _nvidia(hardware))


def decoder_type(hardware: Hardware) -> str:
    """`type_of_decoder` on a described machine."""
    return type_of_decoder(compute_type(hardware)[0], _nvidia(hardware))


def widens_products(hardware: Hardware) -> bool:
    """Whether dense products are float32 of what is stored in bfloat16 (kernels/dense.py)."""
    return compute_type(hardware)[0] == "bfloat16" and not multiplies_bfloat16(_nvidia(hardware))


def without_tensor_cores(hardware: Hardware) -> bool:
    """Whether this is a Turing card without tensor cores."""
    return hardware.kind == "cuda" and hardware.compute_capability in (None, (7, 5)) and breaks_float16(hardware.name)


def breaks_float16(name: str) -> bool:
    """Whether a driver's name is that of a Turing card without tensor cores, which nothing else tells."""
    return not BROKEN_FLOAT16.isdisjoint(name.upper().split())


def int8_units(hardware: Hardware) -> Reason:
    """Why INT8 arithmetic gains nothing on this device."""
    capability = hardware.compute_capability
    if hardware.kind == "mps":
        return reason("int8_apple")
    if hardware.kind == "xpu":
        return reason("int8_intel")
    if hardware.kind == "rocm":
        return reason("int8_rdna_2") if capability and capability[0] == 10 else NOTHING
    if without_tensor_cores(hardware):
        is_gtx_16 = "GTX 16" in hardware.name.upper()
        return reason("int8_gtx_16") if is_gtx_16 else reason("int8_no_tensor_cores", device=hardware.name)
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


def device_name(hardware: Hardware, index: int) -> str:
    """What a device is; where it is not known, the same as the one that is described."""
    names = hardware.device_names
    return names[index] if index != hardware.device_index and index < len(names) else hardware.name


def of_device(hardware: Hardware, index: int) -> Hardware:
    """The machine as if another of its devices were the one that is described.

    A device that nobody described further is of the generation that its name has in the table, or the same as the first
    where it has the same name, or none.
    """
    supported, name = hardware.devices_supported, device_name(hardware, index)
    if index == hardware.device_index or name == hardware.name:
        capability, served = hardware.compute_capability, hardware.torch_supports_device
    else:
        capability, served = published_capability(name), None
    if index < len(hardware.device_capabilities):
        capability = hardware.device_capabilities[index]
    served = supported[index] if index < len(supported) else served
    return replace(hardware, name=name, compute_capability=capability, torch_supports_device=served, architecture="")


def pair_objection(hardware: Hardware, first: int, second: int) -> Reason:
    """Why two devices may not hold one transformer each, as a sentence; `NOTHING` where they may.

    A plan is made for one kind of arithmetic, so both must have torch's kernels, the same computing type with units for
    it or without, and the same INT8 product; and how fast each is must be known, or that they are alike.
    """
    one, other = of_device(hardware, first), of_device(hardware, second)
    why = next((why for why in map(_unserved, (one, other)) if why), NOTHING)
    if not why and _kind_of_arithmetic(one) != _kind_of_arithmetic(other):
        why = reason("pair_unlike", first=_generation(one), second=_generation(other))
    if not why and one.name != other.name:
        strange = next((row.name for row in (one, other) if find_rates(row.name) is None), "")
        why = reason("pair_speed_unknown", device=strange) if strange else NOTHING
    return reason("not_paired", first=one.name, second=other.name, why=why) if why else NOTHING


def _unserved(hardware: Hardware) -> Reason:
    """Why torch computes nothing on a device."""
    if hardware.torch_supports_device is not False:
        return NOTHING
    return reason("pair_no_kernels", device=hardware.name, generation=_generation(hardware))


def _kind_of_arithmetic(hardware: Hardware) -> tuple[str, bool, bool, str]:
    """What of a device decides how a plan computes on it: its type, units for bfloat16, units for INT8, whose product.

    Units for bfloat16 beside the type, because cards before Ampere may keep it and yet have attention only in float16.
    """
    has_bfloat16 = multiplies_bfloat16(_nvidia(hardware))
    return compute_type(hardware)[0], has_bfloat16, bool(int8_units(hardware)), products(hardware)


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
        return reason(REMEDIES.get(hardware.problem_kind, REMEDIES[""])) if hardware.problem else NOTHING
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


def _nvidia(hardware: Hardware) -> Capability | None:
    """Compute capability, which AMD's torch gives, too, in numbers of its own."""
    return hardware.compute_capability if hardware.kind == "cuda" else None


def _generation(hardware: Hardware) -> str:
    """Turing (sm_75), gfx11, or the name where nothing is known."""
    if hardware.compute_capability is None:
        return hardware.name
    if hardware.kind == "rocm":
        return hardware.architecture
    major, minor = hardware.compute_capability
    mark = f"sm_{major}{minor}"
    return mark if hardware.architecture == mark else f"{hardware.architecture} ({mark})"
