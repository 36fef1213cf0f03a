"""Questions and answers about scenes of the shapes world, to teach a small MLLM to see and to read.

Each example is one turn over one picture in TRL's conversational prompt-completion format with images, the format that
`recipes/sft_mllm.py` reads from any other data set too. Like the captions, no question and no answer names a held-out
combination, and no picture shows a held-out pair of colour and shape.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

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


def write_chat(
    folder: str | os.PathLike, num_samples: int, *, seed: int = 0, image_size: int = 64, samples_per_shard: int = 5000
) -> list[Path]:
    r"""
    Writes a chat corpus as parquet shards with the columns `images`, `prompt` and `completion`.

    Args:
        folder (`str` or `os.PathLike`): Where to write; made if missing.
        num_samples (`int`): Examples to write.
        seed (`int`, *optional*, defaults to 0): The corpus.
        image_size (`int`, *optional*, defaults to 64): Side of the pictures in pixels.
        samples_per_shard (`int`, *optional*, defaults to 5000): Examples of all shards but the last.

    Returns:
        `list[Path]`: The shards, in order.

    Raises:
        ValueError: If a number is not positive.
        FileExistsError: If the folder holds shards that this call would not replace.
    """
    import datasets  # an optional dependency, and slow to import

    for name, number in {"num_samples": num_samples, "samples_per_shard": samples_per_shard}.items():
        if number <= 0:
            raise ValueError(f"Expected a positive {name}, got {number}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_samples, samples_per_shard)
    shards = [folder / f"train-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts))]
    strangers = sorted(set(folder.glob("train-*")) - set(shards))
    if strangers:
        raise FileExistsError(f"{folder} holds {strangers[0].name} of another corpus: choose an empty folder.")
    message = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "prompt": message, "completion": message})
    with tqdm(total=num_samples, desc="Drawing shapes", unit="scene") as progress:
        for start, shard in zip(starts, shards, strict=True):
            rows: list[dict[str, Any]] = []
            for index in range(start, min(start + samples_per_shard, num_samples)):
                scene, turn = chat_example(seed, index)
                rows.append(
                    {
                        "images": [Image.fromarray(render(scene, image_size))],
                        "prompt": [{"role": "user", "content": turn.question}],
                        "completion": [{"role": "assistant", "content": turn.answer}],
                    }
                )
                progress.update()
            temporary = shard.with_name(f"{shard.name}.tmp")
            datasets.Dataset.from_list(rows, features=features).to_parquet(temporary)
            temporary.replace(shard)
    return shards
