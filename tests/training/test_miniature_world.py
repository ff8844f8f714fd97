"""Scenes, their captions and the scorer: drawn pictures are right, and deliberately wrong ones are found out."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy
import pytest
from PIL import Image

from ideogram_app.generation.captions import check_caption
from training.miniature import scenes
from training.miniature.scenes import Scene, Thing
from training.miniature.score import Tally, score

SOME = [scenes.sample_scene(random.Random(seed)) for seed in range(120)]
SCENE = Scene(
    "yellow", (Thing("circle", "red", "top left", "large"), Thing("square", "blue", "right", "small")), "HELLO"
)


def test_every_drawn_scene_scores_full_marks() -> None:
    total = sum((score(scene, scenes.draw(scene)) for scene in SOME), Tally())
    assert set(total.shares().values()) == {100.0}


@pytest.mark.parametrize(
    ("wrong", "attribute", "right"),
    [
        (replace(SCENE, background="pink"), "background", 0),
        (replace(SCENE, things=(replace(SCENE.things[0], colour="green"), SCENE.things[1])), "colour", 1),
        (replace(SCENE, things=(replace(SCENE.things[0], shape="triangle"), SCENE.things[1])), "shape", 1),
        (replace(SCENE, things=(replace(SCENE.things[0], place="bottom"), SCENE.things[1])), "place", 1),
        (replace(SCENE, things=SCENE.things[:1]), "colour", 1),
        (replace(SCENE, word="JELLO"), "letters", 4),
        (replace(SCENE, word="HELLO"[:4]), "letters", 4),
        (replace(SCENE, word=None), "letters", 0),
    ],
)
def test_one_wrong_detail_costs_that_attribute_and_the_whole_caption(wrong: Scene, attribute: str, right: int) -> None:
    tally = score(SCENE, scenes.draw(wrong))
    assert getattr(tally, attribute)[0] == right
    assert tally.captions == (0, 1)


def test_something_more_than_was_asked_for_spoils_the_whole_caption_only() -> None:
    more = replace(SCENE, things=(*SCENE.things, Thing("triangle", "black", "bottom left", "small")))
    tally = score(SCENE, scenes.draw(more))
    assert tally.colour == (2, 2) and tally.captions == (0, 1)


def test_noise_scores_no_better_than_chance() -> None:
    generator = numpy.random.default_rng(0)
    noisy = [Image.fromarray(generator.integers(0, 256, (128, 128, 3), dtype=numpy.uint8)) for _ in SOME]
    shares = sum((score(scene, picture) for scene, picture in zip(SOME, noisy, strict=True)), Tally()).shares()
    assert shares["place"] < 30 and shares["colour"] < 30 and shares["letters"] < 15 and shares["captions"] == 0


def test_details_left_unsaid_are_not_judged() -> None:
    vague = Scene(None, (Thing("circle", "red"),))
    tally = score(vague, scenes.draw(SCENE))
    assert tally.background == (0, 0) and tally.place == (0, 0) and tally.shape == (1, 1)


def test_captions_of_scenes_are_valid_captions() -> None:
    for scene in SOME:
        assert check_caption(scenes.to_json(scene)) == scenes.to_json(scene)
        assert check_caption(scenes.to_wrapped(scene)) == scenes.to_wrapped(scene)


def test_shapes_always_show_on_their_background() -> None:
    for scene in SOME:
        for thing in scene.things:
            assert thing.colour in scenes.colours_on(scene.background or "")


def test_blurring_always_leaves_something_unsaid_and_never_changes_what_is_said() -> None:
    rng = random.Random(3)
    for scene in SOME:
        vague = scenes.blur(scene, rng)
        assert vague != scene and vague.word == scene.word
        for said, thing in zip(vague.things, scene.things, strict=True):
            assert said.colour in (None, thing.colour) and said.place in (None, thing.place)


def test_about_one_scene_in_fifty_is_held_out() -> None:
    rng = random.Random(1)
    share = sum(scenes.is_held_out(scenes.sample_scene(rng)) for _ in range(5000)) / 5000
    assert 0.01 < share < 0.03


def test_a_vague_scene_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="fully specified"):
        scenes.draw(Scene("red", (Thing("circle"),)))
