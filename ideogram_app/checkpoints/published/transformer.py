"""A transformer's weights from any published layout, by their official names.

`open_source` takes what a user has: a pipeline folder, a file that holds both transformers, two files, a folder with
the files of one row of local.py. `SourceBranch` is one of the two: names are translated (tensor_names.py), tensors
accounted for and read (component.py), widened (codecs.py), the layout recognised (layouts.py). Everything is found in
the headers, never in the names of files.

diffusers' own loader drops unknown tensors with a warning; on fused FP8 files it then draws noise. Pickles are refused,
because opening one runs whatever it says. Left out: the text encoder, the VAE, LoRA files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ideogram_app.catalog.models import Branch, Model
from ideogram_app.catalog.sources import BRANCHES, SOURCES, Source
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.published.codecs import StoredTensor
from ideogram_app.checkpoints.published.component import Groups, PublishedComponent, WeightFile, gather
from ideogram_app.checkpoints.published.tensor_names import WEIGHT, Name, official_shapes, parse
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.errors import CheckpointError, RequestError

WEIGHT_PATTERNS = ("*.safetensors", "*.gguf")
PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
# ComfyUI writes which transformer a file holds into the metadata of some of its files.
TELLS = {"ideogram4_cond": 0, "ideogram4_uncond": 1}
CONFIGURED = tuple(field.name for field in fields(Branch))


class SourceBranch(PublishedComponent):
    """One transformer of a source, whatever its layout.

    Args:
        folder: of a pipeline's transformer, or a single file.
        branch: what it must be; None takes it as it is.
        which: 0 or 1, the transformer to take of a file that holds both.

    Attributes:
        config: its config.json; one made from the shapes where the weights come without.
        branch: its shape.

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

        groups = gather(files, translate)
        self.branch, self.config = _described(folder, groups, branch)
        shapes = official_shapes(self.branch.shapes())
        super().__init__(folder, files, groups, shapes, "an Ideogram 4 transformer", paired=bool(said))

    def stored(self, linear: str) -> tuple[Tensor]:
        """The weight of a Linear; nothing stays packed."""
        return (self.tensor(f"{linear}.weight"),)


@dataclass(frozen=True)
class SourceModel:
    """Both transformers of a source.

    Attributes:
        branches: conditional first.
        files: everything that is read, each once.
        folder: in which all of them lie, for names relative to it.
    """

    branches: tuple[SourceBranch, SourceBranch]
    files: tuple[Path, ...]
    folder: Path

    @property
    def layout(self) -> str:
        return self.branches[0].layout


def open_source(path: Path, unconditional: Path | None = None, expected: Model | None = None) -> SourceModel:
    """Both transformers of what a user has.

    Args:
        path: a diffusers pipeline folder, a folder with the files of one row of `SOURCES`, a file that holds both
            transformers, or the conditional one's file or folder.
        unconditional: the other one's file or folder, where `path` is one transformer alone.
        expected: what they must be; None takes them as they are.

    Raises:
        CheckpointError: not readable, not this model, or it cannot be told which transformer is which.
    """
    first, second = _pair(path, unconditional)
    shapes = expected.branches if expected else (None, None)
    both = first == second
    branches = (
        SourceBranch(first, shapes[0], 0 if both else None),
        SourceBranch(second, shapes[1], 1 if both else None),
    )
    if not both:
        for number, branch in enumerate(branches):
            _expect_role(branch, number)
    files = tuple(dict.fromkeys(file.path for branch in branches for file in branch.files))
    within = path if path.is_dir() and second.is_relative_to(path) else _common_folder(files)
    return SourceModel(branches, files, within)


def open_weights(path: Path) -> WeightFile:
    """A file of weights by what it begins with.

    Raises:
        CheckpointError: missing, a pickle, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}", do="Fetch or prepare it again")
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] == b"GGUF":
        return GgufFile(path)
    # torch.save writes a zip or a bare pickle. Safetensors begin with the length of their header, which fits the file.
    if start.startswith(PICKLES) and int.from_bytes(start, "little") > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a pickle, which may run any program when it is opened",
            expected="safetensors or GGUF",
            do="Take another publication of these weights",
        )
    return SafetensorsFile(path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those its index lists, else all; a file is its own.

    Raises:
        CheckpointError: none, or an index that cannot be read.
    """
    if folder.is_file():
        return [folder]
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CheckpointError(f"{indexes[0]} is no index of weights", got=str(problem)) from problem
        return sorted(folder / Path(name).name for name in names)
    files = next((found for pattern in WEIGHT_PATTERNS if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} holds no weights",
            expected="at least one .safetensors or .gguf file; pickles (.bin, .pt, .ckpt) are never opened",
            got=", ".join(others)[:200] or "nothing",
        )
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise CheckpointError(f"There is no file {path}") from problem
    except ValueError as problem:
        raise CheckpointError(f"{path} is damaged", expected="JSON", got=str(problem)) from problem
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged", expected="a JSON object", got=type(config).__name__)
    return config


def _pair(path: Path, unconditional: Path | None) -> tuple[Path, Path]:
    """Where the two transformers are; twice the same where one file holds both."""
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
        got=_listing(rows, files),
        do="Name the file of the conditional transformer, and that of the unconditional one",
    )


def _listing(rows: list[Source], files: list[Path]) -> str:
    if rows:
        return "; ".join(" and ".join(row.branches) for row in rows)
    return ", ".join(file.name for file in files)[:200] or "no weights"


def _common_folder(files: tuple[Path, ...]) -> Path:
    """The deepest folder that holds all the files; two on different drives have none, and each keeps its own name."""
    shared = set(files[0].parents).intersection(*(file.parents for file in files))
    return max(shared, key=lambda folder: len(folder.parts), default=files[0].parent)


def _branches_named(files: list[WeightFile]) -> set[int]:
    """Which transformers the names of the tensors speak of; none where they do not say."""
    named = {parse(stored).branch for file in files for stored in file.infos}
    return {branch for branch in named if branch is not None}


def _expect_role(branch: SourceBranch, number: int) -> None:
    """A file that says which transformer it holds must be named as that one."""
    for file in branch.files:
        says = TELLS.get(str(file.metadata.get("model_type", "")), number)
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
        except RequestError as problem:
            raise CheckpointError(
                f"{folder}: {problem.what}", expected=problem.expected, got=problem.got, do=problem.do
            ) from problem
    if expected is not None:
        _expect_config(origin, config, expected)
    numbers = {field: config.get(field) for field in CONFIGURED}
    if not all(isinstance(number, int) and number > 0 for number in numbers.values()):
        raise CheckpointError(f"{origin} is no config of this model", expected=", ".join(CONFIGURED), got=str(numbers))
    return Branch(**{field: config[field] for field in CONFIGURED}), config


def _measured(folder: Path, groups: Groups) -> Branch:
    """The shape of a transformer from the shapes of four of its tensors and the number of its blocks."""
    asked = ("llm_cond_norm", "adaln_proj", "layers.0.attention.norm_q", "layers.0.feed_forward.w1")
    for name in asked:
        if WEIGHT not in groups.get(f"{name}.weight", {}):
            raise CheckpointError(
                f"{folder} holds no Ideogram 4 transformer",
                expected=f"{name}.weight",
                got=f"{len(groups)} tensors, the first {next(iter(groups), 'none')}",
            )
    text, conditioning, head, feed_forward = (StoredTensor(groups[f"{name}.weight"]).shape for name in asked)
    blocks = {name.split(".")[1] for name in groups if name.startswith("layers.")}
    if len(conditioning) != 2 or not head or conditioning[1] % head[0]:
        raise CheckpointError(
            f"{folder} holds no Ideogram 4 transformer",
            expected="adaln_proj.weight with columns in whole heads",
            got=f"{conditioning} and heads of {head}",
        )
    return Branch(len(blocks), head[0], conditioning[1] // head[0], feed_forward[0], conditioning[0], text[0])


def _expect_config(path: Path, config: dict[str, Any], branch: Branch) -> None:
    """Refuse another model; the error names the first field that differs."""
    for field in CONFIGURED:
        expected, got = getattr(branch, field), config.get(field)
        if expected != got:
            raise CheckpointError(
                f"{path} describes another model", expected=f"{field} {expected}", got=str(got or "nothing")
            )
