"""The planner: a table of machines with what each should run, then each rule by itself. No hardware, no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ideogram_app.architecture import MODELS
from ideogram_app.errors import RequestError
from ideogram_app.footprint import device_bytes, encoder_weights, footprint, gb, room_for_weights
from ideogram_app.hardware import DeviceUser, Hardware
from ideogram_app.planner import LADDER, Plan, plan
from ideogram_app.rates import CARDS, find_rates, step_seconds, step_work
from ideogram_app.recipes import RECIPES
from ideogram_app.wire import from_json, to_json

GIB = 2**30
GB = 10**9


def machine(name: str, capability: tuple[int, int] | None, gib: float, **known: Any) -> Hardware:
    """A desktop with this card: 93 % of it free, 32 GiB of RAM, a large disk, unless said otherwise."""
    usual: dict[str, Any] = {
        "kind": "cuda",
        "device_memory_bytes": int(gib * GIB),
        "device_free_bytes": int(gib * GIB * 0.93),
        "host_memory_bytes": 32 * GIB,
        "host_free_bytes": 24 * GIB,
        "disk_free_bytes": 500 * GB,
    }
    return Hardware(name=name, compute_capability=capability, **(usual | known))


GTX_1060 = machine("NVIDIA GeForce GTX 1060 6GB", (6, 1), 6)
GTX_1660 = machine("NVIDIA GeForce GTX 1660 Ti", (7, 5), 6)
RTX_2080_TI = machine("NVIDIA GeForce RTX 2080 Ti", (7, 5), 11)
RTX_3060 = machine("NVIDIA GeForce RTX 3060", (8, 6), 12)
RTX_3090 = machine("NVIDIA GeForce RTX 3090", (8, 6), 24)
RTX_4060 = machine("NVIDIA GeForce RTX 4060", (8, 9), 8)
RTX_4060_TI = machine("NVIDIA GeForce RTX 4060 Ti", (8, 9), 16)
H100 = machine("NVIDIA H100 80GB HBM3", (9, 0), 80)
APPLE = machine("Apple M3 Max", None, 48, kind="mps", host_memory_bytes=64 * GIB, host_free_bytes=55 * GIB)
PROCESSOR = Hardware(name="AMD Ryzen 9", cpu_cores=16, host_free_bytes=200 * GB, disk_free_bytes=500 * GB)

# machine, recipe, residency, computing type
TABLE = [
    (GTX_1060, "gguf-q4_k", "streamed", "float16"),
    (GTX_1660, "gguf-q4_k", "streamed", "float16"),
    (machine("NVIDIA GeForce RTX 2060", (7, 5), 6), "gguf-q4_k", "streamed", "float16"),
    (RTX_2080_TI, "gguf-q4_k", "streamed", "float16"),
    (machine("Quadro RTX 8000", (7, 5), 48), LADDER[0], "resident", "float16"),
    (machine("Tesla V100-SXM2-32GB", (7, 0), 32), "gguf-q4_k", "resident", "float16"),
    (machine("NVIDIA GeForce RTX 3080", (8, 6), 10), "gguf-q4_k", "streamed", "bfloat16"),
    (RTX_3060, "gguf-q4_k", "streamed", "bfloat16"),
    (RTX_3090, LADDER[0], "resident", "bfloat16"),
    (replace(RTX_3090, device_count=2), LADDER[0], "resident", "bfloat16"),
    (RTX_4060, "gguf-q4_k", "streamed", "bfloat16"),
    (RTX_4060_TI, "gguf-q4_k", "resident", "bfloat16"),
    (machine("NVIDIA RTX 4000 Ada Generation", (8, 9), 20), LADDER[0], "streamed", "bfloat16"),
    (machine("NVIDIA GeForce RTX 4090", (8, 9), 24), LADDER[0], "resident", "bfloat16"),
    (machine("NVIDIA GeForce RTX 5060", (12, 0), 8), "gguf-q4_k", "streamed", "bfloat16"),
    (machine("NVIDIA GeForce RTX 5070", (12, 0), 12), "gguf-q4_k", "streamed", "bfloat16"),
    (machine("NVIDIA GeForce RTX 5090", (12, 0), 32), LADDER[0], "resident", "bfloat16"),
    (machine("NVIDIA A100-PCIE-40GB", (8, 0), 40), LADDER[0], "resident", "bfloat16"),
    (machine("NVIDIA A100-SXM4-80GB", (8, 0), 80), LADDER[0], "resident", "bfloat16"),
    (H100, LADDER[0], "resident", "bfloat16"),
    (machine("NVIDIA H200", (9, 0), 140), LADDER[0], "resident", "bfloat16"),
    (machine("NVIDIA B200", (10, 0), 180), LADDER[0], "resident", "bfloat16"),
    (machine("AMD Radeon RX 7900 XTX", (11, 0), 24, kind="rocm"), LADDER[0], "resident", "bfloat16"),
    (machine("AMD Radeon RX 6800 XT", (10, 3), 16, kind="rocm"), "gguf-q4_k", "resident", "bfloat16"),
    (machine("Intel Arc A770", None, 16, kind="xpu"), "gguf-q4_k", "resident", "bfloat16"),
    (APPLE, "gguf-q4_k", "resident", "bfloat16"),
    (machine("Apple M3", None, 11.5, kind="mps", host_free_bytes=11 * GIB), "gguf-q4_k", "disk", "bfloat16"),
    (machine("Apple M3", None, 5.3, kind="mps", host_free_bytes=5 * GIB), None, None, "bfloat16"),
    (PROCESSOR, None, None, "float32"),
]


def label(value: Any) -> str:
    return f"{value.device_count}x{value.name}" if isinstance(value, Hardware) else str(value)


@pytest.mark.parametrize(("hardware", "recipe", "residency", "dtype"), TABLE, ids=label)
def test_each_machine_gets_what_suits_it(
    hardware: Hardware, recipe: str | None, residency: str | None, dtype: str
) -> None:
    decided = plan(hardware, "ideogram-4")
    assert (decided.recipe, decided.residency, decided.compute_dtype) == (recipe, residency, dtype)
    assert decided.fits is (recipe is not None)


@pytest.mark.parametrize("hardware", [row[0] for row in TABLE], ids=label)
def test_every_plan_has_reasons_survives_the_wire_and_stays_within_free_memory(hardware: Hardware) -> None:
    for model in MODELS:
        decided = plan(hardware, model)
        assert decided.reasons and all(reason.endswith(".") for reason in decided.reasons)
        assert from_json(Plan, to_json(decided)) == decided
        if decided.fits and hardware.device_free_bytes:
            assert decided.predicted.peak_device_bytes <= hardware.device_free_bytes
        if not decided.fits:
            assert decided.suggestion and decided.rejected


@pytest.mark.parametrize("hardware", [row[0] for row in TABLE], ids=label)
def test_the_miniature_fits_everywhere_and_shows_int8(hardware: Hardware) -> None:
    decided = plan(hardware, "miniature")
    assert (decided.recipe, decided.residency, decided.fits) == (LADDER[0], "resident", True)
    assert decided.predicted.download_bytes == 0


def test_the_sentence_for_a_24_gb_card_has_both_numbers() -> None:
    decided = plan(replace(RTX_3090, device_free_bytes=23_100_000_000), "ideogram-4")
    assert decided.reasons[0] == "INT8 W8A8 rotated keeps both transformers (17.3 GB) in the 23.1 GB that are free."


def test_free_memory_counts_and_not_the_total() -> None:
    browser = (DeviceUser("chrome", 9 * GB),)
    busy = plan(replace(RTX_3090, device_free_bytes=15 * GB, device_users=browser), "ideogram-4")
    assert (busy.recipe, busy.residency) == ("gguf-q4_k", "resident")
    assert any("chrome (9.0 GB)" in reason for reason in busy.reasons)
    assert "would be resident" in busy.suggestion


def test_a_little_too_little_memory_streams_a_little_of_int8() -> None:
    decided = plan(replace(RTX_3090, device_free_bytes=20 * GB), "ideogram-4")
    assert (decided.recipe, decided.residency) == (LADDER[0], "streamed")
    assert 0 < decided.streamed_bytes < 0.2 * decided.predicted.weight_bytes


def test_a_streamed_plan_holds_in_ram_what_travels() -> None:
    decided = plan(RTX_4060, "ideogram-4")
    assert decided.predicted.peak_host_bytes > decided.streamed_bytes > 0


def test_little_ram_leaves_the_disk_and_too_little_leaves_nothing() -> None:
    # 2.0 GB for the process, 2.0 to pack one matrix, 1.9 for the layers that run once a picture, and two blocks
    slow = plan(replace(RTX_4060, host_free_bytes=round(6.5 * GB)), "ideogram-4")
    assert (slow.recipe, slow.residency) == ("gguf-q4_k", "disk")
    none = plan(replace(RTX_4060, host_free_bytes=2 * GB), "ideogram-4")
    assert none.recipe is None and "RAM" in none.suggestion


def test_a_full_disk_refuses_and_names_how_much_is_missing() -> None:
    decided = plan(replace(RTX_3090, disk_free_bytes=30 * GB), "ideogram-4")
    assert decided.recipe is None and not decided.fits
    assert any("The disk lacks 21.5 GB" in reason for reason in decided.reasons)
    assert "disk" in decided.suggestion


def test_a_disk_that_holds_only_the_smaller_recipe_gets_it() -> None:
    assert plan(replace(RTX_3090, disk_free_bytes=53 * GB), "ideogram-4").recipe == "gguf-q4_k"


def test_what_is_stored_already_need_not_fit_again() -> None:
    hardware = replace(RTX_3090, disk_free_bytes=GB)
    assert not plan(hardware, "ideogram-4").fits
    assert plan(hardware, "ideogram-4", stored_bytes=56 * GB).recipe == LADDER[0]


def test_a_recipe_that_is_ready_needs_no_disk_even_after_its_download_was_deleted() -> None:
    hardware = replace(RTX_3090, disk_free_bytes=GB)
    decided = plan(hardware, "ideogram-4", ready=("gguf-q4_k",))
    assert (decided.recipe, decided.fits) == ("gguf-q4_k", True)
    assert not plan(hardware, "ideogram-4", recipe="fp8", ready=("gguf-q4_k",)).fits


def test_a_recipe_asked_for_is_kept_where_it_can_run_at_all() -> None:
    for recipe in RECIPES:
        decided = plan(RTX_3060, "ideogram-4", recipe=recipe)
        assert decided.requested_recipe == recipe
        assert decided.recipe == recipe
    assert plan(RTX_3060, "ideogram-4", recipe="int8-w8a8").residency == "streamed"


def test_a_recipe_asked_for_is_never_swapped() -> None:
    hardware = replace(RTX_3090, disk_free_bytes=53 * GB)
    decided = plan(hardware, "ideogram-4", recipe="int8-w8a8")
    assert (decided.recipe, decided.fits, decided.requested_recipe) == (None, False, "int8-w8a8")
    assert [row.recipe for row in decided.rejected] == ["int8-w8a8"]
    assert "GGUF Q4_K" in decided.suggestion


def test_int8_asked_for_on_a_card_without_units_says_so() -> None:
    decided = plan(GTX_1060, "ideogram-4", recipe="int8-w8a8")
    assert decided.recipe == "int8-w8a8"
    assert any("asked for by name" in reason for reason in decided.reasons)


def test_gtx_16_cards_are_turing_without_tensor_cores() -> None:
    roomy = plan(machine("NVIDIA GeForce GTX 1660", (7, 5), 48), "ideogram-4")
    assert roomy.recipe == "gguf-q4_k"
    assert any("tensor cores" in reason for reason in roomy.reasons)


def test_two_cards_take_one_transformer_each_where_one_is_too_small() -> None:
    decided = plan(replace(RTX_4060_TI, device_count=2), "ideogram-4")
    assert (decided.recipe, decided.residency) == (LADDER[0], "resident")
    assert decided.branch_devices == ("cuda:0", "cuda:1")
    assert plan(replace(RTX_3090, device_count=2), "ideogram-4").branch_devices == ("cuda:0", "cuda:0")


def test_of_two_cards_the_fuller_one_counts() -> None:
    decided = plan(replace(RTX_4060_TI, device_count=2, devices_free_bytes=(15 * GB, 5 * GB)), "ideogram-4")
    assert (decided.recipe, decided.residency) == ("gguf-q4_k", "streamed")


def test_a_torch_without_kernels_for_the_card_refuses_and_says_which_to_install() -> None:
    pascal = plan(replace(GTX_1060, torch_supports_device=False, torch="2.13.0+cu130"), "ideogram-4")
    assert pascal.recipe is None and "CUDA 12.6" in pascal.suggestion and "sm_61" in pascal.reasons[0]
    blackwell = machine("NVIDIA GeForce RTX 5090", (12, 0), 32, torch_supports_device=False)
    assert "CUDA 12.8" in plan(blackwell, "ideogram-4").suggestion


def test_the_miniature_runs_on_the_processor_where_torch_has_no_kernels() -> None:
    decided = plan(replace(GTX_1060, torch_supports_device=False), "miniature")
    assert (decided.device, decided.compute_dtype, decided.fits) == ("cpu", "float32", True)


def test_a_processor_is_sent_to_the_miniature_and_told_why_the_card_is_not_used() -> None:
    decided = plan(
        replace(PROCESSOR, problem="The driver lists an RTX 3090, but this PyTorch is CPU-only."), "ideogram-4"
    )
    assert "miniature" in decided.suggestion and "CUDA" in decided.suggestion
    assert "RTX 3090" in decided.reasons[0]


def test_the_miniature_on_a_processor_computes_in_float32_and_is_sized_so() -> None:
    decided = plan(PROCESSOR, "miniature")
    assert decided.compute_dtype == "float32"
    assert decided.predicted.weight_bytes == 20_777_728  # without the projection of a text that one branch never sees


def test_a_data_centre_card_is_told_that_int8_gains_little() -> None:
    decided = plan(H100, "ideogram-4")
    assert decided.encoder == "resident"
    assert any("reference (34.7 GB) would fit" in reason and "2 times" in reason for reason in decided.reasons)


def test_a_large_picture_is_decoded_in_tiles() -> None:
    assert plan(RTX_3090, "ideogram-4").decode == "whole"
    assert plan(RTX_3090, "ideogram-4", width=2048, height=2048).decode == "tiled"


def test_a_described_card_without_free_memory_is_assumed_to_serve_a_desktop() -> None:
    assert plan(replace(RTX_3090, device_free_bytes=None), "ideogram-4").recipe == LADDER[0]


def test_more_free_memory_never_makes_a_plan_slower_to_feed() -> None:
    order = [None, "disk", "streamed", "resident"]
    for recipe in LADDER:
        ranks = []
        for gigabytes in range(2, 40):
            hardware = replace(RTX_3090, device_free_bytes=gigabytes * GB, device_memory_bytes=48 * GB)
            ranks.append(order.index(plan(hardware, "ideogram-4", recipe=recipe).residency))
        assert ranks == sorted(ranks)


@pytest.mark.parametrize("wish", [{"recipe": "int4"}, {"width": 1000}, {"width": 64, "height": 2048}])
def test_unknown_wishes_are_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        plan(RTX_3090, "ideogram-4", **wish)


def test_an_unknown_model_is_refused_with_those_that_exist() -> None:
    with pytest.raises(RequestError, match="miniature"):
        plan(RTX_3090, "ideogram-5")


def test_room_for_weights_is_the_inverse_of_device_bytes() -> None:
    for kept in (10**9, 19 * GB):
        assert abs(room_for_weights(device_bytes(kept, GB), GB) - kept) <= 2


def test_sizes_of_the_published_pair_are_those_that_were_counted() -> None:
    """On disk; on the device, where the layers that run once a picture are guests; and in RAM, where those rest."""
    pair = MODELS["ideogram-4"]
    sizes = {name: footprint(pair, RECIPES[name], (1024, 1024), 2) for name in ("reference", "int8-w8a8", "gguf-q4_k")}
    made = [gb(size.disk - size.download - encoder_weights(pair, 2)) for size in sizes.values()]
    assert made == ["37.1 GB", "19.3 GB", "11.3 GB"]
    assert [gb(size.weights) for size in sizes.values()] == ["34.7 GB", "17.3 GB", "9.8 GB"]
    assert [gb(size.once) for size in sizes.values()] == ["2.0 GB", "1.7 GB", "1.0 GB"]


def test_four_bits_on_int8_units_are_predicted_no_slower_than_int8() -> None:
    rates, model, size = find_rates("NVIDIA GeForce RTX 3090"), MODELS["ideogram-4"], (1024, 1024)
    int8 = step_seconds(rates, model, RECIPES["int8-w8a8-rotated"], size)
    assert step_seconds(rates, model, RECIPES["gguf-q4_k"], size, "w4a8") == int8
    assert step_seconds(rates, model, RECIPES["gguf-q4_k"], size, "w4a16") > 1.2 * int8


def test_turing_is_told_whose_int8_products_it_gets() -> None:
    for card in (RTX_2080_TI, RTX_3090, GTX_1660):
        reasons = " ".join(plan(card, "ideogram-4").reasons)
        assert ("Triton compiles none for Turing" in reasons) == (card is RTX_2080_TI)


@pytest.mark.parametrize(
    ("hardware", "arithmetic"),
    [(RTX_3090, "w4a8"), (GTX_1660, "w4a16"), (PROCESSOR, "w4a16"), (replace(RTX_3090, kind="rocm"), "w4a16")],
    ids=["Ampere", "Turing without tensor cores", "a processor", "AMD"],
)
def test_four_bit_weights_meet_int8_units_where_there_are_some(hardware: Hardware, arithmetic: str) -> None:
    model = "miniature" if hardware.kind == "cpu" else "ideogram-4"
    decided = plan(hardware, model, recipe="gguf-q4_k")
    assert decided.arithmetic == arithmetic
    assert any("decoded to" in reason for reason in decided.reasons) == (hardware.kind != "cpu")


def test_the_work_of_a_step_is_the_published_count() -> None:
    work = step_work(MODELS["ideogram-4"], 1024, 1024)
    assert (work.matrices + work.attention) / 1e12 == pytest.approx(169.8, rel=0.002)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1060 6GB", None),
        ("Apple M3", None),
    ],
)
def test_a_card_is_found_by_its_whole_name_or_not_at_all(name: str, row: str | None) -> None:
    assert find_rates(name) == (CARDS[row] if row else None)


def test_predicted_times_on_a_3090_are_the_published_ones() -> None:
    rates, model = find_rates("NVIDIA GeForce RTX 3090"), MODELS["ideogram-4"]
    published = {"int8-w8a8": 156.5, "gguf-q4_k": 203.0, "gguf-q8_0": 176.0, "fp8": 172.9}
    for recipe, seconds in published.items():
        predicted = step_seconds(rates, model, RECIPES[recipe], (1024, 1024))
        assert predicted is not None and predicted * 48 == pytest.approx(seconds, rel=0.05)
