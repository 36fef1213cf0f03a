"""Zero-shot editing in the shapes world: whether the change was made *and* the rest kept.

The paper scores editing by a judge that reads both pictures (its Table 3, ImgEdit-Bench). Here rules do: each case knows the
scene that it starts from and the one that it should end with. A copy of the source makes no change and a fresh picture keeps
nothing, so both score 0. Needs SciPy (the `eval` extra).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..data.collate import sample_seed
from ..data.shapes import COLORS, HELD_OUT_COLOR_PAIRS, Scene, list_metadata, make_metadata, render, scene_for
from ..data.shapes_chat import EDITS
from ..pipeline_iomm import IOMMPipeline
from .drawing import draw_batches
from .geneval_rules import Detection
from .shapes import Mean, Share, find_objects, mean_of_shares, wilson_share


RECOLOR, REMOVE = EDITS[0], EDITS[2]
KINDS = ("recolor", "remove", "variation")
MIN_BOX_OVERLAP = 0.5  # intersection over union of an object's boxes before and after: it stayed where it was
MAX_BACKGROUND_CHANGE = 0.15  # mean over the background, of 0..1: a light and a dark one differ by 0.66 at least
MIN_VARIATION = 0.02  # mean change of a pixel, of 0..1: with less, a variation is a copy


@dataclass(frozen=True)
class EditCase:
    """A scene, what to do with it (`None`: vary it), and the scene it should become (for a variation, one of many)."""

    kind: str
    instruction: str | None
    source: Scene
    target: Scene
    seed: int

    def picture(self, size: int = 64) -> Image.Image:
        """The source, drawn."""
        return Image.fromarray(render(self.source, size))


@dataclass(frozen=True)
class EditVerdict:
    changed: bool
    kept: bool

    @property
    def correct(self) -> bool:
        return self.changed and self.kept


@dataclass(frozen=True)
class EditReport:
    """
    Shares of pictures by kind of edit, with 95 % intervals.

    Args:
        changed, kept, correct (`dict[str, Share]`): Where the change was made, where the rest was kept, and where both.
        overall (`Mean`): Plain mean of `correct` over the kinds.
    """

    changed: dict[str, Share]
    kept: dict[str, Share]
    correct: dict[str, Share]
    overall: Mean

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)


def edit_cases(cases_per_kind: int = 100, seed: int = 0) -> list[EditCase]:
    r"""
    Edits to ask for: "make it blue" of one object, "remove the star" of two, and variations of one or two. No instruction
    asks for a held-out pair of colour and shape, and no picture shows one.

    Args:
        cases_per_kind (`int`, *optional*, defaults to 100): Cases of each of `KINDS`.
        seed (`int`, *optional*, defaults to 0): Seed of scenes and edits.

    Example:

    ```python
    >>> [case.instruction for case in edit_cases(1)]
    ['make it red', 'remove the square', None]
    ```
    """
    cases = []
    for kind_number, kind in enumerate(KINDS):
        for index in range(cases_per_kind):
            rng = np.random.default_rng([seed, kind_number, index])
            number = {"recolor": 1, "remove": 2, "variation": 1 + index % 2}[kind]
            prompts = list_metadata("single_object" if number == 1 else "two_object", show_held_out=False)
            source = scene_for(prompts[rng.integers(len(prompts))], rng, show_held_out=False)
            chosen = source.objects[rng.integers(number)]
            target, instruction = source, None
            if kind == "recolor":
                allowed = [color for color in COLORS if (color, chosen.shape) not in HELD_OUT_COLOR_PAIRS]
                allowed.remove(chosen.color)
                color = allowed[rng.integers(len(allowed))]
                target = replace(source, objects=(replace(chosen, color=color),))
                instruction = RECOLOR.format(color=color)
            elif kind == "remove":
                target = replace(source, objects=tuple(item for item in source.objects if item is not chosen))
                instruction = REMOVE.format(shape=chosen.shape)
            else:
                words = [word for item in source.objects for word in (item.color, item.shape)]
                target = scene_for(make_metadata("colors" if number == 1 else "color_attr", *words), rng)
            cases.append(EditCase(kind, instruction, source, target, index))
    return cases


def judge_edit(picture: Image.Image, case: EditCase) -> EditVerdict:
    r"""
    Whether an edited picture shows the change, and everything else as it was.

    Changed: a recoloured object's new colour is there and its old one gone; a removed shape is gone; a variation differs from
    its source. Kept: the objects are the target's, no more and no fewer, and the background's brightness is the source's;
    but for variations, each also stands where it stood. A recoloured object may be of any colour here.

    Example:

    ```python
    >>> case = edit_cases(1)[0]
    >>> judge_edit(case.picture(), case)
    EditVerdict(changed=False, kept=True)
    >>> judge_edit(Image.fromarray(render(case.target)), case).correct
    True
    ```
    """
    before, after = np.asarray(case.picture(picture.width)), np.asarray(picture.convert("RGB"))
    found = find_objects(after)
    names = Counter((item.color, item.label) for item in found)
    wanted = Counter((item.color, item.shape) for item in case.target.objects)
    difference = np.abs(before.astype(float) - after) / 255

    if case.kind == "variation":
        return EditVerdict(changed=bool(difference.mean() >= MIN_VARIATION), kept=names == wanted)
    expected = find_objects(render(case.target, picture.width))
    kept = len(found) == len(expected) and in_place(found, expected) and background_kept(difference, before, after)
    if case.kind == "recolor":
        colors = {item.color for item in found}
        changed = case.target.objects[0].color in colors and case.source.objects[0].color not in colors
    else:
        [removed] = {item.shape for item in case.source.objects} - {item.shape for item in case.target.objects}
        changed = all(item.label != removed for item in found)
        kept = kept and names == wanted
    return EditVerdict(changed, kept)


def in_place(found: Sequence[Detection], expected: Sequence[Detection]) -> bool:
    """Whether each expected object is found as its shape, where it should be."""
    return all(
        any(item.label == wanted.label and box_overlap(item.box, wanted.box) >= MIN_BOX_OVERLAP for item in found)
        for wanted in expected
    )


def box_overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared)


def background_kept(difference: np.ndarray, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether what is no object in either picture changed little."""
    background = np.ones(difference.shape[:2], dtype=bool)
    for picture in (before, after):
        for item in find_objects(picture):
            left, top, right, bottom = (int(side) for side in item.box)
            background[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
    return bool(difference[background].mean() <= MAX_BACKGROUND_CHANGE) if background.any() else False


def draw_edits(
    pipeline: IOMMPipeline, cases: Sequence[EditCase], num_inference_steps: int = 30, guidance_scale: float = 3.0
) -> list[Image.Image]:
    r"""
    One edited picture for each case, each from its own noise.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> len(draw_edits(tiny_pipeline(), edit_cases(1), num_inference_steps=1))
    3
    ```
    """
    drawn: dict[int, Image.Image] = {}
    for told in (True, False):  # variations have no prompt
        chosen = [i for i, case in enumerate(cases) if (case.instruction is not None) == told]
        if not chosen:
            continue
        inputs: dict[str, Any] = {"image": [cases[i].picture(pipeline.resolution) for i in chosen]}
        if told:
            inputs["prompt"] = [cases[i].instruction for i in chosen]
        seeds = [sample_seed(cases[i].seed, f"{cases[i].kind} {cases[i].instruction}", 0) for i in chosen]
        pictures = draw_batches(pipeline, seeds, num_inference_steps, guidance_scale, **inputs)
        drawn |= dict(zip(chosen, pictures, strict=True))
    return [drawn[i] for i in range(len(cases))]


def score_edits(pictures: Sequence[Image.Image], cases: Sequence[EditCase]) -> EditReport:
    r"""
    Scores edited pictures.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): One for each case.
        cases (`Sequence[EditCase]`): From [`edit_cases`].

    Raises:
        `ValueError`: not as many pictures as cases.

    Example:

    ```python
    >>> cases = edit_cases(2)
    >>> score_edits([case.picture() for case in cases], cases).overall.value  # copies
    0.0
    ```
    """
    verdicts: dict[str, list[EditVerdict]] = {}
    for picture, case in zip(pictures, cases, strict=True):
        verdicts.setdefault(case.kind, []).append(judge_edit(picture, case))

    def shares(question: str) -> dict[str, Share]:
        return {
            kind: wilson_share(sum(getattr(verdict, question) for verdict in of_kind), len(of_kind))
            for kind, of_kind in verdicts.items()
        }

    correct = shares("correct")
    return EditReport(shares("changed"), shares("kept"), correct, mean_of_shares(correct))
