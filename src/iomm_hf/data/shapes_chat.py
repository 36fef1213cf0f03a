"""Questions and answers about scenes of the shapes world, to teach a small MLLM to see and to read.

Each example is one turn over one picture. Like the captions, no question and no answer names a held-out combination, and no
picture shows a held-out pair of colour and shape.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from .chat import ChatExample
from .shapes import (
    COLORS,
    HELD_OUT_COLOR_PAIRS,
    HELD_OUT_POSITION,
    NUMBER_WORDS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    TASKS,
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
    with_article,
)


DESCRIBE = "Describe the image."
MATCH = "Does the image show {}?"
COUNT = "How many {} are there?"
COLOR = "What color is the {}?"
WHERE = "What is {} the {}?"
DESCRIBE_SHARE = 0.5  # of all examples with a picture; the other kinds share the rest as far as a scene allows them

# About a text alone. A large MLLM learned on text which word belongs to which long before it saw a picture; without these a tiny
# one reads captions as bags of words, and so does whatever is conditioned on it.
REPEAT = "Repeat: {}"
REVERSE = "Turn around: {}"
REWORD = "Reword: {}"
ORDER = "In order: {}"
READ_COLOR = "{}: what color is the {}?"
READ_SHAPE = "{}: what is {}?"
READ_SUBJECT = "{}: what is {} the {}?"
READ_RELATION = "{}: where is the {}?"

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


def _may_be_told(objects: Sequence[tuple[str, str]]) -> bool:
    """Whether a text may name these (colour, shape) in any order: no two of them make a held-out caption."""
    return not any(pair in HELD_OUT_COLOR_PAIRS for pair in objects) and not any(
        is_held_out(make_metadata("color_attr", *one, *two)) or (one[1], two[1]) in HELD_OUT_POSITION
        for one, two in itertools.permutations(objects, 2)
    )


def read(rng: np.random.Generator) -> Turn:
    r"""
    A turn about a text alone, which names two to four objects of different colours and shapes.

    Example:

    ```python
    >>> print(*read(np.random.default_rng(0)), sep=" -> ")
    In order: a heart right of a square -> a square left of a heart
    ```
    """
    count = rng.integers(2, 5)
    while True:
        colors, shapes = rng.permutation(list(COLORS))[:count].tolist(), rng.permutation(SHAPES)[:count].tolist()
        if _may_be_told(list(zip(colors, shapes, strict=True))):
            break
    phrases = [with_article(f"{color} {shape}") for color, shape in zip(colors, shapes, strict=True)]
    kinds = {"repeat": 1, "reverse": 1, "reword": 2, "order": 2, "color": 1, "shape": 1}
    kinds |= {"turn": 1, "sides": 2, "subject": 1, "relation": 1}  # of two objects beside each other
    kind = rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values()))
    text, one = _listed(phrases), int(rng.integers(count))
    if kind == "repeat":
        return Turn(REPEAT.format(text), text)
    if kind == "reverse":
        return Turn(REVERSE.format(text), _listed(phrases[::-1]))
    if kind == "reword":
        reworded = _listed([with_article(f"{shape} in {color}") for color, shape in zip(colors, shapes, strict=True)])
        return Turn(REWORD.format(text), reworded) if rng.random() < 0.7 else Turn(REWORD.format(reworded), text)
    if kind == "order":  # by shape, with other words: each colour has to be looked up by its shape
        in_order = sorted(zip(shapes, colors, strict=True))
        return Turn(ORDER.format(text), _listed([with_article(f"{shape} in {color}") for shape, color in in_order]))
    if kind == "color":
        return Turn(READ_COLOR.format(text, shapes[one]), colors[one])
    if kind == "shape":
        return Turn(READ_SHAPE.format(text, colors[one]), shapes[one])
    relation = str(rng.choice(list(RELATIONS)))
    if rng.random() < 0.5:
        phrases = [with_article(shape) for shape in shapes]
    text, turned = f"{phrases[0]} {relation} {phrases[1]}", f"{phrases[1]} {OPPOSITE[relation]} {phrases[0]}"
    if kind == "turn":
        return Turn(REVERSE.format(text), turned)
    if kind == "sides":  # the left or upper one first, however it was told
        return Turn(ORDER.format(text), text if relation in ("left of", "above") else turned)
    # of the first, or of the second: the same the other way around
    subject, reference, relation = ((0, 1, relation), (1, 0, OPPOSITE[relation]))[rng.integers(2)]
    if kind == "subject":
        return Turn(READ_SUBJECT.format(text, relation, shapes[reference]), phrases[subject])
    return Turn(READ_RELATION.format(text, shapes[subject]), relation)


NOUN_LABELS = {
    "shape": SHAPES,
    "color": (None, *COLORS),
    "number": (None, *NUMBER_WORDS.values()),
    "place": (None, *RELATIONS),
}


def noun_labels(caption: str) -> tuple[dict[int, tuple[int, ...]], list[tuple[int, ...]]]:
    r"""
    What belongs to the nouns of a caption: shape, colour, number, and the place beside the other object, as places in
    `NOUN_LABELS`.

    Returns:
        By the noun's place among the words, what the words up to it tell; and all objects in order once the caption is
        read, when the first one's place is known too.

    Example:

    ```python
    >>> nouns, objects = noun_labels("a red star left of three rings")
    >>> for labels in (*nouns.values(), *objects):
    ...     print([names[place] for names, place in zip(NOUN_LABELS.values(), labels, strict=True)])
    ['star', 'red', None, None]
    ['ring', None, 'three', 'right of']
    ['star', 'red', None, 'left of']
    ['ring', None, 'three', 'right of']
    ```
    """
    relations = {relation.split(" ")[0]: relation for relation in RELATIONS}
    nouns, told = dict[int, dict[str, str]](), dict[str, str]()
    for number, word in enumerate(caption.split(" ")):
        shape = next((shape for shape in SHAPES if word.strip(",") in (shape, plural(shape))), None)
        if shape is not None:
            nouns[number], told = told | {"shape": shape}, {}
        elif word in COLORS:
            told["color"] = word
        elif word in NUMBER_WORDS.values():
            told["number"] = word
        elif word in relations:
            told["place"] = OPPOSITE[relations[word]]
    objects = list(nouns.values())
    if objects and "place" in objects[-1]:
        objects[0] = objects[0] | {"place": OPPOSITE[objects[-1]["place"]]}

    def labels(of_noun: dict[str, str]) -> tuple[int, ...]:
        return tuple(names.index(of_noun.get(kind)) for kind, names in NOUN_LABELS.items())

    return {number: labels(of_noun) for number, of_noun in nouns.items()}, [labels(item) for item in objects]


def _listed(phrases: Sequence[str]) -> str:
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def chat_example(
    seed: int, index: int, *, tasks: Sequence[str] = TASKS, text_share: float = 0.0
) -> tuple[Scene | None, Turn]:
    """Example `index` of the chat corpus `seed`: a scene of `corpus_scene` and one turn about it, or for a share `text_share`
    no scene and a turn about a text."""
    rng = np.random.default_rng([seed, index, 1])
    if text_share and rng.random() < text_share:
        return None, read(rng)
    scene, metadata = corpus_scene(seed, index, tasks=tasks)
    turns = questions(scene, metadata, rng)
    described = turns.pop("describe")
    return scene, described if rng.random() < DESCRIBE_SHARE else list(turns.values())[rng.integers(len(turns))]


def instructions() -> Iterator[str]:
    """Every wording of questions and edits, for the tokenizer."""
    yield from (DESCRIBE, MATCH.format("a circle"), "yes", "no", "none", "one", *NUMBER_WORDS.values())
    yield from (COUNT.format(plural(shape)) for shape in SHAPES)
    yield from (COLOR.format(shape) for shape in SHAPES)
    yield from (
        REPEAT.format("a circle"),
        REVERSE.format("a circle"),
        REWORD.format("a circle in red"),
        ORDER.format("a circle"),
    )
    yield from (READ_COLOR.format("a circle", shape) for shape in SHAPES)
    yield from (READ_SHAPE.format("a circle", color) for color in COLORS)
    yield from (READ_RELATION.format("a circle", shape) for shape in SHAPES)
    yield from (READ_SUBJECT.format("a circle", relation, shape) for relation in RELATIONS for shape in SHAPES)
    for color, shape in itertools.product(COLORS, SHAPES):
        if (color, shape) in HELD_OUT_COLOR_PAIRS:
            continue
        yield from (WHERE.format(relation, f"{color} {shape}") for relation in RELATIONS)
        words = {"color": color, "shape": shape, "a_shape": with_article(shape)}
        yield from (edit.format(**words, a_color_shape=with_article(f"{color} {shape}")) for edit in EDITS)


def shapes_chat(
    num_samples: int, *, seed: int = 0, image_size: int = 64, tasks: Sequence[str] = TASKS, text_share: float = 0.0
) -> Iterator[ChatExample]:
    r"""
    The chat corpus `seed`, drawn.

    Args:
        num_samples (`int`): Examples to draw.
        seed (`int`, *optional*, defaults to 0): The corpus.
        image_size (`int`, *optional*, defaults to 64): Side of the pictures in pixels.
        tasks (`Sequence[str]`, *optional*, defaults to all six): Kinds of scenes, see `sample_scene`.
        text_share (`float`, *optional*, defaults to 0): Share of turns about a text alone.

    Example:

    ```python
    >>> [example] = shapes_chat(1)
    >>> example.image.size, example.question, example.answer
    ((64, 64), 'Describe the image.', 'a blue circle left of a yellow cross')
    ```
    """
    for index in range(num_samples):
        scene, turn = chat_example(seed, index, tasks=tasks, text_share=text_share)
        yield ChatExample(None if scene is None else Image.fromarray(render(scene, image_size)), *turn)
