"""GenEval's rules, as pure functions of detections: boxes, scores and colours in, correct and reason out.

Read in djghosh13/geneval, evaluation/evaluate_images.py (MIT). Two things differ. Of objects with equal confidence we take
the first given, they the order of an unstable sort. A reason lists what is wrong as "; " between sentences, theirs as lines.
Suppression of overlapping boxes, which they offer and leave off (`max_overlap=1.0`), is left out: overlapping objects count.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.shapes import TASKS


# COCO's, as GenEval names them (evaluation/object_names.txt)
CLASSES = tuple(
    [
        "person",
        "bicycle",
        "car",
        "motorcycle",
        "airplane",
        "bus",
        "train",
        "truck",
        "boat",
        "traffic light",
        "fire hydrant",
        "stop sign",
        "parking meter",
        "bench",
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "backpack",
        "umbrella",
        "handbag",
        "tie",
        "suitcase",
        "frisbee",
        "skis",
        "snowboard",
        "sports ball",
        "kite",
        "baseball bat",
        "baseball glove",
        "skateboard",
        "surfboard",
        "tennis racket",
        "bottle",
        "wine glass",
        "cup",
        "fork",
        "knife",
        "spoon",
        "bowl",
        "banana",
        "apple",
        "sandwich",
        "orange",
        "broccoli",
        "carrot",
        "hot dog",
        "pizza",
        "donut",
        "cake",
        "chair",
        "couch",
        "potted plant",
        "bed",
        "dining table",
        "toilet",
        "tv",
        "laptop",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "cell phone",
        "microwave",
        "oven",
        "toaster",
        "sink",
        "refrigerator",
        "book",
        "clock",
        "vase",
        "scissors",
        "teddy bear",
        "hair drier",
        "toothbrush",
    ]
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

CONFIDENCE = 0.3  # an object counts above it,
COUNTING_CONFIDENCE = 0.9  # in the task `counting` above this
MAX_OBJECTS = 16  # of a class: the most confident ones
POSITION_THRESHOLD = 0.1  # the share of both boxes' sides by which an offset is reduced


@dataclass(frozen=True)
class Detection:
    """One object found: class, box (left, top, right, bottom) in pixels, confidence, and colour if it was judged."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


def judge_geneval(detections: Iterable[Detection], metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """
    GenEval's verdict on everything that a detector found in a picture: thresholds, limits, then [`judge`].

    Args:
        detections (`Iterable[Detection]`): All objects, in any order; those of classes whose colour is asked for need one.
        metadata (`dict`): A line of `evaluation_metadata.jsonl`: `tag`, `include` and, optionally, `exclude`.

    Returns:
        `tuple[bool, str]`: Whether the picture is right, and what is wrong with it (empty when right).

    Raises:
        ValueError: If the tag is none of the six tasks, or a colour is asked for of a detection without one.

    Example:

    ```python
    >>> clock = Detection("clock", (0, 0, 9, 9), 0.9)  # not above 0.9, which counting asks for
    >>> judge_geneval([clock], {"tag": "counting", "include": [{"class": "clock", "count": 1}]})
    (False, 'expected clock>=1, found 0')
    >>> judge_geneval([clock], {"tag": "single_object", "include": [{"class": "clock", "count": 1}]})
    (True, '')
    ```
    """
    return judge(counted_objects(detections, metadata["tag"]), metadata)


def counted_objects(detections: Iterable[Detection], task: str) -> list[Detection]:
    """
    The detections that count in a task: above its confidence, and at most 16 of a class, most confident first.

    Raises:
        ValueError: If the task is none of the six.

    Example:

    ```python
    >>> [item.score for item in counted_objects([Detection("cup", (0, 0, 1, 1), s) for s in (0.3, 0.31, 0.5)], "colors")]
    [0.5, 0.31]
    ```
    """
    if task not in TASKS:
        raise ValueError(f"Expected a task out of {', '.join(TASKS)}, got {task!r}.")
    threshold = COUNTING_CONFIDENCE if task == "counting" else CONFIDENCE
    taken: dict[str, int] = defaultdict(int)
    counted = []
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold and taken[detection.label] < MAX_OBJECTS:
            taken[detection.label] += 1
            counted.append(detection)
    return counted


def relative_position(subject: Detection, reference: Detection) -> set[str]:
    """
    GenEval's relations of a subject to a reference: the offset between box centres, reduced by a tenth of both boxes'
    sides, must reach half of the full offset's length along an axis.

    Returns:
        `set[str]`: Out of "left of", "right of", "above", "below"; empty where the boxes are too close to tell.

    Example:

    ```python
    >>> relative_position(Detection("star", (0, 0, 10, 10), 1.0), Detection("ring", (30, 0, 40, 10), 1.0))
    {'left of'}
    ```
    """
    a, b = np.reshape(subject.box, (2, 2)), np.reshape(reference.box, (2, 2))
    offset = a.mean(axis=0) - b.mean(axis=0)
    sides = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    reduced = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sides, 0.0) * np.sign(offset)
    if not np.any(np.abs(reduced) >= 1e-3):
        return set()
    x, y = reduced / np.linalg.norm(offset)
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in tests.items() if true}


def judge(detections: Iterable[Detection], metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """
    GenEval's verdict on the objects that count, from any detector.

    Every `include` entry must hold: at least `count` objects of the class; the `count` most confident ones of the
    colour asked for, and in the position asked for relative to those of the entry pointed at. No `exclude` entry may
    reach its count. Objects of classes that the metadata do not name are allowed, as GenEval allows them.

    Args:
        detections (`Iterable[Detection]`): What was found, in any order.
        metadata (`dict`): `include` and, optionally, `exclude`, in GenEval's form.

    Returns:
        `tuple[bool, str]`: Whether the picture is right, and what is wrong with it (empty when right).

    Raises:
        ValueError: If a colour is asked for of a detection without one.

    Example:

    ```python
    >>> judge([Detection("star", (0, 0, 9, 9), 0.9, "red")], {"include": [{"class": "star", "count": 2}]})
    (False, 'expected star>=2, found 1')
    ```
    """
    by_class: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection.score):
        by_class[detection.label].append(detection)

    reasons: list[str] = []
    matched: list[list[Detection] | None] = []  # for each `include` entry its objects, `None` where it failed
    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        found = by_class[name][:count]
        problem = ""
        if len(found) < count:
            problem = f"expected {name}>={count}, found {len(found)}"
        elif "color" in wanted:
            if any(item.color is None for item in found):
                raise ValueError(f"The metadata ask for a {wanted['color']} {name}, but a detection has no colour.")
            wrong = [item.color for item in found if item.color != wanted["color"]]
            if wrong:
                problem = f"expected {wanted['color']} {name}>={count}, found {', '.join(map(str, wrong))}"
        if not problem and "position" in wanted:
            relation, index = wanted["position"]
            references = matched[index]
            if references is None:
                problem = f"no target for {name} to be {relation}"
            else:
                relations = [relative_position(item, reference) for item in found for reference in references]
                wrong_relation = next((true for true in relations if relation not in true), None)
                if wrong_relation is not None:
                    actual = " and ".join(sorted(wrong_relation)) or "too close to"
                    problem = f"expected {name} {relation} target, found {actual} target"
        if problem:
            reasons.append(problem)
        matched.append(None if problem else found)
    for unwanted in metadata.get("exclude", []):
        number = len(by_class[unwanted["class"]])
        if number >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
    return not reasons, "; ".join(reasons)
