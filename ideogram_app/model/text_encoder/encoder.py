"""Loading the text encoder from published or prepared files, quantized matrix by matrix.

    encoder = encoder_from_source(TextEncoderCheckpoint(path), recipe, device, dtype)      packed while it is read
    encoder = encoder_from_file(PackedFile(...), config, device, dtype)          prepared before
    features = encode(tokenizer, encoder, caption)                                 features.py

The layers are those of qwen.py; dense features equal those of transformers' model to the last bit. Packed matrices
become the layer of their storage; the embedding table looks up packed rows and decodes those alone. Rows are read and
packed in runs, so that beside the encoder itself only one run is in memory.

transformers' loaders quantize after a whole model was read, or need a library for each format. Left out: writing
prepared files (prepare/transformers.py) and generating text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ideogram_app.catalog.models import Linear
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import EMBEDDING_TABLE, TextEncoder, block_type
from ideogram_app.checkpoints.prefetch import prefetched
from ideogram_app.checkpoints.prepared.packed_file import PackedFile, PackedWeight
from ideogram_app.checkpoints.span import without
from ideogram_app.errors import CheckpointError
from ideogram_app.kernels import dense as products
from ideogram_app.model.fill import finished, put
from ideogram_app.model.text_encoder.qwen import text_model
from ideogram_app.model.transformer.layers import GgufLinear, PackedLinear
from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rows import dequantize_rows, row_runs

PACKING_CHUNK = 2**25  # weights read at once: 128 MB in float32; the published table is 19 such runs
LANGUAGE = "language_model."
Builder = Callable[[Mapping[str, Any]], nn.Module]


class EncoderWeights(Protocol):
    """What an encoder can be filled from: `TextEncoderCheckpoint`, or random numbers of a benchmark."""

    encoder: TextEncoder
    config: dict[str, Any]

    def tensor(self, name: str, rows: slice | None = None) -> Tensor: ...  # in any floating type


class CaptionEncoder(nn.Module):
    """`language_model` as in transformers' `Qwen3VLModel`, and nothing beside it."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model


class Int8WeightLinear(PackedLinear):
    """`weight` int8 (rows, columns) with one float32 `scale` a row; the input is not rounded."""

    weight: Tensor
    scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        rows, columns = values.shape
        super().__init__(rows, columns, bias, weight=values, scale=scale.float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        return products.linear(x, dequantize_rows(self.weight, self.scale, x.dtype), self.bias)


class PackedEmbedding(PackedLinear):
    """An embedding table in INT8 or GGUF blocks; a lookup decodes the rows it asks for, to a computing type."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, packed: PackedWeight, columns: int, dtype: torch.dtype) -> None:
        super().__init__(packed.values.shape[0], columns, None, weight=packed.values, scale=packed.scale)
        self.storage, self.gguf_type, self.dtype = packed.storage, packed.gguf_type, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(..., n) whole numbers -> (..., n, columns)."""
        flat = ids.flatten()
        scale = None if self.scale is None else self.scale[flat]
        rows = PackedWeight(self.storage, self.weight[flat], scale, self.gguf_type).decoded()
        return rows.to(self.dtype).view(*ids.shape, -1)


def encoder_from_source(
    source: EncoderWeights, recipe: Recipe, device: torch.device | str, dtype: torch.dtype, build: Builder = text_model
) -> CaptionEncoder:
    """An encoder whose matrices are packed while they are read.

    Args:
        recipe: a row of `ENCODER_RECIPES`.
        dtype: the computing type, that of everything that is not packed.
        build: makes the module that a config describes, parameters on the meta device.

    Raises:
        CheckpointError: the source is damaged, or weights are not finite.
    """
    packed = {linear.name for linear in source.encoder.linears() if recipe.packs(linear.name)}

    def dense(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        for rows in row_runs(shape, PACKING_CHUNK):
            values[rows] = source.tensor(name, rows).to(device=device, dtype=dtype)
        return values

    def weight(linear: Linear) -> PackedWeight:
        whole: PackedWeight | None = None
        for rows in row_runs((linear.rows, linear.columns), PACKING_CHUNK):
            part = _pack(recipe, linear, source.tensor(f"{linear.name}.weight", rows).to(device))
            if whole is None:
                values = part.values.new_empty(linear.rows, part.values.shape[1])
                scale = None if part.scale is None else part.scale.new_empty(linear.rows)
                whole = PackedWeight(part.storage, values, scale, part.gguf_type)
            whole.values[rows] = part.values
            if whole.scale is not None and part.scale is not None:
                whole.scale[rows] = part.scale
        assert whole is not None
        return whole

    empty = build(source.config)
    return _filled(empty, source.encoder, packed, dense, weight, torch.device(device), dtype)


def encoder_from_file(
    file: PackedFile,
    encoder: TextEncoder,
    config: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
    build: Builder = text_model,
    offloaded: frozenset[str] = frozenset(),
) -> CaptionEncoder:
    """An encoder from a prepared file and the config.json beside it; dtype and build as for `encoder_from_source`.

    Matrices that are `offloaded` are left on the meta device, unread but for their scales.

    Raises:
        CheckpointError: damaged.
    """
    packed = [linear.name for linear in encoder.linears() if linear.name in file.packed]
    dense = [name for name in encoder.shapes() if name.rpartition(".")[0] not in file.packed]
    names = [name for name in (*packed, *dense) if name.removesuffix(".weight") not in offloaded]

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        read = file.tensor(name)
        return read.to(dtype) if read.is_meta else read.to(device=device, dtype=dtype)

    def weight(linear: Linear) -> PackedWeight:
        read = file.weight(linear.name)
        return read if linear.name in offloaded else read.to(device)

    # `names` are in the order in which `_filled` asks for them.
    with prefetched([span for name in names for span in file.spans(name)], device) as reader:
        file = file.read_with(without({span for name in offloaded for span in file.weight_spans(name)}, reader))
        return _filled(build(config), encoder, file.packed, tensor, weight, torch.device(device), dtype, offloaded)


def _filled(
    empty: nn.Module,
    encoder: TextEncoder,
    packed: set[str],
    dense: Callable[[str, tuple[int, ...]], Tensor],
    weight: Callable[[Linear], PackedWeight],
    device: torch.device,
    dtype: torch.dtype,
    offloaded: frozenset[str] = frozenset(),
) -> CaptionEncoder:
    """The text side, filled but for the offloaded matrices."""
    module = CaptionEncoder(empty)
    for linear in encoder.linears():
        if linear.name in packed:
            module.set_submodule(linear.name, _layer(linear, weight(linear), dtype))
    for name, shape in encoder.shapes().items():
        if name.rpartition(".")[0] not in packed:
            put(module, name, dense(name, shape))
    module.get_submodule(f"{LANGUAGE}rotary_emb").to(device)  # computed, never stored
    return finished(module, "A text encoder", offloaded)


def _layer(linear: Linear, weight: PackedWeight, dtype: torch.dtype) -> nn.Module:
    if linear.name == EMBEDDING_TABLE:
        return PackedEmbedding(weight, linear.columns, dtype)
    if weight.storage == "gguf":
        return GgufLinear(weight.values, weight.gguf_type, linear.rows, linear.columns)
    assert weight.scale is not None
    return Int8WeightLinear(weight.values, weight.scale)


def _pack(recipe: Recipe, linear: Linear, weight: Tensor) -> PackedWeight:
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(f"{linear.name} holds numbers that are not finite", do="Fetch the text encoder again")
    if recipe.storage == "gguf":
        kind = block_type(recipe, linear.name, linear.columns)
        return PackedWeight("gguf", k_quants.encode(weight, kind), gguf_type=kind)
    values, scale = int8.quantize_rows(weight)
    return PackedWeight("int8", values, scale)
