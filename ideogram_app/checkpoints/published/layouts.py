"""Published layouts of Ideogram 4's transformers, one table row each; component.py recognises them in files.

A row names a file for people, for the manifest and for the replicas of tools/make_replica.py. How a tensor decodes is
found for each by itself (codecs.py), and so is whether attention is fused (tensor_names.py): the same layout is
published both ways. GGUF files of different publishers have no header that would tell them apart, and need none.

Left out: nvfp4 and SDNQ files, which are refused.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        container: kind of file, safetensors or gguf.
        codec: of the Linears that are packed, a name of `codecs.CODECS`; "" for any mixture.
        noted: ComfyUI's notes stand beside packed weights, or in the metadata.
        paired: one file holds both transformers, told apart by a prefix.
        about: how a Linear is stored.
    """

    name: str
    container: str
    codec: str
    noted: bool = False
    paired: bool = False
    about: str = ""


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("dense", "safetensors", "dense", about="float32, bfloat16 or float16"),
        Layout("fp8", "safetensors", "fp8", about="float8_e4m3fn, one float32 scale a row"),
        Layout("nf4", "safetensors", "nf4", about="bitsandbytes NF4, scales plain or nested"),
        Layout("comfy-fp8", "safetensors", "fp8", noted=True, about="float8_e4m3fn, ComfyUI's notes"),
        Layout("comfy-int8", "safetensors", "int8", noted=True, about="int8 of rotated weights, ComfyUI's notes"),
        Layout("gguf", "gguf", "", about="blocks of any GGML types, one file for each transformer"),
        Layout("transformerlab-gguf", "gguf", "", paired=True, about="GGML blocks, both transformers in one file"),
        Layout(
            "transformerlab-int8", "safetensors", "int8", paired=True, about="int8 of smoothed weights, both in one"
        ),
    )
}
