"""File plan: header and offsets of every tensor of a safetensors or GGUF file, before any is computed.

    header | tensor | tensor | ...

So a file can be filled in any order, in pieces of any size, by runs that die in between (journal.py). safetensors and
gguf-py write a file only from its first byte to its last. GGUF files carry no metadata, because any value makes one
reader or another refuse; safetensors files say what diffusers, torchao or ComfyUI look for. Left out: shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ideogram_app.checkpoints.gguf import GgufTensor, aligned, gguf_header
from ideogram_app.checkpoints.safetensors import SafetensorsTensor, layout


@dataclass(frozen=True)
class Unit:
    """A matrix or vector that is packed, written and recorded in the journal as one.

    Attributes:
        tensor: its name without the suffixes of its parts.
        source: the official name of the tensor it is made of; `first`: of its rows, where a file holds it in several.
        parts: the tensors in the file, of which the first names the unit. The first `by_rows` have its rows; what
            follows does not depend on weights.
    """

    tensor: str
    source: str
    first: int
    parts: tuple[SafetensorsTensor | GgufTensor, ...]
    packed: bool
    by_rows: int = 1

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape


@dataclass(frozen=True)
class FilePlan:
    """A file without its data; `spans`: name of a tensor to its start and stop, in bytes from the file's start."""

    header: bytes
    spans: dict[str, tuple[int, int]]
    size: int


def plan_safetensors(made: Sequence[Unit], metadata: dict[str, str]) -> FilePlan:
    infos = [part for unit in made for part in unit.parts if isinstance(part, SafetensorsTensor)]
    header, placed = layout(infos, metadata)
    spans = {name: (info.start, info.stop) for name, info in placed.items()}
    return FilePlan(header, spans, max(info.stop for info in placed.values()))


def plan_gguf(made: Sequence[Unit]) -> FilePlan:
    infos = [part for unit in made for part in unit.parts if isinstance(part, GgufTensor)]
    header = gguf_header(infos)
    end = aligned(len(header))
    spans = {}
    for info in infos:
        spans[info.name] = (end, end + info.byte_count)
        end = aligned(end + info.byte_count)
    return FilePlan(header, spans, end)


def torchao_metadata(made: Sequence[Unit], dtype: torch.dtype) -> dict[str, str]:
    """What torchao's `flatten_tensor_state_dict` would say of these tensors, without having them.

    Args:
        dtype: that of dense layers, which packed ones claim to have.
    """
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    metadata = {"format": "pt", "tensor_names": json.dumps([unit.tensor for unit in made])}
    for unit in made:
        row: Any = {"_type": "Tensor"}
        if unit.packed:
            columns = unit.parts[0].shape[1]
            values, scale = torch.zeros(1, columns, dtype=torch.int8), torch.ones(1, 1)
            per_token = QuantizeTensorToInt8Kwargs(granularity=PerRow())
            row = Int8Tensor(values, scale, [1, columns], dtype, act_quant_kwargs=per_token)
        metadata[unit.tensor] = json.dumps(row, cls=TensorSubclassAttributeJSONEncoder)
    return metadata
