"""Image distance to the reference: PSNR and SSIM.

Both compare 8-bit RGB pictures of the same size; scikit-image does the arithmetic, and is imported, with SciPy in more
than a second, when there are two pictures to compare. They measure difference, not quality: over many steps the
same seed drifts into another, equally good picture, so they are comparable between recipes of one request and not
between requests. Left out: LPIPS, CLIPScore, PickScore and reading of lettering, which need models of their own.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray
from PIL import Image

from ideogram_app.text import IDENTICAL_PSNR


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal to noise ratio in dB; `IDENTICAL_PSNR` for equal pictures."""
    first, second = _pixels(picture), _pixels(reference)
    if numpy.array_equal(first, second):
        return IDENTICAL_PSNR
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(second, first, data_range=255))


def ssim(picture: Image.Image, reference: Image.Image) -> float:
    """Structural similarity over 7 x 7 windows, averaged over the colour channels; 1.0 for equal pictures."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(_pixels(picture), _pixels(reference), channel_axis=2, data_range=255))


def _pixels(picture: Image.Image) -> NDArray[numpy.uint8]:
    return numpy.asarray(picture.convert("RGB"), dtype=numpy.uint8)
