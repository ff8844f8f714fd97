"""Predictions of memory against memory that was counted, tensor by tensor, by running the real code without numbers.

A prediction is never below what is counted and at most 8 % above. Two layers of the published width stand for all 34:
depth adds weights, which are exact, and the norms' vectors, which are in the formulas (test_counted_memory.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.counting import ledger
from benchmarks.counting.counted import (
    Case,
    Counted,
    count_decode,
    count_encode,
    count_picture,
    count_pictures,
)
from ideogram_app.benchmark.shapes import Workload, find_shape
from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES, Recipe
from ideogram_app.catalog.text_encoder import ENCODER_RECIPES, PUBLISHED_ENCODER, encoder_bytes
from ideogram_app.machine.attention import EFFICIENT, MATH, SCORE_BYTES
from ideogram_app.planning.activations import Drawing, decode_bytes, encode_bytes, standing_bytes
from ideogram_app.planning.footprint import (
    DEVICE_CONTEXT_BYTES,
    STEP_SHARE,
    Footprint,
    device_bytes,
    device_share,
    encoder_weights,
    footprint,
    phase_bytes,
    room_for_weights,
)

pytestmark = pytest.mark.slow

ABOVE = 1.08  # at most
TWO = find_shape("layers=2")
WHOLE = MODELS["ideogram-4"]
SMALL_CHANGE = 4096  # tensors are counted in whole 512 bytes
AMPERE, TURING = (8, 6), (7, 5)
# width, height, text tokens: both ends of each, and what is usual
PICTURES = ((1024, 1024, 300), (2048, 2048, 2048), (512, 512, 20), (1536, 640, 300), (512, 512, 2048), (2048, 2048, 20))
# What a plan counts with on other cards than Ampere's under Linux.
ON_TURING = {"attention": EFFICIENT, "decoder_bytes": 4, "widens": True}
# recipe, arithmetic, card, how many of the pictures are counted, and kernels other than the card's with Triton
RECIPES_COUNTED = [
    ("reference", "", AMPERE, 2),
    ("int8-w8a8-rotated", "", AMPERE, 6),
    ("int8-w8a8-rotated", "", TURING, 2),
    ("int8-w8a8", "", TURING, 1),
    ("reference", "", TURING, 1),
    ("gguf-q4_k", "w4a8", TURING, 1),
    ("int8-w8a8", "", AMPERE, 2),  # fragile layers and the text projection in other types
    ("gguf-q4_k", "w4a8", AMPERE, 3),
    ("gguf-q4_k", "w4a16", AMPERE, 3),
    ("gguf-q8_0", "", AMPERE, 1),
    ("fp8", "", AMPERE, 2),
]
WITHOUT_TRITON = [
    ("reference", "", AMPERE, 1, "torch"),
    ("int8-w8a8-rotated", "", AMPERE, 2, "torch"),
    ("int8-w8a8", "", AMPERE, 2, "torch"),
    ("gguf-q4_k", "w4a8", AMPERE, 1, "torch"),
    ("gguf-q4_k", "w4a16", AMPERE, 1, "torch"),
    ("int8-w8a8-rotated", "", AMPERE, 1, "plain"),
]


def workload(width: int, height: int, text_tokens: int, dtype: str = "bfloat16") -> Workload:
    return Workload("layers=2", TWO, width, height, text_tokens, 2048, 48, dtype)


def predicted(recipe: Recipe, asked: Workload, arithmetic: str, **how: Any) -> tuple[Footprint, Drawing]:
    size = asked.width, asked.height
    drawing = Drawing(asked.model, recipe, size, 2, text_tokens=asked.text_tokens, arithmetic=arithmetic, **how)
    return footprint(drawing), drawing


@pytest.mark.parametrize(
    ("name", "arithmetic", "capability", "pictures", "kernels"),
    [*((*row, "int_mm" if row[2] == TURING else "triton") for row in RECIPES_COUNTED), *WITHOUT_TRITON],
)
def test_every_phase_takes_what_was_predicted_or_a_little_less(
    name: str, arithmetic: str, capability: tuple[int, int], pictures: int, kernels: str
) -> None:
    recipe, how = RECIPES[name].protecting(), {"kernels": kernels} | (ON_TURING if capability == TURING else {})
    workloads = [workload(*picture) for picture in PICTURES[:pictures]]
    if recipe.gguf_type == "Q4_K" and kernels != "torch":  # the first finds no scratch yet, others keep it
        workloads.insert(0, workloads[0])
    case = Case(workloads[0], recipe, arithmetic, capability, decodes=False, kernels=kernels)
    counted = list(zip(workloads, count_pictures(case, workloads), strict=True))
    for asked, found in counted[-pictures:]:
        made, drawing = predicted(recipe, asked, arithmetic, **how)
        phases = phase_bytes(drawing)
        assert made.weights == pytest.approx(found.kept, rel=1e-4)
        for phase in ("prepare", "step"):
            busy = found.phases[phase] - found.kept
            assert busy <= phases[phase] <= ABOVE * busy, f"{phase} of {asked.width} x {asked.height}"
        within(made.weights + made.workspace / STEP_SHARE, found.peak)
        assert found.prepared <= standing_bytes(drawing)


def test_sums_in_float32_are_counted_where_flash_attention_is_not_built() -> None:
    """As in PyTorch's wheels for Windows."""
    asked, recipe = workload(1024, 1024, 300), RECIPES["int8-w8a8-rotated"]
    found = count_picture(Case(asked, recipe, capability=AMPERE, decodes=False, flash=False))
    busy = found.phases["step"] - found.kept
    assert busy <= phase_bytes(predicted(recipe, asked, "", attention=EFFICIENT)[1])["step"] <= ABOVE * busy


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fused attention, as on a Mac or an RDNA card."""
    monkeypatch.setattr(ledger, "backend_on", lambda *asked: SDPBackend.MATH)


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("picture", [PICTURES[0], PICTURES[4]], ids=str)
def test_scores_in_runs_are_counted_where_no_kernel_is_fused(picture: tuple[int, int, int]) -> None:
    asked, recipe = workload(*picture), RECIPES["int8-w8a8-rotated"]
    found = count_picture(Case(asked, recipe, decodes=False))
    busy = found.phases["step"] - found.kept
    drawing = predicted(recipe, asked, "", attention=MATH)[1]
    # MPS rounds scores besides, which the ledger, on a CUDA device, does not see.
    assert busy <= phase_bytes(drawing)["step"] <= busy + SCORE_BYTES


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("tokens", [20, 2048])
def test_scores_of_a_caption_are_counted_where_no_kernel_is_fused(tokens: int) -> None:
    recipe = ENCODER_RECIPES["encoder-int8"]
    found = count_encode(recipe, tokens, torch.bfloat16, 1)
    expected = encode_bytes(WHOLE.conditional, recipe, tokens, 2, MATH)
    assert found.peak - found.kept <= expected + SMALL_CHANGE


@pytest.mark.parametrize(("capability", "flash"), [(TURING, True), (AMPERE, False)], ids=["Turing", "Windows"])
def test_a_caption_takes_no_scores_where_kernels_know_no_groups(capability: tuple[int, int], flash: bool) -> None:
    """32 heads of the longest one would be 1.1 GB of scores, twice in float32."""
    recipe, widens = ENCODER_RECIPES["encoder-int8"], capability == TURING
    found = count_encode(recipe, 2048, torch.bfloat16, 1, capability, flash)
    busy = found.peak - found.kept
    assert busy <= encode_bytes(WHOLE.conditional, recipe, 2048, 2, EFFICIENT, widens) <= 1.5 * busy


def within(expected: float, found: float) -> None:
    """Not below, but for the rounding of small tensors, and not far above."""
    assert found * 0.9999 <= expected <= ABOVE * found


@cache
def decoded(width: int, height: int, tile: int | None, dtype: torch.dtype) -> Counted:
    return count_decode(width, height, dtype, tile)


@pytest.mark.parametrize(
    ("width", "height", "tile", "dtype"),
    [
        (512, 512, None, torch.bfloat16),
        (1024, 1024, None, torch.bfloat16),
        (2048, 2048, None, torch.bfloat16),
        (1536, 640, None, torch.bfloat16),
        (1024, 1024, None, torch.float32),
        (2048, 2048, 1024, torch.bfloat16),
        (2048, 2048, 512, torch.bfloat16),
        (1024, 1024, 256, torch.bfloat16),
        (1536, 640, 384, torch.float32),
    ],
)
def test_decoding_takes_what_was_predicted(width: int, height: int, tile: int | None, dtype: torch.dtype) -> None:
    found = decoded(width, height, tile, dtype)
    busy = found.peak - found.kept
    assert busy <= decode_bytes(WHOLE, width, height, dtype.itemsize, tile) <= ABOVE * busy


def test_the_decoder_is_as_large_as_the_table_says() -> None:
    found = decoded(512, 512, None, torch.bfloat16)
    assert WHOLE.vae_parameters * 2 == pytest.approx(found.kept, rel=1e-3)  # tensors are rounded up to 512 bytes


def test_previews_fit_between_two_steps() -> None:
    recipe = RECIPES["int8-w8a8-rotated"]
    workloads = workload(1024, 1024, 20), workload(1536, 640, 20)
    for asked, found in zip(workloads, count_pictures(Case(workloads[0], recipe), workloads), strict=True):
        made, drawing = predicted(recipe, asked, "")
        phases = phase_bytes(drawing)
        busy = found.phases["preview"] - found.kept
        assert busy <= phases["preview"] <= ABOVE * busy
        whole = found.phases["decode"] - found.kept
        assert whole <= made.decode_whole <= ABOVE * whole


@pytest.mark.parametrize(
    ("name", "layers", "tokens"),
    [
        ("encoder-dense", 36, 300),  # as deep as it is, one takes no more than the first alone
        *((name, 1, 20) for name in ("encoder-int8", "encoder-q8_0", "encoder-q4_k")),
        *((name, 1, 2048) for name in ENCODER_RECIPES),
    ],
)
def test_reading_a_caption_takes_what_was_predicted(name: str, layers: int, tokens: int) -> None:
    recipe = ENCODER_RECIPES[name]
    found = count_encode(recipe, tokens, torch.bfloat16, layers)
    shape = replace(PUBLISHED_ENCODER, num_hidden_layers=layers)
    assert found.kept == pytest.approx(encoder_bytes(shape, recipe), rel=1e-3)
    busy, expected = found.peak - found.kept, encode_bytes(WHOLE.conditional, recipe, tokens, 2)
    assert busy <= expected + SMALL_CHANGE
    if tokens > 20:  # of a few words it is the decoded matrix alone; k_quants.decode takes less than is planned for
        assert expected <= ABOVE * busy


def test_a_caption_of_a_few_words_takes_a_matrix_decoded_and_little_else() -> None:
    found = count_encode(ENCODER_RECIPES["encoder-int8"], 20, torch.bfloat16, 1)
    expected = encode_bytes(WHOLE.conditional, ENCODER_RECIPES["encoder-int8"], 20, 2)
    assert expected <= ABOVE * (found.peak - found.kept)


SHALLOW: Sequence[tuple[str, str, int, int | None]] = [
    ("int8-w8a8-rotated", "", 1024, None),
    ("gguf-q4_k", "w4a16", 2048, 512),
]


@pytest.mark.parametrize(("name", "arithmetic", "side", "tile"), SHALLOW)
def test_a_device_of_the_predicted_size_has_room_for_every_tensor_where_the_allocator_puts_it(
    name: str, arithmetic: str, side: int, tile: int | None
) -> None:
    asked = replace(workload(side, side, 300), model=WHOLE)
    found = count_picture(Case(asked, RECIPES[name], arithmetic, tile=tile))
    made, _ = predicted(RECIPES[name], asked, arithmetic)
    decoding = made.standing + decode_bytes(WHOLE, side, side, 2, tile)
    expected = device_bytes(made.weights, max(made.workspace, decoding)) - DEVICE_CONTEXT_BYTES
    assert found.least <= expected <= ABOVE * found.least


def test_the_inverse_of_a_prediction_is_exact() -> None:
    for free in (6 * 10**9, 24 * 10**9):
        room = room_for_weights(free, 10**9)
        assert device_bytes(room, 10**9) == pytest.approx(free, abs=2)


def test_shares_sum_to_the_prediction() -> None:
    where = device_share(10**10, 10**9, 3 * 10**8)
    assert (where.weights, where.standing, where.activations) == (10**10, 3 * 10**8, 7 * 10**8)
    assert where.total == where.allocated + where.slack + where.context == device_bytes(10**10, 10**9)


def test_shorter_captions_and_smaller_pictures_take_less() -> None:
    recipe = RECIPES["int8-w8a8-rotated"]
    long, short = (footprint(Drawing(WHOLE, recipe, (1024, 1024), 2, text_tokens=tokens)) for tokens in (2048, 300))
    small = footprint(Drawing(WHOLE, recipe, (512, 512), 2, text_tokens=300))
    assert long.workspace > short.workspace >= small.workspace and long.encoder > short.encoder
    assert short.decode_whole > small.decode_whole


def test_an_encoder_whose_layers_pass_through_takes_two_of_them() -> None:
    made = footprint(Drawing(WHOLE, RECIPES["gguf-q4_k"], (1024, 1024), 2, text_tokens=300))
    whole = encoder_weights(WHOLE, 2)
    reading = made.encoder - whole
    assert made.encoder_layer - reading == pytest.approx(2 * (whole - made.encoder_table) / 36, rel=1e-3)
    assert made.encoder_table == pytest.approx(151936 * 4096 * 34 / 32, rel=1e-3)
