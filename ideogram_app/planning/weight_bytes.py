"""Bytes of weights under a recipe: of one Linear, of a transformer on disk, and of one as it is drawn with.

Counted from the rows of catalog/models.py; the text encoder's are in catalog/text_encoder.py.
"""

from __future__ import annotations

from ideogram_app.catalog.models import TEXT_PROJECTION, Branch, Linear
from ideogram_app.catalog.recipes import Recipe


def linear_bytes(linear: Linear, recipe: Recipe, dense_bytes: int) -> float:
    """Of a weight and its scales, without the bias."""
    count = linear.rows * linear.columns
    if recipe.packs(linear.name):
        return count * recipe.bytes_per_weight + linear.rows * recipe.row_scale_bytes
    return float(count * dense_bytes)


def weight_bytes(branch: Branch, recipe: Recipe, dense_bytes: int = 2) -> int:
    """Bytes of one transformer's parameters under a recipe, as they rest on disk; dense_bytes: of the computing type
    in which unpacked parameters are held (2 for bf16, 4 for float32)."""
    linears = sum(linear_bytes(linear, recipe, dense_bytes) for linear in branch.linears())
    return round(branch.other_parameters() * dense_bytes + linears)


def loaded_bytes(branch: Branch, recipe: Recipe, dense_bytes: int, sees_text: bool) -> tuple[int, int]:
    """Bytes of one transformer as it is drawn with: what every step needs, and what runs once a picture.

    Not loaded at all: the text projection of the branch without text. Norms of single heads are held in float32.
    """
    every_step = float(2 * branch.num_layers * branch.attention_head_dim * 4 + branch.hidden_size * dense_bytes)
    once = float((4 * branch.num_layers + 1) * branch.hidden_size * dense_bytes)
    if sees_text:
        once += branch.llm_features_dim * dense_bytes
    for linear in branch.linears():
        size = linear_bytes(linear, recipe, dense_bytes) + (linear.rows * dense_bytes if linear.bias else 0)
        if not linear.once:
            every_step += size
        elif sees_text or linear.name != TEXT_PROJECTION:
            once += size
    return round(every_step), round(once)
