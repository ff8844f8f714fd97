"""What a stored tensor's name says: which transformer it belongs to, which weight, and which part of that weight.

    unconditional.layers.3.attention.qkv.ws
    [branch      ][weight layers.3.attention.qkv.weight][role: scale]

Published files differ in three ways that these tables undo: a prefix for both transformers in one file or for ComfyUI,
a suffix for every tensor that a packed weight needs beside it, and attention fused as Ideogram has it (`qkv`, rows in
thirds, and `o`) where diffusers splits it (`to_q`, `to_k`, `to_v`, `to_out.0`). Inside the program every name is
diffusers'. Left out: names of the text encoder and the VAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# prefix -> which transformer it says: 0 conditional, 1 unconditional, None neither (ComfyUI's, for the whole model)
PREFIXES: dict[str, int | None] = {
    "model.diffusion_model.": None,
    "unconditional.": 1,  # Transformer Lab's INT8 file
    "conditional.": 0,
    "uncond.": 1,  # Transformer Lab's GGUF files
    "cond.": 0,
}
WEIGHT = "weight"
# suffix -> what it is to `<module>.weight`; any other name is itself a weight, bias or norm
ROLES: dict[str, str] = {
    ".weight_scale": "scale",
    ".weight_scale_2": "second scale",  # ComfyUI's nvfp4
    ".input_scale": "input scale",  # of activations; weights do not need it
    ".comfy_quant": "note",  # JSON: format and rotation
    ".weight.absmax": "absmax",  # bitsandbytes, from here on
    ".weight.quant_map": "levels",
    ".weight.nested_absmax": "nested absmax",
    ".weight.nested_quant_map": "nested levels",
    ".weight.quant_state.bitsandbytes__nf4": "state",  # JSON: shape, block sizes, offset
    ".wq": WEIGHT,  # Transformer Lab's INT8 file, from here on
    ".ws": "scale",
    ".smooth": "smooth",
}
FUSED = (".attention.qkv.", (".attention.to_q.", ".attention.to_k.", ".attention.to_v."))
RENAMED = (".attention.o.", ".attention.to_out.0.")


@dataclass(frozen=True)
class Name:
    """One stored name, taken apart.

    Attributes:
        branch: 0 conditional, 1 unconditional, None where the name does not say.
        base: the tensor it belongs to, as the file spells it, without prefix.
        role: `WEIGHT` for that tensor itself, else what it is to it, a value of `ROLES`.
    """

    branch: int | None
    base: str
    role: str


def parse(stored: str) -> Name:
    """Take a stored name apart; a name of no known pattern is a tensor of its own."""
    branch = None
    for prefix, says in PREFIXES.items():
        if stored.startswith(prefix):
            branch, stored = says, stored.removeprefix(prefix)
            break
    for suffix, role in ROLES.items():
        if stored.endswith(suffix):
            return Name(branch, f"{stored.removesuffix(suffix)}.weight", role)
    return Name(branch, stored, WEIGHT)


def pieces(base: str) -> Iterator[tuple[str, int | None]]:
    """diffusers' name of a tensor, or its three with the third of the rows that each is."""
    fused, parts = FUSED
    if fused not in base:
        yield base.replace(*RENAMED), None
        return
    for third, part in enumerate(parts):
        yield base.replace(fused, part), third
