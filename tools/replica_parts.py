"""A Linear's weight in each published packing, and files filled with such parts piece by piece.

A random weight of 245 million numbers need not hold as many different ones: `PERIOD` rows are drawn and packed, and
repeated down the matrix when they are written, so that 18.5 GB take as long as the disk does. 61 is a prime, so neither
thirds of a fused weight nor any round number of rows look alike. Weights that are given are their own period.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ideogram_app.checkpoints.gguf import FLOATS
from ideogram_app.checkpoints.gguf import GgufTensor as GgufInfo
from ideogram_app.checkpoints.safetensors import DTYPE_NAMES, DTYPES, SafetensorsTensor, layout
from ideogram_app.quantization import fp8 as fp8_rows
from ideogram_app.quantization import int8 as int8_rows
from ideogram_app.quantization import k_quants
from ideogram_app.quantization import nf4 as nf4_blocks
from ideogram_app.quantization.rotation import GROUP, rotate

PERIOD = 61
WRITTEN_AT_ONCE = 2**25  # bytes; beyond a few MB the size no longer matters


@dataclass(frozen=True)
class Part:
    """One stored tensor: its first rows, repeated until the shape is full.

    Attributes:
        name: as it is stored; a suffix of the module's name until `named` puts that before it.
        kind: type by the name that the header of its file gives it.
        shape: as the header says it; of the weights, for block types of GGUF.
        period: its first rows as they are stored, or all of them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    period: Tensor

    def named(self, module: str) -> Part:
        return Part(module + self.name, self.kind, self.shape, self.period)

    def raw(self, size: int) -> np.ndarray:
        """`size` bytes of it from the start, at least one period."""
        raw = self.period.contiguous().flatten().view(torch.uint8).numpy()
        return np.tile(raw, max(1, -(-size // len(raw))))


Pack = Callable[[Tensor, int], list[Part]]  # weight (its first rows, columns), all its rows -> parts named by suffix


def dense(name: str, values: Tensor, shape: tuple[int, ...], kind: str) -> Part:
    """A tensor that is not packed; shape may be higher than its values, never wider."""
    return Part(name, kind, shape, values.to(FLOATS[kind]))


def fp8(weight: Tensor, rows: int) -> list[Part]:
    values, scale = fp8_rows.quantize_rows(weight)
    return [Part(".weight", "F8_E4M3", (rows, weight.shape[1]), values), Part(".weight_scale", "F32", (rows,), scale)]


def comfy_fp8(weight: Tensor, rows: int) -> list[Part]:
    """One scale for the whole matrix: with one a row the published files would be 9 MB larger than they are."""
    scale = (weight.abs().amax() / fp8_rows.LARGEST).clamp(min=fp8_rows.SMALLEST_SCALE)
    values = (weight / scale).clamp(-fp8_rows.LARGEST, fp8_rows.LARGEST).to(torch.float8_e4m3fn)
    weights = Part(".weight", "F8_E4M3", (rows, weight.shape[1]), values)
    return [weights, Part(".weight_scale", "F32", (), scale), _json(".comfy_quant", {"format": "float8_e4m3fn"})]


def comfy_int8(weight: Tensor, rows: int) -> list[Part]:
    values, scale = int8_rows.quantize_rows(rotate(weight))
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}
    shape = (rows, weight.shape[1])
    scales = Part(".weight_scale", "F32", (rows, 1), scale.unsqueeze(-1))
    return [Part(".weight", "I8", shape, values), scales, _json(".comfy_quant", note)]


def smoothed_int8(weight: Tensor, rows: int) -> list[Part]:
    """Activations divided by `smooth`, weights multiplied; with no activations at hand, weights alone decide."""
    smooth = weight.abs().amax(0).clamp(min=1e-5).rsqrt()
    values, scale = int8_rows.quantize_rows(weight * smooth)
    weights = Part(".wq", "I8", (rows, weight.shape[1]), values)
    return [weights, Part(".ws", "F32", (rows,), scale), Part(".smooth", "F32", (weight.shape[1],), smooth)]


def nf4(weight: Tensor, rows: int, nested: bool = False) -> list[Part]:
    """As bitsandbytes saves it; the blocks of the period's rows must be whole."""
    packed, absmax_of_period = nf4_blocks.encode(weight)
    count = rows * weight.shape[1]
    state = {"quant_type": "nf4", "blocksize": nf4_blocks.BLOCK, "dtype": "bfloat16", "shape": [rows, weight.shape[1]]}
    levels = Part(".weight.quant_map", "F32", (16,), torch.tensor(nf4_blocks.NF4_LEVELS))
    made = [Part(".weight", "U8", (-(-count // 2), 1), packed.unsqueeze(-1)), levels]
    blocks = -(-count // nf4_blocks.BLOCK)
    absmax = Part(".weight.absmax", "F32", (blocks,), absmax_of_period)
    if nested:
        whole = torch.from_numpy(absmax.raw(4 * blocks)[: 4 * blocks].view(np.float32))
        scales = nest(whole)
        assert scales.nested_absmax is not None and scales.nested_levels is not None
        absmax = Part(".weight.absmax", "U8", (blocks,), scales.absmax)
        made.append(Part(".weight.nested_absmax", "F32", tuple(scales.nested_absmax.shape), scales.nested_absmax))
        made.append(Part(".weight.nested_quant_map", "F32", (256,), scales.nested_levels))
        state |= {"nested_blocksize": scales.nested_block, "nested_dtype": "float32", "nested_offset": scales.offset}
    return [*made, absmax, _json(".weight.quant_state.bitsandbytes__nf4", state)]


def nest(absmax: Tensor) -> nf4_blocks.Scales:
    """Quantize scales themselves: float32 (blocks,) to a byte each, less their mean, scaled in runs of 256."""
    offset, run = absmax.mean(), nf4_blocks.NESTED_BLOCK
    runs = ceil(absmax.numel() / run)
    centred = torch.nn.functional.pad(absmax - offset, (0, runs * run - absmax.numel())).view(runs, run)
    largest = centred.abs().amax(-1)
    unit = (centred / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).flatten()[: absmax.numel()]
    levels = nested_levels()
    codes = torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return nf4_blocks.Scales(codes, largest, levels, run, float(offset))


def nested_levels() -> Tensor:
    """The 256 levels of nested scales, ascending: 1, 2, 4 ... 64 of either sign for each decade to 1, and 0 and 1."""
    positive = []
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6))
    halves = torch.cat(positive)
    return torch.cat([halves, -halves, torch.tensor([0.0, 1.0])]).sort().values


def nested_nf4(weight: Tensor, rows: int) -> list[Part]:
    return nf4(weight, rows, nested=True)


def ggml(kind: str) -> Pack:
    """Blocks of one GGML type; rows that are no whole number of them fall back to Q8_0, then to F16."""

    def pack(weight: Tensor, rows: int) -> list[Part]:
        columns = weight.shape[1]
        chosen = next(one for one in (kind, "Q8_0", "F16") if one == "F16" or columns % _block(one) == 0)
        if chosen == "F16":
            packed = weight.half()
        elif chosen in k_quants.FORMATS:
            packed = k_quants.encode(weight, chosen)
        else:
            packed = torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[chosen]))
        return [Part(".weight", chosen, (rows, columns), packed)]

    return pack


def write_safetensors(path: Path, parts: Sequence[Part], metadata: Mapping[str, str]) -> int:
    """A file of these parts, in the order that safetensors gives them; says how many bytes its tensors have."""
    by_name = {part.name: part for part in parts}
    header, placed = layout([SafetensorsTensor(part.name, part.kind, part.shape) for part in parts], metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        for info in sorted(placed.values(), key=lambda info: info.start):
            part, left = by_name[info.name], info.size
            assert part.period.dtype == DTYPES[part.kind], (
                f"{part.name} is {DTYPE_NAMES[part.period.dtype]}, not {part.kind}"
            )
            chunk = part.raw(min(left, WRITTEN_AT_ONCE))
            while left > 0:
                left -= file.write(chunk[:left].data)
    return sum(info.size for info in placed.values())


def write_gguf(path: Path, parts: Sequence[Part]) -> None:
    """A GGUF file of these parts without any metadata, as the published ones are; the largest tensor is in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    infos = [GgufInfo(part.name, part.shape, part.kind) for part in parts]
    writer = gguf.GGUFWriter(path, arch="")  # any other architecture would be written as metadata
    for info in infos:
        kind = gguf.GGMLQuantizationType[info.dtype]
        writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), info.byte_count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for info, part in zip(infos, parts, strict=True):
        writer.write_tensor_data(part.raw(info.byte_count)[: info.byte_count])
    writer.close()


def _block(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def _json(name: str, value: object) -> Part:
    """JSON as a row of bytes, the form in which both ComfyUI and bitsandbytes store it."""
    raw = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
    return Part(name, "U8", (raw.numel(),), raw)
