"""Memory footprint of a model: bytes on the device, in RAM and on disk, counted before anything is loaded.

Every number is counted from the shapes in catalog/models.py; what is alive beside the weights, moment by moment, is in
planning/activations.py. A prediction is the sum of what can be told apart (`Share`), so that a page can show where the
memory goes and a measurement can be held against the part that it measures.

Left out: the exact order in which an allocator places tensors (a share stands for it), attention kernels that hold
the full matrix of scores on CUDA (the program never calls them there), and vision parts of the text encoder.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ideogram_app.catalog.models import LATENT_CHANNELS, Branch, Model
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import DEFAULT, DENSE, ENCODERS, encoder_bytes, find_encoder_recipe
from ideogram_app.machine.staging import BUFFERS, CHUNK
from ideogram_app.planning.activations import (
    DECODED_TO_INT8,
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
from ideogram_app.planning.weight_bytes import loaded_bytes, weight_bytes

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


@dataclass(frozen=True)
class Footprint:
    """What one recipe of one model takes at one size; all in bytes.

    Attributes:
        weights: of what every step needs of both transformers; branches: of each.
        once: of what runs once a picture; it rests in host memory and is staged on the device, layer by layer.
        block: one transformer block, the largest.
        workspace: all that is beside the weights until the last step is done, at its highest, and the gaps between.
        standing: what stays while the picture is decoded; decode_whole: that, and decoding the picture at once.
        encoder, encoder_layer: the text encoder, and what of it is on the device where it is streamed; each with its
            activations. encoder_table: what then stays in host memory.
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
        weights: that stay, and slots for those that are streamed.
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
        """What `torch.cuda.max_memory_allocated` would report."""
        return self.weights + self.standing + self.activations + self.libraries

    @property
    def total(self) -> int:
        """What must be free before."""
        return self.allocated + self.slack + self.context


@dataclass(frozen=True)
class BranchFootprint:
    """One transformer, in bytes: what every step needs, what runs once a picture, one block, and its file."""

    every_step: int
    once: int
    block: int
    stored: int


@functools.lru_cache(maxsize=256)  # it takes 20 ms, and one machine is planned for many times
def footprint(drawing: Drawing) -> Footprint:
    """Count everything; the longest caption where its length is not known."""
    model, width, tokens = drawing.model, drawing.dense_bytes, drawing.text_tokens
    conditional = branch_footprint(drawing, model.conditional, sees_text=True)
    unconditional = branch_footprint(drawing, model.unconditional, sees_text=False)
    standing = latents_bytes(drawing)
    encoder, table, layer = _encoder(model, width)
    how = drawing.attention, drawing.widens
    encoding = encode_bytes(model.conditional, find_encoder_recipe(DEFAULT), tokens, width, *how)
    largest = max(row.rows * row.columns for row in model.conditional.linears())
    written = conditional.stored + unconditional.stored + (encoder if model.source_bytes else 0)
    return Footprint(
        weights=conditional.every_step + unconditional.every_step,
        branches=(conditional.every_step, unconditional.every_step),
        once=conditional.once + unconditional.once,
        block=max(conditional.block, unconditional.block),
        workspace=round(max(phase_bytes(drawing).values()) * STEP_SHARE),
        standing=standing,
        encoder=encoder + encoding,
        encoder_layer=FEWEST_SLOTS * layer + encoding,
        encoder_table=table,
        decode_whole=standing + decode_bytes(model, *drawing.size, drawing.vae_bytes),
        staging=max(BUFFERS * CHUNK, 2 * 4 * largest),
        download=model.source_bytes,
        disk=model.source_bytes + written,
    )


def branch_footprint(drawing: Drawing, branch: Branch, sees_text: bool) -> BranchFootprint:
    """Count one transformer; a block is the difference that one layer more makes."""
    every_step, once = _loaded(drawing, branch, sees_text)
    deeper, _ = _loaded(drawing, replace(branch, num_layers=branch.num_layers + 1), sees_text)
    stored = weight_bytes(branch, drawing.recipe, drawing.dense_bytes)
    return BranchFootprint(every_step, once, deeper - every_step, stored)


def phase_bytes(drawing: Drawing) -> dict[str, int]:
    """Device bytes beside the weights of both transformers in each phase between loading and decoding."""
    model, width = drawing.model, drawing.dense_bytes
    latents = drawing.image_tokens * LATENT_CHANNELS
    first = prepared_bytes(drawing, model.conditional, True)
    prepare = prepare_bytes(drawing, model.conditional, True), prepare_bytes(drawing, model.unconditional, False)
    step = step_bytes(drawing, model.conditional, True), step_bytes(drawing, model.unconditional, False)
    standing = standing_bytes(drawing)
    return {
        "prepare": model.vae_parameters * drawing.vae_bytes + latents * 4 + max(prepare[0], first + prepare[1]),
        "step": standing + max(step[0], step[1] + latents * width),  # the other's velocity is there already
        "preview": standing + preview_bytes(model, drawing.size, drawing.vae_bytes),
    }


def encoder_weights(model: Model, dense_bytes: int) -> int:
    """Bytes of the text encoder: as it ships, or as it is stored beside packed transformers."""
    return encoder_bytes(ENCODERS[model.text_encoder], _encoder_recipe(model), dense_bytes)


def device_share(weights: int, busy: int, standing: int = 0) -> Share:
    """Where memory goes when a phase needs `busy` bytes beside weights; `standing`: that part of it not at work."""
    allocated = weights + busy + LIBRARY_BYTES
    slack = round(allocated * ALLOCATOR_SHARE) - allocated
    return Share(
        weights=weights,
        standing=standing,
        activations=busy - standing,
        libraries=LIBRARY_BYTES,
        slack=slack,
        context=DEVICE_CONTEXT_BYTES,
    )


def device_bytes(weights: int, busy: int) -> int:
    """Device memory in use when a phase needs `busy` bytes beside weights."""
    return device_share(weights, busy).total


def room_for_weights(free: int, busy: int) -> int:
    """The inverse of `device_bytes`: weight bytes that fit beside a phase; negative where not even that fits."""
    return int((free - DEVICE_CONTEXT_BYTES) / ALLOCATOR_SHARE) - LIBRARY_BYTES - busy


def _loaded(drawing: Drawing, branch: Branch, sees_text: bool) -> tuple[int, int]:
    """Bytes for every step, and once; Q4_K that is rounded to INT8 has a scale a row besides."""
    every_step, once = loaded_bytes(branch, drawing.recipe, drawing.dense_bytes, sees_text)
    scaled = [linear for linear in branch.linears() if drawing.kind(linear.name) in DECODED_TO_INT8]
    rows = sum(linear.rows for linear in scaled if not linear.once)
    return every_step + 4 * rows, once + 4 * (sum(linear.rows for linear in scaled) - rows)


def _encoder(model: Model, dense_bytes: int) -> tuple[int, int, int]:
    """Bytes of the text encoder, its embedding table, and one of its layers."""
    whole, encoder = encoder_weights(model, dense_bytes), ENCODERS[model.text_encoder]
    table = encoder_bytes(replace(encoder, num_hidden_layers=0), _encoder_recipe(model), dense_bytes)
    return whole, table, (whole - table) // encoder.num_hidden_layers


def _encoder_recipe(model: Model) -> Recipe:
    return find_encoder_recipe(DEFAULT if model.source_bytes else DENSE)
