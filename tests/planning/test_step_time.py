"""Published peaks and counted work: cards by their names, times that were published, work that was counted."""

from __future__ import annotations

import pytest

from ideogram_app.catalog.models import MODELS
from ideogram_app.catalog.recipes import RECIPES
from ideogram_app.machine.gpu_specs import CARDS, Rates, find_rates
from ideogram_app.planning.step_time import EFFICIENCY, branch_flops, ideal_seconds, published_share, step_flops

MODEL = MODELS["ideogram-4"]


def step_seconds(name: str, recipe: str, arithmetic: str = "") -> float:
    rates, row = find_rates(name), RECIPES[recipe]
    assert rates
    products = arithmetic or row.arithmetic
    return ideal_seconds(rates, step_flops(MODEL, 1024, 1024), products) / published_share(row, products)


def test_the_work_of_a_step_is_the_published_count() -> None:
    work = step_flops(MODEL, 1024, 1024)
    assert (work.matrices + work.attention) / 1e12 == pytest.approx(169.8, rel=0.002)


def test_a_step_is_both_transformers_and_only_one_of_them_sees_the_text() -> None:
    first, second = branch_flops(MODEL, (1024, 1024), 300)
    assert step_flops(MODEL, 1024, 1024, 300) == first + second
    assert first.matrices / second.matrices == pytest.approx(4396 / 4096)
    assert first.attention / second.attention == pytest.approx((4396 / 4096) ** 2)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 6GB Laptop"),
        ("NVIDIA GeForce RTX 3050 Ti Laptop GPU", "RTX 3050 Ti Laptop"),
        ("NVIDIA GeForce GTX 1660 Ti", "GTX 1660 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA RTX A4000", "RTX A4000"),
        ("Quadro RTX 4000", "Quadro RTX 4000"),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", None),
        ("NVIDIA RTX A2000 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1060 6GB", None),
        ("AMD Radeon RX 7900 XTX", None),
        ("Apple M3", None),
    ],
)
def test_a_card_is_found_by_its_whole_name_or_not_at_all(name: str, row: str | None) -> None:
    assert find_rates(name) == (CARDS[row] if row else None)


def test_laptop_parts_are_slower_than_the_cards_they_are_named_after() -> None:
    laptops = [name for name in CARDS if name.endswith("Laptop")]
    assert len(laptops) == 19
    for name in laptops:
        desktop = CARDS.get(name.removesuffix(" Laptop").removesuffix(" 6GB"))
        if desktop:  # there is no desktop RTX 4050 and no RTX 3050 Ti
            assert 0.25 < CARDS[name].tflops_16bit / desktop.tflops_16bit < 1


def test_a_laptop_part_counts_at_the_low_end_of_its_clocks() -> None:
    """RTX 4060 Laptop GPU: 3072 cores, boost clock 1470 to 2370 MHz; two operations a core and clock."""
    rates = find_rates("NVIDIA GeForce RTX 4060 Laptop GPU")
    assert rates and rates.tflops_16bit == pytest.approx(2 * 2 * 3072 * 1.47e9 / 1e12)


def test_gtx_16_cards_gain_nothing_from_int8() -> None:
    for name in ("GTX 1650", "GTX 1660", "GTX 1660 SUPER", "GTX 1660 Ti"):
        assert CARDS[name].int8_gain == 1


def test_every_other_card_multiplies_int8_at_least_twice_as_fast_as_16_bits() -> None:
    for name, rates in CARDS.items():
        if not name.startswith("GTX 16") and name != "Tesla V100":
            assert rates.int8_gain == pytest.approx(4, rel=0.01) or rates.int8_gain == pytest.approx(2, rel=0.02)


def test_predicted_times_on_a_3090_are_the_published_ones() -> None:
    published = {"int8-w8a8": 156.5, "gguf-q4_k": 203.0, "gguf-q8_0": 176.0, "fp8": 172.9}
    for recipe, seconds in published.items():
        assert step_seconds("NVIDIA GeForce RTX 3090", recipe) * 48 == pytest.approx(seconds, rel=0.05)


def test_four_bits_on_int8_units_are_predicted_no_slower_than_int8() -> None:
    int8 = step_seconds("NVIDIA GeForce RTX 3090", "int8-w8a8-rotated")
    assert step_seconds("NVIDIA GeForce RTX 3090", "gguf-q4_k", "w4a8") == int8
    assert step_seconds("NVIDIA GeForce RTX 3090", "gguf-q4_k", "w4a16") > 1.2 * int8


def test_attention_never_runs_on_int8_units() -> None:
    work = step_flops(MODEL, 1024, 1024)
    assert ideal_seconds(Rates(1.0, 1e9), work, "w8a8") == pytest.approx(work.attention / 1e12, rel=1e-3)
    assert all(0 < share < 1 for share in EFFICIENCY.values())
