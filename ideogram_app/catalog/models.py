"""Models: shapes of the transformers of Ideogram 4 and of the miniature, one row a Linear, without torch.

Sizes are counted rather than remembered: the planner, the README and the tests sum the same table. The published model:
34 layers, hidden 4608, 9 279 288 448 parameters a branch (counted from diffusers' `Ideogram4Transformer2DModel`); the
embedded miniature has the same layers, smaller and fewer.

Left out: convolutions of the VAE (a constant is enough) and vision parts of the text encoder, which are never used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ideogram_app.errors import RequestError, choose

TAPS = 13  # text-encoder layers whose outputs are concatenated: 0, 3, ..., 33, 35
LATENT_CHANNELS = 128  # 32 VAE channels x 2 x 2 patch
PIXELS_PER_TOKEN = 16  # 8 (VAE) x 2 (patch)
# Weights do not tell how positions are encoded; the models that exist differ in it as in the size of their heads.
# head size -> rope_theta, mrope_section (frequencies for time, height, width)
ROTARY = {256: (5_000_000, (24, 20, 20)), 64: (1000, (12, 10, 10))}


# Layers whose inputs do not depend on latents: they run once a picture (model/transformer/conditioner.py).
ONCE_A_PICTURE = ("llm_cond_proj", "t_embedding.", "adaln_proj", "adaln_modulation")
TEXT_PROJECTION = "llm_cond_proj"  # which the branch without text never loads


@dataclass(frozen=True)
class Linear:
    """One Linear layer by its diffusers name: output features, input features, and whether it has a bias."""

    name: str
    rows: int
    columns: int
    bias: bool
    in_block: bool = False

    @property
    def once(self) -> bool:
        """Whether it runs once a picture, and not in every step."""
        return any(fragment in self.name for fragment in ONCE_A_PICTURE)


class Component(Protocol):
    """Named tensors, some of them Linear weights: a transformer, the text encoder."""

    def linears(self) -> Iterator[Linear]:
        """Every Linear, in the order of the forward pass."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by its name."""


@dataclass(frozen=True)
class Branch:
    """One transformer. Field names follow diffusers' `Ideogram4Transformer2DModel` config."""

    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    intermediate_size: int
    adaln_dim: int
    llm_features_dim: int

    @property
    def hidden_size(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    def linears(self) -> Iterator[Linear]:
        """Every Linear of the branch: the seven outside the blocks, then eight for each block."""
        hidden, feed_forward = self.hidden_size, self.intermediate_size
        yield Linear("input_proj", hidden, LATENT_CHANNELS, True)
        yield Linear("llm_cond_proj", hidden, self.llm_features_dim, True)
        yield Linear("t_embedding.mlp_in", hidden, hidden, True)
        yield Linear("t_embedding.mlp_out", hidden, hidden, True)
        yield Linear("adaln_proj", self.adaln_dim, hidden, True)
        for index in range(self.num_layers):
            block = f"layers.{index}."
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                yield Linear(f"{block}attention.{name}", hidden, hidden, False, True)
            yield Linear(f"{block}feed_forward.w1", feed_forward, hidden, False, True)
            yield Linear(f"{block}feed_forward.w3", feed_forward, hidden, False, True)
            yield Linear(f"{block}feed_forward.w2", hidden, feed_forward, False, True)
            yield Linear(f"{block}adaln_modulation", 4 * hidden, self.adaln_dim, True, True)
        yield Linear("final_layer.linear", LATENT_CHANNELS, hidden, True)
        yield Linear("final_layer.adaln_modulation", hidden, self.adaln_dim, True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the branch by its diffusers name, in the order of the forward pass."""
        shapes: dict[str, tuple[int, ...]] = {
            "llm_cond_norm.weight": (self.llm_features_dim,),
            "embed_image_indicator.weight": (2, self.hidden_size),
        }
        for linear in self.linears():
            shapes[f"{linear.name}.weight"] = (linear.rows, linear.columns)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.rows,)
            if linear.name.endswith("attention.to_q"):  # the first of its block
                block = linear.name.removesuffix("attention.to_q")
                for norm in ("attention.norm_q", "attention.norm_k"):
                    shapes[f"{block}{norm}.weight"] = (self.attention_head_dim,)
                for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                    shapes[f"{block}{norm}.weight"] = (self.hidden_size,)
        return shapes

    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def other_parameters(self) -> int:
        """Parameters that are no Linear weight: biases, norms and the two-row indicator embedding."""
        return self.parameters() - sum(linear.rows * linear.columns for linear in self.linears())

    def config(self) -> dict[str, Any]:
        """diffusers' config.json of this transformer, for files that come without one; RequestError for heads of a size
        that no model has, since nothing then tells the position encoding."""
        if self.attention_head_dim not in ROTARY:
            raise RequestError(
                "The position encoding of this transformer is not known",
                expected=f"heads of {' or '.join(str(size) for size in ROTARY)}",
                got=str(self.attention_head_dim),
                do="Put its config.json beside the weights",
            )
        theta, section = ROTARY[self.attention_head_dim]
        fixed = {"_class_name": "Ideogram4Transformer2DModel", "in_channels": LATENT_CHANNELS, "norm_eps": 1e-5}
        return {**fixed, **asdict(self), "rope_theta": theta, "mrope_section": list(section)}


@dataclass(frozen=True)
class Model:
    """Everything a plan needs to know of a model.

    Attributes:
        text_encoder: a key of `text_encoder.ENCODERS`.
        vae_parameters: of the decoder; the encoder is never loaded. vae_widths: its channels, the last stage's first.
        default_size: width and height drawn when none is asked for.
        source_bytes: what a first run downloads (0: it ships with the app).
        guidance: for every step, in place of the presets' where those harm; None keeps the presets'.
    """

    name: str
    title: str
    conditional: Branch
    unconditional: Branch
    text_encoder: str
    vae_parameters: int
    default_size: tuple[int, int]
    source_bytes: int
    guidance: float | None = None
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)

    @property
    def branches(self) -> tuple[Branch, Branch]:
        return self.conditional, self.unconditional


# Layers, size of a head, heads, feed-forward, adaLN, text features; and the miniature below likewise.
_PUBLISHED = Branch(34, 256, 18, 12288, 512, TAPS * 4096)

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "ideogram-4",
            "Ideogram 4",
            _PUBLISHED,
            _PUBLISHED,
            text_encoder="qwen3-vl-8b",
            vae_parameters=49_620_259,  # counted (benchmark/memory/counted.py): 0.10 GB in bf16
            default_size=(1024, 1024),
            source_bytes=27_500_000_000,  # ideogram-ai/ideogram-4-fp8
        ),
        Model(
            "miniature",
            "Miniature",
            Branch(6, 64, 4, 768, 256, TAPS * 64),
            Branch(3, 64, 4, 768, 256, TAPS * 64),
            text_encoder="miniature",
            vae_parameters=486_787,
            default_size=(128, 128),
            source_bytes=0,
            guidance=1.5,
            vae_widths=(16, 32, 32, 64),
        ),
    )
}


def find_model(name: str) -> Model:
    """The model of that name; RequestError lists those that exist."""
    return choose(MODELS, name, "model")


def check_size(width: int, height: int) -> None:
    """RequestError for sizes off the grid or absurd; names the side, the grid and the nearest size that works.

    The published model takes multiples of 16 from 256 to 2048 a side and aspects to 6:1; the miniature goes down
    to 64. The lower bound is the miniature's, because a size that is merely small does no harm.
    """
    for label, side in (("width", width), ("height", height)):
        if side % PIXELS_PER_TOKEN or not 64 <= side <= 2048:
            nearest = min(2048, max(64, round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN))
            raise RequestError(
                f"The {label} cannot be drawn",
                expected=f"a multiple of {PIXELS_PER_TOKEN} from 64 to 2048",
                got=str(side),
                do=f"Try {nearest}",
            )
    if max(width, height) > 6 * min(width, height):
        raise RequestError("The picture is too narrow", expected="an aspect of at most 6:1", got=f"{width} x {height}")
