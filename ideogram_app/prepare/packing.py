"""Packing of a transformer or text encoder, in runs of rows: read, scale, pack, write, compare with the source.

    rows of the source -> * factors -> pack -> write behind the last rows -> read through the code that loads -> compare

A run of rows is read from the source once and checked at once, so a file costs one pass over the source and one over
itself. Memory is that of a few runs, whatever the matrix: llm_cond_proj of the published model is 4608 x 53248, 981 MB
in float32, and a run of it 16 MB. diffusers and llama.cpp hold or map a whole model to convert it.

Left out: what to scale and to protect (calibration/tuning.py), several processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ideogram_app.catalog.models import Component
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.file_plan import FilePlan, Unit
from ideogram_app.checkpoints.prepared.journal import MismatchError
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.published.tensor_names import diffusers_names, rows_of_parts
from ideogram_app.errors import CheckpointError
from ideogram_app.prepare.calibration.smoothing import Factors, Scaling
from ideogram_app.quantization.rows import row_runs

# Weights in a run. On two cores of a Xeon INT8 rounding makes 254 M weights/s in runs of 2^22 and 131 in runs of 2^24,
# whose float32 temporaries glibc maps afresh each time; a GPU wants larger runs, and has the memory.
RUN_ON_CPU, RUN_ELSEWHERE = 2**22, 2**24
# |decoded - source| / |source| of a run of rows, as a norm, at most. Far above what any weights give (normal ones:
# 0.027, 0.01, 0.01, 0.006, 0.08) and far below what a wrong order, scale or type gives (about 1): this finds faults of
# the program or the machine; the quality of a recipe is measured on pictures. FP8 has a proof: half a step of 3 bits
# is 1/16.
LARGEST_ERROR = {"fp8": 0.07, "int8": 0.3, "convrot": 0.3, "Q8_0": 0.03, "Q6_K": 0.1, "Q5_K": 0.15, "Q4_K": 0.3}


# Block scales of GGUF are fp16, which ends at 6e-8: 127 levels of half of that may round to nothing. Trained layers
# that were never needed hold such numbers.
VANISHING = 127 * 2**-25


class WeightSource(Protocol):
    """What weights are read from: `TransformerCheckpoint` or `TextEncoderCheckpoint`."""

    folder: Path
    config: dict[str, Any]
    dtypes: dict[str, torch.dtype]

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Rows of a tensor."""


@dataclass
class Packing:
    """One transformer, or the text encoder: its source, its file, and how it is tuned."""

    name: str  # of the folder with its config.json
    source: WeightSource
    component: Component
    recipe: Recipe
    path: Path  # of the file that is filled
    device: torch.device
    scaling: Scaling = field(default_factory=dict)  # as importance, that of `Tuning`
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    units: list[Unit] = field(init=False)
    file_plan: FilePlan = field(init=False)

    def __post_init__(self) -> None:
        self.units = formats.units(self.recipe, self.component, self.source.dtypes)
        shapes = self.component.shapes()
        dense = next(self.source.dtypes[name] for name, shape in shapes.items() if len(shape) == 1)
        self._heights = {name: shape[0] for name, shape in shapes.items()}
        self.file_plan = formats.plan_file(self.recipe, self.units, dense)

    def size(self, unit: Unit) -> int:
        """Bytes of a unit in the file."""
        return sum(stop - start for start, stop in (self.file_plan.spans[part.name] for part in unit.parts))

    def runs(self, unit: Unit) -> list[slice]:
        """Rows of a unit's source, as many at a time as are worked on at once."""
        most = RUN_ON_CPU if self.device.type == "cpu" else RUN_ELSEWHERE
        return [slice(unit.first + rows.start, unit.first + rows.stop) for rows in row_runs(unit.shape, most)]

    def scaled(self, name: str, rows: slice) -> Tensor:
        """Rows of the source, multiplied as tuned, on the device; CheckpointError where some are NaN or infinite."""
        tensor = self.source.tensor(name, rows).to(self.device)
        if self.scaling:
            tensor = self._multiplied(name, rows, tensor)
        # A sum that is finite has finite terms, and takes an eighth of the time of looking at each.
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
            said = f"{name} in {self.source.folder} holds numbers that are not finite"
            raise CheckpointError(said, do="Fetch the source again")
        return tensor

    def packed(self, unit: Unit, tensor: Tensor) -> list[Tensor]:
        """What these rows of a unit become. Importance is that of columns: q, k and v read one input."""
        importance = self.importance.get(diffusers_names(unit.source)[0])
        return formats.pack(self.recipe, unit, tensor, importance)

    def compare(self, written: PackedFile, unit: Unit, rows: slice, tensor: Tensor) -> None:
        """Read rows back through the code that loads them; MismatchError where they are not (nearly) the source's."""
        name = unit.source
        got = written.values(name, rows, self.device)
        if not unit.packed:
            if not torch.equal(tensor.to(got.dtype), got):
                raise self._mismatch(name, "the source's values", "others")
            return
        expected = tensor.float()
        bound = LARGEST_ERROR[self.recipe.gguf_type or self.recipe.storage]
        error, size = float((got - expected).norm()), float(expected.norm())
        vanishing = VANISHING * expected.numel() ** 0.5 if self.recipe.storage == "gguf" else 0.0
        if not error <= bound * size + vanishing:  # NaN compares false
            raise self._mismatch(name, f"a relative error up to {bound}", f"{error / max(size, 1e-30):.2g}")

    def _multiplied(self, name: str, rows: slice, tensor: Tensor) -> Tensor:
        """Rows of a tensor times its factors, which are found and named as diffusers has it: apart for q, k and v."""
        parts = diffusers_names(name)
        cuts = rows_of_parts(rows, self._heights[parts[0]], len(parts))
        pieces = zip(cuts, tensor.split([cut.stop - cut.start for _, cut in cuts]), strict=True)
        return torch.cat([self.scaling.get(parts[i], Factors()).applied(piece, cut) for (i, cut), piece in pieces])

    def _mismatch(self, name: str, expected: str, got: str) -> MismatchError:
        return MismatchError(
            f"{name} in {self.path.name} does not match its source {self.source.folder}",
            expected=expected,
            got=got,
            do="The unfinished files were removed; check the source and prepare it again",
        )
