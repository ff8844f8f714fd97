"""How many bytes a model takes: on the device, in RAM and on disk, counted before anything is loaded.

Every number is counted from the shapes in architecture.py, on the safe side: the longest caption, the widest layer,
nothing freed early. The formulas stand beside the functions; the constants name their source.

Left out: the exact order in which an allocator places tensors (a share stands for it), attention kernels that keep
the full matrix of scores on CUDA (the program never calls them there), and vision parts of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.architecture import PIXELS_PER_TOKEN, Branch, Linear, Model, held_bytes, weight_bytes
from ideogram_app.recipes import Recipe
from ideogram_app.text_encoder import DEFAULT, find_encoder_recipe

TEXT_TOKENS = 2048  # the longest caption the text encoder takes
ALLOCATOR_SHARE = 1.03  # blocks are rounded up and leave gaps
DEVICE_CONTEXT_BYTES = 600_000_000  # CUDA context, cuBLAS workspaces and loaded kernels on a current driver
HOST_PROCESS_BYTES = 2_000_000_000  # Python, torch and Gradio: 0.5 GB measured without CUDA, the rest is CUDA's own
DECODER_BYTES_PER_PIXEL = 2 * 4 * 256  # VAE decoder at full size: four live bf16 tensors of 256 channels
TILE_PIXELS = 512 * 512  # where the whole picture is too large to decode, it is decoded in tiles of this size
STREAM_BUFFERS = 2  # one block is computed while the next arrives
DISK_MARGIN = 1.1  # free disk asked for, per byte that will be written


@dataclass(frozen=True)
class Footprint:
    """What one recipe of one model takes at one size; all in bytes.

    Attributes:
        weights: of what every step needs of both transformers.
        branches: that of each transformer.
        once: of what runs once a picture; it rests in host memory and visits the device.
        blocks: that part of `weights` which can be streamed.
        block: one transformer block, the largest.
        workspace: activations and scratch of one pass.
        encoder, encoder_layer: the text encoder, and one of its layers; each with the features it makes.
        decode_whole, decode_tiled: the VAE and its activations.
        staging: host memory in which one matrix is prepared.
        download, disk: fetched, and fetched and written together.
    """

    weights: int
    branches: tuple[int, int]
    once: int
    blocks: int
    block: int
    workspace: int
    encoder: int
    encoder_layer: int
    decode_whole: int
    decode_tiled: int
    staging: int
    download: int
    disk: int


def footprint(
    model: Model, recipe: Recipe, size: tuple[int, int], dense_bytes: int, fused_attention: bool = True
) -> Footprint:
    """Count everything.

    Args:
        dense_bytes: bytes of the computing type, 2 or 4.
        fused_attention: whether scores are never held as a whole.
    """
    first, guest = held_bytes(model.conditional, recipe, dense_bytes, sees_text=True)
    second, other = held_bytes(model.unconditional, recipe, dense_bytes, sees_text=False)
    stored = sum(weight_bytes(branch, recipe, dense_bytes) for branch in model.branches)
    outside, block = zip(*(_outside_and_block(branch, recipe, dense_bytes) for branch in model.branches), strict=True)
    pixels = size[0] * size[1]
    vae = model.vae_parameters * dense_bytes
    features = _feature_bytes(model.conditional, dense_bytes)
    decoder = DECODER_BYTES_PER_PIXEL * dense_bytes // 2
    encoder = encoder_weights(model, dense_bytes)
    return Footprint(
        weights=first + second,
        branches=(first, second),
        once=guest + other,
        blocks=first + second - sum(outside),
        block=max(block),
        workspace=max(
            _workspace_bytes(model.conditional, recipe, pixels, dense_bytes, fused_attention),
            guest + features + _scratch_bytes(model.conditional, recipe, dense_bytes, once=True),
        ),
        encoder=encoder + features,
        encoder_layer=encoder // 36 + features,
        decode_whole=vae + pixels * decoder,
        decode_tiled=vae + min(pixels, TILE_PIXELS) * decoder,
        staging=2 * 4 * max(_count(linear) for linear in model.conditional.linears()),  # float32 and its rounded twin
        download=model.source_bytes,
        disk=model.source_bytes + stored + (encoder if model.source_bytes else 0),
    )


def encoder_weights(model: Model, dense_bytes: int) -> int:
    """Bytes of the text encoder: as it ships, or as it is kept beside packed transformers."""
    each = find_encoder_recipe(DEFAULT).bytes_per_weight if model.source_bytes else dense_bytes
    return round(model.text_encoder_parameters * each)


def device_bytes(kept: int, busy: int) -> int:
    """Device memory in use when `kept` bytes of weights lie there and a phase needs `busy` more."""
    return round((kept + busy) * ALLOCATOR_SHARE) + DEVICE_CONTEXT_BYTES


def room_for_weights(free: int, busy: int) -> int:
    """The inverse of `device_bytes`: weight bytes that fit beside a phase; negative where not even that fits."""
    return int((free - DEVICE_CONTEXT_BYTES) / ALLOCATOR_SHARE) - busy


def _count(linear: Linear) -> int:
    return linear.rows * linear.columns


def _outside_and_block(branch: Branch, recipe: Recipe, dense_bytes: int) -> tuple[int, int]:
    """Bytes outside the blocks, and of one block: the difference that one layer more makes."""
    one_more = Branch(**{**vars(branch), "num_layers": branch.num_layers + 1})
    total, _ = held_bytes(branch, recipe, dense_bytes, False)
    block = held_bytes(one_more, recipe, dense_bytes, False)[0] - total
    return total - branch.num_layers * block, block


def _feature_bytes(branch: Branch, dense_bytes: int) -> int:
    """Text features before their projection: once as computed and once in float32 for the norm."""
    return TEXT_TOKENS * branch.llm_features_dim * (dense_bytes + 4)


def _workspace_bytes(branch: Branch, recipe: Recipe, pixels: int, dense_bytes: int, fused_attention: bool) -> int:
    """One block's activations, and scratch for a matrix decoded at its use.

    A token holds four vectors of the hidden size (residual, normed input, output, rotary copy) and five of the
    feed-forward size (both arms, their product, and the INT32 sums where these are not fused away).
    """
    tokens = TEXT_TOKENS + pixels // PIXELS_PER_TOKEN**2
    activations = tokens * (4 * branch.hidden_size + 5 * branch.intermediate_size) * dense_bytes
    if not fused_attention:
        activations += 2 * branch.num_attention_heads * tokens**2 * dense_bytes
    return activations + _scratch_bytes(branch, recipe, dense_bytes, once=False)


def _scratch_bytes(branch: Branch, recipe: Recipe, dense_bytes: int, once: bool) -> int:
    """The largest matrix that is decoded at its use, of those that run once a picture or of the blocks' merged ones."""
    if recipe.quantizes_activations:
        return 0
    merged = {"attention.to_q": 3, "feed_forward.w1": 2}  # q, k and v are one matrix, w1 and w3 are one
    packed = (linear for linear in branch.linears() if recipe.packs(linear.name) and linear.once == once)
    times = ((linear, merged.get(".".join(linear.name.split(".")[2:]), 1)) for linear in packed)
    return max((count * _count(linear) for linear, count in times), default=0) * dense_bytes


def gb(size: float) -> str:
    """Bytes for people, in powers of ten as disks and downloads are sold: 19313000000 -> 19.3 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
