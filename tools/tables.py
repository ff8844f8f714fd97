"""Tables of the pages that are made from the program's rows, its plans and its measurements.

Each function gives one Markdown table; tools/docs.py puts it where a page has its mark. What is published, measured or
computed is said by the sentence in front of a table, not by the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ideogram_app.benchmark.receipts import read_all
from ideogram_app.benchmark.receipts import table as receipts_as_table
from ideogram_app.catalog.models import MODELS, Model
from ideogram_app.catalog.presets import PRESETS
from ideogram_app.catalog.recipes import RECIPES, Recipe
from ideogram_app.catalog.sources import SOURCES
from ideogram_app.catalog.speedups import SPEEDUPS
from ideogram_app.catalog.text_encoder import ENCODER_RECIPES, PUBLISHED_ENCODER, encoder_bytes
from ideogram_app.checkpoints.published.layouts import LAYOUTS
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.downloads import EXAMPLE_RATE
from ideogram_app.planning.inputs import PlanInputs
from ideogram_app.planning.planner import Plan, plan
from ideogram_app.planning.weight_bytes import weight_bytes
from ideogram_app.studio.setup_status import SetupStatus, lasting
from ideogram_app.studio.state import State
from tools.cards import CARDS, Card, described

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
DEVICES = {"Intel(R) Xeon(R) Processor": "Xeon"}  # as a cell of a table has room for
AT_HOME = tuple(card for card in CARDS if card[0] != "H100" and card[-1] == 1)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recipe_table() -> str:
    """Every row of catalog/recipes.py with the size of both transformers."""
    header = ["recipe", "Ideogram 4", "miniature", "computes in", "what it is"]
    rows = [
        [f"`{r.name}`", _size(r, MODELS["ideogram-4"]), _size(r, MODELS["miniature"]), r.compute, r.summary]
        for r in RECIPES.values()
    ]
    return table(header, rows)


def preset_table() -> str:
    """Every row of catalog/presets.py."""
    header = ["preset", "steps", "guidance of Ideogram 4", "guidance of the miniature", "mu", "std"]
    miniature = MODELS["miniature"].guidance
    rows = [
        [
            f"`{p.name}`",
            str(p.steps),
            f"{p.guidance[0]:g}, then {p.guidance[-1]:g}",
            f"{miniature:g}",
            f"{p.mu:g}",
            f"{p.std:g}",
        ]
        for p in PRESETS.values()
    ]
    return table(header, rows)


def card_table() -> str:
    """What the planner decides for cards as they are sold, at 1024 x 1024."""
    rows = []
    for card in CARDS:
        name, _, memory, ram, count = card
        decided = planned(card)
        predicted = decided.predicted
        seconds = f"{predicted.seconds_per_step:.1f} s" if predicted.seconds_per_step else "–"
        rows.append(
            [
                f"2 x {name}" if count > 1 else name,
                f"{memory} GB",
                f"{ram} GB",
                f"`{decided.recipe}`" if decided.recipe else "nothing fits",
                _home(decided),
                seconds,
                f"{predicted.peak_device_bytes / 1e9:.1f} GB" if decided.fits else "–",
                f"{predicted.peak_host_bytes / 1e9:.1f} GB" if decided.fits else "–",
            ]
        )
    header = ["card", "memory", "RAM", "plan", "transformers", "a step", "predicted peak", "of RAM"]
    return table(header, rows)


def home_table() -> str:
    """What cards that people own get: the recipe, seconds a picture by preset, disk and time of the first run."""
    rows = []
    for card in AT_HOME:
        name, _, memory, ram, _ = card
        decided = planned(card)
        first = SetupStatus(State(), decided.model, (decided.recipe or "",))
        step = decided.predicted.seconds_per_step or 0.0
        rows.append(
            [
                f"{name.removesuffix(' GPU')}, {memory} GB",
                f"{ram} GB",
                f"`{decided.recipe}`",
                *(_seconds(preset.steps * step) for preset in PRESETS.values()),
                f"{decided.predicted.disk_bytes / 1e9:.0f} GB, then {first.to_make / 1e9:.0f}",
                lasting(first.to_fetch / EXAMPLE_RATE + first.make_seconds).removeprefix("about "),
            ]
        )
    return table(["card", "RAM", "recipe", *(f"`{name}`" for name in PRESETS), "disk", "first run"], rows)


def _step(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def planned(card: Card) -> Plan:
    """What the planner decides for a card as it is sold, at 1024 x 1024."""
    return plan(PlanInputs.of(Hardware(**described(card)), "ideogram-4"))


def _home(decided: Plan) -> str:
    """Where the transformers live, and what share of them travels in every step."""
    if not decided.fits:
        return "–"
    if decided.residency == "resident":
        return "one on each" if len(set(decided.branch_devices)) > 1 else "resident"
    pair = MODELS[decided.model].branches
    share = sum(decided.streamed_blocks) / sum(branch.num_layers for branch in pair)
    return f"{share:.0%} {'streamed' if decided.residency == 'streamed' else 'from disk'}"


def saving_table() -> str:
    """Every row of catalog/speedups.py."""
    return table(["`--saving`", "what it leaves out"], [[f"`{row.name}`", row.summary] for row in SPEEDUPS.values()])


def measured_table() -> str:
    """The miniature's recipes as benchmarks/compare_recipes.py measured them."""
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['ms_per_step']:.0f} ms",
            f"{row['weight_bytes'] / 1e6:.1f} MB",
            f"{row['peak_memory_bytes'] / 1e6:.0f} MB",
            "–" if row["psnr"] is None else f"{row['psnr']:.1f} dB",
            "–" if row["ssim"] is None else f"{row['ssim']:.4f}",
        ]
        for row in results("miniature-recipes-cpu")["rows"]
    ]
    header = ["recipe", "a step", "weights", "peak memory", "PSNR", "SSIM"]
    return table(header, rows)


def score_table() -> str:
    """How often the miniature draws what a held-out caption asks for, as training/miniature/evaluate.py measured it."""
    names = ["background", "colour", "shape", "place", "letters", "words", "captions"]
    rows = [
        [row["form"], *(f"{row['shares'][name]:.1f} %" if name in row["shares"] else "–" for name in names)]
        for row in results("miniature-scores")["rows"]
    ]
    return table(["captions", *names[:-1], "everything"], rows)


def source_table() -> str:
    """Every row of catalog/sources.py that is published."""
    rows = [
        [
            f"[{row.repository}]({row.url})",
            LAYOUTS[row.layout].about,
            f"{row.size / 1e9:.1f} GB",
            "yes" if row.gated else "no",
        ]
        for row in SOURCES
        if row.repository
    ]
    return table(["repository", "what is in it", "size", "gated"], rows)


def family_table() -> str:
    """INT8's variants on the miniature and on outliers, as benchmarks/int8_family.py measured them."""
    measured = results("int8-family")
    rows = [
        [
            f"`{row['recipe']}`" if row["recipe"] in RECIPES else row["recipe"],
            f"{row['ideogram_4_gb']:.1f} GB",
            f"{row['psnr']:.1f} dB",
            f"{row['velocity_percent']:.2f} %",
            f"{row['drifted']} of {measured['pictures']}",
        ]
        for row in measured["rows"]
    ]
    return table(["variant", "Ideogram 4", "PSNR, median", "error of the velocity", "below 25 dB"], rows)


def encoder_table() -> str:
    """The text encoder's recipes, as benchmarks/encoder.py measured them."""
    measured = results("encoder")["rows"]

    def worst(recipe: str, model: str) -> str:
        taps = next(row["taps"] for row in measured if row["recipe"] == recipe and row["model"] == model)
        return f"{100 * max(taps):.2f} %"

    models = list(dict.fromkeys(row["model"] for row in measured))
    rows = [
        [
            f"`{name}`",
            f"{encoder_bytes(PUBLISHED_ENCODER, recipe) / 1e9:.1f} GB",
            *(worst(name, model) for model in models),
        ]
        for name, recipe in ENCODER_RECIPES.items()
    ]
    return table(["recipe", "Ideogram 4", *(f"worst tap, {model}" for model in models)], rows)


def search_table() -> str:
    """Encoders of GGUF types, as benchmarks/k_quants.py measured them."""

    def beside(errors: dict[str, float]) -> str:
        return f"{errors['ours']:.2f} ({errors['llama.cpp']:.2f})"

    def fastest(row: dict[str, Any], search: str) -> str:
        return f"{max(case['mweights_per_second'] for case in row['speed'] if case['search'] == search):.0f}"

    rows = [
        [
            row["name"],
            *(beside(row["rmse_percent"][kind]) for kind in ("gaussian", "student-t5", "miniature")),
            f"{row['output_error_percent']['without']:.2f} -> {row['output_error_percent']['with']:.2f}",
            fastest(row, "numba"),
            fastest(row, "torch"),
        ]
        for row in results("k-quants-cpu")["rows"]
    ]
    kinds = ("Gaussian, %", "Student t5, %", "the miniature, %")
    return table(["type", *kinds, "output, with importance, %", "Mweights/s, Numba", "torch"], rows)


def quantize_table() -> str:
    """Packing both published-size transformers, as benchmarks/quantize.py measured it."""
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['seconds'] / 60:.1f} min",
            f"{row['weights_per_second'] / 1e6:.0f} M/s",
            f"{row['peak_resident_bytes_sampled'] / 1e9:.2f} GB",
            f"{row['bytes_written'] / 1e9:.1f} GB",
            f"{'the same' if row['killed']['same_hashes'] else 'others'}, {row['killed']['seconds'] / 60:.1f} min",
        ]
        for row in results("quantize-full-cpu")["rows"]
    ]
    header = ["recipe", "time", "weights packed", "peak memory", "written", "hashes after ten kills, time in all"]
    return table(header, rows)


def speed_table() -> str:
    """Steps of our recipes and of stock diffusers, from every kept run of `python -m ideogram_app benchmark`."""
    rows = []
    for path in sorted(RESULTS.glob("benchmark-*.json"), key=lambda path: ("-cpu-" in path.stem, path.stem)):
        run = results(path.stem)
        for row in run["rows"]:
            kinds = row["families"]
            device = run["hardware"]["name"]
            split = " / ".join(f"{kinds[name]:.0%}" for name in ("gemm", "attention", "other")) if kinds else "–"
            rows.append(
                [
                    DEVICES.get(device, device),
                    f"{run['shape']}, {run['size'][0]}²",
                    f"`{row['name']}`",
                    run["dtype"],
                    _step(row["ms_per_step"]),
                    f"{row['share_of_ceiling']:.0%}",
                    split,
                    f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
                ]
            )
    split = "products / attention / rest"
    return table(["device", "shape", "row", "computes in", "a step", "of the ceiling", split, "peak memory"], rows)


def receipt_table() -> str:
    """What strangers measured, from benchmarks/receipts/."""
    kept = read_all(RESULTS.parent / "receipts")
    return "\n".join(receipts_as_table(kept)) if kept else "*No receipt has come in yet.*"


def kernel_table() -> str:
    """What the kernels need on each generation, as kernels/fused/offline.py had them compiled."""
    rows = []
    for target in dict.fromkeys(row["target"] for row in results("kernels-offline")["rows"]):
        compiled = [row for row in results("kernels-offline")["rows"] if row["target"] == target]
        products = [row for row in compiled if row["instruction"]]
        largest = max(products, key=lambda row: row["shared_bytes"], default=None)
        amd = isinstance(target, str)
        registers = 255 if not amd else 512 if target.startswith("gfx9") else 256
        rows.append(
            [
                target if amd else f"sm_{target}",
                str(len(compiled)),
                f"{max(row['registers'] for row in compiled)} of {registers}",
                f"{max(row['shared_bytes'] for row in compiled) // 1024} of {compiled[0]['shared_limit'] // 1024} KB",
                f"{max(row['local_bytes'] for row in compiled)} B",
                f"`{_short(largest['instruction'])}`" if largest else "PyTorch's product",
            ]
        )
    header = ["target", "kernels", "most registers", "most shared memory", "most spilled", "INT8 instruction"]
    return table(header, rows)


def choice_table() -> str:
    """What savings, presets and arithmetic gain and cost on the miniature, as benchmarks/choices.py measured them."""
    rows = [
        [
            f"`{row['name']}`",
            f"{row['blocks']:.0%}",
            f"{row['time']:.0%}",
            "–" if row["psnr"] is None else f"{row['psnr']:.1f} dB",
            "–" if row["psnr_worst"] is None else f"{row['psnr_worst']:.1f} dB",
            f"{row['shares']['captions']:.1f} %",
        ]
        for row in results("choices")["rows"]
    ]
    header = ["choice", "blocks run", "time", "PSNR to the whole, median", "worst", "captions right in every way"]
    return table(header, rows)


def memory_table() -> str:
    """Peaks of device memory as predicted, beside those that the program's own modules come to."""
    rows = [
        [
            f"`{' '.join(filter(None, (row['recipe'], row['arithmetic'])))}`",
            f"{row['side']}²",
            f"{row['cap'] / 1e9:.0f} GB",
            f"{sum(row['blocks'])} of 68" if sum(row["blocks"]) else "none",
            f"tiles of {row['tile']}" if row["tile"] else "whole",
            f"{row['predicted_allocated'] / 1e9:.2f}",
            f"{row['allocated'] / 1e9:.2f}",
            f"{row['predicted_allocated'] / row['allocated'] - 1:+.1%}",
            f"{row['predicted_total'] / 1e9:.1f}",
        ]
        for row in results("memory-counted")["rows"]
    ]
    tensors = ["tensors, predicted", "counted", "difference"]
    header = ["recipe", "picture", "free", "blocks that travel", "decoded", *tensors, "with gaps and the driver"]
    return table(header, rows)


def results(name: str) -> dict[str, Any]:
    """One file of measurements."""
    read: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return read


def _short(instruction: str) -> str:
    """The kind of an instruction and its types: mma.sync ... s32.s8.s8.s32."""
    if "." not in instruction:  # AMD's are short
        return instruction
    words = instruction.split(".")
    first = next(index for index, word in enumerate(words) if word in ("s32", "s8"))
    return f"{'.'.join(words[:2])} … {'.'.join(words[first:])}"


def _size(recipe: Recipe, model: Model) -> str:
    total = sum(weight_bytes(branch, recipe.protecting()) for branch in model.branches)
    return f"{total / 1e9:.1f} GB" if total > 1e9 else f"{total / 1e6:.1f} MB"
