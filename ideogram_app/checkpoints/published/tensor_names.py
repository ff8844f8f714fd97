"""Names of tensors in published files, parsed and translated: prefixes, suffixes, Ideogram's and diffusers' names.

    unconditional.layers.3.attention.qkv.ws
    [branch      ][weight layers.3.attention.qkv.weight][role: scale]

Published files differ in three ways that these tables undo: a prefix for both transformers in one file or for ComfyUI,
a suffix for every tensor that a packed weight needs beside it, and attention as one matrix, as Ideogram has it (`qkv`,
rows in thirds, and `o`), or in three, as diffusers has it (`to_q`, `to_k`, `to_v`, `to_out.0`).

From file to layer q, k and v are one matrix, under the official names. Diffusers' names are those of its reference
model, and so of the Linears of `models.Branch`, of protected lists and of a calibration's statistics. Left out: names
of the text encoder and the VAE, which are the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
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
# Ideogram's name of a matrix -> diffusers' of those that its rows are, the first on top. All else is called alike.
FUSED: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.o": ("attention.to_out.0",),
}


@dataclass(frozen=True)
class Name:
    """One stored name, parsed.

    Attributes:
        branch: 0 conditional, 1 unconditional, None where the name does not say.
        base: the tensor it belongs to, as the file spells it, without prefix.
        role: `WEIGHT` for that tensor itself, else a value of `ROLES`.
    """

    branch: int | None
    base: str
    role: str


def parse(stored: str) -> Name:
    """A stored name in its parts; one of no known pattern is a tensor of its own."""
    branch = None
    for prefix, says in PREFIXES.items():
        if stored.startswith(prefix):
            branch, stored = says, stored.removeprefix(prefix)
            break
    for suffix, role in ROLES.items():
        if stored.endswith(suffix):
            return Name(branch, f"{stored.removesuffix(suffix)}.weight", role)
    return Name(branch, stored, WEIGHT)


def diffusers_names(official: str) -> tuple[str, ...]:
    """Diffusers' names of a tensor or Linear: three, from top to bottom, where it has the rows apart."""
    for whole, parts in FUSED.items():
        if f".{whole}." in f"{official}.":
            return tuple(_renamed(official, whole, part) for part in parts)
    return (official,)


def official_place(name: str) -> tuple[str, int]:
    """The official name of diffusers' tensor or Linear, and which of its equal parts it is, from 0."""
    for whole, parts in FUSED.items():
        for index, part in enumerate(parts):
            if f".{part}." in f"{name}.":
                return _renamed(name, part, whole), index
    return name, 0


def official_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by official names, from those by diffusers' (`Component.shapes`), in order."""
    found = {}
    for name, (rows, *columns) in shapes.items():
        official, part = official_place(name)
        if part == 0:
            found[official] = (len(diffusers_names(official)) * rows, *columns)
    return found


def _renamed(name: str, old: str, new: str) -> str:
    return f"{name}.".replace(f".{old}.", f".{new}.").removesuffix(".")


def rows_of_parts(rows: slice, height: int, count: int) -> list[tuple[int, slice]]:
    """Rows of a matrix that is stored in `count` parts of `height` rows: number of a part, and which of its rows."""
    if rows.start >= rows.stop:
        return [(0, slice(0, 0))]
    found = []
    for part in range(rows.start // height, min(count, -(-rows.stop // height))):
        above = part * height
        found.append((part, slice(max(0, rows.start - above), min(height, rows.stop - above))))
    return found
