"""The miniature's world: what can be asked for, how it is said, and what it looks like.

A scene is a plain background, up to two coloured shapes at named places in two sizes, and perhaps a word in capitals
along the bottom. Everything a full caption says determines the picture: with nothing left to chance, place and shape
are learnt in minutes on two CPU cores, while jittered places and free words stayed at chance for the same effort.
Shapes and letters sit on the model's grid of 16 x 16 pixels (one image token), which is why letters are learnt at all.

Left out: overlap, texture, light, and every style a real caption may name.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ideogram_app.generation.captions import serialise, wrap_plain

SIDE = 128  # pixels
CELL = 16  # pixels a token covers: 8 (VAE) x 2 (patch)
TEXT_TOP = 112  # the last row of cells holds the word, one letter a cell
OVERSAMPLING = 4  # shapes are drawn four times as large and averaged down, for smooth edges

COLOURS = {
    "red": (224, 40, 40),
    "orange": (250, 145, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "blue": (35, 80, 225),
    "purple": (150, 50, 190),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
    "yellow": (250, 225, 50),
    "red": (224, 40, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 225),
    "pink": (250, 175, 200),
}
LOWEST_CONTRAST = 110.0  # Euclidean RGB distance; below it (orange on yellow, purple on blue) shapes hardly show

SHAPES = ("circle", "square", "triangle")
RADII = {"small": 9, "large": 15}  # pixels from the centre to the edge of the bounding square
PLACES = {
    f"{row} {column}".strip() if (row or column) else "center": (x, y)
    for row, y in (("top", 24), ("", 56), ("bottom", 88))
    for column, x in (("left", 24), ("", 64), ("right", 104))
}
WORDS = (
    "ART BIRD BLUE BOOK CAFE CAT DAY DOG DREAM FISH FLY FOX GOLD HELLO HOME JAZZ JUMP KEY KING LOVE MAGIC MILK "
    "MOON MUSIC NIGHT OPEN PARK PLAY QUIZ RIVER ROCK SALE SHOP SKY STAR SUN TEA TREE VIP WAVE WIND WOLF YES ZERO"
).split()
HELD_OUT_SHARE = 50  # one scene in fifty is never trained on


@dataclass(frozen=True)
class Thing:
    """One coloured shape. None means that the caption does not say."""

    shape: str
    colour: str | None = None
    place: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption asks for. None means that the caption does not say."""

    background: str | None
    things: tuple[Thing, ...] = ()
    word: str | None = None


def contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """Euclidean distance of two RGB colours, 0 to 441."""
    return float(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5)


@cache
def colours_on(background: str) -> tuple[str, ...]:
    """The shape colours that show on this background."""
    ground = BACKGROUNDS[background]
    return tuple(name for name, colour in COLOURS.items() if contrast(colour, ground) >= LOWEST_CONTRAST)


def ink(background: str) -> str:
    """Letters are black or white, whichever differs more from the background."""
    ground = BACKGROUNDS[background]
    return max(("black", "white"), key=lambda name: contrast(COLOURS[name], ground))


def sample_scene(rng: random.Random) -> Scene:
    """A fully specified scene, never an empty one."""
    background = rng.choice(list(BACKGROUNDS))
    count = rng.choices((0, 1, 2), weights=(15, 45, 40))[0]
    places = rng.sample(list(PLACES), count)
    things = tuple(
        Thing(rng.choice(SHAPES), rng.choice(colours_on(background)), place, rng.choice(list(RADII)))
        for place in places
    )
    word = rng.choice(WORDS) if count == 0 or rng.random() < 0.5 else None
    return Scene(background, things, word)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test set; decided by its content, so that no caption of it is ever trained on."""
    return zlib.crc32(repr(scene).encode()) % HELD_OUT_SHARE == 0


def blur(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with some of its details left unsaid, at least one of them."""
    things = tuple(
        replace(
            thing,
            colour=thing.colour if rng.random() < 0.85 else None,
            place=thing.place if rng.random() < 0.4 else None,
            size=thing.size if rng.random() < 0.35 else None,
        )
        for thing in scene.things
    )
    background = scene.background if rng.random() < 0.65 else None
    blurred = Scene(background, things, scene.word)
    return Scene(None, things, scene.word) if blurred == scene else blurred


def to_json(scene: Scene) -> str:
    """The scene as a caption in Ideogram's schema."""
    elements = [{"type": "obj", "desc": _describe(thing)} for thing in scene.things]
    if scene.word:
        elements.append({"type": "text", "text": scene.word, "desc": _letters(scene)})
    return serialise({"compositional_deconstruction": {"background": scene.background or "", "elements": elements}})


def to_plain(scene: Scene) -> str:
    """The scene as a person would type it."""
    parts = [_article(_describe(thing)) for thing in scene.things]
    if scene.word:
        parts.append(f"the word {scene.word} in {_letters(scene)}")
    sentence = " and ".join(parts)
    return f"{sentence} on a {scene.background} background" if scene.background else sentence


def to_wrapped(scene: Scene) -> str:
    """The plain sentence as the app wraps it."""
    return wrap_plain(to_plain(scene))


def draw(scene: Scene) -> Image.Image:
    """The one picture, 128 x 128 RGB, that a fully specified scene describes."""
    if scene.background is None or any(None in (thing.colour, thing.place, thing.size) for thing in scene.things):
        raise ValueError(f"only a fully specified scene can be drawn, got {scene}")
    large = Image.new("RGB", (SIDE * OVERSAMPLING,) * 2, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(large)
    for thing in scene.things:
        _draw_thing(pen, thing)
    for index, letter in enumerate(scene.word or ""):
        large.paste(
            COLOURS[ink(scene.background)], (index * CELL * OVERSAMPLING, TEXT_TOP * OVERSAMPLING), glyph(letter)
        )
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)


@cache
def glyph(letter: str) -> Image.Image:
    """A capital letter, centred in one oversampled cell, as an 8-bit mask (white where there is ink)."""
    side = CELL * OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    font = ImageFont.load_default(size=17 * OVERSAMPLING)
    ImageDraw.Draw(mask).text((side / 2, side / 2 + 6 * OVERSAMPLING), letter, 255, font, anchor="ms", stroke_width=2)
    return mask


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y = (value * OVERSAMPLING for value in PLACES[thing.place or "center"])
    radius = RADII[thing.size or "large"] * OVERSAMPLING
    colour = COLOURS[thing.colour or "black"]
    box = (x - radius, y - radius, x + radius - 1, y + radius - 1)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)


def _describe(thing: Thing) -> str:
    words = [word for word in (thing.size, thing.colour, thing.shape) if word]
    return " ".join(words) + (f" at the {thing.place}" if thing.place else "")


def _letters(scene: Scene) -> str:
    return f"{ink(scene.background)} letters" if scene.background else "capital letters"


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
