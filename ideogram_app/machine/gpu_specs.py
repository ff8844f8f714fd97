"""Peak rates of graphics cards: dense teraflops, INT8 teraops, bytes a second over PCIe, by a driver's name.

`CARDS` is the table, from NVIDIA's specifications, `CAPABILITIES` beside it what generation its rows are of;
`MeasuredRates` is what microbench.py measured on this machine in their place. How long a step of this model takes with
them: planning/step_time.py.

Left out: AMD, Intel and Apple devices, for which nobody published a time of this model; laptop parts of workstations
and those named Max-Q. A card that is not in the table gets None.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: those in matrices that recipes pack, and those in attention."""

    matrices: float
    attention: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matrices + other.matrices, self.attention + other.attention)


@dataclass(frozen=True)
class MeasuredRates:
    """Teraflops in 16 bits (a processor: in its computing type), INT8 teraops, bytes a second; None: not measured."""

    tflops_16bit: float | None = None
    tops_int8: float | None = None
    link: float | None = None
    disk: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no device can be, so that a file edited by hand is noticed."""
        if not all(rate is None or (math.isfinite(rate) and rate > 0) for rate in vars(self).values()):
            raise ValueError("a rate is a positive number")

    def updated(self, newer: MeasuredRates) -> MeasuredRates:
        """The newer rates; what they did not measure stays."""
        return MeasuredRates(
            tflops_16bit=newer.tflops_16bit or self.tflops_16bit,
            tops_int8=newer.tops_int8 or self.tops_int8,
            link=newer.link or self.link,
            disk=newer.disk or self.disk,
        )


@dataclass(frozen=True)
class Ceiling:
    """The device at its best.

    Attributes:
        tflops_bf16, tops_int8: of large products; 10^12 operations a second, multiply and add counted apart.
        copy_gb_s: bytes read plus bytes written, in 10^9 a second.
        tflops: of products in the computing type `dtype`.
        problem: why a number is missing.
    """

    tflops_bf16: float | None
    tops_int8: float | None
    copy_gb_s: float
    tflops: float
    dtype: str
    problem: str = ""

    def better(self, other: Ceiling) -> Ceiling:
        """The higher of each number, of two measurements of one device: what else ran on it lowers a ceiling."""
        bf16, int8 = self.tflops_bf16, self.tops_int8
        return replace(
            self,
            tflops_bf16=bf16 and max(bf16, other.tflops_bf16 or 0.0),
            tops_int8=int8 and max(int8, other.tops_int8 or 0.0),
            copy_gb_s=max(self.copy_gb_s, other.copy_gb_s),
            tflops=max(self.tflops, other.tflops),
        )


def find_rates(name: str) -> Rates | None:
    """The row of a card as its driver names it; None for those not in the table and for Max-Q parts."""
    row = _row(name)
    return CARDS[row] if row else None


def _row(name: str) -> str | None:
    words = f" {name.lower()} ".replace("-", " ")
    if "max q" in words:
        return None
    laptop = " laptop " in words
    rows = [fragment for fragment in CARDS if f" {fragment.lower()} " in words]
    rows = [fragment for fragment in rows if fragment.endswith("Laptop") == laptop]
    return max(rows, key=len, default=None)


def published_capability(name: str) -> tuple[int, int] | None:
    """The compute capability of a card of the table, as its driver names it; None for any other."""
    row = _row(name) or ""
    return next((capability for start, capability in CAPABILITIES if row.startswith(start)), None)


def _rates(dense: float, int8: float, float32_tflops: float, link_gb: float = 24) -> Rates:
    """dense, int8: of tensor units in 16 bits and in INT8, times the float32 rate; link_gb: 24 is PCIe 4 x16."""
    return Rates(dense * float32_tflops, int8 * float32_tflops, link_gb * 1e9)


# Multiples by generation, from NVIDIA's white papers.
_geforce = functools.partial(_rates, 2, 8)  # GeForce 30, 40 and 50
_turing = functools.partial(_rates, 4, 16, link_gb=12)  # GeForce 20, PCIe 3
# Turing without tensor cores: no INT8 units for matrix products, and float16 that gives wrong numbers, so both columns
# are float32 (machine/capabilities.py, BROKEN_FLOAT16).
_gtx_16 = functools.partial(_rates, 1, 1, link_gb=12)
_professional = functools.partial(_rates, 4, 8)  # RTX A and RTX Ada: sums in float32 run at the full tensor rate


def _laptop(cores: int, lowest_boost_mhz: int) -> Rates:
    """A GeForce laptop part at the low end of its boost range, where small power limits hold it; PCIe 4 x8."""
    return _geforce(2 * cores * lowest_boost_mhz / 1e6, 12)


# Beginning of a row of `CARDS` -> compute capability, from NVIDIA's table of CUDA GPUs; the first that fits counts.
CAPABILITIES: tuple[tuple[str, tuple[int, int]], ...] = (
    *((start, (8, 9)) for start in ("RTX 2000 Ada", "RTX 40", "RTX 4500 Ada", "RTX 5000 Ada", "RTX 6000 Ada", "L4")),
    ("Tesla V100", (7, 0)),
    *((start, (7, 5)) for start in ("GTX 16", "RTX 20", "TITAN RTX", "Quadro RTX", "Tesla T4")),
    ("A100", (8, 0)),
    *((start, (8, 6)) for start in ("RTX 30", "RTX A", "A10", "A40")),
    *((start, (9, 0)) for start in ("H100", "H200")),
    ("B200", (10, 0)),
    *((start, (12, 0)) for start in ("RTX 50", "RTX PRO")),
)
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
