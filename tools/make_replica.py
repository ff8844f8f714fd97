"""Write a repository as somebody published it, without its weights: `python tools/make_replica.py --layout fp8-fused`.

    --size tiny       two and one layers of width 256, with encoder, VAE and tokenizer: a few MB
    --size layers=2   layers of the published width, as many as asked for
    --size full       the published size: 18.5 GB in FP8, written as fast as the disk takes it
    --from FOLDER     the weights of a dense pipeline folder (assets/miniature) in place of random ones

File names, tensor names, types, scales, metadata and index are those of the publication (replica_layouts.py), so that
tests of readers, downloads and the quantizer need neither the hub nor anybody's access to it. Random weights are
finite, of a trained model's size, and repeat every 61 rows (replica_parts.py). Left out: text encoders and VAEs of
repositories that are no diffusers pipeline, and the published tokenizer, in whose place stands the miniature's.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ideogram_app.catalog.models import MODELS, Branch  # noqa: E402
from ideogram_app.catalog.sources import BRANCHES  # noqa: E402
from ideogram_app.checkpoints.published.tensor_names import official_place, official_shapes  # noqa: E402
from ideogram_app.checkpoints.published.transformer import TransformerCheckpoint  # noqa: E402
from ideogram_app.errors import AppError, RequestError, choose  # noqa: E402
from tools.replica_components import write_components  # noqa: E402
from tools.replica_layouts import REPLICAS, Replica  # noqa: E402
from tools.replica_parts import PERIOD, Part, dense, write_gguf, write_safetensors  # noqa: E402

TINY = (Branch(2, 64, 4, 256, 256, 13 * 64), Branch(1, 64, 4, 256, 256, 13 * 64))  # fits the miniature's encoder
WEIGHTS = "diffusion_pytorch_model"
Values = Callable[[str, tuple[int, ...]], Tensor]  # name as it is stored, shape -> its first rows or all, float32


@dataclass(frozen=True)
class Contents:
    """What a replica is filled with: either transformer's shape, config and values."""

    branches: tuple[Branch, Branch]
    configs: tuple[dict[str, Any], dict[str, Any]]
    values: tuple[Values, Values]


def make(
    layout: str,
    out: Path,
    size: str = "tiny",
    seed: int = 0,
    source: Path | None = None,
    parts: str | None = None,
) -> Path:
    """Write a replica into an empty folder.

    Args:
        size: tiny, full or layers=N; ignored where `source` gives the weights.
        source: a dense diffusers pipeline folder.
        parts: transformers or all; None takes all at tiny size, transformers otherwise.

    Raises:
        RequestError: an unknown layout, size or parts, or a folder that is not empty.
    """
    replica = choose(REPLICAS, layout, "layout")
    tiny = source is not None or size == "tiny"
    parts = choose(
        {"transformers": "transformers", "all": "all"}, parts or ("all" if tiny else "transformers"), "parts"
    )
    contents = _given(source) if source else _random(size, seed)
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out} is not empty", do="Name another folder")
    if replica.files[0] == replica.files[1]:
        _write_file(
            out / replica.files[0],
            replica,
            [*packed_parts(replica, contents, 0), *packed_parts(replica, contents, 1)],
            0,
        )
    else:
        for number, name in enumerate(replica.files):
            write = _write_folder if replica.is_pipeline else _write_file
            write(out / name, replica, list(packed_parts(replica, contents, number)), number)
    if replica.is_pipeline:
        for name, config in zip(BRANCHES, contents.configs, strict=True):
            (out / name / "config.json").write_text(json.dumps({**config, **replica.config}, indent=2) + "\n")
        write_components(out, replica.pack, source, weights=parts == "all", tiny=tiny, seed=seed)
    return out


def _random(size: str, seed: int) -> Contents:
    """Random weights of the size asked for."""
    branches = TINY
    if size != "tiny":
        count = size.removeprefix("layers=") if size != "full" else str(MODELS["ideogram-4"].conditional.num_layers)
        if not count.isdecimal() or not int(count):
            raise RequestError(f"Unknown size {size!r:.40}", expected="tiny, full or layers=N")
        published = MODELS["ideogram-4"].conditional
        one = Branch(int(count), *list(vars(published).values())[1:])
        branches = (one, one)

    def values_of(number: int) -> Values:
        generator = torch.Generator().manual_seed(2 * seed + number)

        def values(name: str, shape: tuple[int, ...]) -> Tensor:
            if len(shape) == 1:
                noise = torch.randn(shape, generator=generator)
                return 1 + 0.1 * noise if "norm" in name else 0.02 * noise
            rows = min(shape[0], PERIOD)
            spread = torch.randn(rows, 1, generator=generator).mul(0.3).exp()  # rows of a trained model differ in size
            return torch.randn(rows, shape[1], generator=generator) * spread / shape[1] ** 0.5

        return values

    configs = (branches[0].config(), branches[1].config())
    return Contents(branches, configs, (values_of(0), values_of(1)))


def _given(source: Path) -> Contents:
    """The weights of a dense pipeline folder, fused where the layout asks for it."""
    readers = (TransformerCheckpoint(source / BRANCHES[0]), TransformerCheckpoint(source / BRANCHES[1]))

    def values_of(reader: TransformerCheckpoint) -> Values:
        def values(name: str, shape: tuple[int, ...]) -> Tensor:
            official, part = official_place(name)
            return reader.tensor(official, slice(part * shape[0], (part + 1) * shape[0])).float()

        return values

    branches = (readers[0].branch, readers[1].branch)
    return Contents(branches, (readers[0].config, readers[1].config), (values_of(readers[0]), values_of(readers[1])))


def packed_parts(replica: Replica, contents: Contents, number: int) -> Iterator[Part]:
    """One transformer in the replica's packing, under its names."""
    branch, prefix = contents.branches[number], replica.prefixes[number]
    linears = {f"{linear.name}.weight" for linear in branch.linears()}
    packed = {official_place(name)[0] if replica.fused else name for name in linears} if replica.pack else set()
    shapes = official_shapes(branch.shapes()) if replica.fused else branch.shapes()
    for name, shape in shapes.items():
        values, module = contents.values[number](name, shape), name.removesuffix(".weight")
        if replica.pack and name in packed and replica.packs(module):
            yield from (part.named(prefix + module) for part in replica.pack(values, shape[0]))
        else:
            yield dense(prefix + name, values, shape, replica.dense)


def _write_file(path: Path, replica: Replica, parts: list[Part], number: int) -> None:
    if replica.is_gguf:
        write_gguf(path, parts)
    else:
        write_safetensors(path, parts, replica.metadata[number])


def _write_folder(folder: Path, replica: Replica, parts: list[Part], number: int) -> None:
    """A pipeline's transformer: shards by name, and an index where the publication has one."""
    count, weight_map, total = replica.shards, {}, 0
    ordered = sorted(parts, key=lambda part: part.name)
    each = -(-len(ordered) // count)
    for shard in range(count):
        mine = ordered[shard * each : (shard + 1) * each]
        tail = f"-{shard + 1:05}-of-{count:05}" if count > 1 else ""
        name = f"{WEIGHTS}{tail}.safetensors"
        total += write_safetensors(folder / name, mine, replica.metadata[number])
        weight_map |= {part.name: name for part in mine}
    if replica.indexed:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main(
    layout: Annotated[str, typer.Option(help=" ".join(REPLICAS))],
    out: Annotated[Path, typer.Option(help="An empty folder, or one to make.")],
    size: Annotated[str, typer.Option(help="tiny, full or layers=N")] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    source: Annotated[Path | None, typer.Option("--from", help="A dense pipeline folder with the weights.")] = None,
    parts: Annotated[str | None, typer.Option(help="transformers or all")] = None,
) -> None:
    """Write a repository in a published layout, with random or given weights."""
    try:
        make(layout, out, size, seed, source, parts)
    except AppError as problem:
        typer.echo(str(problem), err=True)
        raise typer.Exit(1) from problem
    taken = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out}: {taken / 1e9:.2f} GB, {shutil.disk_usage(out).free / 1e9:.0f} GB left on the disk")


if __name__ == "__main__":
    typer.run(main)
