"""How fast cards are, from published peaks, and how long a step should take on one.

A step is both transformers once. Its time is counted work divided by the card's dense peak and by the share of the
peak that published runs of this model reached. It is a planning number for people, good to perhaps a third either way;
what a machine really does is measured (measure.py) and shown beside it.

Left out: AMD, Intel and Apple devices, for which nobody published a time of this model, laptop cards, whose power
limits differ by a factor of two under one name, and first-step compilation. A card that is not in the table gets None.
"""

from __future__ import annotations

from dataclasses import dataclass

from ideogram_app.architecture import PIXELS_PER_TOKEN, Model
from ideogram_app.recipes import Recipe

TEXT_TOKENS = 300  # of a usual JSON caption; the text is trimmed to what is there

# Share of the ideal time that published runs reached on a 3090, 48 steps at 1024 x 1024, from the table of times in
# speed-and-memory.md section 2: INT8 fused 156.5 s of 40 s ideal (arXiv 2606.14598); FP8 172.9 s of 114 s; GGUF Q8_0
# 176 s; Q4_K 203 s. INT8 has the largest room upwards: 80 % was reported from a 5090.
EFFICIENCY = {"dense": 0.68, "fp8": 0.66, "int8": 0.26, "gguf-q8_0": 0.65, "gguf-q4_k": 0.56}
STREAMING_OVERHEAD = 1.07  # Wan 14B on an H100 with block-wise streaming: 4919 ms against 4602 ms (diffusers #11605)
DISK_BYTES_PER_SECOND = 2.0e9  # an ordinary NVMe drive reading large files; an assumption, not a measurement
LINK_BYTES_PER_SECOND = 12e9  # PCIe 3 x16 or 4 x8 in practice; taken where the card's own link is not known


@dataclass(frozen=True)
class Rates:
    """Peaks of one card: dense teraflops (16-bit, summed in float32), INT8 teraops, bytes a second from RAM."""

    tflops_16bit: float
    tops_int8: float
    link: float = LINK_BYTES_PER_SECOND

    @property
    def int8_gain(self) -> float:
        """How many times faster INT8 products are than 16-bit ones, on paper."""
        return self.tops_int8 / self.tflops_16bit


def _geforce(float32_tflops: float, link_gb: float = 24) -> Rates:
    """GeForce 30, 40 and 50: tensor units do 2 x (16-bit) and 8 x (INT8) the float32 rate (NVIDIA's white papers)."""
    return Rates(2 * float32_tflops, 8 * float32_tflops, link_gb * 1e9)


def _turing(float32_tflops: float) -> Rates:
    """GeForce 20: 4 x (float16) and 16 x (INT8) the float32 rate, PCIe 3."""
    return Rates(4 * float32_tflops, 16 * float32_tflops)


# Name fragment -> peaks; float32 rates at boost clock from NVIDIA's specifications, links by PCIe generation and lanes
# less a quarter for what is lost on the way. The longest fragment found in a name is its row.
CARDS: dict[str, Rates] = {
    "RTX 2060": _turing(6.45),
    "RTX 2060 SUPER": _turing(7.2),
    "RTX 2070": _turing(7.5),
    "RTX 2070 SUPER": _turing(9.1),
    "RTX 2080": _turing(10.1),
    "RTX 2080 SUPER": _turing(11.2),
    "RTX 2080 Ti": _turing(13.45),
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
    "RTX 5060": _geforce(19.2, 24),
    "RTX 5060 Ti": _geforce(23.7, 24),
    "RTX 5070": _geforce(30.9, 48),
    "RTX 5070 Ti": _geforce(43.9, 48),
    "RTX 5080": _geforce(56.3, 48),
    "RTX 5090": _geforce(104.8, 48),
    "RTX A6000": Rates(154.8, 309.7, 24e9),
    "RTX 6000 Ada": Rates(364.2, 728.5, 24e9),
    "L40S": Rates(362.0, 733.0, 24e9),
    "L4": Rates(121.0, 242.0, 24e9),
    "A10G": Rates(70.0, 140.0, 24e9),
    "A100": Rates(312.0, 624.0, 24e9),
    "H100": Rates(989.0, 1979.0, 48e9),
    "H100 PCIe": Rates(756.0, 1513.0, 48e9),
    "H200": Rates(989.0, 1979.0, 48e9),
    "B200": Rates(2250.0, 4500.0, 48e9),
    "Tesla T4": Rates(65.0, 130.0),
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one step: those in matrices that recipes pack, and those in attention."""

    matrices: float
    attention: float


def find_rates(name: str) -> Rates | None:
    """The row of a card as its driver names it; None for laptop cards and those not in the table."""
    words = f" {name.lower()} ".replace("-", " ")
    if "laptop" in words or "max q" in words:
        return None
    rows = [fragment for fragment in CARDS if f" {fragment.lower()} " in words]
    return CARDS[max(rows, key=len)] if rows else None


def step_work(model: Model, width: int, height: int, text_tokens: int = TEXT_TOKENS) -> Work:
    """Work of one step, multiply and add counted apart.

    The conditional transformer sees text and image, the other the image alone. The text projection runs once for a
    prompt and the adaLN paths on one row, so both are left out.
    """
    image_tokens = (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    matrices = attention = 0.0
    for branch, tokens in ((model.conditional, image_tokens + text_tokens), (model.unconditional, image_tokens)):
        per_token = sum(
            linear.rows * linear.columns
            for linear in branch.linears()
            if linear.in_block and "adaln" not in linear.name
        )
        matrices += 2.0 * per_token * tokens
        attention += 4.0 * branch.num_layers * branch.hidden_size * tokens**2
    return Work(matrices, attention)


def step_seconds(
    rates: Rates | None, model: Model, recipe: Recipe, size: tuple[int, int], arithmetic: str = ""
) -> float | None:
    """Seconds of one step with all weights on the card; None where the card is not known.

    Args:
        arithmetic: of the products where it is not the recipe's own. 4-bit weights decoded to INT8 (`w4a8`) count as
            INT8: decoding a weight is a few operations, multiplying it thousands.
    """
    if rates is None:
        return None
    work = step_work(model, *size)
    flops, ops = rates.tflops_16bit * 1e12, rates.tops_int8 * 1e12
    if recipe.quantizes_activations or arithmetic.endswith("a8"):
        return (work.matrices / ops + work.attention / flops) / EFFICIENCY["int8"]
    share = EFFICIENCY.get(recipe.name, EFFICIENCY["dense"])
    return (work.matrices + work.attention) / flops / share


def moved_seconds(resident_seconds: float | None, moved_bytes: int, bytes_per_second: float) -> float | None:
    """Seconds of a step during which this many bytes of weights arrive, while the card computes on those before."""
    if resident_seconds is None:
        return None
    return max(resident_seconds, moved_bytes / bytes_per_second) * STREAMING_OVERHEAD
