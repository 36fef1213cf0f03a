"""Questions and answers about scenes of the shapes world, to teach a small MLLM to see and to read.

Each example is one turn over one picture. Like the captions, no question and no answer names a held-out combination, and no
picture shows a held-out pair of colour and shape.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from .chat import ChatExample
from .shapes import (
    COLORS,
    HELD_OUT_COLOR_PAIRS,
    HELD_OUT_POSITION,
    NUMBER_WORDS,
    RELATIONS,
    SHAPES,
    Metadata,
    Scene,
    SceneObject,
    corpus_scene,
    describe,
    falsify,
    is_held_out,
    make_metadata,
    relation_between,
    render,
)


DESCRIBE = "Describe the image."
MATCH = "Does the image show {}?"
COUNT = "How many {} are there?"
COLOR = "What color is the {}?"
WHERE = "What is {} the {}?"
DESCRIBE_SHARE = 0.5  # of all examples; the other four kinds share the rest as far as a scene allows them

# How people ask for changes; together with the questions, what the tokenizer learns beside captions.
EDITS = (
    "make it {color}",
    "make the {shape} {color}",
    "remove the {shape}",
    "add {a_color_shape}",
    "turn the {shape} into {a_shape}",
)


class Turn(NamedTuple):
    question: str
    answer: str


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def questions(scene: Scene, metadata: Metadata, rng: np.random.Generator) -> dict[str, Turn]:
    r"""
    One turn of each kind that a scene allows.

    Args:
        scene (`Scene`): The scene.
        metadata (`dict`): Metadata that are true of it.
        rng (`np.random.Generator`): Chooses what is asked.

    Returns:
        `dict[str, Turn]`: Out of `describe`, `match`, `count`, `color` and `where`.

    Example:

    ```python
    >>> from iomm_hf.data.shapes import scene_for
    >>> metadata = make_metadata("position", "heart", "left of", "star")
    >>> rng = np.random.default_rng(0)
    >>> turns = questions(scene_for(metadata, rng, show_held_out=False), metadata, rng)
    >>> list(turns)
    ['describe', 'match', 'count', 'color', 'where']
    ```
    """
    turns = {"describe": Turn(DESCRIBE, describe(scene))}
    if rng.random() < 0.5:
        turns["match"] = Turn(MATCH.format(metadata["prompt"]), "yes")
    else:
        turns["match"] = Turn(MATCH.format(falsify(metadata, rng, show_held_out=False)["prompt"]), "no")
    counts = {shape: sum(item.shape == shape for item in scene.objects) for shape in SHAPES}
    present = [shape for shape in SHAPES if counts[shape]]
    # A fifth of the time a shape that may not be there at all.
    shape = str(rng.choice(SHAPES if rng.random() < 0.2 else present))
    turns["count"] = Turn(COUNT.format(plural(shape)), {0: "none", 1: "one", **NUMBER_WORDS}[counts[shape]])
    single = [item for item in scene.objects if counts[item.shape] == 1]
    if single:
        item = single[rng.integers(len(single))]
        turns["color"] = Turn(COLOR.format(item.shape), item.color)
    if len(scene.objects) == 2:  # among more, several may be left of one
        where = [turn for pair in itertools.permutations(scene.objects) if (turn := _where(*pair)) is not None]
        if where:
            turns["where"] = where[rng.integers(len(where))]
    return turns


def _where(subject: SceneObject, reference: SceneObject) -> Turn | None:
    relation = relation_between(subject, reference)
    if relation is None or (subject.color, subject.shape) == (reference.color, reference.shape):
        return None
    if (subject.shape, reference.shape) in HELD_OUT_POSITION:
        return None
    for one, two in itertools.permutations((subject, reference)):
        if {(one.color, one.shape), (two.color, two.shape)} & HELD_OUT_COLOR_PAIRS or (
            one.shape != two.shape
            and one.color != two.color
            and is_held_out(make_metadata("color_attr", one.color, one.shape, two.color, two.shape))
        ):
            return None
    return Turn(
        WHERE.format(relation, f"{reference.color} {reference.shape}"),
        with_article(f"{subject.color} {subject.shape}"),
    )


def chat_example(seed: int, index: int) -> tuple[Scene, Turn]:
    """Example `index` of the chat corpus `seed`: a scene of `corpus_scene` and one turn about it."""
    scene, metadata = corpus_scene(seed, index)
    rng = np.random.default_rng([seed, index, 1])
    turns = questions(scene, metadata, rng)
    described = turns.pop("describe")
    return scene, described if rng.random() < DESCRIBE_SHARE else list(turns.values())[rng.integers(len(turns))]


def instructions() -> Iterator[str]:
    """Every wording of questions and edits, for the tokenizer."""
    yield from (DESCRIBE, MATCH.format("a circle"), "yes", "no", "none", "one", *NUMBER_WORDS.values())
    yield from (COUNT.format(plural(shape)) for shape in SHAPES)
    yield from (COLOR.format(shape) for shape in SHAPES)
    for color, shape in itertools.product(COLORS, SHAPES):
        if (color, shape) in HELD_OUT_COLOR_PAIRS:
            continue
        yield from (WHERE.format(relation, f"{color} {shape}") for relation in RELATIONS)
        words = {"color": color, "shape": shape, "a_shape": with_article(shape)}
        yield from (edit.format(**words, a_color_shape=with_article(f"{color} {shape}")) for edit in EDITS)


def shapes_chat(num_samples: int, *, seed: int = 0, image_size: int = 64) -> Iterator[ChatExample]:
    r"""
    The chat corpus `seed`, drawn.

    Args:
        num_samples (`int`): Examples to draw.
        seed (`int`, *optional*, defaults to 0): The corpus.
        image_size (`int`, *optional*, defaults to 64): Side of the pictures in pixels.

    Example:

    ```python
    >>> [example] = shapes_chat(1)
    >>> example.image.size, example.question, example.answer
    ((64, 64), 'Describe the image.', 'a yellow cross right of a blue circle')
    ```
    """
    for index in range(num_samples):
        scene, turn = chat_example(seed, index)
        yield ChatExample(Image.fromarray(render(scene, image_size)), *turn)
