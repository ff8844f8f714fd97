"""Predicted against measured peaks of device memory, or against counted ones: `python benchmarks/memory.py`.

    with a card     {INT8, Q4_K} x {resident, half streamed, streamed} x {512², 1024², 2048²}, memory capped to 8, 12,
                    16 and 24 GB by `torch.cuda.set_per_process_memory_fraction`: PyTorch's own counters, and seconds
                    of a step; random weights, whose bytes are those of real ones
    without one     what the same code asks for, counted on tensors without numbers (counting/counted.py), and what
                    CUDA's allocator would make of it (allocator.py there); rows are marked `counted`

Without one, a plan for a card of each size decides how many blocks are offloaded, through how many slots, and in which
tiles the picture is decoded. Every row has the prediction beside it. `allocated` is of tensors, to be held against
`max_memory_allocated`; `total` must be free before, with gaps and the driver's context. **No measured row was ever
made by us**: there was no card. Left out: two devices, and blocks from disk, which take the device what blocks from RAM
take.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.counting.counted import Case, count_picture  # noqa: E402
from ideogram_app.benchmark.ours import GUIDANCE, SCHEDULE_SHIFT, evenly  # noqa: E402
from ideogram_app.benchmark.rows import effective  # noqa: E402
from ideogram_app.benchmark.shapes import Workload, find_shape  # noqa: E402
from ideogram_app.benchmark.weights import RandomBranch, Tiles  # noqa: E402
from ideogram_app.catalog.recipes import find_recipe  # noqa: E402
from ideogram_app.generation.guidance import GuidedModel  # noqa: E402
from ideogram_app.generation.sampler import decode, denoise, make_noise, schedule, times  # noqa: E402
from ideogram_app.kernels.choice import choose_kernels  # noqa: E402
from ideogram_app.kernels.choice import kernels as find_kernels  # noqa: E402
from ideogram_app.machine.hardware import Hardware, compute_capability, detect  # noqa: E402
from ideogram_app.machine.meter import release, synchronize  # noqa: E402
from ideogram_app.machine.versions import commit, versions  # noqa: E402
from ideogram_app.model.loader import Loaded  # noqa: E402
from ideogram_app.model.offload.offload import Offload  # noqa: E402
from ideogram_app.model.transformer.assemble import Placement, assemble, blocks_of  # noqa: E402
from ideogram_app.model.transformer.layers import weight_bytes  # noqa: E402
from ideogram_app.model.vae import Autoencoder, autoencoder  # noqa: E402
from ideogram_app.planning.activations import Drawing, decode_bytes, tile_gaps  # noqa: E402
from ideogram_app.planning.footprint import device_bytes, device_share, footprint  # noqa: E402
from ideogram_app.planning.inputs import PlanInputs  # noqa: E402
from ideogram_app.planning.planner import plan  # noqa: E402
from ideogram_app.planning.streaming import FEWEST_SLOTS, spread  # noqa: E402
from ideogram_app.text import gb  # noqa: E402
from ideogram_app.wire import to_plain  # noqa: E402

GB = 10**9
RECIPES = (("int8-w8a8-rotated", ""), ("gguf-q4_k", "w4a8"))
HOMES = {"resident": 0.0, "half streamed": 0.5, "streamed": 1.0}  # share of the blocks that travel
CAPS = (8, 12, 16, 24)
TILE = 512  # of the decoder, where the whole picture would not fit
TIMED = 3  # steps, after one that compiles
CPU = torch.device("cpu")
CARD = Hardware(
    kind="cuda",
    name="NVIDIA GeForce RTX 3090",
    compute_capability=(8, 6),
    device_memory_bytes=24 * GB,
    host_memory_bytes=64 * GB,
    host_free_bytes=60 * GB,
)


@dataclass(frozen=True)
class Row:
    """One combination. Bytes; `source` says whether peaks were measured or counted, and `least` is the smallest device
    on which the allocator's model finds room."""

    source: str
    recipe: str
    arithmetic: str
    home: str
    side: int
    text_tokens: int
    tile: int | None
    cap: int | None
    predicted_allocated: int
    predicted_total: int
    allocated: int | None = None
    reserved: int | None = None
    least: int | None = None
    phases: dict[str, int] | None = None
    step_seconds: float | None = None
    problem: str = ""
    blocks: tuple[int, int] = (0, 0)
    slots: int = 0


def main(
    shape: Annotated[str, typer.Option(help="ideogram-4, or layers=N.")] = "ideogram-4",
    text_tokens: int = 300,
    sides: str = "512,1024,2048",
    out: Annotated[Path | None, typer.Option(help="memory.json of a card, memory-counted.json without one.")] = None,
) -> None:
    """Measure where there is a card, else count, and write."""
    measures = torch.cuda.is_available()
    workloads = [
        Workload(shape, find_shape(shape), side, side, text_tokens, 2048, 48, "bfloat16")
        for side in map(int, sides.split(","))
    ]
    rows = []
    for row in measured(workloads) if measures else counted(workloads):
        rows.append(row)
        found = row.allocated
        print(
            f"{row.source} {row.recipe} {row.home} {row.side}² tile {row.tile} cap {row.cap}: predicted "
            f"{gb(row.predicted_allocated)}, found {gb(found) if found else row.problem}; in all "
            f"{gb(row.predicted_total)}, {gb(row.least or row.reserved or 0)}",
            file=sys.stderr,
            flush=True,
        )
    path = out or ROOT / "benchmarks" / "results" / ("memory.json" if measures else "memory-counted.json")
    report = {"hardware": to_plain(detect(ROOT)), "versions": versions(), "commit": commit(), "rows": to_plain(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"rows": to_plain(rows)}))


def counted(workloads: list[Workload]) -> Iterator[Row]:
    """Without a card: what a plan within each cap asks for."""
    for name, _ in RECIPES:
        for workload in workloads:
            for cap in CAPS:
                yield _count(workload, name, cap * GB)


def _count(workload: Workload, name: str, cap: int) -> Row:
    """The picture of a plan; its encoder is staged and gone before, so that plans with a resident one are not."""
    size = workload.width, workload.height
    card, settled = replace(CARD, device_free_bytes=cap), {"recipe": name, "ready": (name,)}
    chosen = plan(PlanInputs.of(card, "ideogram-4", *size, text_tokens=workload.text_tokens, **settled))
    homes = {"offloaded": chosen.streamed_blocks, "slots": chosen.slots or 2, "tile": chosen.decode_tile or None}
    found = count_picture(Case(workload, effective(find_recipe(name)), chosen.arithmetic, **homes))
    made = footprint(
        Drawing(
            workload.model,
            effective(find_recipe(name)),
            (workload.width, workload.height),
            workload.dense_bytes,
            text_tokens=workload.text_tokens,
            arithmetic=chosen.arithmetic,
        )
    )
    kept = made.weights - (sum(chosen.streamed_blocks) - chosen.slots) * made.block
    drawn = workload.model, *size.values(), workload.dense_bytes, chosen.decode_tile or None
    decoding = made.standing + decode_bytes(*drawn)
    busy, with_gaps = max(made.workspace, decoding), max(made.workspace, decoding + tile_gaps(*drawn))
    return Row(
        "counted",
        name,
        chosen.arithmetic,
        chosen.residency or "",
        workload.width,
        workload.text_tokens,
        chosen.decode_tile or None,
        cap,
        device_share(kept, busy).allocated,
        device_bytes(kept, with_gaps),
        found.peak,
        found.reserved,
        found.least,
        found.phases,
        blocks=chosen.streamed_blocks,
        slots=chosen.slots,
    )


def predicted(
    name: str,
    arithmetic: str,
    workload: Workload,
    home: str,
    tile: int | None,
    cap: int | None,
    kernels: str = "triton",
) -> Row:
    """A row with nothing but its prediction."""
    size = workload.width, workload.height
    made = footprint(
        Drawing(
            workload.model,
            effective(find_recipe(name)),
            size,
            workload.dense_bytes,
            text_tokens=workload.text_tokens,
            arithmetic=arithmetic,
            kernels=kernels,
        )
    )
    offloaded = sum(travellers(workload, home))
    kept = made.weights + (FEWEST_SLOTS - offloaded if offloaded else 0) * made.block
    busy = max(made.workspace, made.standing + decode_bytes(workload.model, *size, workload.dense_bytes, tile))
    allocated = device_share(kept, busy).allocated
    tokens, side = workload.text_tokens, workload.width
    return Row("predicted", name, arithmetic, home, side, tokens, tile, cap, allocated, device_bytes(kept, busy))


def travellers(workload: Workload, home: str) -> tuple[int, int]:
    """How many blocks of each transformer travel."""
    first, second = (round(HOMES[home] * branch.num_layers) for branch in workload.model.branches)
    return first, second


def measured(workloads: list[Workload]) -> Iterator[Row]:
    """On a card: every combination within every cap that the card has."""
    device, (_, total) = torch.device("cuda", 0), torch.cuda.mem_get_info(0)
    for cap in (cap * GB for cap in CAPS if cap * GB <= total):
        torch.cuda.set_per_process_memory_fraction(cap / total, device)
        for name, arithmetic in RECIPES:
            for home in HOMES:
                for workload in workloads:
                    kernels = choose_kernels(device, compute_capability(device))[0]
                    whole = predicted(name, arithmetic, workload, home, None, cap, kernels)
                    tile = None if whole.predicted_total <= cap else TILE
                    row = predicted(name, arithmetic, workload, home, tile, cap, kernels)
                    yield _measure(replace(row, source="measured"), workload, device)
                    release(device)
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def _measure(row: Row, workload: Workload, device: torch.device) -> Row:
    """Draw once and read the counters; what does not fit is a row too."""
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds, problem = None, ""
    try:
        seconds = draw(workload, row.recipe, row.arithmetic, travellers(workload, row.home), row.tile, device)
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0]
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return replace(row, allocated=allocated, reserved=reserved, step_seconds=seconds, problem=problem)


@torch.inference_mode()
def draw(
    workload: Workload, name: str, arithmetic: str, offloaded: tuple[int, int], tile: int | None, device: torch.device
) -> float:
    """A few steps and the decoder, on random weights; the median seconds of a step."""
    offload = Offload()
    tiles = Tiles(device, getattr(torch, workload.dtype))
    try:
        loaded = _loaded(workload, name, arithmetic, offloaded, offload, tiles)
        if device.type == "cuda":  # noise is made on the device, also that of blocks which files would bring to RAM
            torch.cuda.reset_peak_memory_stats(device)
        sigmas = schedule(evenly(workload.steps), workload.width, workload.height, SCHEDULE_SHIFT)
        features = torch.randn(1, workload.text_tokens, workload.model.conditional.llm_features_dim)
        noise = make_noise(0, workload.width, workload.height).to(device)
        vae = _decoder(tiles.dtype, tile).to(device)
        velocity = GuidedModel(loaded, features, workload.rows, workload.columns, times(sigmas))
        steps, spent = denoise(velocity, noise, sigmas, (GUIDANCE,) * (1 + TIMED)), []
        for _ in range(1 + TIMED):
            synchronize(device)
            start = time.perf_counter()
            step = next(steps)
            synchronize(device)
            spent.append(time.perf_counter() - start)
        latents = step.latents.cpu()
        del velocity, steps, step  # as pipeline.draw does
        loaded.release_scratch()
        release(device)
        decode(vae, latents, workload.rows, workload.columns)
        return statistics.median(spent[1:])
    finally:
        offload.close()


def _loaded(
    workload: Workload, name: str, arithmetic: str, offloaded: tuple[int, int], offload: Offload, tiles: Tiles
) -> Loaded:
    """Both transformers of noise, some of whose blocks travel."""
    device = tiles.device
    kernels, made = find_kernels(choose_kernels(device, compute_capability(device))[0]), []
    hooks, recipe = offload.on(device), effective(find_recipe(name))
    for number, branch in enumerate(workload.model.branches):
        away = spread(offloaded[number], branch.num_layers)
        placement = Placement(tiles.dtype, device, kernels=kernels, arithmetic=arithmetic, offloaded=away)
        weights = RandomBranch(branch, recipe, tiles)
        blocks = hooks.add_some(blocks_of(weights, branch, placement), away)
        backbone = assemble(weights, branch, branch.config(), placement, sees_text=number == 0, blocks=blocks)
        made.append(backbone)
    offload.start()
    first, second = made
    held = weight_bytes(first) + weight_bytes(second)
    return Loaded(first, second, held, name, (device, device), arithmetic, kernels.name, offload)


def _decoder(dtype: torch.dtype, tile: int | None) -> Autoencoder:
    """The published decoder on random weights."""
    vae: Any = autoencoder({}).to_empty(device="cpu")
    for tensor in (*vae.parameters(), *vae.buffers()):
        tensor.copy_(torch.rand(tensor.shape) * 0.02 + 0.01)
    vae = vae.to(dtype).eval()
    vae.enable_tiling(tile or 0)
    return vae


if __name__ == "__main__":
    typer.run(main)
