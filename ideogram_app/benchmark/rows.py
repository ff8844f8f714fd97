"""Rows of a benchmark: our recipes, and each way to run stock diffusers; packages they need, memory they take.

Memory is counted before anything is built. Rows of stock begin with `stock-`; stock-bf16 is called stock-fp16 or
stock-fp32 where that is the computing type.

Left out: how rows are built (ours.py, stock.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from ideogram_app.benchmark.shapes import DTYPE_LABELS, Workload
from ideogram_app.catalog.models import Branch
from ideogram_app.catalog.recipes import RECIPES, Recipe, find_recipe
from ideogram_app.errors import RequestError
from ideogram_app.machine.capabilities import arithmetic as verdict
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.activations import Drawing
from ideogram_app.planning.footprint import footprint
from ideogram_app.planning.weight_bytes import weight_bytes

# Published NF4 files pack every Linear; 4 bits and a float32 for each 64 weights, as quantization/nf4.py draws them.
NF4 = Recipe("nf4", "NF4", "nf4", 0.5 + 4 / 64, "decoded at every use", "bitsandbytes' 4 bits")
# Bytes that a packed matrix takes for each weight while it is decoded in plain torch: three tensors of 4-byte numbers
# and the result in NF4 (codes, levels, scales), a little less in diffusers' Q4_K.
DECODING_BYTES = 16


@dataclass(frozen=True)
class Row:
    """One thing to time."""

    name: str  # unique in a session
    recipe: Recipe  # of the weights; for stock, the recipe whose storage and packed layers are the same
    kind: str = "ours"  # or one of stock.py's
    arithmetic: str = ""  # of ours, as `capabilities.arithmetic` names it: bits of weights and activations
    compiled: bool = False  # by torch.compile: stock's repeated blocks, our kernels between two matrices
    trimmed: bool = False  # whether a stock row computes with the caption's true length instead of padding it
    needs: tuple[str, ...] = ()  # packages

    @property
    def multiplies_int8(self) -> bool:
        """Whether packed matrices run on INT8 units."""
        return self.recipe.quantizes_activations or self.arithmetic.endswith("a8")


@dataclass(frozen=True)
class RowMemory:
    """Memory of a row: what it holds while it exists, and what a step takes besides."""

    kept: int
    busy: int


_INT8 = RECIPES["int8-w8a8-rotated"]
_STOCK_NEEDS = ("diffusers", "transformers", "accelerate")
# Plain first, then what its users reach for; what compiles comes last, because nobody knows for how long.
STOCK_ROWS: tuple[Row, ...] = (
    Row("stock-bf16", RECIPES["reference"], "dense", needs=_STOCK_NEEDS),
    Row("stock-torchao-int8", _INT8, "torchao", needs=(*_STOCK_NEEDS, "torchao")),
    Row("stock-gguf-q4_k", RECIPES["gguf-q4_k"], "gguf", needs=(*_STOCK_NEEDS, "gguf")),
    Row("stock-fp8", RECIPES["fp8"], "fp8", needs=_STOCK_NEEDS),
    Row("stock-nf4", NF4, "nf4", needs=_STOCK_NEEDS),
    Row("stock-bf16-trimmed", RECIPES["reference"], "dense", trimmed=True, needs=_STOCK_NEEDS),
    Row("stock-torchao-int8-compiled", _INT8, "torchao", compiled=True, needs=(*_STOCK_NEEDS, "torchao")),
)
ARITHMETICS = ("w4a8", "w4a16")  # 4-bit weights decoded to INT8, or to the computing type


def rows_for(recipes: Sequence[str], against: str, dtype: str, hardware: Hardware) -> tuple[Row, ...]:
    """The rows asked for, ours first, in the order of the flags.

    Args:
        recipes: each as `name`, computed as the program does on this hardware, or `name@arithmetic`; either with
            `+compiled` behind it.
        against: stock, none, or names of stock rows with commas.

    Raises:
        RequestError: an unknown recipe or row, or one that is named twice.
    """
    ours = [_own(text, hardware) for text in recipes]
    stock = [replace(row, name=row.name.replace("bf16", DTYPE_LABELS[dtype])) for row in STOCK_ROWS]
    if against == "none":
        stock = []
    elif against != "stock":
        wanted = {name.strip() for name in against.split(",")}
        unknown = sorted(wanted - {row.name for row in stock})
        if unknown:
            known = ", ".join(("stock", "none", *(row.name for row in stock)))
            raise RequestError(f"Unknown rows to measure against: {', '.join(unknown)}", expected=known)
        stock = [row for row in stock if row.name in wanted]
    rows = (*ours, *stock)
    if not rows:
        raise RequestError("There is nothing to time", do=f"Name recipes: {', '.join(RECIPES)}")
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"Named twice: {', '.join(twice)}")
    return rows


def missing_packages(row: Row) -> str:
    """Which packages a row lacks here, as a sentence; "" where none."""
    lacking = [name for name in row.needs if find_spec(name) is None]
    return f"Not installed: {', '.join(lacking)}." if lacking else ""


def row_bytes(row: Row, workload: Workload) -> RowMemory:
    """Count a row's memory on the safe side, from shapes alone.

    Ours is what the planner counts. Stock keeps text features for the whole sequence of both branches and passes over
    them at every step: masked, squared in float32, normed and masked again.
    """
    size, dense, recipe = (workload.width, workload.height), workload.dense_bytes, effective(row.recipe)
    text = workload.text_tokens if row.kind == "ours" or row.trimmed else workload.padding
    counted = footprint(
        Drawing(
            workload.model,
            recipe,
            size,
            dense,
            text_tokens=text,
            steps=workload.steps,
            arithmetic=row.arithmetic,
        )
    )
    if row.kind == "ours":
        return RowMemory(counted.weights + counted.once, counted.workspace)
    weights = sum(weight_bytes(branch, recipe, dense) for branch in workload.model.branches)
    branch = workload.model.conditional
    tokens = text + workload.image_tokens
    features = (tokens + workload.image_tokens) * branch.llm_features_dim * dense
    passed = tokens * branch.llm_features_dim * (2 * dense + 8)
    decoded = 0
    if recipe.storage in ("gguf", "fp8", "nf4"):
        packed = (linear.rows * linear.columns for linear in branch.linears() if row.recipe.packs(linear.name))
        decoded = DECODING_BYTES * max(packed, default=0)
    return RowMemory(weights + features, max(counted.workspace, passed) + decoded)


def effective(recipe: Recipe) -> Recipe:
    """The recipe with what it protects where no calibration is at hand."""
    return recipe.protecting(None)


def int8_share(row: Row, branch: Branch) -> float:
    """The share of a block's matrices that a row multiplies in INT8, from 0 to 1."""
    if not row.multiplies_int8:
        return 0.0
    recipe = effective(row.recipe)
    linears = [linear for linear in branch.linears() if linear.in_block and "adaln" not in linear.name]
    weights = [linear.rows * linear.columns for linear in linears]
    packed = [count for count, linear in zip(weights, linears, strict=True) if recipe.packs(linear.name)]
    return sum(packed) / sum(weights)


def _own(text: str, hardware: Hardware) -> Row:
    plain, plus, compiled = text.partition("+")
    name, _, arithmetic = plain.partition("@")
    if compiled != ("compiled" if plus else ""):
        raise RequestError(f"Unknown way to run {name}: {compiled!r:.40}", expected="+compiled, or nothing")
    recipe = find_recipe(name)
    if arithmetic and (arithmetic not in ARITHMETICS or recipe.gguf_type != "Q4_K"):
        raise RequestError(
            f"{name} has no arithmetic {arithmetic!r:.40}", expected=f"{' or '.join(ARITHMETICS)}, of gguf-q4_k alone"
        )
    return Row(text, recipe, arithmetic=arithmetic or verdict(hardware, recipe)[0], compiled=bool(plus))
