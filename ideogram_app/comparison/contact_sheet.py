"""The contact sheet: every picture of a comparison with its numbers under it, as one lossless PNG.

Pictures are pasted pixel for pixel when they are large, and enlarged by a whole factor without smoothing when they are
small, so nothing on the sheet is resampled. The comparison's JSON is stored as text inside the PNG.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ideogram_app.catalog.recipes import find_recipe
from ideogram_app.comparison.history import Comparison
from ideogram_app.files import write_png
from ideogram_app.records import REFERENCE, Result
from ideogram_app.text import decibels, duration, gb
from ideogram_app.wire import to_json

SMALLEST_SIDE = 256  # pixels; smaller pictures are enlarged by a whole factor to at least this
MARGIN, LINE = 20, 20
INK, QUIET, PAPER, ALARM = (24, 24, 27), (100, 100, 110), (250, 250, 249), (170, 30, 30)


def write_sheet(comparison: Comparison, path: Path) -> None:
    """Write the sheet to `path`, replacing it in one rename."""
    write_png(path, draw_sheet(comparison), to_json(comparison, indent=None))


def draw_sheet(comparison: Comparison) -> Image.Image:
    """One column a result, a header with the caption and seed, a footer with the machine and versions."""
    request = comparison.request
    factor = -(-SMALLEST_SIDE // request.width) if request.width < SMALLEST_SIDE else 1
    width, height = request.width * factor, request.height * factor
    columns = max(1, len(comparison.results))
    total = max(columns * (width + MARGIN) + MARGIN, 640)
    header = _header(comparison, (total - 2 * MARGIN) // 8)
    strip = max((len(result_lines(result)) for result in comparison.results), default=0)
    top = MARGIN + LINE * len(header) + MARGIN // 2
    sheet = Image.new("RGB", (total, top + height + 12 + LINE * strip + 2 * LINE + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, line in enumerate(header):
        pen.text((MARGIN, MARGIN + LINE * index), line, INK if index == 0 else QUIET, _font(15))
    for index, result in enumerate(comparison.results):
        _column(sheet, result, (MARGIN + index * (width + MARGIN), top), (width, height))
    pen.text((MARGIN, sheet.height - MARGIN - LINE), _footer(comparison), QUIET, _font(13))
    return sheet


def result_lines(result: Result) -> list[str]:
    """Lines under a picture: its recipe, then one number a line."""
    title = find_recipe(result.recipe).title
    if result.error:
        return [title, *textwrap.wrap(f"failed: {result.error}", 34)[:7]]
    lines = [title, f"{duration(result.seconds.total)} in all"]
    if result.seconds_per_step is not None:
        lines.append(f"{duration(result.seconds_per_step)} a step, first {duration(result.seconds.first_step)}")
    if result.weight_bytes is not None:
        lines.append(f"weights {gb(result.weight_bytes)}")
    if result.peak_memory_bytes is not None:
        lines.append(f"peak memory {gb(result.peak_memory_bytes)}")
    if result.psnr is not None and result.ssim is not None:
        lines.append(f"PSNR {decibels(result.psnr)}, SSIM {result.ssim:.4f}")
    elif result.recipe == REFERENCE:
        lines.append("what the others are compared with")
    return lines


def _column(sheet: Image.Image, result: Result, at: tuple[int, int], size: tuple[int, int]) -> None:
    pen = ImageDraw.Draw(sheet)
    if result.image:
        with Image.open(result.image) as picture:
            sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), at)
    else:
        pen.rectangle((*at, at[0] + size[0] - 1, at[1] + size[1] - 1), outline=ALARM)
        pen.text((at[0] + 12, at[1] + 12), "no picture", ALARM, _font(15))
    for index, line in enumerate(result_lines(result)):
        colour = ALARM if result.error and index else INK if index == 0 else QUIET
        pen.text((at[0], at[1] + size[1] + 10 + LINE * index), line, colour, _font(15 if index == 0 else 13))


def _header(comparison: Comparison, characters: int) -> list[str]:
    request = comparison.request
    about = f"{request.width} x {request.height}, seed {request.seed}, {request.preset}, model {request.model}"
    if request.savings:
        about += f", left out: {', '.join(request.savings)}"
    return [about, *textwrap.wrap(request.caption, characters)[:4]]


def _footer(comparison: Comparison) -> str:
    versions = next((result.versions for result in comparison.results if result.versions), {})
    shown = [f"{name} {versions[name]}" for name in versions if name in ("ideogram_app", "torch", "diffusers")]
    return f"{comparison.hardware.name}   {', '.join(shown)}"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
