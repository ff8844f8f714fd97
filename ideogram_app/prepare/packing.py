"""A transformer, or the text encoder, on its way into its file, in runs of rows: read, scale, pack, write, compare.

    rows of the source -> * factors -> pack -> write behind the last rows -> read through the code that loads -> compare

A run of rows is read from the source once and checked at once, so a file costs one pass over the source and one over
itself. Memory is that of a few runs, whatever the matrix: llm_cond_proj of the published model is 4608 x 53248, 981 MB
in float32, and a run of it 16 MB. diffusers and llama.cpp hold or map a whole model to convert it.

Left out: what to scale and to protect (calibration.py decides, `Tuning` carries it), several processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ideogram_app.catalog.models import Component
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.file_plan import FilePlan, Unit
from ideogram_app.checkpoints.prepared.journal import MismatchError
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.published.tensor_names import diffusers_names, rows_of_parts
from ideogram_app.errors import CheckpointError
from ideogram_app.prepare.calibration.calibration import Calibration
from ideogram_app.prepare.calibration.smoothing import Factors, Scaling
from ideogram_app.quantization.rows import row_runs

# Weights in a run. On two cores of a Xeon INT8 rounding makes 254 M weights/s in runs of 2^22 and 131 in runs of 2^24,
# whose float32 temporaries glibc maps afresh each time; a GPU wants larger runs, and has the memory.
RUN_ON_CPU, RUN_ELSEWHERE = 2**22, 2**24
# |decoded - source| / |source| of a run of rows, as a norm, at most. Far above what any weights give (normal ones:
# 0.027, 0.01, 0.01, 0.006, 0.08) and far below what a wrong order, scale or type gives (about 1): this finds faults of
# the program or the machine; the quality of a recipe is measured on pictures. FP8 has a proof: half a step of 3 bits
# is 1/16.
LARGEST_ERROR = {
    "fp8": 0.07,
    "int8": 0.3,
    "convrot": 0.3,
    "Q8_0": 0.03,
    "Q6_K": 0.1,
    "Q5_K": 0.15,
    "Q4_K": 0.3,
}


@dataclass(frozen=True)
class Tuning:
    """What a calibration says of a model; nothing where there is none.

    Attributes:
        scaling: for each branch, what its tensors are multiplied by before they are packed, by diffusers' names.
        importance: for each branch, diffusers' name of a weight -> (columns,), for GGUF's search.
        protected: name fragments of all layers that stay unpacked, in place of the recipe's own choice.
        calibration: hash of the statistics, which manifests record; found from the rest where it is left out.
    """

    scaling: tuple[Scaling, Scaling] = ({}, {})
    importance: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {})
    protected: tuple[str, ...] | None = None
    calibration: str = ""

    @classmethod
    def of(cls, calibration: Calibration, recipe: Recipe, sha256: str) -> Tuning:
        """What of a calibration a recipe uses: nothing of it, for some.

        Args:
            sha256: of the calibration's file.
        """
        tuned = cls(
            scaling=(calibration.scaling(0), calibration.scaling(1)) if recipe.smoothed else ({}, {}),
            importance=(_moments(calibration, 0, recipe), _moments(calibration, 1, recipe)),
            protected=recipe.protecting(calibration.protected(recipe.packs)).protected if recipe.fragile else None,
        )
        return tuned if tuned == UNTUNED else replace(tuned, calibration=sha256)

    def effective(self, recipe: Recipe) -> Recipe:
        """The recipe with the protected list to use."""
        return recipe.protecting() if self.protected is None else replace(recipe, protected=self.protected)

    @property
    def identity(self) -> str:
        """Changes with anything that changes the files made; "" where nothing is tuned."""
        if self == UNTUNED:
            return ""
        digest = hashlib.sha256(f"{self.calibration} {self.protected}".encode())
        for name, tensor in self._tensors():
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that is a number, named, in one order."""
        for branch in range(len(BRANCHES)):
            for name, factors in sorted(self.scaling[branch].items()):
                for kind, tensor in (("rows", factors.rows), ("columns", factors.columns)):
                    if tensor is not None:
                        yield f"{branch} {name} {kind}", tensor
            for name, importance in sorted(self.importance[branch].items()):
                yield f"{branch} {name} importance", importance


UNTUNED = Tuning()


def _moments(calibration: Calibration, branch: int, recipe: Recipe) -> dict[str, Tensor]:
    """How much every column of the weights matters that a GGUF recipe packs; no other storage asks."""
    if recipe.storage != "gguf":
        return {}
    linears = [linear.name for linear in calibration.branches[branch].branch.linears() if recipe.packs(linear.name)]
    return {f"{name}.weight": calibration.second_moment(branch, name) for name in linears}


# Block scales of GGUF are fp16, which ends at 6e-8: 127 levels of half of that may round to nothing. Trained layers
# that were never needed hold such numbers.
VANISHING = 127 * 2**-25


class Reader(Protocol):
    """What weights are read from: `TransformerCheckpoint` or `TextEncoderCheckpoint`."""

    folder: Path
    config: dict[str, Any]
    dtypes: dict[str, torch.dtype]

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """Rows of a tensor."""


@dataclass
class Packing:
    """One transformer, or the text encoder: where it comes from, what it becomes, and how it is tuned.

    Attributes:
        name: the folder of its config.json.
        path: of the file that is filled.
    """

    name: str
    reader: Reader
    component: Component
    recipe: Recipe
    path: Path
    device: torch.device
    scaling: Scaling = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    units: list[Unit] = field(init=False)
    file_plan: FilePlan = field(init=False)

    def __post_init__(self) -> None:
        self.units = formats.units(self.recipe, self.component, self.reader.dtypes)
        shapes = self.component.shapes()
        dense = next(self.reader.dtypes[name] for name, shape in shapes.items() if len(shape) == 1)
        self._heights = {name: shape[0] for name, shape in shapes.items()}
        self.file_plan = formats.plan_file(self.recipe, self.units, dense)

    def size(self, unit: Unit) -> int:
        """Bytes of a unit in the file."""
        return sum(stop - start for start, stop in (self.file_plan.spans[part.name] for part in unit.parts))

    def weights(self, unit: Unit) -> int:
        """How many weights of a unit are packed."""
        return prod(unit.shape) if unit.packed else 0

    def runs(self, unit: Unit) -> list[slice]:
        """Rows of a unit's source, as many at a time as are worked on at once."""
        most = RUN_ON_CPU if self.device.type == "cpu" else RUN_ELSEWHERE
        return [slice(unit.first + rows.start, unit.first + rows.stop) for rows in row_runs(unit.shape, most)]

    def scaled(self, name: str, rows: slice) -> Tensor:
        """Rows of the source, multiplied as tuned, on the device.

        Raises:
            CheckpointError: some are NaN or infinite, which would spread over whole rows.
        """
        tensor = self.reader.tensor(name, rows).to(self.device)
        if self.scaling:
            tensor = self._multiplied(name, rows, tensor)
        # A sum that is finite has finite terms, and takes an eighth of the time of looking at each.
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} in {self.reader.folder} holds numbers that are not finite", do="Fetch the source again"
            )
        return tensor

    def packed(self, unit: Unit, tensor: Tensor) -> list[Tensor]:
        """What these rows of a unit become. Importance is that of columns: q, k and v read one input."""
        importance = self.importance.get(diffusers_names(unit.source)[0])
        return formats.pack(self.recipe, unit, tensor, importance)

    def compare(self, written: PackedFile, unit: Unit, rows: slice, tensor: Tensor) -> None:
        """Read rows back through the code that loads them.

        Raises:
            MismatchError: they are not the source's, or not near them where they are packed.
        """
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
            f"{name} in {self.path.name} does not match its source {self.reader.folder}",
            expected=expected,
            got=got,
            do="The unfinished files were removed; check the source and prepare it again",
        )
