"""Calibration file: statistics of every Linear's input, smoothing, fragility ranking, importance of channels.

    <branch>/<linear>/maximum     F32 (columns,)   largest magnitude of every input channel
    <branch>/<linear>/squares     F64 (columns,)   their sums of squares
    <branch>/<linear>/reach       F64 (2, 4)       early and late half: maximum, kurtoses, calls, rows
    <branch>/<linear>/exponents   I8 (columns,)    log2 of the smoothing factors, once the calibration is complete

Linears that share an input share its statistics (`smoothing.input_of`). The header's metadata say of which model shape,
from which captions and with how many steps. It holds sums, not means, so an unfinished calibration is the same file
with fewer captions in it and goes on to the same bits as an undisturbed one. 20 MB for the published model, 0.3 MB
for the miniature: made once on any machine, it can be shared and used on all.

The pass over the model that fills it is collect.py. Published recipes choose what to protect on raw prompts and on the
conditional transformer alone; here captions are what the model was trained on and both count. Left out: static
activation scales, which per-token rounding does not need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import Branch, Model
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.errors import CheckpointError
from ideogram_app.files import replacing
from ideogram_app.prepare.calibration.smoothing import Factors, column_maxima, exponents, folded, groups, input_of
from ideogram_app.prepare.calibration.statistics import InputStatistics
from ideogram_app.quantization.rows import RowReader

CALIBRATION_FORMAT = "ideogram-calibration-1"
SHARE = 17 / 279  # of a transformer's Linears the published recipe protects (it counts q, k and v as one: 17 of 211)
STATISTICS = ("maximum", "squares", "reach")
ABOUT = "calibration"  # the key of the metadata


@dataclass
class BranchStatistics:
    """Of one transformer: statistics by Linear, and the exponents of its smoothing once they are known."""

    branch: Branch
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    powers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for linear in self.branch.linears():
            if input_of(linear.name) == linear.name:
                self.inputs.setdefault(linear.name, InputStatistics(linear.columns))

    def of(self, linear: str) -> InputStatistics:
        """Statistics of a Linear's input, whoever shares it."""
        return self.inputs[input_of(linear)]

    def smooth(self, read: RowReader) -> None:
        """Compute the smoothing from the maxima gathered and the source's weights, a few rows at a time."""
        for group in groups(self.branch):
            maxima = column_maxima(group, self.branch, read)
            self.powers[group.name] = exponents(self.inputs[group.name].maximum, maxima)

    def fragility(self, halves: tuple[int, ...] = (0, 1)) -> dict[str, float]:
        """Score of every Linear, in the order of the forward pass."""
        return {linear.name: self.of(linear.name).fragility(halves) for linear in self.branch.linears()}

    def agreement(self) -> float:
        """Spearman's rank correlation of the scores in the early and the late half of the trajectory, -1 to 1."""
        from scipy.stats import spearmanr  # takes a second to import

        early, late = (list(self.fragility((half,)).values()) for half in (0, 1))
        return float(spearmanr(early, late).statistic)


@dataclass
class Calibration:
    """Both branches' statistics, and what they were gathered from."""

    model: str
    branches: tuple[BranchStatistics, BranchStatistics]  # conditional, unconditional
    settings: dict[str, str] = field(default_factory=dict)  # must agree for a calibration to be continued
    captions: int = 0  # how many are in it
    sources: dict[str, str] = field(default_factory=dict)  # the model's files -> their hashes, where known

    @classmethod
    def empty(cls, model: Model, settings: Mapping[str, str], sources: Mapping[str, str] | None = None) -> Calibration:
        """Before the first caption."""
        first, second = (BranchStatistics(branch) for branch in model.branches)
        return cls(model.name, (first, second), dict(settings), 0, dict(sources or {}))

    def scaling(self, branch: int) -> dict[str, Factors]:
        """What every tensor of a branch is multiplied by to smooth it; nothing where the calibration is unfinished."""
        return folded(self.branches[branch].branch, self.branches[branch].powers)

    def ranking(self) -> list[tuple[str, float]]:
        """Linears with their scores, the most fragile first; a name in both branches counts with its worse score.

        Guidance weighs the two velocities almost alike (7 and -6), so a layer must hold in both.
        """
        scores: dict[str, float] = {}
        for found in self.branches:
            for name, score in found.fragility().items():
                scores[name] = max(score, scores.get(name, 0.0))
        return sorted(scores.items(), key=lambda row: -row[1])

    def protected(self, packs: Callable[[str], bool], share: float = SHARE) -> tuple[str, ...]:
        """Names of the most fragile Linears among those that a recipe packs: a share of all, at least one."""
        count = max(1, round(share * sum(1 for _ in self.branches[0].branch.linears())))
        return tuple([name for name, _ in self.ranking() if packs(name)][:count])

    def save(self, path: Path) -> None:
        """Write the file, in one rename."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, found in zip(BRANCHES, self.branches, strict=True):
            for linear, statistics in found.inputs.items():
                tensors |= {f"{name}/{linear}/{part}": getattr(statistics, part) for part in STATISTICS}
            tensors |= {f"{name}/{linear}/exponents": powers for linear, powers in found.powers.items()}
        about = {
            "format": CALIBRATION_FORMAT,
            "model": self.model,
            "branches": [asdict(found.branch) for found in self.branches],
            "settings": self.settings,
            "captions": self.captions,
            "sources": self.sources,
        }
        metadata = {ABOUT: json.dumps(about, sort_keys=True)}  # one key: safetensors writes several in any order
        with replacing(path) as draft:
            save_file(tensors, draft, metadata)


def read_calibration(path: Path, model: Model) -> Calibration:
    """Read a calibration; CheckpointError: missing, damaged, of another format, or of a model of another shape."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            _check(path, about, model)
            calibration = Calibration.empty(model, about["settings"], about["sources"])
            calibration.captions = int(about["captions"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError, ValueError, KeyError) as problem:
        raise CheckpointError(
            f"{path} cannot be read as a calibration", got=str(problem), do="Calibrate again, or name another file"
        ) from problem
    for name, found in zip(BRANCHES, calibration.branches, strict=True):
        _fill(path, f"{name}/", found, tensors)
    if tensors:
        raise CheckpointError(f"{path} holds {len(tensors)} unknown tensors", got=f"first {min(tensors)}")
    return calibration


def _check(path: Path, about: Mapping[str, Any], model: Model) -> None:
    if about.get("format") != CALIBRATION_FORMAT:
        got = str(about.get("format", "no format"))
        raise CheckpointError(f"{path} is no calibration of this version", expected=CALIBRATION_FORMAT, got=got)
    shapes = [asdict(branch) for branch in model.branches]
    if about["branches"] != shapes:
        raise CheckpointError(
            f"{path} is a calibration of another model",
            expected=f"{model.title}: {json.dumps(shapes[0])}",
            got=f"{about['model']}: {json.dumps(about['branches'][0])}",
        )


def _fill(path: Path, prefix: str, found: BranchStatistics, tensors: dict[str, Tensor]) -> None:
    """Take a branch's tensors out of `tensors`."""
    for linear, statistics in found.inputs.items():
        for part in STATISTICS:
            setattr(statistics, part, _take(path, f"{prefix}{linear}/{part}", getattr(statistics, part), tensors))
    for group in groups(found.branch):
        name = f"{prefix}{group.name}/exponents"
        if name in tensors:
            columns = found.inputs[group.name].columns
            found.powers[group.name] = _take(path, name, torch.empty(columns, dtype=torch.int8), tensors)


def _take(path: Path, name: str, like: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise CheckpointError(
            f"Tensor {name} of {path} does not fit",
            expected=f"{like.dtype} {tuple(like.shape)}",
            got="nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
        )
    return tensor
