"""How fast cards are, from published peaks, and how long a step should take on one with all weights at hand.

A step is both transformers once. Its time is counted work divided by the card's dense peak and by the share of the
peak that published runs of this model reached. It is a planning number for people, good to perhaps a third either way;
what a machine really does is measured, remembered (planning/profile.py) and counted with from then on.

Left out: weights on the road (planning/streaming.py); AMD, Intel and Apple devices, for which nobody published a time
of this model; laptop parts of workstations and those named Max-Q. A card that is not in the table gets None.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ideogram_app.catalog.models import PIXELS_PER_TOKEN, Branch, Model
from ideogram_app.catalog.recipes import Recipe

TYPICAL_TEXT_TOKENS = 300  # of a usual JSON caption; the text is trimmed to what is there

# Share of the ideal time that published runs reached on a 3090, 48 steps at 1024 x 1024 (arXiv 2606.14598): INT8 fused
# 156.5 s of 40 s ideal; FP8 172.9 s of 114 s; GGUF Q8_0 176 s; Q4_K 203 s. Ideal is counted work over the peaks below.
# INT8 has the largest room upwards: 80 % was reported from a 5090.
EFFICIENCY = {"dense": 0.68, "fp8": 0.66, "int8": 0.26, "gguf-q8_0": 0.65, "gguf-q4_k": 0.56}
DISK_BYTES_PER_SECOND = 2.0e9  # an ordinary NVMe drive reading large files; an assumption, not a measurement
LINK_BYTES_PER_SECOND = 12e9  # PCIe 3 x16 or 4 x8 in practice; taken where the card's own link is not known


@dataclass(frozen=True)
class Rates:
    """Peaks of one card: dense teraflops (16-bit, summed in float32), INT8 teraops, bytes a second from RAM.

    `disk` is bytes a second from disk, None until it was measured.
    """

    tflops_16bit: float
    tops_int8: float
    link: float = LINK_BYTES_PER_SECOND
    disk: float | None = None

    @property
    def int8_gain(self) -> float:
        """How many times faster INT8 products are than 16-bit ones, on paper."""
        return self.tops_int8 / self.tflops_16bit


def _geforce(float32_tflops: float, link_gb: float = 24) -> Rates:
    """GeForce 30, 40 and 50: tensor units do 2 x (16-bit) and 8 x (INT8) the float32 rate (NVIDIA's white papers)."""
    return Rates(2 * float32_tflops, 8 * float32_tflops, link_gb * 1e9)


def _laptop(cores: int, lowest_boost_mhz: int) -> Rates:
    """A GeForce laptop part at the low end of its boost range, where small power limits hold it; PCIe 4 x8."""
    return _geforce(2 * cores * lowest_boost_mhz / 1e6, 12)


def _turing(float32_tflops: float) -> Rates:
    """GeForce 20: 4 x (float16) and 16 x (INT8) the float32 rate, PCIe 3."""
    return Rates(4 * float32_tflops, 16 * float32_tflops)


def _gtx_16(float32_tflops: float) -> Rates:
    """Turing without tensor cores: float16 at twice the float32 rate, and no INT8 units that a matrix product uses."""
    return Rates(2 * float32_tflops, 2 * float32_tflops)


def _professional(float32_tflops: float, link_gb: float = 24) -> Rates:
    """RTX A and RTX Ada: sums in float32 run at the full tensor rate, 4 x (16-bit) and 8 x (INT8) of float32."""
    return Rates(4 * float32_tflops, 8 * float32_tflops, link_gb * 1e9)


# Name fragment -> peaks; float32 rates at boost clock from NVIDIA's specifications, links by PCIe generation and lanes
# less a quarter for what is lost on the way. The longest fragment found in a name is its row.
CARDS: dict[str, Rates] = {
    "GTX 1650": _gtx_16(3.0),
    "GTX 1650 SUPER": _gtx_16(4.4),
    "GTX 1660": _gtx_16(5.0),
    "GTX 1660 SUPER": _gtx_16(5.0),
    "GTX 1660 Ti": _gtx_16(5.4),
    "RTX 2060": _turing(6.45),
    "RTX 2060 SUPER": _turing(7.2),
    "RTX 2070": _turing(7.5),
    "RTX 2070 SUPER": _turing(9.1),
    "RTX 2080": _turing(10.1),
    "RTX 2080 SUPER": _turing(11.2),
    "RTX 2080 Ti": _turing(13.45),
    "TITAN RTX": Rates(130.5, 261.0),
    "Quadro RTX 4000": Rates(57.0, 113.9),
    "Quadro RTX 5000": Rates(89.2, 178.4),
    "Quadro RTX 6000": Rates(130.5, 261.0),
    "Quadro RTX 8000": Rates(130.5, 261.0),
    "Tesla T4": Rates(65.0, 130.0),
    "Tesla V100": Rates(112.0, 112.0),  # the slower of its forms; no INT8 units
    "RTX 3050": _geforce(9.1, 12),
    "RTX 3060": _geforce(12.74),
    "RTX 3060 Ti": _geforce(16.2),
    "RTX 3070": _geforce(20.3),
    "RTX 3070 Ti": _geforce(21.7),
    "RTX 3080": _geforce(29.8),
    "RTX 3080 Ti": _geforce(34.1),
    "RTX 3090": _geforce(35.6),
    "RTX 3090 Ti": _geforce(40.0),
    "RTX 4060": _geforce(15.1, 12),
    "RTX 4060 Ti": _geforce(22.1, 12),
    "RTX 4070": _geforce(29.1),
    "RTX 4070 SUPER": _geforce(35.5),
    "RTX 4070 Ti": _geforce(40.1),
    "RTX 4070 Ti SUPER": _geforce(44.1),
    "RTX 4080": _geforce(48.7),
    "RTX 4080 SUPER": _geforce(52.2),
    "RTX 4090": _geforce(82.6),
    "RTX 5050": _geforce(13.2, 24),
    "RTX 5060": _geforce(19.2, 24),
    "RTX 5060 Ti": _geforce(23.7, 24),
    "RTX 5070": _geforce(30.9, 48),
    "RTX 5070 Ti": _geforce(43.9, 48),
    "RTX 5080": _geforce(56.3, 48),
    "RTX 5090": _geforce(104.8, 48),
    "RTX A2000": _professional(8.0),
    "RTX A4000": _professional(19.2),
    "RTX A4500": _professional(23.7),
    "RTX A5000": _professional(27.8),
    "RTX A6000": Rates(154.8, 309.7, 24e9),
    "RTX 2000 Ada": _professional(12.0, 12),
    "RTX 4000 Ada": Rates(81.9, 163.8, 24e9),  # its tensor units are specified below 4 x float32: 327.6 sparse FP8
    "RTX 4500 Ada": _professional(39.6),
    "RTX 5000 Ada": _professional(65.3),
    "RTX 6000 Ada": Rates(364.2, 728.5, 24e9),
    "RTX PRO 6000": _professional(125.0, 48),
    "L4": Rates(121.0, 242.0, 24e9),
    "L40": Rates(181.0, 362.0, 24e9),
    "L40S": Rates(362.0, 733.0, 24e9),
    "A10": Rates(125.0, 250.0, 24e9),
    "A10G": Rates(70.0, 140.0, 24e9),
    "A40": Rates(149.7, 299.3, 24e9),
    "A100": Rates(312.0, 624.0, 24e9),
    "H100": Rates(989.0, 1979.0, 48e9),
    "H100 PCIe": Rates(756.0, 1513.0, 48e9),
    "H200": Rates(989.0, 1979.0, 48e9),
    "B200": Rates(2250.0, 4500.0, 48e9),
    # Cores and the low end of the boost clock, in MHz, from NVIDIA's tables of laptop GPUs. One name covers power
    # limits from 35 to 150 W, so most laptops are faster than this, by up to two thirds.
    "RTX 3050 Laptop": _laptop(2048, 1057),
    "RTX 3050 6GB Laptop": _laptop(2560, 1237),
    "RTX 3050 Ti Laptop": _laptop(2560, 1035),
    "RTX 3060 Laptop": _laptop(3840, 1283),
    "RTX 3070 Laptop": _laptop(5120, 1290),
    "RTX 3070 Ti Laptop": _laptop(5888, 1035),
    "RTX 3080 Laptop": _laptop(6144, 1245),
    "RTX 3080 Ti Laptop": _laptop(7424, 1125),
    "RTX 4050 Laptop": _laptop(2560, 1605),
    "RTX 4060 Laptop": _laptop(3072, 1470),
    "RTX 4070 Laptop": _laptop(4608, 1230),
    "RTX 4080 Laptop": _laptop(7424, 1350),
    "RTX 4090 Laptop": _laptop(9728, 1455),
    "RTX 5050 Laptop": _laptop(2560, 1500),
    "RTX 5060 Laptop": _laptop(3328, 1455),
    "RTX 5070 Laptop": _laptop(4608, 1425),
    "RTX 5070 Ti Laptop": _laptop(5888, 1447),
    "RTX 5080 Laptop": _laptop(7680, 1500),
    "RTX 5090 Laptop": _laptop(10496, 1597),
}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: those in matrices that recipes pack, and those in attention."""

    matrices: float
    attention: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matrices + other.matrices, self.attention + other.attention)


def find_rates(name: str) -> Rates | None:
    """The row of a card as its driver names it; None for those not in the table and for Max-Q parts."""
    words = f" {name.lower()} ".replace("-", " ")
    if "max q" in words:
        return None
    laptop = " laptop " in words
    rows = [fragment for fragment in CARDS if f" {fragment.lower()} " in words]
    rows = [fragment for fragment in rows if fragment.endswith("Laptop") == laptop]
    return CARDS[max(rows, key=len)] if rows else None


def branch_flops(model: Model, size: tuple[int, int], text_tokens: int = TYPICAL_TEXT_TOKENS) -> tuple[Flops, Flops]:
    """Work of the conditional and of the unconditional transformer in one step, multiply and add counted apart.

    The conditional one sees text and image, the other the image alone. The text projection runs once for a prompt and
    the adaLN paths on one row, so both are left out.
    """
    width, height = size
    image_tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    return _work(model.conditional, image_tokens + text_tokens), _work(model.unconditional, image_tokens)


def step_flops(model: Model, width: int, height: int, text_tokens: int = TYPICAL_TEXT_TOKENS) -> Flops:
    """Work of one step: both transformers."""
    first, second = branch_flops(model, (width, height), text_tokens)
    return first + second


def ideal_seconds(rates: Rates, work: Flops, arithmetic: str) -> float:
    """Seconds in which the peaks do this work; products run on INT8 units where activations have 8 bits."""
    products = rates.tops_int8 if arithmetic.endswith("a8") else rates.tflops_16bit
    return work.matrices / (products * 1e12) + work.attention / (rates.tflops_16bit * 1e12)


def published_share(recipe: Recipe, arithmetic: str) -> float:
    """Share of the ideal time that published runs reached.

    4-bit weights decoded to INT8 (`w4a8`) count as INT8: decoding a weight is a few operations, multiplying it
    thousands.
    """
    if arithmetic.endswith("a8"):
        return EFFICIENCY["int8"]
    return EFFICIENCY.get(recipe.name, EFFICIENCY["dense"])


def _work(branch: Branch, tokens: int) -> Flops:
    return Flops(2.0 * _weights_per_token(branch) * tokens, 4.0 * branch.num_layers * branch.hidden_size * tokens**2)


@functools.cache  # a plan asks some twenty times, and summing 272 matrices takes 3 ms
def _weights_per_token(branch: Branch) -> int:
    inside = (linear for linear in branch.linears() if linear.in_block and "adaln" not in linear.name)
    return sum(linear.rows * linear.columns for linear in inside)
