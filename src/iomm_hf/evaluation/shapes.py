"""The exact score of the shapes world: GenEval's six tasks judged by rule, with no detector to download or to trust.

`find_objects` turns a picture into detections: subtract a fitted background, name colours in an opponent space, take
connected components, and compare each with templates of its own area. `judge` applies GenEval's rules to detections,
whoever made them. `score_pictures` sums up, with counts, intervals, and seen and held-out prompts apart.

The rules read clean rendering and the blur, noise and drift of an autoencoder alike; the tests hold both directions,
right on scenes that show their caption and wrong on scenes that do not.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from PIL import Image

from ..data.shapes import COLORS, SHAPES, TASKS, Metadata, coverage, is_held_out, list_metadata, render, scene_for, signed_distance


try:
    from scipy import ndimage

    is_scipy_available = True
except ImportError:
    is_scipy_available = False


# Linear opponent space: red-green, yellow-blue, and luminance at half weight. Linear, because anti-aliasing and blur
# mix linearly; opponent, because every grey is then (0, 0, x) and backgrounds differ from the palette in two axes.
OPPONENT = np.array([[1.0, 0.5, 1 / 6], [-1.0, 0.5, 1 / 6], [0.0, -1.0, 1 / 6]])
COLOR_NAMES = tuple(COLORS)
PALETTE = np.array(list(COLORS.values())) / 255 @ OPPONENT  # (8, 3)

MIN_CHROMA = 0.5 * np.linalg.norm(PALETTE[:, :2], axis=1).min()
MIN_AREA = 0.005  # of the picture; the smallest object drawn, a star of radius 0.13, covers 0.018
MIN_CORE_SHARE = 0.15  # a colour with less of a component's inside is a fringe, not an object
MAX_COLOR_DISTANCE = 0.22  # an object whose colour is further from the whole palette has no name
MIN_OVERLAP = 0.75  # intersection over union with the best template; blobs stay below
TEMPLATE_BLURS = (0.7, 1.4)  # pixels; blur fills notches and holes, so blurred shapes need blurred templates


POSITION_THRESHOLD = 0.1  # GenEval's: the share of both boxes' sides by which an offset is reduced


@dataclass(frozen=True)
class Detection:
    """One object found: class, box (left, top, right, bottom) in pixels, confidence, and colour where it was judged."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str  # empty when correct
    found: list[Detection]


# Rules


def relative_position(subject: Detection, reference: Detection) -> set[str]:
    """
    GenEval's relations of a subject to a reference: the offset between box centres, reduced by a tenth of both boxes'
    sides, must reach half of the full offset's length along an axis.

    Returns:
        `set[str]`: Out of "left of", "right of", "above", "below"; empty where the boxes are too close to tell.

    Example:

    ```py
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


def judge(detections: Iterable[Detection], metadata: Metadata) -> tuple[bool, str]:
    """
    GenEval's verdict on detections, from any detector.

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

    ```py
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


# Objects


def _fit_background(pixels: np.ndarray) -> np.ndarray:
    """A plane for each channel through the pixels that look like the border, (H, W, 3)."""
    height, width, _ = pixels.shape
    y, x = np.mgrid[0:height, 0:width]
    terms = np.stack([np.ones(height * width), x.ravel() / width - 0.5, y.ravel() / height - 0.5], axis=1)
    flat = pixels.reshape(-1, 3)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.broadcast_to(np.median(border, axis=0), flat.shape)
    # Each round keeps the pixels near the last fit; the first is wide enough for the steepest ramp that is drawn.
    for tolerance in (0.2, 0.1, 0.08):
        near = np.abs(flat - background).max(axis=1) < tolerance
        if near.mean() < 0.1:
            break
        inputs = terms[near]
        weights = np.linalg.lstsq(inputs.T @ inputs, inputs.T @ flat[near], rcond=None)[0]
        background = terms @ weights
    return background.reshape(pixels.shape)


def _nearest_color(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For opponent pixels (N, 3) the nearest palette entry and its distance."""
    distance = np.linalg.norm(pixels[:, None] - PALETTE, axis=-1)
    nearest = distance.argmin(axis=1)
    return nearest, distance[np.arange(len(pixels)), nearest]


def _components(mask: np.ndarray, min_area: float) -> list[np.ndarray]:
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())[1:]
    return [labels == i + 1 for i in np.flatnonzero(areas >= min_area)]


def _inner(mask: np.ndarray) -> np.ndarray:
    eroded = ndimage.binary_erosion(mask)
    return eroded if eroded.any() else mask


def _split_by_color(component: np.ndarray, color: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """
    Parts of one colour in a connected component, which touching objects may share.

    Along an outline one object blends into the background through other palette colours (orange on black through
    brown). Such fringes are thin, so a colour counts when its own pixels have an inside, and the others join the
    nearest that counts.
    """
    areas = np.array([np.count_nonzero(component & (color == k)) for k in range(len(PALETTE))])
    cores = np.array([np.count_nonzero(ndimage.binary_erosion(component & (color == k))) for k in range(len(PALETTE))])
    kept = np.flatnonzero(cores > MIN_CORE_SHARE * cores.sum())
    if len(kept) < 2:
        return [(int(kept[0] if len(kept) else areas.argmax()), component)]
    seeds = np.where(component & np.isin(color, kept), color, -1)
    rows, columns = ndimage.distance_transform_edt(seeds < 0, return_distances=False, return_indices=True)
    filled = seeds[rows, columns]
    return [(int(k), component & (filled == k)) for k in kept]


def _name_shape(opacity: np.ndarray) -> tuple[str, float]:
    """The shape whose template, of the same area and centroid, overlaps an opacity map (h, w) best, and its IoU."""
    height, width = opacity.shape
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    area = opacity.sum()
    center_x, center_y = (opacity * x).sum() / area, (opacity * y).sum() / area
    best = ("", 0.0)
    for shape in SHAPES:
        unit_area, unit_center_y = _UNIT_MOMENTS[shape]
        radius = math.sqrt(area / unit_area)
        distance = radius * signed_distance(
            shape, (x - center_x) / radius, (y - center_y) / radius + unit_center_y
        )
        sharp = np.clip(0.5 - distance, 0.0, 1.0)
        templates = np.stack([sharp, *(ndimage.gaussian_filter(sharp, sigma) for sigma in TEMPLATE_BLURS)])
        overlap = np.minimum(templates, opacity).sum(axis=(1, 2)) / np.maximum(templates, opacity).sum(axis=(1, 2))
        if overlap.max() > best[1]:
            best = (shape, float(overlap.max()))
    return best


def _unit_moments(shape: str) -> tuple[float, float]:
    """Area and height of the centroid of a shape of radius 1; all shapes are symmetric about x = 0."""
    grid = (np.arange(256) + 0.5) / 128 - 1
    y, x = np.meshgrid(grid * 100, grid * 100, indexing="ij")
    inside = coverage(shape, x, y, 100.0)
    return float(inside.sum() / 128**2), float((inside * y).sum() / inside.sum() / 100)


_UNIT_MOMENTS = {shape: _unit_moments(shape) for shape in SHAPES}


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"Expected a PIL image or a uint8 array (H, W, 3), got {pixels.dtype} {pixels.shape}.")
    return pixels / 255


def find_objects(image: Image.Image | np.ndarray) -> list[Detection]:
    """
    Shapes and colours in a picture, by rule.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): The picture; an array is `uint8` sRGB of shape `(H, W, 3)`.

    Returns:
        `list[Detection]`: Objects from the most to the least certain; `score` is the overlap with the best template.

    Raises:
        ImportError: If SciPy is missing.
        ValueError: If an array is not `uint8` or not of shape `(H, W, 3)`.

    Example:

    ```py
    >>> from iomm_hf.data.shapes import make_metadata
    >>> scene = scene_for(make_metadata("colors", "red", "circle"), np.random.default_rng(0))
    >>> [(item.color, item.label) for item in find_objects(render(scene))]
    [('red', 'circle')]
    ```
    """
    if not is_scipy_available:
        raise ImportError("Scoring shapes needs SciPy. Install it with `pip install iomm-hf[eval]`.")
    pixels = _as_pixels(image)
    min_area = MIN_AREA * pixels.shape[0] * pixels.shape[1]
    background = _fit_background(pixels) @ OPPONENT
    observed = pixels @ OPPONENT
    contrast = observed - background
    # Chroma alone finds objects, so that no grey is one, whatever the background's luminance does.
    mask = np.hypot(contrast[..., 0], contrast[..., 1]) > MIN_CHROMA
    color = np.full(mask.shape, -1)
    color[mask] = _nearest_color(observed[mask])[0]

    found = []
    for component in _components(mask, min_area):
        for k, part in _split_by_color(component, color):
            rows, columns = ndimage.find_objects(part.astype(np.int8))[0]
            rows, columns = slice(max(rows.start - 2, 0), rows.stop + 2), slice(max(columns.start - 2, 0), columns.stop + 2)
            # Opacity of this colour over the background: 0.5 is where the outline runs.
            full = PALETTE[k] - background[rows, columns]
            opacity = np.clip((contrast[rows, columns] * full).sum(axis=-1) / (full**2).sum(axis=-1), 0.0, 1.0)
            own = part[rows, columns]
            for piece in _components(own & (opacity > 0.5), min_area):
                median = np.median(observed[rows, columns][_inner(piece)], axis=0)
                (name,), (distance,) = _nearest_color(median[None])
                if distance > MAX_COLOR_DISTANCE:
                    continue
                # Two pixels around the piece hold the rest of its outline, unless another object shows there.
                fringe = ndimage.binary_dilation(piece, np.ones((5, 5))) & (own | ~mask[rows, columns])
                shape, overlap = _name_shape(np.where(fringe, opacity, 0.0))
                if overlap >= MIN_OVERLAP:
                    top, left = np.argwhere(piece).min(axis=0) + (rows.start, columns.start)
                    bottom, right = np.argwhere(piece).max(axis=0) + (rows.start + 1, columns.start + 1)
                    box = (float(left), float(top), float(right), float(bottom))
                    found.append(Detection(shape, box, overlap, COLOR_NAMES[name]))
    return sorted(found, key=lambda detection: -detection.score)


def score_image(image: Image.Image | np.ndarray, metadata: Metadata) -> Verdict:
    """
    Whether a picture shows its caption: `find_objects`, then `judge`.

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): The picture.
        metadata (`dict`): Its GenEval metadata.

    Returns:
        `Verdict`: `correct`, the `reason` where it is not, and the objects `found`.

    Example:

    ```py
    >>> score_image(Image.new("RGB", (64, 64), "white"), {"include": [{"class": "star", "count": 1}]}).reason
    'expected star>=1, found 0'
    ```
    """
    found = find_objects(image)
    correct, reason = judge(found, metadata)
    return Verdict(correct, reason, found)
