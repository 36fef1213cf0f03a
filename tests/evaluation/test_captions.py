"""Captions read back into objects, and judged object by object."""

import pytest

from iomm_hf.data.shapes import corpus_scene, describe
from iomm_hf.evaluation.captions import compare, parse_caption, score_captions
from iomm_hf.tiny import tiny_encoder


def test_every_description_parses_into_its_objects():
    for index in range(500):
        scene, _ = corpus_scene(4, index)
        objects = parse_caption(describe(scene))
        assert sorted(shape for _, shape in objects) == sorted(item.shape for item in scene.objects)
        for color, shape in objects:
            assert color is None or (color, shape) in {(item.color, item.shape) for item in scene.objects}


@pytest.mark.parametrize(
    "text", ["", "a", "a red", "red circle", "five circles", "a mauve circle", "a red circle and"]
)
def test_what_is_not_in_the_grammar_is_no_caption(text):
    assert parse_caption(text) is None


@pytest.mark.parametrize(
    ("said", "shapes", "colors", "counts", "named"),
    [
        ("a red circle left of a blue star", [1, 1], [1, 1], [1, 1], [1, 1]),
        ("a blue star right of a red circle", [1, 1], [1, 1], [1, 1], [1, 1]),
        ("a blue circle left of a red star", [1, 1], [0, 0], [1, 1], [1, 1]),
        ("a red circle", [1, 0], [1], [1, 0], [1]),
        ("two red circles and a blue star", [1, 1], [1, 1], [0, 1], [1, 1, 1]),
        ("a red heart left of a blue star", [0, 1], [1], [0, 1], [0, 1]),
        ("nonsense", [0, 0], [], [0, 0], []),
    ],
)
def test_verdicts_are_given_object_by_object(said, shapes, colors, counts, named):
    verdicts = compare(said, "a red circle left of a blue star")
    assert verdicts == {"shapes": shapes, "colors": colors, "counts": counts, "named": named} | {
        "whole": [all(shapes) and all(colors) and len(named) == 2]
    }


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("a star left of a ring", "a ring right of a star", True),
        ("a star above a ring", "a ring below a star", True),
        ("a star left of a ring", "a star right of a ring", False),
        ("a star left of a ring", "a star and a ring", False),
        ("a red star and a blue star", "a blue star and a red star", True),
        ("two red stars", "a red star and a red star", True),
        ("two red stars", "three red stars", False),
        ("nonsense", "gibberish", False),
    ],
)
def test_captions_that_mean_the_same_are_the_same(one, two, same):
    assert compare(one, "a star" if one == "nonsense" else two)["whole"] == [same]


def test_an_untrained_mllm_is_scored_low(processor):
    result = score_captions(tiny_encoder(processor).mllm, processor, [corpus_scene(0, i)[0] for i in range(3)])
    assert result["scenes"] == 3 and result["whole"].correct == 0 and result["shapes"].total >= 3
    assert {"said", "wanted"} == set(result["wrong"][0])
