"""Does a picture show what its caption asked for? Measured on pixels, by someone who knows the scene.

    background   the median colour of the picture's border, named by the nearest palette colour
    things       connected regions that differ from that background: mean colour, centre, and how much of its bounding
                 box each fills (circle pi/4, square 1, triangle 1/2)
    letters      each cell of the bottom row against the 26 drawn capitals and the blank, by correlation

Asked and found things are paired so that most agrees, then every attribute is judged by itself. The scorer never sees
how the picture was made and is itself tested on drawn pictures, right and deliberately wrong. Left out: size (small and
large are judged with the eye), and anything a scene cannot ask for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache

import numpy
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from training.miniature import scenes
from training.miniature.scenes import BACKGROUNDS, CELL, COLOURS, PLACES, TEXT_TOP, Scene, Thing

Floats = NDArray[numpy.float64]

DIFFERENT = 60.0  # RGB distance from the background from which a pixel belongs to a thing
SMALLEST_THING = 60  # pixels; the small triangle has 162
SHAPE_FILL = {"triangle": 0.5, "circle": 0.785, "square": 1.0}
BLANK = " "
LEAST_INK = 0.07  # mean of a cell, 1 being all ink, below which it is blank (the thinnest letter, I, has 0.13)


@dataclass(frozen=True)
class Found:
    """A region of the picture, named. area: pixels."""

    colour: str
    shape: str
    place: str
    area: int


@dataclass(frozen=True)
class Tally:
    """Right answers and questions for each attribute. Tallies add up."""

    background: tuple[int, int] = (0, 0)
    colour: tuple[int, int] = (0, 0)
    shape: tuple[int, int] = (0, 0)
    place: tuple[int, int] = (0, 0)
    letters: tuple[int, int] = (0, 0)
    words: tuple[int, int] = (0, 0)
    captions: tuple[int, int] = (0, 0)

    def __add__(self, other: Tally) -> Tally:
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Tally(**{name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in pairs.items()})

    def shares(self) -> dict[str, float]:
        """Percent right, for attributes that were asked for at all."""
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: round(100 * right / asked, 1) for name, (right, asked) in rows.items() if asked}


def score(scene: Scene, picture: Image.Image) -> Tally:
    """Judge one picture against the scene its caption described; details left unsaid are not judged."""
    pixels = numpy.asarray(picture.convert("RGB").resize((scenes.SIDE,) * 2), dtype=numpy.float64)
    ground = _ground(pixels)
    background = _count(None if scene.background is None else _nearest(ground, BACKGROUNDS) == scene.background)
    found = find_things(pixels, ground)
    pairs = _pair(scene.things, found)
    colour = _sum(
        _count(None if asked.colour is None else seen is not None and seen.colour == asked.colour)
        for asked, seen in pairs
    )
    shape = _sum(_count(seen is not None and seen.shape == asked.shape) for asked, seen in pairs)
    place = _sum(
        _count(None if asked.place is None else seen is not None and seen.place == asked.place) for asked, seen in pairs
    )
    read = read_word(pixels, ground)
    word = scene.word or ""
    letters = (sum(a == b for a, b in zip(word, read, strict=False)), len(word))
    whole = _count(read.rstrip() == word if word else None)
    complete = all(right == asked for right, asked in (background, colour, shape, place, letters))
    tidy = len(found) == len(scene.things) and read.rstrip() == word
    return Tally(background, colour, shape, place, letters, whole, _count(complete and tidy))


def find_things(pixels: Floats, ground: Floats) -> list[Found]:
    """Every region above the text row that is not background, largest first. pixels: (128, 128, 3), ground: (3,)."""
    upper = pixels[:TEXT_TOP]
    labels, count = ndimage.label(numpy.linalg.norm(upper - ground, axis=2) > DIFFERENT)
    found = []
    for label, box in enumerate(ndimage.find_objects(labels, count), start=1):
        region = labels[box] == label
        if region.sum() < SMALLEST_THING:
            continue
        inside = ndimage.binary_erosion(region) if region.sum() > 2 * SMALLEST_THING else region
        colour = numpy.median(upper[box][inside if inside.any() else region], axis=0)
        fill = region.sum() / region.size
        centre = ((box[1].start + box[1].stop) / 2, (box[0].start + box[0].stop) / 2)
        shape = min(SHAPE_FILL, key=lambda name: abs(SHAPE_FILL[name] - fill))
        place = min(PLACES, key=lambda name: numpy.hypot(PLACES[name][0] - centre[0], PLACES[name][1] - centre[1]))
        found.append(Found(_nearest(colour, COLOURS), shape, place, int(region.sum())))
    return sorted(found, key=lambda thing: -thing.area)


def read_word(pixels: Floats, ground: Floats) -> str:
    """The eight cells of the bottom row as letters and blanks."""
    full = max(float(numpy.linalg.norm(numpy.array(COLOURS[name]) - ground)) for name in ("black", "white"))
    ink = numpy.linalg.norm(pixels[TEXT_TOP:] - ground, axis=2) / full  # (16, 128)
    cells = ink.reshape(CELL, -1, CELL).transpose(1, 0, 2)  # (8, 16, 16)
    return "".join(_read_letter(cell) for cell in cells)


def _read_letter(cell: Floats) -> str:
    if cell.mean() < LEAST_INK:
        return BLANK
    names, templates = _alphabet()
    centred = cell - cell.mean()
    return names[int(numpy.argmax((templates * centred).sum((1, 2))))]


@cache
def _alphabet() -> tuple[str, Floats]:
    """The 26 capitals as drawn, (26, 16, 16), each with zero mean and unit norm."""
    names = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    drawn = [scenes.glyph(name).resize((CELL, CELL), Image.Resampling.BOX) for name in names]
    templates = numpy.stack([numpy.asarray(letter, dtype=numpy.float64) for letter in drawn])
    templates -= templates.mean((1, 2), keepdims=True)
    return names, templates / numpy.linalg.norm(templates, axis=(1, 2), keepdims=True)


def _ground(pixels: Floats) -> Floats:
    """Median colour of the border above the text row: shapes reach it nowhere."""
    upper = pixels[:TEXT_TOP]
    border = numpy.concatenate([upper[:4].reshape(-1, 3), upper[:, :4].reshape(-1, 3), upper[:, -4:].reshape(-1, 3)])
    return numpy.asarray(numpy.median(border, axis=0))


def _nearest(colour: Floats, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(numpy.linalg.norm(colour - numpy.array(palette[name]))))


def _pair(asked: tuple[Thing, ...], found: list[Found]) -> list[tuple[Thing, Found | None]]:
    """Each thing asked for with the region that agrees with it most; None where there are too few regions.

    Only as many regions as were asked for take part, the largest: a picture full of specks must not find one that fits.
    """
    found = found[: len(asked)]
    if not asked or not found:
        return [(thing, None) for thing in asked]
    agreement = numpy.array([[_agreement(thing, seen) for seen in found] for thing in asked])
    rows, columns = linear_sum_assignment(agreement, maximize=True)
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return [(thing, found[chosen[index]] if index in chosen else None) for index, thing in enumerate(asked)]


def _agreement(asked: Thing, seen: Found) -> int:
    return (asked.colour == seen.colour) + (asked.shape == seen.shape) + (asked.place == seen.place)


def _count(right: bool | None) -> tuple[int, int]:
    """None is a question that was not asked."""
    return (0, 0) if right is None else (int(right), 1)


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    pairs = list(counts)
    return sum(right for right, _ in pairs), sum(asked for _, asked in pairs)
