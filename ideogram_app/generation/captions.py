"""Ideogram 4's JSON caption: its schema, its checks, and wrapping plain text as a caption.

The network was trained on JSON captions only, so every prompt reaches it as one. Rules follow the reference
repository's `CaptionVerifier` (ideogram-oss/ideogram4): known keys, required keys, key order inside
`style_description` and elements, boxes, palettes. Unlike it, the order of the root's two or three keys is checked too,
because serialisation below always writes them in the documented order.

Left out: enhancement of a prompt by a language model, and the safety rules of the hosted service.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from ideogram_app.errors import CaptionError

LONGEST_PROMPT = 20_000  # characters; 2048 tokens, the encoder's limit, are seldom more than 8 000
PLAIN_BOX = [100, 100, 900, 900]  # InvokeAI's finding: a full-frame box repeating the prompt trips the safety picture

Colour = Annotated[str, StringConstraints(pattern=r"^#[0-9A-F]{6}$")]
Coordinate = Annotated[int, Field(ge=0, le=1000, strict=True)]
Box = Annotated[list[Coordinate], Field(min_length=4, max_length=4)]
ElementPalette = Annotated[list[Colour], Field(max_length=5)]
GlobalPalette = Annotated[list[Colour], Field(max_length=16)]


class _Strict(BaseModel):
    """Unknown keys are refused, strings are not coerced, and keys must come in the order of the fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_order(cls, value: Any) -> Any:
        wanted = [key for key in cls.model_fields if isinstance(value, dict) and key in value]
        if wanted and wanted != [key for key in value if key in cls.model_fields]:
            raise ValueError(f"keys must come in this order: {', '.join(wanted)}")
        return value


class _Boxed(_Strict):
    @model_validator(mode="after")
    def _check_box(self) -> _Boxed:
        box = getattr(self, "bbox", None)
        if box is not None and (box[0] > box[2] or box[1] > box[3]):
            raise ValueError(f"bbox is [ymin, xmin, ymax, xmax] and {box} has a minimum above its maximum")
        return self


class ObjectElement(_Boxed):
    type: Literal["obj"]
    bbox: Box | None = None
    desc: str
    color_palette: ElementPalette | None = None


class TextElement(_Boxed):
    type: Literal["text"]
    bbox: Box | None = None
    text: str
    desc: str
    color_palette: ElementPalette | None = None


class Composition(_Strict):
    background: str
    elements: list[Annotated[ObjectElement | TextElement, Field(discriminator="type")]]


class PhotoStyle(_Strict):
    aesthetics: str
    lighting: str
    photo: str
    medium: str
    color_palette: GlobalPalette | None = None


class ArtStyle(_Strict):
    aesthetics: str
    lighting: str
    medium: str
    art_style: str
    color_palette: GlobalPalette | None = None


def _one_style(value: Any) -> Any:
    if isinstance(value, dict) and ("photo" in value) == ("art_style" in value):
        raise ValueError("exactly one of photo and art_style is needed")
    return value


def _kind_of_style(value: Any) -> str:
    return "photo" if isinstance(value, dict) and "photo" in value else "art"


Style = Annotated[
    Annotated[PhotoStyle, Tag("photo")] | Annotated[ArtStyle, Tag("art")],
    Discriminator(_kind_of_style),
    BeforeValidator(_one_style),
]


class Caption(_Strict):
    """A whole caption. `style_description` holds exactly one of `photo` and `art_style`."""

    high_level_description: str | None = None
    style_description: Style | None = None
    compositional_deconstruction: Composition


@dataclass(frozen=True)
class Prompt:
    """The caption for the text encoder, and whether the user typed plain text."""

    caption: str
    was_plain: bool


def serialise(caption: dict[str, Any]) -> str:
    """The form the network was trained on: no spaces, no escapes for non-ASCII, keys as given."""
    return json.dumps(caption, separators=(",", ":"), ensure_ascii=False)


def wrap_plain(text: str) -> str:
    """The smallest valid caption around plain text: no background, one element with all of the text."""
    element = {"type": "obj", "bbox": PLAIN_BOX, "desc": text}
    return serialise({"compositional_deconstruction": {"background": "", "elements": [element]}})


def check_caption(text: str) -> str:
    """Check a JSON caption and return it serialised.

    Raises:
        CaptionError: not JSON, or a rule of the schema is broken; says which rule and where.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise CaptionError(
            f"The caption starts like JSON but is not: {problem.msg} at line {problem.lineno}, column {problem.colno}",
            do="Mend it there, or write a plain sentence without a leading brace",
        ) from problem
    try:
        Caption.model_validate(value)
    except ValidationError as problem:
        raise CaptionError(
            f"The caption breaks the schema at {_explain(problem)}",
            do="Mend that part, or write a plain sentence instead",
        ) from problem
    return serialise(value)


def parse_prompt(typed: str) -> Prompt:
    """Turn what the user typed, plain text or a JSON caption, into what the encoder gets.

    Raises:
        CaptionError: empty, longer than `LONGEST_PROMPT`, or JSON that breaks the schema.
    """
    if len(typed) > LONGEST_PROMPT:
        raise CaptionError(
            "The prompt is too long",
            expected=f"at most {LONGEST_PROMPT:,} characters",
            got=f"{len(typed):,}",
            do="Shorten it; the text encoder reads 2048 tokens at most",
        )
    text = typed.strip()
    if not text:
        example = "Say what to draw, for example: a red circle on a yellow background"
        raise CaptionError("The prompt is empty", do=example)
    if text.startswith("{"):
        return Prompt(check_caption(text), was_plain=False)
    return Prompt(wrap_plain(text), was_plain=True)


def _explain(problem: ValidationError) -> str:
    """The first complaint, as `place: rule`, without the tags by which pydantic names a union's branch."""
    first = problem.errors()[0]
    tags = {"style_description": 1, "elements": 2}  # how far behind these keys the tag of the branch stands
    skipped = {first["loc"].index(key) + distance for key, distance in tags.items() if key in first["loc"]}
    steps = [step for index, step in enumerate(first["loc"]) if index not in skipped]
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    return f"{place or 'the root'}: {_rule(first)}"


def _rule(error: ErrorDetails) -> str:
    """The rule in plain words; pydantic's messages on numbers, lengths and patterns are plain already."""
    details = error.get("ctx", {})
    plain = {
        "missing": "it is missing, and required",
        "extra_forbidden": "there is no such key in the schema",
        "union_tag_invalid": f"type is {details.get('tag')!r} and may be {details.get('expected_tags')}",
        "union_tag_not_found": "type is missing; it may be 'obj' or 'text'",
    }
    return plain.get(error["type"], error["msg"].removeprefix("Value error, "))
