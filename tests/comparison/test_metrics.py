"""PSNR against its formula in NumPy, SSIM against its properties."""

from __future__ import annotations

import math

import numpy
import pytest
from PIL import Image

from ideogram_app.comparison.metrics import psnr, ssim
from ideogram_app.text import IDENTICAL_PSNR


def picture(seed: int, side: int = 64) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def noisy(original: Image.Image, amount: int) -> Image.Image:
    pixels = numpy.asarray(original).astype(int)
    change = numpy.random.default_rng(9).integers(-amount, amount + 1, pixels.shape)
    return Image.fromarray((pixels + change).clip(0, 255).astype(numpy.uint8))


def test_psnr_is_its_formula() -> None:
    first, second = picture(0), noisy(picture(0), 12)
    error = numpy.mean((numpy.asarray(first, float) - numpy.asarray(second, float)) ** 2)
    assert psnr(second, first) == pytest.approx(10 * math.log10(255**2 / error))


def test_equal_pictures_have_a_finite_psnr_that_json_can_hold() -> None:
    assert psnr(picture(1), picture(1)) == IDENTICAL_PSNR and ssim(picture(1), picture(1)) == pytest.approx(1)


def test_one_value_off_by_one_stays_below_identical() -> None:
    pixels = numpy.zeros((2048, 2048, 3), dtype=numpy.uint8)
    changed = pixels.copy()
    changed[0, 0, 0] = 1
    assert 115 < psnr(Image.fromarray(changed), Image.fromarray(pixels)) < IDENTICAL_PSNR


def test_more_noise_means_less_of_both() -> None:
    base = Image.fromarray(numpy.tile(numpy.linspace(0, 255, 64, dtype=numpy.uint8)[:, None, None], (1, 64, 3)))
    steps = [noisy(base, amount) for amount in (2, 8, 32)]
    assert [psnr(step, base) for step in steps] == sorted((psnr(step, base) for step in steps), reverse=True)
    assert [ssim(step, base) for step in steps] == sorted((ssim(step, base) for step in steps), reverse=True)


def test_an_alpha_channel_does_not_matter() -> None:
    assert psnr(picture(2).convert("RGBA"), picture(2)) == IDENTICAL_PSNR
