"""Transformers from published weights of any layout: the pair of files found, names and shapes checked, rows read.

`open_source` takes what a user has: a pipeline folder, a file that holds both transformers, two files, a folder with
the files of one published repository. `TransformerCheckpoint` is one of the two: names are translated
(tensor_names.py), tensors accounted for and read (component.py), dequantized (codecs.py), the layout recognised
(layouts.py). Everything is found in the headers, never in the names of files.

diffusers' own loader drops unknown tensors with a warning; on fused FP8 files it then draws noise. Left out: the text
encoder, the VAE, LoRA files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ideogram_app.catalog.models import Branch, Model
from ideogram_app.catalog.sources import BRANCHES, SOURCES
from ideogram_app.checkpoints.published.codecs import EncodedTensor
from ideogram_app.checkpoints.published.component import Checkpoint, Groups, group_tensors
from ideogram_app.checkpoints.published.tensor_names import WEIGHT, Name, official_shapes, parse
from ideogram_app.checkpoints.weight_files import WEIGHT_PATTERNS, WeightFile, open_weights, read_config, weight_files
from ideogram_app.errors import CheckpointError, RequestError

# ComfyUI writes which transformer a file holds into the metadata of some of its files.
MODEL_TYPES = {"ideogram4_cond": 0, "ideogram4_uncond": 1}
CONFIGURED = tuple(field.name for field in fields(Branch))


class TransformerCheckpoint(Checkpoint):
    """One transformer, whatever its layout; `config` is its config.json, or made from shapes where there is none.

    Args:
        folder: of a pipeline's transformer, or a single file.
        branch: the expected shape; None takes it as it is.
        which: 0 or 1, the transformer to take of a file that holds both.

    Raises:
        CheckpointError: no transformer, or not what `branch` asks for; it names file, tensor, expected and got.
    """

    def __init__(self, folder: Path, branch: Branch | None = None, which: int | None = None) -> None:
        files = [open_weights(path) for path in weight_files(folder)]
        said = _branches_named(files)
        if which is None and len(said) > 1:
            raise CheckpointError(f"{folder} holds both transformers", expected="one", do="Name it as the whole source")

        def translate(file: WeightFile, stored: str) -> Name | None:
            name = parse(stored)
            return name if which is None or name.branch == which else None

        groups = group_tensors(files, translate)
        self.branch, self.config = _described(folder, groups, branch)
        shapes = official_shapes(self.branch.shapes())
        super().__init__(folder, files, groups, shapes, "an Ideogram 4 transformer", paired=bool(said))

    def stored(self, linear: str) -> tuple[Tensor]:
        return (self.tensor(f"{linear}.weight"),)


@dataclass(frozen=True)
class TransformerPair:
    """Both transformers of a source, conditional first, and all their files; these lie in `folder`."""

    branches: tuple[TransformerCheckpoint, TransformerCheckpoint]
    files: tuple[Path, ...]
    folder: Path

    @property
    def layout(self) -> str:
        return self.branches[0].layout


def open_source(path: Path, unconditional: Path | None = None, expected: Model | None = None) -> TransformerPair:
    """Both transformers of what a user has.

    Args:
        path: a diffusers pipeline folder, a folder with the files of one row of `SOURCES`, a file that holds both
            transformers, or the conditional one's file or folder.
        unconditional: the other one's file or folder, where `path` is one transformer alone.
        expected: the model that they must be; None takes them as they are.

    Raises:
        CheckpointError: not readable, not this model, or it cannot be told which transformer is which.
    """
    first, second = _pair(path, unconditional)
    shapes = expected.branches if expected else (None, None)
    both = first == second
    conditional = TransformerCheckpoint(first, shapes[0], 0 if both else None)
    branches = (conditional, TransformerCheckpoint(second, shapes[1], 1 if both else None))
    if not both:
        for number, branch in enumerate(branches):
            _expect_role(branch, number)
    files = tuple(dict.fromkeys(file.path for branch in branches for file in branch.files))
    if path.is_dir() and second.is_relative_to(path):
        return TransformerPair(branches, files, path)
    shared = set(files[0].parents).intersection(*(file.parents for file in files))  # none on different drives
    deepest = max(shared, key=lambda folder: len(folder.parts), default=files[0].parent)
    return TransformerPair(branches, files, deepest)


def _pair(path: Path, unconditional: Path | None) -> tuple[Path, Path]:
    """Paths of the two transformers; twice the same where one file holds both."""
    if unconditional is not None:
        if path.resolve() == unconditional.resolve():
            raise CheckpointError("The same weights were named for both transformers", got=str(path))
        return path, unconditional
    if path.is_dir():
        return _pair_in(path)
    if len(_branches_named([open_weights(path)])) > 1:
        return path, path
    raise CheckpointError(
        f"{path} holds one transformer, and this model has two", do="Name the file of the unconditional one as well"
    )


def _pair_in(folder: Path) -> tuple[Path, Path]:
    """The two in a folder: a pipeline's, those of one published repository, or one file's."""
    pipeline = (folder / BRANCHES[0], folder / BRANCHES[1])
    if all(part.is_dir() for part in pipeline):
        return pipeline
    rows = [row for row in SOURCES if all((folder / name).is_file() for name in row.branches)]
    if len(rows) == 1:
        return folder / rows[0].branches[0], folder / rows[0].branches[1]
    files = sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern))
    if not rows and len(files) == 1:
        return _pair(files[0], None)
    raise CheckpointError(
        f"It cannot be told which files of {folder} are the transformers",
        expected=f"the folders {' and '.join(BRANCHES)}, or the files of one published repository",
        got="; ".join(" and ".join(row.branches) for row in rows)
        or ", ".join(file.name for file in files)[:200]
        or "no weights",
        do="Name the file of the conditional transformer, and that of the unconditional one",
    )


def _branches_named(files: list[WeightFile]) -> set[int]:
    """The transformers that prefixes of tensors name; none where they do not say."""
    return {which for file in files for name in file.infos if (which := parse(name).branch) is not None}


def _expect_role(branch: TransformerCheckpoint, number: int) -> None:
    """Refuse a file whose metadata says that it holds the other transformer."""
    for file in branch.files:
        says = MODEL_TYPES.get(str(file.metadata.get("model_type", "")), number)
        if says != number:
            words = ("conditional", "unconditional")
            raise CheckpointError(
                f"{file.path} was named as the {words[number]} transformer",
                got=f"the {words[says]} one, as its metadata says",
                do="Name the two the other way round",
            )


def _described(folder: Path, groups: Groups, expected: Branch | None) -> tuple[Branch, dict[str, Any]]:
    """Shape and config: from config.json where there is one, else from the shapes of a few tensors."""
    if folder.is_dir() and (folder / "config.json").exists():
        config, origin = read_config(folder), folder / "config.json"
    else:
        branch, origin = _measured(folder, groups), folder
        try:
            config = branch.config()
        except RequestError as error:
            what = f"{folder}: {error.what}"
            raise CheckpointError(what, expected=error.expected, got=error.got, do=error.do) from error
    if expected is not None:
        _expect_config(origin, config, expected)
    numbers = {field: config.get(field) for field in CONFIGURED}
    if not all(isinstance(number, int) and number > 0 for number in numbers.values()):
        raise CheckpointError(f"{origin} is no config of this model", expected=", ".join(CONFIGURED), got=str(numbers))
    return Branch(**{field: config[field] for field in CONFIGURED}), config


def _measured(folder: Path, groups: Groups) -> Branch:
    """The shape of a transformer, from four of its tensors and the number of its blocks."""
    asked = ("llm_cond_norm", "adaln_proj", "layers.0.attention.norm_q", "layers.0.feed_forward.w1")
    for name in asked:
        if WEIGHT not in groups.get(f"{name}.weight", {}):
            raise CheckpointError(
                f"{folder} holds no Ideogram 4 transformer",
                expected=f"{name}.weight",
                got=f"{len(groups)} tensors, the first {next(iter(groups), 'none')}",
            )
    text, conditioning, head, feed_forward = (EncodedTensor(groups[f"{name}.weight"]).shape for name in asked)
    blocks = {name.split(".")[1] for name in groups if name.startswith("layers.")}
    if len(conditioning) != 2 or not head or conditioning[1] % head[0]:
        raise CheckpointError(
            f"{folder} holds no Ideogram 4 transformer",
            expected="adaln_proj.weight with columns in whole heads",
            got=f"{conditioning} and heads of {head}",
        )
    return Branch(
        num_layers=len(blocks),
        attention_head_dim=head[0],
        num_attention_heads=conditioning[1] // head[0],
        intermediate_size=feed_forward[0],
        adaln_dim=conditioning[0],
        llm_features_dim=text[0],
    )


def _expect_config(path: Path, config: dict[str, Any], branch: Branch) -> None:
    """Refuse another model; the error names the first field that differs."""
    for field in CONFIGURED:
        expected, got = getattr(branch, field), config.get(field)
        if expected != got:
            raise CheckpointError(
                f"{path} describes another model", expected=f"{field} {expected}", got=str(got or "nothing")
            )
