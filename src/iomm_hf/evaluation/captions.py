"""How well an MLLM names what a scene of the shapes world shows: shapes, colours and counts an object, whole captions.

Captions are read back into objects by the grammar that `describe` writes them in. Each true object is matched with a
spoken one, so one missed object costs one object and not the whole picture. A whole caption is right if it names the very
objects and a relation that means the same: "a star left of a ring" is "a ring right of a star".
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.shapes import COLORS, NUMBER_WORDS, RELATIONS, SHAPES, Scene, describe, render
from ..data.shapes_chat import DESCRIBE, plural
from ..processing_iomm import IOMMProcessor
from .shapes import Share, wilson_share


NUMBERS = {"a": 1, "an": 1} | {word: number for number, word in NUMBER_WORDS.items()}
SHAPE_OF = {word: shape for shape in SHAPES for word in (shape, plural(shape))}


def parse_caption(text: str) -> list[tuple[str | None, str]] | None:
    r"""
    The objects that a caption names, as (colour or `None`, shape), or `None` if it is not in the grammar.

    Example:

    ```python
    >>> parse_caption("two red stars and a heart")
    [('red', 'star'), ('red', 'star'), (None, 'heart')]
    ```
    """
    for relation in RELATIONS:
        text = text.replace(f" {relation} ", " and ")
    objects: list[tuple[str | None, str]] = []
    for phrase in text.replace(", ", " and ").split(" and "):
        words = phrase.split()
        if not 2 <= len(words) <= 3 or words[0] not in NUMBERS or words[-1] not in SHAPE_OF:
            return None
        if len(words) == 3 and words[1] not in COLORS:
            return None
        objects += [(words[1] if len(words) == 3 else None, SHAPE_OF[words[-1]])] * NUMBERS[words[0]]
    return objects


def meaning(text: str) -> tuple[str, ...]:
    """The same for captions that say the same: objects in alphabetical order, or "left of" and "above" alone."""
    for relation, opposite in {"left of": None, "above": None, "right of": "left of", "below": "above"}.items():
        first, found, second = text.partition(f" {relation} ")
        if found:
            return (first, relation, second) if opposite is None else (second, opposite, first)
    return tuple(sorted(f"{color} {shape}" for color, shape in parse_caption(text) or [])) or (text,)


def compare(said: str, wanted: str) -> dict[str, list[bool]]:
    """Verdicts on one caption: `shapes`, `colors` and `counts` an object of `wanted`, `named` an object of `said` (true if
    it is there), and `whole` (the same [`meaning`])."""
    truth = parse_caption(wanted)
    assert truth is not None, wanted  # `describe` wrote it
    spoken = parse_caption(said) or []
    verdicts: dict[str, list[bool]] = {"whole": [meaning(said) == meaning(wanted)]}
    by_shape, spoken_by_shape = Counter(shape for _, shape in truth), Counter(shape for _, shape in spoken)
    # Of two stars one spoken star is right and the other missed.
    verdicts["shapes"] = [
        number < spoken_by_shape[shape] for shape, count in by_shape.items() for number in range(count)
    ]
    colored = Counter(spoken)
    # colours of objects whose shape was named, so that a colour is not counted wrong for a missed object
    verdicts["colors"] = []
    for color, shape in truth:
        if color is not None and spoken_by_shape[shape]:
            verdicts["colors"].append(colored[color, shape] > 0)
            colored[color, shape] -= 1
    verdicts["counts"] = [spoken_by_shape[shape] == by_shape[shape] for _, shape in truth]
    verdicts["named"] = [by_shape[shape] > 0 for _, shape in spoken]
    return verdicts


@torch.no_grad()
def score_captions(
    mllm: PreTrainedModel, processor: IOMMProcessor, scenes: Sequence[Scene], batch_size: int = 64
) -> dict[str, Any]:
    r"""
    Captions of scenes, greedily spoken, against `describe`.

    Args:
        mllm (`PreTrainedModel`): The MLLM.
        processor ([`IOMMProcessor`]): Its processor.
        scenes (`Sequence[Scene]`): Scenes that it has not seen.
        batch_size (`int`, *optional*, defaults to 64): Scenes a forward pass.

    Returns:
        `dict` with `scenes`, a [`~iomm_hf.evaluation.shapes.Share`] for each of `shapes`, `colors`, `counts` (of the true
        objects), `named` (of the spoken objects: is such a shape there?) and `whole`, and up to 20 wrong captions.
    """
    verdicts: dict[str, list[bool]] = {name: [] for name in ("shapes", "colors", "counts", "named", "whole")}
    wrong: list[dict[str, str]] = []
    for start in tqdm(range(0, len(scenes), batch_size), desc="Captions", unit="batch"):
        part = scenes[start : start + batch_size]
        images = [np.asarray(render(scene)) for scene in part]
        inputs = processor.encode([processor.understand(DESCRIBE, image) for image in images])
        answers = mllm.generate(**inputs.to(mllm.device), max_new_tokens=40, do_sample=False)
        texts = processor.tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for scene, text in zip(part, texts, strict=True):
            said, wanted = text.strip(), describe(scene)
            for name, found in compare(said, wanted).items():
                verdicts[name] += found
            if meaning(said) != meaning(wanted) and len(wrong) < 20:
                wrong.append({"said": said, "wanted": wanted})
    shares: dict[str, Share] = {
        name: wilson_share(sum(found), len(found)) for name, found in verdicts.items() if found
    }
    return {"scenes": len(scenes), **shares, "wrong": wrong}
