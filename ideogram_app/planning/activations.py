"""Activations in bytes: what is on a device beside the weights at each moment of a picture, from shapes alone.

    encode      one layer of the text encoder at work; tapped outputs leave the device as they are made
    prepare     the layers that run once a picture, staged on the device one after another
    step        one block at work, the picture's own tensors beside it
    decode      the decoder at its widest, whole or one tile after another

Every function names the tensors that are alive at once in the code that it speaks of, so the most of them is what an
allocator is asked for. `benchmarks/counting/counted.py` counts the same by running that code on tensors that hold
nothing, and tests hold the two together: never below, at most 8 % above.

What kernels that are not Triton's hold for a moment is counted in planning/kernel_bytes.py and added here. Left out:
gaps that an allocator leaves and what libraries allocate for themselves (planning/footprint.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.catalog.models import (
    LATENT_CHANNELS,
    PIXELS_PER_TOKEN,
    TAPS,
    TEXT_PROJECTION,
    Branch,
    Linear,
    Model,
)
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.machine.attention import EFFICIENT, FLASH, MATH, run_bytes
from ideogram_app.planning.kernel_bytes import (
    WITHOUT_TRITON,
    add_bytes,
    decoding_bytes,
    heads_bytes,
    operand_bytes,
    product_bytes,
    swiglu_bytes,
)
from ideogram_app.planning.weight_bytes import linear_bytes
from ideogram_app.quantization.rows import WIDENED_AT_ONCE

MAX_TEXT_TOKENS = 2048  # the longest caption the text encoder takes
STEPS = 48  # of the longest preset
UNPACKING = 40_000_000  # plain torch decodes GGUF in runs of 2^21 weights, at most four float32 copies and two of bytes
WIDENING = 4 * WIDENED_AT_ONCE  # bytes of a run of INT8 or FP8 rows in float32
# cuDNN multiplies 16-bit tensors channels last: it copies what it reads and what it makes, in a workspace that torch
# asks the same allocator for. With that the decoder takes 2.1 kB a pixel and, where there is plenty, 4.3 kB reserved;
# without it 1.5 and 2.7. InvokeAI plans 4.4 kB reserved for decoders of these widths, from measurements (its #7674).
CONVOLVES_IN_COPIES = True
# A whole picture's decoder asks for a few tensors of gigabytes, larger than the gaps that those before them left: 6 %
# beyond planning/footprint.py's share (the smallest device for 2048 x 2048 in benchmarks/results/memory-counted.json).
DECODER_SHARE = 1.06
# Tiles of 1024 pixels and more leave gaps to the next row of tiles: 0.4 GB beside Q4_K at 2048 x 2048, a fifth of what
# a tile takes. Smaller ones fit into what steps leave behind (the same file).
LARGE_TILE, LARGE_TILE_GAPS = 1024 * 1024, 0.2
DECODED_TO_INT8 = ("scratch8", "decoded8")  # kinds of matrices that have a scale a row beside their Q4_K
ROUNDING_KERNELS = ("int8", *DECODED_TO_INT8)  # kinds of matrices whose inputs are INT8 rows
PREVIEW_TOKENS = 16  # a preview decodes at most 16 x 16 tokens, 256 pixels a side
# A block's matrices in the order of its forward pass: q, k, v (one matrix where they are of one kind), o, gate and up
# (likewise), down.
BLOCK_LINEARS = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w3", "w2")),
)
ENCODER_INNER = 3  # of the text encoder's feed-forward, in hidden sizes: 12288 of 4096
ENCODER_HEAD = 128
ENCODER_ANGLES = 2 * ENCODER_HEAD  # cosines and sines of a token, for a head


@dataclass(frozen=True)
class Drawing:
    """What is drawn, with what.

    Attributes:
        dense_bytes: of the computing type, 2 or 4.
        arithmetic: of Q4_K, w4a8 or w4a16; "" takes the one that needs more.
        kernels: their name in kernels/choice.py, as `machine.capabilities.products` tells it.
        attention: which kernel it is counted with (`machine.attention.expected`).
        decoder_bytes: of the decoder's type, where that is not the computing type.
        widens: whether dense products are float32 of what is stored in 16 bits (kernels/dense.py).
    """

    model: Model
    recipe: Recipe
    size: tuple[int, int]
    dense_bytes: int
    text_tokens: int = MAX_TEXT_TOKENS
    steps: int = STEPS
    arithmetic: str = ""
    kernels: str = "triton"
    attention: str = FLASH
    decoder_bytes: int = 0
    widens: bool = False

    @property
    def vae_bytes(self) -> int:
        """Bytes of a number in the decoder."""
        return self.decoder_bytes or self.dense_bytes

    @property
    def image_tokens(self) -> int:
        return self.size[0] * self.size[1] // PIXELS_PER_TOKEN**2

    def tokens(self, sees_text: bool) -> int:
        """Of one transformer's sequence."""
        return self.image_tokens + (self.text_tokens if sees_text else 0)

    def kind(self, linear: str) -> str:
        """How a matrix is multiplied: dense, int8, scratch (decoded to one INT8 or 16-bit buffer) or decoded (anew).

        With an 8 behind it, it is decoded to INT8.
        """
        if not self.recipe.packs(linear):
            return "dense"
        if self.recipe.quantizes_activations:
            return "int8"
        if self.recipe.gguf_type == "Q4_K":
            place = "decoded" if self.kernels in WITHOUT_TRITON else "scratch"
            return f"{place}8" if self.arithmetic == "w4a8" else place
        return "decoded"

    def input_format(self, kind: str) -> str:
        """What a matrix of a kind reads (`kernels.contract.InputFormat`)."""
        if kind not in ROUNDING_KERNELS:
            return "dense"
        return "int8" if kind == "int8" and self.recipe.storage == "int8" else "rotated"


def prepared_bytes(drawing: Drawing, branch: Branch, sees_text: bool) -> int:
    """`conditioner.Conditioning`: projected text, and in float32 the norms' vectors of all steps and rotary angles."""
    text = drawing.text_tokens * branch.hidden_size * drawing.dense_bytes if sees_text else 0
    angles = 2 * drawing.tokens(sees_text) * branch.attention_head_dim // 2 * 4
    return text + _vectors(drawing, branch) + drawing.steps * branch.hidden_size * 4 + angles


def standing_bytes(drawing: Drawing, branches: tuple[bool, ...] = (True, False)) -> int:
    """What is on a device from the first step to the last, weights of transformers aside; branches: which transformers
    draw there, each by whether it sees text."""
    chosen = {True: drawing.model.conditional, False: drawing.model.unconditional}
    prepared = sum(prepared_bytes(drawing, chosen[sees_text], sees_text) for sees_text in branches)
    latents = 5 * drawing.image_tokens * LATENT_CHANNELS * 4  # noise, latents before and after, velocity, clean
    return prepared + latents + drawing.model.vae_parameters * drawing.vae_bytes + scratch_bytes(drawing, once=False)


def latents_bytes(drawing: Drawing) -> int:
    """What stays on a device while latents become a picture: the decoder, the noise, and they themselves."""
    return drawing.model.vae_parameters * drawing.vae_bytes + 2 * drawing.image_tokens * LATENT_CHANNELS * 4


def scratch_bytes(drawing: Drawing, once: bool) -> int:
    """The buffer that Q4_K is decoded to, as large as the largest matrix of the blocks, or of those that run once."""
    bytes_of = {"scratch8": 1, "scratch": drawing.dense_bytes}
    merged = {"layers.0.attention.to_q": 3, "layers.0.feed_forward.w1": 2}  # matrices that are one with those after
    found = (
        bytes_of.get(drawing.kind(linear.name), 0) * merged.get(linear.name, 1) * linear.rows * linear.columns
        for linear in drawing.model.conditional.linears()
        if linear.once == once
    )
    return max(found, default=0)


def prepare_bytes(drawing: Drawing, branch: Branch, sees_text: bool) -> int:
    """While the layers that run once a picture are on the device one after another (`conditioner.Conditioner`)."""
    tokens, width, hidden = drawing.text_tokens if sees_text else 0, drawing.dense_bytes, branch.hidden_size
    kernels = drawing.kernels
    features = tokens * branch.llm_features_dim * width  # as they come; normed they are as large
    text = tokens * hidden * width

    def staged(name: str, rows: int, columns: int, beside: int = 0, count: int = drawing.steps) -> int:
        """A layer of `count` rows of input, and the most of: its weight decoded, its product made."""
        linear, kind = Linear(name, rows, columns, True), drawing.kind(name)
        beside += _widened_bytes(drawing, kind, count, rows, columns)
        scales = rows * 4 if kind in DECODED_TO_INT8 else 0
        layer = round(linear_bytes(linear, drawing.recipe, width)) + rows * width + scales
        if kind in ROUNDING_KERNELS:
            rounding = operand_bytes(kernels, drawing.input_format(kind), count, columns)
            made = product_bytes(kernels, count, rows, biased=True) + beside
            if kind == "decoded8":
                made = rows * columns + max(decoding_bytes(kernels, rows * columns), made)
            return layer + max(rounding, made)
        if kind != "decoded":
            return layer + beside
        decoded = rows * columns * width
        return layer + decoded + max(_unpacking(drawing, rows * columns), beside)

    modulated = staged("layers.0.adaln_modulation", 4 * hidden, branch.adaln_dim)
    moments = {
        "embed_in": text + staged("t_embedding.mlp_in", hidden, hidden),
        "modulations": text + _vectors(drawing, branch) + modulated,
        "conditioning": prepared_bytes(drawing, branch, sees_text),
    }
    if sees_text:
        rounded = tokens * branch.llm_features_dim if drawing.kind(TEXT_PROJECTION) in ROUNDING_KERNELS else 0
        projected = rounded + staged(TEXT_PROJECTION, hidden, branch.llm_features_dim, text, tokens)
        moments |= {"text_norm": 2 * features, "text_project": features + projected}
    norms = (4 * branch.num_layers + 1) * hidden * width + (branch.llm_features_dim * width if sees_text else 0)
    waves = 8 * drawing.steps * hidden * 4  # times between two layers; a block's vectors are as much
    return max(moments.values()) + norms + waves + scratch_bytes(drawing, once=True)


def step_bytes(drawing: Drawing, branch: Branch, sees_text: bool) -> int:
    """One pass of a transformer: the worst moment of its worst block, and the latents in the computing type."""
    kinds = {
        tuple(drawing.kind(f"layers.{index}.{name}") for name in BLOCK_LINEARS) for index in range(branch.num_layers)
    }
    worst = max((_block_bytes(drawing, branch, sees_text, each) for each in kinds), default=0)
    return worst + drawing.image_tokens * LATENT_CHANNELS * (drawing.dense_bytes + 4)


def decode_bytes(model: Model, width: int, height: int, dense_bytes: int, tile: int | None = None) -> int:
    """Activations of the decoder for a picture, whole or in tiles of this side in pixels; its weights not included."""
    pixels = width * height
    finished = pixels * (3 * dense_bytes + 3 * 12)  # the picture, and what becomes of it in float32
    if not tile or max(width, height) <= tile:
        return round(max(_decoder_bytes(model, pixels, dense_bytes), finished) * DECODER_SHARE)
    columns = -(-width // (tile * 3 // 4))
    rows_of_tiles = 2 * 3 * dense_bytes * min(tile, height) * columns * tile  # this row's tiles, and those above it
    bands = pixels * 3 * dense_bytes
    one = _decoder_bytes(model, min(tile, width) * min(tile, height), dense_bytes)
    latents = 8 * pixels  # scaled, put in order, and in the computing type
    return max(one + rows_of_tiles + bands + latents, 2 * bands + finished)


def tile_gaps(model: Model, width: int, height: int, dense_bytes: int, tile: int | None) -> int:
    """What large tiles leave unused between them, beyond footprint.py's share; in no counter of tensors."""
    inside = min(tile or 0, width) * min(tile or 0, height)
    if not tile or max(width, height) <= tile or inside < LARGE_TILE:
        return 0
    return round(_decoder_bytes(model, inside, dense_bytes) * LARGE_TILE_GAPS)


def preview_bytes(model: Model, size: tuple[int, int], dense_bytes: int) -> int:
    """A picture so far, between two steps: as large as `sampler.preview` makes it."""
    tokens = [side // PIXELS_PER_TOKEN for side in size]
    fold = -(-max(tokens) // PREVIEW_TOKENS)
    width, height = (max(1, count // fold) * PIXELS_PER_TOKEN for count in tokens)
    return decode_bytes(model, width, height, dense_bytes)


def encode_bytes(
    branch: Branch, recipe: Recipe, tokens: int, dense_bytes: int, attention: str = FLASH, widens: bool = False
) -> int:
    """Encoding a caption under a recipe of catalog/text_encoder.py: one layer at work, without its weights; attention
    and widens are those of `Drawing`."""
    hidden = branch.llm_features_dim // TAPS
    angles = tokens * (ENCODER_ANGLES * dense_bytes + 16)  # and the token's number and position
    inner, weights = ENCODER_INNER * hidden, ENCODER_INNER * hidden**2
    unpacking = {"int8": WIDENING}.get(recipe.storage, UNPACKING)
    residual = 3 * tokens * hidden * dense_bytes  # twice, and normed
    wide = tokens * inner * dense_bytes  # gate or up
    swiglu = 3 * wide  # the gate's SiLU, up, their product
    products = 4 * sum(min(count, WIDENED_AT_ONCE) for count in (tokens * hidden, weights, tokens * inner))
    up = wide + weights * dense_bytes + max(unpacking, wide)  # the gate, the matrix of up, its result
    most = swiglu if recipe.storage == "dense" else max(swiglu, up)
    attended = 0
    if attention == MATH:  # q, k and v before and after they are turned, keys and values of every head, the result
        attended = 8 * tokens * hidden * dense_bytes + run_bytes(hidden // ENCODER_HEAD, tokens, ENCODER_HEAD)
    return angles + residual + max(most + (products if widens else 0), attended)


def _vectors(drawing: Drawing, branch: Branch) -> int:
    return drawing.steps * branch.num_layers * 4 * branch.hidden_size * 4


def _unpacking(drawing: Drawing, weights: int) -> int:
    """Bytes of a run of a matrix of so many weights between its packed form and the computing type."""
    return min(4 * weights, WIDENING) if drawing.recipe.storage == "fp8" else UNPACKING


def _block_bytes(drawing: Drawing, branch: Branch, sees_text: bool, kinds: tuple[str, ...]) -> int:
    """The most that is alive in `backbone.Block.forward`, of matrices of these kinds (`BLOCK_LINEARS`)."""
    hidden, inner, width = branch.hidden_size, branch.intermediate_size, drawing.dense_bytes
    tokens, kernels = drawing.tokens(sees_text), drawing.kernels
    qkv, o, gate_up, down = _merged_kind(kinds[:3]), kinds[3], _merged_kind(kinds[4:6]), kinds[6]

    def operand(kind: str, columns: int) -> int:
        """What a matrix reads: INT8 rows with a float32 scale, or the computing type."""
        return tokens * (columns + 4 if kind in ROUNDING_KERNELS else columns * width)

    def product(kind: str, rows: int, columns: int) -> int:
        """A product's result, with what it takes to make it."""
        result = tokens * rows * width
        made = result + product_bytes(kernels, tokens, rows)
        if kind == "decoded8":
            return rows * columns + max(decoding_bytes(kernels, rows * columns), made)
        if kind in ROUNDING_KERNELS:
            return made
        if kind == "apart":  # each by itself, then side by side
            return max(made, 2 * result + rows * columns * (4 + width))
        if kind != "decoded":
            return result
        return rows * columns * width + max(_unpacking(drawing, rows * columns), result)

    update = tokens * hidden * width  # (M, hidden), as large as the residual
    residual = update + operand(qkv, hidden)  # and x, what the first matrix reads, which the caller holds
    attended = update + tokens * branch.num_attention_heads * 4 + _attention_bytes(drawing, branch, tokens)
    rounded = operand(o, hidden) if o in ROUNDING_KERNELS else 0
    rounding = operand_bytes(kernels, drawing.input_format(o), tokens, hidden) if rounded else 0
    x, wide = operand(gate_up, hidden), operand(down, inner)

    def widened(kind: str, rows: int, columns: int) -> int:
        return _widened_bytes(drawing, kind, tokens, rows, columns)

    read = max(operand_bytes(kernels, drawing.input_format(kind), tokens, hidden) for kind in (qkv, gate_up))
    moments = {
        "qkv": product(qkv, 3 * hidden, hidden) + widened(qkv, 3 * hidden, hidden),
        "heads": tokens * 3 * hidden * width + heads_bytes(kernels, tokens, hidden),
        "attention": tokens * 3 * hidden * width + attended,
        "o": update + rounded + max(rounding, product(o, hidden, hidden) + widened(o, hidden, hidden)),
        "add_norm": update + max(add_bytes(kernels, tokens, hidden), x + read),
        "gate_up": x + product(gate_up, 2 * inner, hidden) + widened(gate_up, 2 * inner, hidden),
        "swiglu": tokens * 2 * inner * width + wide + swiglu_bytes(kernels, drawing.input_format(down), tokens, inner),
        "down": wide + product(down, hidden, inner) + widened(down, hidden, inner),
    }
    return residual + max(moments.values())


def _merged_kind(kinds: tuple[str, ...]) -> str:
    return kinds[0] if len(set(kinds)) == 1 else "apart"


def _attention_bytes(drawing: Drawing, branch: Branch, tokens: int) -> int:
    """What attention takes beside its result: a run of scores where it holds them, and float32 sums of 16-bit results
    in the memory-efficient kernels, whose registers do not hold heads of 256. q, k and v become float16 where they
    are."""
    if drawing.attention == MATH:
        return run_bytes(branch.num_attention_heads, tokens, branch.attention_head_dim)
    return tokens * branch.hidden_size * 4 if drawing.attention == EFFICIENT and drawing.dense_bytes == 2 else 0


def _widened_bytes(drawing: Drawing, kind: str, tokens: int, rows: int, columns: int) -> int:
    """What a dense product takes in float32 beside its operands: a run of inputs, of weights and of results."""
    if not drawing.widens or kind in ROUNDING_KERNELS:
        return 0
    return 4 * sum(min(count, WIDENED_AT_ONCE) for count in (tokens * columns, rows * columns, tokens * rows))


def _decoder_bytes(model: Model, pixels: int, dense_bytes: int) -> int:
    """The decoder's worst moment, among its last convolutions, where channels are few and pixels many."""
    width, second = model.vae_widths[:2]
    copies = CONVOLVES_IN_COPIES and dense_bytes == 2
    enlarging = 2 * second + (2 * second if copies else 0)  # channels at every pixel
    narrowing = 2 * second + width + (second + width if copies else 0)
    channels = max(enlarging, narrowing, 3 * second)
    filters = 9 * second**2 * dense_bytes
    return round(pixels * channels * dense_bytes) + pixels * 10 + filters
