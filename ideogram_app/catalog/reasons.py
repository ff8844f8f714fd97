"""Reasons: one table of every sentence of a plan, and of what is offered when memory ran out; code -> text.

    reason("resident", title="GGUF Q4_K", weights=9_800_000_000, free=15_600_000_000)
    Reason("resident", "GGUF Q4_K keeps both transformers (9.8 GB) in the 15.6 GB that are free.", {"weights": ...})

Code that decides names a row of `SENTENCES` and hands over its numbers; how that is said stands here and nowhere else.
A sentence may hold another one in a field, and may be followed by another (`+`): the code then names all of their rows
in reading order, `not_taken+too_slow_from_ram`. What is made is a `Reason`, on the wire its text.

Left out: translations, and the sentences of what is not planned: of running out of memory (planning/oom.py), of the
stages of a first run (studio/setup_stages.py).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ideogram_app.text import gb, in_seconds

_PAIR = (
    "{title}: the conditional transformer ({first_weights:gb}) has device {first} ({first_free:gb} free), the "
    "unconditional one ({second_weights:gb}) device {second} ({second_free:gb} free), and a step takes the longer of "
    "the two"
)
_TRAVELS = "{title} keeps {kept:gb} of {weights:gb} on the device and brings {moved:gb} in every step"
_BLOCKS = "{count} of {blocks} blocks through {slots} places{pair}: {copies}"
_SLOWER = (
    "in every step it would take {seconds:time}, {times:.1f} times as long as {title} ({best:time}); at most "
    "{accepted} times are accepted."
)
# Code -> sentence. {name:gb} is a size, {name:time} a duration; a field without a format is a word, a count or another
# reason. Clauses that stand inside other sentences begin with a small letter.
SENTENCES: dict[str, str] = {
    # The computing type.
    "computes_float32": "Computes in float32: what every processor does exactly.",
    "computes_bfloat16_turing": (
        "Stores bfloat16 between matrices and computes attention in float16: {generation} has no bfloat16 units, and "
        "what this model makes between matrices may be larger than float16 holds."
    ),
    "computes_float32_old": (
        "Computes in float32: {generation} has no bfloat16 units, and what this model makes between matrices may be "
        "larger than float16 holds."
    ),
    "computes_float32_turing": (
        "Computes in float32: the {device} is Turing without tensor cores, and its float16 gives wrong numbers."
    ),
    "computes_bfloat16": "Computes in bfloat16, the checkpoint's own type.",
    # Why INT8 products gain nothing on a device.
    "int8_apple": "Apple GPUs have no INT8 matrix products in PyTorch, and Q4_K is the smaller.",
    "int8_intel": ("the INT8 kernels here are made for NVIDIA and AMD, not for Intel GPUs, and Q4_K is the smaller."),
    "int8_rdna_2": "RDNA 2 has no matrix units.",
    "int8_gtx_16": "GTX 16 cards are Turing without tensor cores, so INT8 has no units to run on.",
    "int8_no_tensor_cores": "The {device} is Turing without tensor cores, so INT8 has no units to run on.",
    "int8_before_turing": "{generation} has no INT8 matrix units (they begin with Turing, sm_75).",
    "int8_untried": "no INT8 kernels of this program have been tried on {kind} devices.",
    "int8_asked": "INT8 was asked for by name, but {units}",
    # How matrices are multiplied.
    "q4_k_to_int8": ("Q4_K is decoded to INT8 one matrix at a time and multiplied on INT8 units, activations rotated."),
    "q4_k_to_dense": "Q4_K is decoded to the computing type at every use: {why}",
    "int8_of_pytorch": (
        "INT8 products are PyTorch's own: Triton compiles none for Turing. All that stands between them is fused."
    ),
    "no_triton": "Kernels are PyTorch's own, which are slower. {problem}",
    # What rules the published model out, or moves the miniature.
    "problem": "{problem}",
    "no_gpu": (
        "No GPU to compute on. A step is {trillions:.0f} trillion operations: about {minutes:.0f} minutes on a fast "
        "processor, and a picture takes 12 to 48 of them."
    ),
    "no_kernels": "The installed {torch} has no kernels for the {device}, {generation}.",
    "on_processor_instead": "Runs on the processor: the installed PyTorch has no kernels for the {device}.",
    # Which PyTorch to install.
    "torch_for_cuda": "Install a PyTorch built for CUDA and a driver to match it.",
    "free_for_context": "Close the programs that hold the card's memory, a game or another image program.",
    "leave_exclusive": (
        "End the program that has it, or let several share it (nvidia-smi -c DEFAULT, as administrator)."
    ),
    "show_device": "Unset CUDA_VISIBLE_DEVICES, or set it to the number of a card, such as 0.",
    "restart_driver": "Start the machine again, or install its graphics driver anew.",
    "newer_driver": "Install a newer NVIDIA driver.",
    "newer_driver_or_wheel": (
        "Install a newer NVIDIA driver, or take the PyTorch that runs with this one: python launch.py --torch cu126."
    ),
    "torch_for_device": "Install a PyTorch built for this device.",
    "torch_cuda_12_6": "Install a PyTorch built for CUDA 12.6: CUDA 13 no longer serves cards before Turing.",
    "torch_cuda_12_8": "Install a PyTorch built for CUDA 12.8 or newer, the first to know Blackwell.",
    "torch_newer": "Install a newer PyTorch built for CUDA.",
    # Where the transformers live.
    "resident": "{title} keeps both transformers ({weights:gb}) in the {free:gb} that are free.",
    "resident_pair": f"{_PAIR}.",
    "resident_pair_timed": f"{_PAIR}, {{seconds:time}}, and not their sum, {{alone:time}}.",
    "on_processor": "{title}: both transformers ({weights:gb}) live in RAM and run on the processor.",
    "streamed": f"{_TRAVELS} from locked RAM, {_BLOCKS}",
    "from_disk": f"{_TRAVELS} from disk, {_BLOCKS}",
    "blocks_of_pair": " a device ({first} of the conditional transformer)",
    "copies_unknown": "at least {copying:time} a step.",
    "copies_hidden": "{copying:time} of copying, hidden behind {computing:time} of computing.",
    "copies_waited_for": (
        "{copying:time} of copying, of which {waits:time} do not hide behind {computing:time} of computing."
    ),
    "ram_is_shared": "They are read there because the GPU shares the RAM.",
    "ram_lacks": "They are read there because RAM lacks {missing:gb} to hold them.",
    "disk_assumed": "The disk is taken to read {gigabytes:.0f} GB/s.",
    # Homes that have no room.
    "disk_lacks": (
        "The disk lacks {missing:gb}: the download ({download:gb}) and the files made from it need {needed:gb} with a "
        "tenth to spare, {free:gb} are free."
    ),
    "no_ram_for_processor": "RAM lacks {missing:gb} for the {model} on the processor.",
    "no_ram_to_load": "{title} lacks {missing:gb} of free RAM to load even one matrix at a time.",
    "no_ram_to_stream": "RAM lacks {missing:gb} for the {moved:gb} of {title} that would travel from it.",
    "windows_locks_half": "Windows locks about half of the RAM.",
    "no_gain_from_ram": "{title} gains nothing from blocks that wait in RAM: the GPU shares it.",
    "no_room_for_both": (
        "{title} needs {needed:gb} of device memory for both transformers to stay; {free:gb} are free."
    ),
    "no_room_for_one": (
        "{title} needs {needed:gb} of device memory for the {branch} transformer to stay; {free:gb} are free."
    ),
    "no_room_streamed": (
        "{title} needs {needed:gb} of device memory even when all of its blocks travel; {free:gb} are free."
    ),
    # One device, or two.
    "pair_slower": "One device for each transformer would take {seconds:time} a step, not {best:time}.",
    "pair_streams_more": ("One device for each transformer would let {moved:gb} travel in every step, not {best:gb}."),
    "alone_slower": (
        "On one device both transformers would take, one after the other, {seconds:time} a step, not {best:time}."
    ),
    "alone_in_turn": (
        "On one device both transformers would compute one after the other; on two a step takes the longer one."
    ),
    "not_paired": "The {first} and the {second} do not share the work: {why}",
    "pair_no_kernels": "the installed PyTorch has no kernels for the {device}, {generation}.",
    "pair_unlike": "{first} and {second} compute in different types or by different kernels.",
    "pair_speed_unknown": "nobody has published how fast the {device} draws.",
    # One recipe, or another.
    "not_taken": "Not {title}: {why}",
    "disk_unmeasured": (
        "RAM lacks {missing:gb} to stream it; from disk {moved:gb} would be read in every step, and how fast is not "
        "measured."
    ),
    "too_slow_from_disk": f"with {{moved:gb}} read from disk {_SLOWER}",
    "too_slow_from_ram": f"with {{moved:gb}} brought from RAM {_SLOWER}",
    "too_much_travels": (
        "{moved:gb} of its {weights:gb} find no room in the {free:gb} that are free, and {share:.0%} on the road are "
        "too many while nobody knows how long a step takes on this device (at most {accepted:.0%})."
    ),
    "closer_with_room": ("It would save {saved:gb}, but {title} is closer to the reference and has room."),
    "closer_in_time": (
        "It would save {saved:gb} and take {best:time} a step, but {title} is closer to the reference and takes "
        "{seconds:time}: {times:.2f} times as long, and {accepted} are accepted."
    ),
    # What surrounds the steps.
    "encoder_resident": "The text encoder ({encoder:gb}) stays beside them.",
    "encoder_staged": "The text encoder ({encoder:gb}) is on the device only while it reads the prompt.",
    "encoder_streamed": "The text encoder ({encoder:gb}) passes through the device layer by layer, once a prompt.",
    "decoded_in_tiles": (
        "Decoding {width} x {height} at once takes {whole:gb} beside them, so it is done in tiles of {side} pixels."
    ),
    "peak": "At its fullest, {total:gb} of device memory: {parts}.",
    "locked": "{locked:gb} of RAM are locked for copies.",
    # What was asked for, or is known of the machine.
    "reserve": "{reserve:gb} of free device memory are left to other programs, as asked.",
    "limit": "No more than {limit:gb} of device memory are planned with, as asked.",
    "kept_within": (
        "PyTorch is kept within {limit:gb}: beyond them this driver would go on in RAM, many times slower, unnoticed."
    ),
    "caption": "Planned for a caption of {tokens} tokens; the longest has {longest}.",
    "measured": "Measured on this machine, and counted with: {rates}.",
    "learned": "The time of a step is predicted from that of earlier pictures on this machine.",
    "laptop": "Laptop parts of one name differ by their power limits; the time is that of the slowest of them.",
    "reference_fits": "The reference ({weights:gb}) would fit too: --recipe reference.",
    "int8_gains_little": ("INT8 products are only {times:.0f} times as fast as bfloat16 here: INT8 gains little time."),
    "device_users": "Device memory is also held by {users}.",
    # What would help.
    "free_disk": "Free that much disk space, or put the weights on another disk.",
    "free_ram": "Close other programs to free RAM.",
    "free_device": "Close other programs that use the device, or draw a smaller picture.",
    "use_miniature": (
        "Use the miniature (--model miniature), a small model of the same build that runs on any machine."
    ),
    "unasked": "Without a recipe asked for, {title} would be taken ({residency}).",
    "more_ram_spares_disk": "More free RAM would spare the disk; smaller pictures need less of both.",
    "more_ram_streams": "With {missing:gb} more RAM free, {title} would be streamed.",
    "more_device_memory": "With {needed:gb} of device memory free, {title} would be resident.",
    # What can still be drawn when memory ran out.
    "same_picture": "The picture stays the same.",
    "tiles_blended": "Its tiles are blended where they meet.",
    "smaller_recipe": "{title} takes {weights:gb} of weights and is further from the reference.",
    "not_prepared": "It is not prepared yet: that is done first.",
    "smaller_picture": "The same shape with {share:.0%} of the pixels; another picture, from the same seed.",
    "less_memory": "Expected: {peak:gb} of {memory}, {saved:gb} less.",
    "less_memory_timed": (
        "Expected: {peak:gb} of {memory}, {saved:gb} less; {seconds:.1f} s a step instead of {before:.1f} s."
    ),
}
# Name of a number -> how it is said in a list (`measured_list`).
PEAK_PARTS = {
    "weights": "{:gb} weights and places for those that travel",
    "standing": "{:gb} prepared text, latents and the decoder",
    "activations": "{:gb} activations",
    "libraries": "{:gb} libraries and gaps between tensors",
    "context": "{:gb} the driver",
}
MEASURED_RATES = {
    "tflops_16bit": "{:.3g} teraflops in 16 bits",
    "tflops_float32": "{:.3g} teraflops in float32",
    "tops_int8": "{:.3g} INT8 teraops",
    "link": "{:.3g} GB/s from RAM",
    "disk": "{:.3g} GB/s from disk",
}


class _Formatter(string.Formatter):
    """`str.format` with sizes and durations."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec == "gb":
            return gb(value)
        return in_seconds(value) if format_spec == "time" else format(value, format_spec)


_FORMATTER = _Formatter()


@dataclass(frozen=True)
class Reason:
    """Why something was decided: a sentence, or a few that belong together. Two that read the same are equal.

    Attributes:
        code: rows of `reasons.SENTENCES`, joined by "+"; "" of a reason that was read from JSON.
        text: for people.
        numbers: what stands in the text, by the names of the table's fields: bytes and seconds, not rounded.
    """

    code: str = field(compare=False)
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        return bool(self.text)

    def __add__(self, other: Reason) -> Reason:
        """Both, one after the other; nothing to say adds nothing."""
        if not (self and other):
            return self or other
        return Reason(f"{self.code}+{other.code}", f"{self.text} {other.text}", {**self.numbers, **other.numbers})

    def capital(self) -> Reason:
        """A clause as a sentence of its own."""
        return replace(self, text=self.text[:1].upper() + self.text[1:])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Written as its text, and read from it."""
        from pydantic_core import core_schema

        as_text = core_schema.plain_serializer_function_ser_schema(str)
        return core_schema.no_info_plain_validator_function(_reason_of, serialization=as_text)


NOTHING = Reason("", "")  # nothing to say: no objection, no note, no advice


def reason(code: str, /, **facts: Any) -> Reason:
    """The sentence of a row; KeyError where there is no such row, or a field is missing.

    Args:
        facts: what its fields name: numbers, words and other reasons. Numbers that no field names are recorded as well.
    """
    parts = [fact for fact in facts.values() if isinstance(fact, Reason)]
    numbers = {name: fact for part in parts for name, fact in part.numbers.items()}
    numbers |= {name: fact for name, fact in facts.items() if isinstance(fact, int | float)}
    text = _FORMATTER.vformat(SENTENCES[code], (), facts)
    return Reason("+".join((code, *(part.code for part in parts))), text, numbers)


def measured_list(parts: Mapping[str, str], numbers: Mapping[str, float | None]) -> str:
    """Numbers in words, in the order of a table such as `PEAK_PARTS`, without those that are 0 or unknown."""
    said = [(words, numbers.get(name)) for name, words in parts.items()]
    return ", ".join(_FORMATTER.format(words, number) for words, number in said if number)


def _reason_of(value: Any) -> Reason:
    if isinstance(value, Reason):
        return value
    if isinstance(value, str):
        return Reason("", value)
    raise ValueError("a reason is a sentence")
