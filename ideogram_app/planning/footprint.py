"""How many bytes a model takes: on the device, in RAM and on disk, counted before anything is loaded.

Every number is counted from the shapes in catalog/models.py; what is alive beside the weights, moment by moment, is in
planning/activations.py. A prediction is the sum of what can be told apart (`Share`), so that a page can show where the
memory goes and a measurement can be held against the part that it measures: PyTorch counts tensors and library
workspaces, a driver counts the context and the allocator's gaps as well.

Left out: the exact order in which an allocator places tensors (a share stands for it), attention kernels that keep
the full matrix of scores on CUDA (the program never calls them there), and vision parts of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ideogram_app.catalog.models import LATENT_CHANNELS, Branch, Model, held_bytes, weight_bytes
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import DEFAULT, DENSE, ENCODERS, encoder_bytes, find_encoder_recipe
from ideogram_app.machine.staging import BUFFERS, CHUNK
from ideogram_app.planning.activations import (
    MAX_TEXT_TOKENS,
    STEPS,
    Drawing,
    decode_bytes,
    encode_bytes,
    latents_bytes,
    prepare_bytes,
    prepared_bytes,
    preview_bytes,
    standing_bytes,
    step_bytes,
)
from ideogram_app.planning.streaming import FEWEST_SLOTS

# Gaps that PyTorch's allocator leaves, computed by replaying every tensor of a picture in a model of it and looking for
# the smallest device on which all of them find room (benchmarks/results/memory-counted.json). A segment is a whole
# multiple of 2 MiB, and of Q4_K's matrices the last multiple is half empty; between tensors of a step, which come in
# many sizes, more is lost.
ALLOCATOR_SHARE = 1.055
STEP_SHARE = 1.2
# An assumption: nothing here has seen a GPU. Users report 0.3 to 0.5 GB for the context with the kernels that a program
# of PyTorch has loaded, by nvidia-smi.
DEVICE_CONTEXT_BYTES = 600_000_000
LIBRARY_BYTES = 2**25  # cuBLAS's workspace, from PyTorch's own allocator: 8.1 MiB, 32 on Hopper (CublasHandlePool.cpp)
HOST_PROCESS_BYTES = 2_000_000_000  # Python, torch and Gradio: 0.5 GB measured without CUDA, the rest is CUDA's own
DISK_MARGIN = 1.1  # free disk asked for, per byte that will be written


@dataclass(frozen=True)
class Footprint:
    """What one recipe of one model takes at one size; all in bytes.

    Attributes:
        weights: of what every step needs of both transformers.
        branches: that of each transformer.
        once: of what runs once a picture; it rests in host memory and visits the device, layer by layer.
        block: one transformer block, the largest.
        workspace: all that is beside the weights until the last step is done, at its highest, and the gaps between.
        standing: what stays while the picture is decoded.
        encoder, encoder_layer: the text encoder, and what of it is on the device where its layers pass through; each
            with what it makes.
        encoder_table: what then stays in host memory.
        decode_whole: `standing`, and the decoder at work on the whole picture.
        staging: host memory in which one matrix is prepared.
        download, disk: fetched, and fetched and written together.
    """

    weights: int
    branches: tuple[int, int]
    once: int
    block: int
    workspace: int
    standing: int
    encoder: int
    encoder_layer: int
    encoder_table: int
    decode_whole: int
    staging: int
    download: int
    disk: int


@dataclass(frozen=True)
class Share:
    """Where the memory of a device goes in one phase; bytes.

    Attributes:
        weights: that stay, and places for those that travel.
        standing: prepared text and vectors, latents, the decoder; while it decodes, the last two.
        activations: what is at work.
        libraries: workspaces of cuBLAS. PyTorch's own counters show these four together.
        slack: gaps that the allocator leaves; with it its counter of reserved memory.
        context: the driver's, in no counter of PyTorch.
    """

    weights: int
    standing: int
    activations: int
    libraries: int
    slack: int
    context: int

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return self.weights + self.standing + self.activations + self.libraries

    @property
    def total(self) -> int:
        """What must be free before."""
        return self.allocated + self.slack + self.context


def footprint(
    model: Model,
    recipe: Recipe,
    size: tuple[int, int],
    dense_bytes: int,
    fused_attention: bool = True,
    *,
    text_tokens: int = MAX_TEXT_TOKENS,
    steps: int = STEPS,
    arithmetic: str = "",
    kernels: str = "triton",
) -> Footprint:
    """Count everything.

    Args:
        dense_bytes: bytes of the computing type, 2 or 4.
        fused_attention: whether scores are never held as a whole.
        text_tokens: of the caption; the longest where it is not known.
        steps: of the preset.
        arithmetic: of Q4_K, w4a8 or w4a16; "" stands for the one that needs more.
        kernels: triton, or int_mm on Turing.
    """
    drawing = Drawing(model, recipe, size, dense_bytes, text_tokens, steps, arithmetic, kernels, fused_attention)
    held = [_held(drawing, branch, number == 0) for number, branch in enumerate(model.branches)]
    (first, guest), (second, other) = held
    stored = sum(weight_bytes(branch, recipe, dense_bytes) for branch in model.branches)
    standing = latents_bytes(drawing)
    encoder, table, layer = _encoder(model, dense_bytes)
    reading = encode_bytes(model.conditional, find_encoder_recipe(DEFAULT), text_tokens, dense_bytes)
    return Footprint(
        weights=first + second,
        branches=(first, second),
        once=guest + other,
        block=max(_block(drawing, branch) for branch in model.branches),
        workspace=round(max(phase_bytes(drawing).values()) * STEP_SHARE),
        standing=standing,
        encoder=encoder + reading,
        encoder_layer=FEWEST_SLOTS * layer + reading,
        encoder_table=table,
        decode_whole=standing + decode_bytes(model, *size, dense_bytes),
        staging=max(BUFFERS * CHUNK, 2 * 4 * max(row.rows * row.columns for row in model.conditional.linears())),
        download=model.source_bytes,
        disk=model.source_bytes + stored + (encoder if model.source_bytes else 0),
    )


def phase_bytes(drawing: Drawing) -> dict[str, int]:
    """Device bytes beside the weights of both transformers in each phase between loading and decoding."""
    model, width = drawing.model, drawing.dense_bytes
    standing = standing_bytes(drawing)
    around = model.vae_parameters * width + drawing.image_tokens * LATENT_CHANNELS * 4
    first = prepared_bytes(drawing, model.conditional, True)
    guided = drawing.image_tokens * LATENT_CHANNELS * width  # the other's velocity is there already
    return {
        "prepare": around
        + max(
            prepare_bytes(drawing, model.conditional, True),
            first + prepare_bytes(drawing, model.unconditional, False),
        ),
        "step": standing
        + max(
            step_bytes(drawing, model.conditional, True),
            step_bytes(drawing, model.unconditional, False) + guided,
        ),
        "preview": standing + preview_bytes(model, drawing.size, width),
    }


def encoder_weights(model: Model, dense_bytes: int) -> int:
    """Bytes of the text encoder: as it ships, or as it is kept beside packed transformers."""
    return encoder_bytes(ENCODERS[model.text_encoder], _encoder_recipe(model), dense_bytes)


def device_share(kept: int, busy: int, standing: int = 0) -> Share:
    """Where memory goes when `kept` bytes of weights lie on a device and a phase needs `busy` more.

    Args:
        standing: that part of `busy` which is not at work.
    """
    allocated = kept + busy + LIBRARY_BYTES
    slack = round(allocated * ALLOCATOR_SHARE) - allocated
    return Share(kept, standing, busy - standing, LIBRARY_BYTES, slack, DEVICE_CONTEXT_BYTES)


def device_bytes(kept: int, busy: int) -> int:
    """Device memory in use when `kept` bytes of weights lie there and a phase needs `busy` more."""
    return device_share(kept, busy).total


def room_for_weights(free: int, busy: int) -> int:
    """The inverse of `device_bytes`: weight bytes that fit beside a phase; negative where not even that fits."""
    return int((free - DEVICE_CONTEXT_BYTES) / ALLOCATOR_SHARE) - LIBRARY_BYTES - busy


def _held(drawing: Drawing, branch: Branch, sees_text: bool) -> tuple[int, int]:
    """What a branch holds for every step, and what once; Q4_K that is rounded to INT8 has a scale a row besides."""
    every_step, once = held_bytes(branch, drawing.recipe, drawing.dense_bytes, sees_text)
    scaled = [linear for linear in branch.linears() if drawing.kind(linear.name) == "scratch8"]
    rows = sum(linear.rows for linear in scaled if not linear.once)
    return every_step + 4 * rows, once + 4 * (sum(linear.rows for linear in scaled) - rows)


def _block(drawing: Drawing, branch: Branch) -> int:
    """Bytes of one block: the difference that one layer more makes."""
    one_more = replace(branch, num_layers=branch.num_layers + 1)
    return _held(drawing, one_more, False)[0] - _held(drawing, branch, False)[0]


def _encoder(model: Model, dense_bytes: int) -> tuple[int, int, int]:
    """The text encoder, its embedding table, and one of its layers."""
    whole, encoder = encoder_weights(model, dense_bytes), ENCODERS[model.text_encoder]
    table = encoder_bytes(replace(encoder, num_hidden_layers=0), _encoder_recipe(model), dense_bytes)
    return whole, table, (whole - table) // encoder.num_hidden_layers


def _encoder_recipe(model: Model) -> Recipe:
    """As it is kept beside packed transformers, or as it ships."""
    return find_encoder_recipe(DEFAULT if model.source_bytes else DENSE)
