"""What a name tells of a card, and which two cards may share the work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ideogram_app.machine.capabilities import compute_type, int8_units, of_device, pair_objection
from ideogram_app.machine.gpu_specs import CARDS, published_capability
from ideogram_app.machine.hardware import Hardware
from tests.machines import RTX_2080_TI, RTX_3060, RTX_3090, geforce, machine

T1000 = machine("NVIDIA T1000 8GB", (7, 5), 8)
WITHOUT_TENSOR_CORES = [
    "NVIDIA GeForce GTX 1660",
    "NVIDIA GeForce GTX 1660 Ti with Max-Q Design",
    "NVIDIA GeForce GTX 1650 SUPER",
    "NVIDIA GeForce GTX 1630",
    "NVIDIA T500",
    "NVIDIA T550 Laptop GPU",
    "NVIDIA T600",
    "NVIDIA GeForce MX450",
    "NVIDIA GeForce MX550",
    "Quadro T1000",
    "NVIDIA T1000 8GB",
    "NVIDIA T1200 Laptop GPU",
    "Quadro T2000 with Max-Q Design",
    "NVIDIA CMP 30HX",
]


@pytest.mark.parametrize("name", WITHOUT_TENSOR_CORES)
def test_turing_without_tensor_cores_computes_in_float32_and_has_no_int8_units(name: str) -> None:
    for capability in ((7, 5), None):
        card = replace(T1000, name=name, compute_capability=capability)
        dtype, why = compute_type(card)
        assert (dtype, why.code) == ("float32", "computes_float32_turing")
        assert int8_units(card).code in ("int8_gtx_16", "int8_no_tensor_cores")


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("Tesla T4", (7, 5)),
        ("NVIDIA GeForce RTX 2060", (7, 5)),
        ("Quadro RTX 4000", (7, 5)),
        ("NVIDIA RTX A2000", (8, 6)),
        ("NVIDIA GeForce MX570", (8, 6)),
        ("NVIDIA T1000 of another generation", (8, 6)),
    ],
)
def test_cards_with_tensor_cores_keep_their_int8_units(name: str, capability: tuple[int, int]) -> None:
    card = replace(T1000, name=name, compute_capability=capability)
    assert compute_type(card)[0] != "float32" and not int8_units(card)


def test_a_name_of_another_maker_tells_nothing() -> None:
    assert compute_type(Hardware("rocm", "AMD Radeon RX 1660", (11, 0)))[0] == "bfloat16"


def pair(first: Hardware, *second: str, **known: object) -> Hardware:
    """Two cards in one machine, of which the second is known by its name, or better."""
    return replace(first, device_count=2, device_names=(first.name, *second), **known)


V100, TURING = "Tesla V100-SXM2-32GB", RTX_2080_TI.name


@pytest.mark.parametrize(
    ("machine", "code"),
    [
        (pair(RTX_3090, TURING), "pair_unlike"),
        (pair(RTX_3060, V100), "pair_unlike"),
        (pair(RTX_2080_TI, V100), "pair_unlike"),  # INT8 units on one alone
        (pair(RTX_2080_TI, "NVIDIA GeForce GTX 1660"), "pair_unlike"),
        (pair(RTX_3060, V100, devices_supported=(True, False)), "pair_no_kernels"),
        (pair(RTX_3060, V100, device_capabilities=((8, 6), (7, 0)), devices_supported=(True, True)), "pair_unlike"),
        (pair(RTX_3060, "NVIDIA Titan V"), "pair_speed_unknown"),
        (pair(RTX_3060, "NVIDIA Titan V", device_capabilities=((8, 6), (7, 0))), "pair_unlike"),
        # Of one name, and yet not alike: what was asked counts before the name.
        (pair(RTX_3060, RTX_3060.name, devices_supported=(True, False)), "pair_no_kernels"),
        (pair(RTX_3060, RTX_3090.name), ""),
        (pair(RTX_3060, "NVIDIA GeForce RTX 5060 Ti"), ""),
        (pair(RTX_2080_TI, "Tesla T4"), ""),
        (pair(RTX_3060), ""),
    ],
)
def test_two_cards_share_the_work_only_where_they_compute_alike(machine: Hardware, code: str) -> None:
    told, other_way = pair_objection(machine, 0, 1), pair_objection(machine, 1, 0)
    assert told.code == (f"not_paired+{code}" if code else "") and bool(told) is bool(other_way)


def test_a_device_that_was_asked_is_described_by_its_own_answers() -> None:
    two = pair(RTX_3090, V100, device_capabilities=((8, 6), (7, 0)), devices_supported=(True, False))
    other = of_device(two, 1)
    assert (other.name, other.compute_capability, other.architecture) == (V100, (7, 0), "Volta")
    assert other.torch_supports_device is False and of_device(two, 0).architecture == "Ampere"


def test_every_card_of_the_table_has_a_published_generation() -> None:
    assert all(published_capability(row) for row in CARDS)
    known = {"A10": (8, 6), "A100": (8, 0), "L4": (8, 9), "RTX 2000 Ada": (8, 9), "RTX 2080": (7, 5)}
    known |= {"RTX A4000": (8, 6), "RTX 4000 Ada": (8, 9), "RTX PRO 6000": (12, 0), "RTX 5000 Ada": (8, 9)}
    assert {row: published_capability(row) for row in known} == known
    assert published_capability(geforce("GTX 1080", (6, 1), 8).name) is None
