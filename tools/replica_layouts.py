"""What `make_replica.py` can write: one row for every way in which Ideogram 4 is published.

A row names the row of `ideogram_app.checkpoints.published.layouts.LAYOUTS` by which readers know it, and adds what a
header does not fix: attention fused or split, file names (those of the row of catalog/sources.py where
there is one), which Linears are packed and as what, the type of everything else, and quirks of the index and the
metadata. File names, prefixes and the types of what GGUF files do not pack follow what the publishers' pages and other
readers say; where those are silent, the rows differ from each other on purpose, so that our readers meet every
variation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ideogram_app.catalog.sources import BRANCHES, SOURCES
from tools import replica_parts as parts
from tools.replica_parts import Pack

Packs = Callable[[str], bool]  # name of a Linear -> whether it is packed


def _every(name: str) -> bool:
    return True


def _blocks(name: str) -> bool:
    return name.startswith("layers.")


def _smoothed(name: str) -> bool:
    """All but 16 feed_forward.w2 and the output of the time embedding, Transformer Lab's 17 of a branch; which 16 they
    are is not published, here they are the first."""
    pieces = name.split(".")
    return name != "t_embedding.mlp_out" and not (name.endswith("feed_forward.w2") and int(pieces[1]) < 16)


@dataclass(frozen=True)
class Replica:
    """One published layout, as it is written.

    Attributes:
        name: what `--layout` takes.
        layout: the row of `layouts.LAYOUTS` that readers find in it.
        fused: attention as `qkv` and `o`.
        pack: how a Linear is packed; None leaves it dense.
        packs: which Linears are.
        dense: type of everything that is not packed.
        repository: of the row of catalog/sources.py whose files it has; "" for a diffusers pipeline that no
            row describes.
        prefixes: before the names of either transformer's tensors.
        metadata: of either transformer's file.
        indexed: an index file lists the weights, even where it is a single file.
        shards: files of a transformer.
        config: added to the transformers' config.json.
    """

    name: str
    layout: str
    fused: bool
    pack: Pack | None = None
    packs: Packs = _every
    dense: str = "BF16"
    repository: str = ""
    prefixes: tuple[str, str] = ("", "")
    metadata: tuple[dict[str, str], dict[str, str]] = ({"format": "pt"}, {"format": "pt"})
    indexed: bool = False
    shards: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, str]:
        """Of either transformer inside the repository: folders of a pipeline, or files."""
        rows = (row for row in SOURCES if (row.repository, row.layout) == (self.repository, self.layout))
        row = next(rows, None)
        return row.branches if row else BRANCHES

    @property
    def is_pipeline(self) -> bool:
        return self.files == BRANCHES

    @property
    def is_gguf(self) -> bool:
        return self.files[0].endswith(".gguf")


def _bitsandbytes(nested: bool) -> dict[str, Any]:
    settings = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16"}
    settings |= {"bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    return {"quantization_config": {**settings, "quant_method": "bitsandbytes"}}


_TELLING = ({"model_type": "ideogram4_cond"}, {"model_type": "ideogram4_uncond"})
_COMFY, _LAB = "Comfy-Org/Ideogram-4", "transformerlab/ideogram-4-"

REPLICAS: dict[str, Replica] = {
    replica.name: replica
    for replica in (
        Replica("dense-split", "dense", fused=False, indexed=True, shards=2),
        Replica("dense-fused", "dense", fused=True),
        Replica("fp8-fused", "fp8", fused=True, pack=parts.fp8, indexed=True, repository="ideogram-ai/ideogram-4-fp8"),
        Replica("fp8-split", "fp8", fused=False, pack=parts.fp8),
        Replica("nf4-fused", "nf4", fused=True, pack=parts.nf4, repository="ideogram-ai/ideogram-4-nf4"),
        Replica("nf4-split", "nf4", fused=False, pack=parts.nested_nf4, config=_bitsandbytes(True)),
        Replica("comfy-fp8", "comfy-fp8", fused=True, pack=parts.comfy_fp8, repository=_COMFY, metadata=_TELLING),
        Replica(
            *("comfy-int8", "comfy-int8", True, parts.comfy_int8, _blocks),
            repository=_COMFY,
            metadata=({}, {}),
        ),
        Replica("gguf-leejet", "gguf", True, parts.ggml("Q4_0"), _blocks, "F16", "leejet/ideogram-4-GGUF"),
        Replica("gguf-molbal", "gguf", True, parts.ggml("Q4_0"), _blocks, "BF16", "molbal/ideogram-4-gguf"),
        Replica("gguf-rectangleworm", "gguf", True, parts.ggml("Q4_K"), _every, "F32", "rectangleworm/ideogram-4-gguf"),
        Replica(
            *("gguf-stduhpf", "gguf", True, parts.ggml("Q8_0"), _blocks, "F16", "stduhpf/ideogram-4-gguf"),
            prefixes=("model.diffusion_model.", "model.diffusion_model."),
        ),
        Replica(
            *("transformerlab-gguf-q4_k", "transformerlab-gguf", True, parts.ggml("Q4_K"), _every, "F16"),
            repository=f"{_LAB}gguf-q4_k",
            prefixes=("cond.", "uncond."),
        ),
        Replica(
            *("transformerlab-gguf-q8_0", "transformerlab-gguf", True, parts.ggml("Q8_0"), _every, "F16"),
            repository=f"{_LAB}gguf-q8_0",
            prefixes=("cond.", "uncond."),
        ),
        Replica(
            *("transformerlab-int8", "transformerlab-int8", True, parts.smoothed_int8, _smoothed, "BF16"),
            repository=f"{_LAB}int8-w8a8",
            prefixes=("conditional.", "unconditional."),
            metadata=({}, {}),
        ),
    )
}
