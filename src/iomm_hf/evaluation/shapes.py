"""The exact score of the shapes world: GenEval's six tasks judged by rule, with no detector to download or to trust.

`find_objects` turns a picture into detections: subtract a fitted background, name colours in an opponent space, take
connected components, and compare each with templates of its own area. GenEval's rules (`geneval_rules.judge`) judge them.
`score_pictures` sums up, with counts, intervals, and seen and held-out prompts apart.

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

from ..data.shapes import COLORS, SHAPES, TASKS, Metadata, coverage, is_held_out, list_metadata, render, scene_for
from .geneval_rules import Detection, judge


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
MIN_CORE_SHARE = 0.25  # of a colour's pixels in a component: with less inside it is a fringe, not an object
MAX_COLOR_DISTANCE = 0.22  # an object whose colour is further from the whole palette has no name
# Intersection over union with the best template. Degraded objects stay above 0.84, most blobs of noise below.
MIN_OVERLAP = 0.82
TEMPLATE_BLURS = (0.0, 0.7, 1.4)  # pixels; blur fills notches and holes, so blurred shapes need blurred templates


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str  # empty when correct
    found: list[Detection]


# Objects


def _fit_background(pixels: np.ndarray) -> np.ndarray:
    """A plane for each channel through the pixels that look like the border, (H, W, 3)."""
    height, width, _ = pixels.shape
    y, x = np.mgrid[0:height, 0:width]
    terms = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], axis=-1)  # (H, W, 3)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    weights = np.zeros((3, 3))
    weights[0] = np.median(border, axis=0)
    sampled, inputs = pixels[::2, ::2].reshape(-1, 3), terms[::2, ::2].reshape(-1, 3)  # a quarter of them suffices
    # Each round keeps the pixels near the last fit; the first is wide enough for the steepest ramp that is drawn.
    for tolerance in (0.2, 0.1, 0.08):
        near = (np.abs(sampled - inputs @ weights) < tolerance).all(axis=1)
        if near.mean() < 0.1:
            break
        used = inputs[near]
        weights = np.linalg.lstsq(used.T @ used, used.T @ sampled[near], rcond=None)[0]
    return terms @ weights


def _nearest_color(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For opponent pixels (N, 3) the nearest palette entry and its distance."""
    distance = np.linalg.norm(pixels[:, None] - PALETTE, axis=-1)
    nearest = distance.argmin(axis=1)
    return nearest, distance[np.arange(len(pixels)), nearest]


def _components(mask: np.ndarray, min_area: float) -> list[np.ndarray]:
    labels, _ = ndimage.label(mask)
    areas = np.bincount(labels.ravel())[1:]
    return [labels == i + 1 for i in np.flatnonzero(areas >= min_area)]


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask; the last two are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _inner(mask: np.ndarray) -> np.ndarray:
    eroded = ndimage.binary_erosion(mask)
    return eroded if eroded.any() else mask


def _split_by_color(component: np.ndarray, color: np.ndarray, min_area: float) -> list[tuple[int, np.ndarray]]:
    """
    Parts of one colour in a connected component, which touching objects may share.

    Along an outline one object blends into the background through other palette colours (orange on black through
    brown). Such fringes are thin, so a colour counts when its own pixels have an inside, and the others join the
    nearest that counts.
    """
    own = [component & (color == k) for k in range(len(PALETTE))]
    areas = np.array([mask.sum() for mask in own])
    cores = np.array([ndimage.binary_erosion(mask).sum() if mask.any() else 0 for mask in own])
    kept = np.flatnonzero((areas >= min_area) & (cores >= MIN_CORE_SHARE * areas))
    if len(kept) < 2:
        return [(int(cores.argmax() if cores.any() else areas.argmax()), component)]
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
    templates = np.empty((len(SHAPES), height, width))
    for i, shape in enumerate(SHAPES):
        unit_area, unit_center_y = _UNIT_MOMENTS[shape]
        radius = math.sqrt(area / unit_area)
        templates[i] = coverage(shape, x - center_x, y - center_y + radius * unit_center_y, radius)
    overlaps = np.stack([_overlap(opacity, ndimage.gaussian_filter(templates, (0, b, b))) for b in TEMPLATE_BLURS])
    best = int(overlaps.max(axis=0).argmax())
    return SHAPES[best], float(overlaps[:, best].max())


def _overlap(opacity: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Intersection over union of one opacity map (h, w) with each template (N, h, w)."""
    return np.minimum(templates, opacity).sum(axis=(1, 2)) / np.maximum(templates, opacity).sum(axis=(1, 2))


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

    ```python
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
        left, top, right, bottom = _bounds(component)
        left, top = max(left - 2, 0), max(top - 2, 0)
        window = (slice(top, bottom + 2), slice(left, right + 2))  # everything below is within it
        for k, part in _split_by_color(component[window], color[window], min_area):
            # Opacity of this colour over the background: 0.5 is where the outline runs.
            full = PALETTE[k] - background[window]
            opacity = np.clip((contrast[window] * full).sum(axis=-1) / (full**2).sum(axis=-1), 0.0, 1.0)
            for piece in _components(part & (opacity > 0.5), min_area):
                median = np.median(observed[window][_inner(piece)], axis=0)
                (name,), (distance,) = _nearest_color(median[None])
                if distance > MAX_COLOR_DISTANCE:
                    continue
                # Two pixels around the piece hold the rest of its outline, unless another object shows there.
                fringe = ndimage.binary_dilation(piece, np.ones((5, 5))) & (part | ~mask[window])
                shape, overlap = _name_shape(np.where(fringe, opacity, 0.0))
                if overlap >= MIN_OVERLAP:
                    x0, y0, x1, y1 = _bounds(piece)
                    box = (float(left + x0), float(top + y0), float(left + x1), float(top + y1))
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

    ```python
    >>> score_image(Image.new("RGB", (64, 64), "white"), {"include": [{"class": "star", "count": 1}]}).reason
    'expected star>=1, found 0'
    ```
    """
    found = find_objects(image)
    correct, reason = judge(found, metadata)
    return Verdict(correct, reason, found)


# Benchmark


@dataclass(frozen=True)
class BenchmarkPicture:
    """One picture to draw: a prompt's metadata (with `held_out`) and the seed of the noise to start from."""

    metadata: Metadata
    seed: int


def benchmark_prompts(
    tasks: Sequence[str] = TASKS, *, max_prompts: int = 50, max_held_out: int = 10, seed: int = 0
) -> list[Metadata]:
    """
    The benchmark's prompts: all distinct prompts of a task, or a seeded choice where there are too many.

    With the defaults 8, 50, 24, 50, 50 and 50 prompts in the order of `TASKS`. Held-out prompts are 0, 8, 0, 8, 10 and
    10 of them: more than their natural share, so that 200 pictures a task still tell something about them.

    Args:
        tasks (`Sequence[str]`, *optional*, defaults to all six): Which tasks.
        max_prompts (`int`, *optional*, defaults to 50): Most prompts of a task.
        max_held_out (`int`, *optional*, defaults to 10): Most of them that are held out of training.
        seed (`int`, *optional*, defaults to 0): Seed of the choice.

    Returns:
        `list[dict]`: GenEval metadata, task by task, each with a boolean `held_out` added.

    Raises:
        ValueError: If a task is unknown.

    Example:

    ```python
    >>> prompts = benchmark_prompts(["two_object"])
    >>> len(prompts), sum(metadata["held_out"] for metadata in prompts)
    (50, 8)
    ```
    """
    chosen = []
    for task in tasks:
        candidates = [{**metadata, "held_out": is_held_out(metadata)} for metadata in list_metadata(task)]
        rng = np.random.default_rng([seed, TASKS.index(task)])
        held_out = [i for i, metadata in enumerate(candidates) if metadata["held_out"]]
        seen = [i for i, metadata in enumerate(candidates) if not metadata["held_out"]]
        kept = rng.permutation(held_out)[: min(max_held_out, max_prompts)].tolist()
        kept += rng.permutation(seen)[: max_prompts - len(kept)].tolist()
        chosen += [candidates[int(i)] for i in sorted(kept)]
    return chosen


def benchmark_plan(
    prompts: Sequence[Metadata] | None = None, *, pictures_per_task: int = 200
) -> list[BenchmarkPicture]:
    """
    Which pictures to draw: each task's prompts in turn with seed 0, then with seed 1, until the task has enough.

    Args:
        prompts (`Sequence[dict]`, *optional*, defaults to `benchmark_prompts()`): Metadata with `held_out`.
        pictures_per_task (`int`, *optional*, defaults to 200): Pictures of each task that the prompts hold.

    Returns:
        `list[BenchmarkPicture]`: The plan, task by task.

    Example:

    ```python
    >>> plan = benchmark_plan()
    >>> len(plan), max(picture.seed for picture in plan if picture.metadata["tag"] == "two_object")
    (1200, 3)
    ```
    """
    by_task: dict[str, list[Metadata]] = defaultdict(list)
    for metadata in benchmark_prompts() if prompts is None else prompts:
        by_task[metadata["tag"]].append(metadata)
    return [
        BenchmarkPicture(group[i % len(group)], i // len(group))
        for group in by_task.values()
        for i in range(pictures_per_task)
    ]


def render_truth(plan: Sequence[BenchmarkPicture], size: int = 64) -> list[np.ndarray]:
    """
    A true picture for each entry of a plan: what the scorer's ceiling, and that of an autoencoder, is measured on.

    Example:

    ```python
    >>> plan = benchmark_plan(pictures_per_task=1)
    >>> score_pictures(render_truth(plan), [picture.metadata for picture in plan]).overall.value
    1.0
    ```
    """
    return [
        render(scene_for(picture.metadata, np.random.default_rng([picture.seed, index])), size)
        for index, picture in enumerate(plan)
    ]


# Report


@dataclass(frozen=True)
class Share:
    """`correct` of `total` pictures, with Wilson's 95 % interval."""

    correct: int
    total: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """The plain mean of several tasks' accuracies, with a 95 % interval, and the tasks that it is over."""

    value: float
    low: float
    high: float
    tasks: list[str]


@dataclass(frozen=True)
class ShapesReport:
    """
    What a set of pictures scores.

    Args:
        tasks (`dict[str, Share]`): By task.
        overall (`Mean`, *optional*): Plain mean of the six tasks, as GenEval reports it; `None` unless all are there.
        seen, held_out (`dict[str, Share]`): By task, the pictures of prompts that training may, and may not, name.
        seen_mean, held_out_mean (`Mean`, *optional*):
            Plain means over the tasks that have pictures of both kinds, so that the two compare; `None` without any.
        pictures (`int`): Pictures scored.
        prompts (`int`): Distinct prompts among them.
        seeds (`list[int]`): The seeds they were drawn with, sorted; empty where none were given.
    """

    tasks: dict[str, Share]
    overall: Mean | None
    seen: dict[str, Share]
    held_out: dict[str, Share]
    seen_mean: Mean | None
    held_out_mean: Mean | None
    pictures: int
    prompts: int
    seeds: list[int]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return asdict(self)


def wilson_share(correct: int, total: int, confidence: float = 0.95) -> Share:
    """
    A proportion with Wilson's score interval, which stays inside [0, 1] and keeps a width at 0 and 1.

    Raises:
        ValueError: If `total` is not positive or `correct` not in [0, total].

    Example:

    ```python
    >>> share = wilson_share(200, 200)
    >>> share.accuracy, round(share.low, 3), share.high
    (1.0, 0.981, 1.0)
    ```
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"Expected 0 <= correct <= total and total > 0, got {correct} of {total}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At 0 and 1 the bound equals the share but for rounding.
    low = 0.0 if correct == 0 else center - half
    high = 1.0 if correct == total else center + half
    return Share(correct, total, share, low, high)


def mean_of_shares(shares: dict[str, Share]) -> Mean:
    """
    Plain mean of the tasks' accuracies. Its interval recovers the tasks' variances from their Wilson limits (MOVER,
    Zou and Donner 2008), so that it neither collapses where every picture is right nor leaves [0, 1]. Pictures count
    as independent, although those of one prompt are alike.

    Example:

    ```python
    >>> mean_of_shares({"colors": wilson_share(10, 20), "counting": wilson_share(20, 20)}).value
    0.75
    ```
    """
    value = fmean(share.accuracy for share in shares.values())
    down = math.hypot(*(share.accuracy - share.low for share in shares.values())) / len(shares)
    up = math.hypot(*(share.high - share.accuracy for share in shares.values())) / len(shares)
    return Mean(value, value - down, value + up, list(shares))


def score_pictures(
    pictures: Iterable[Image.Image | np.ndarray], metadata: Sequence[Metadata], *, seeds: Sequence[int] = ()
) -> ShapesReport:
    """
    Score pictures against their prompts.

    Args:
        pictures (`Iterable`): PIL images or `uint8` arrays of shape `(H, W, 3)`; a generator is read one at a time.
        metadata (`Sequence[dict]`): The prompt's metadata of each picture.
        seeds (`Sequence[int]`, *optional*): The seeds that the pictures were drawn with, for the report.

    Returns:
        `ShapesReport`: The scores.

    Raises:
        ValueError: If there are not as many pictures as metadata, none at all, or a task is unknown.

    Example:

    ```python
    >>> blank = Image.new("RGB", (64, 64))
    >>> score_pictures([blank], list_metadata("single_object")[:1]).tasks["single_object"].accuracy
    0.0
    ```
    """
    correct = [score_image(picture, wanted).correct for picture, wanted in zip(pictures, metadata, strict=True)]
    return report_verdicts(correct, metadata, seeds=seeds)


def report_verdicts(
    correct: Sequence[bool], metadata: Sequence[Metadata], *, seeds: Sequence[int] = ()
) -> ShapesReport:
    """
    The report on pictures that were judged before.

    Args:
        correct (`Sequence[bool]`): Whether each picture shows its prompt.
        metadata, seeds: See [`score_pictures`].

    Raises:
        ValueError: See [`score_pictures`].

    Example:

    ```python
    >>> report_verdicts([True, False], list_metadata("single_object")[:2]).tasks["single_object"].accuracy
    0.5
    ```
    """
    verdicts: dict[tuple[str, bool], list[bool]] = defaultdict(list)
    for right, wanted in zip(correct, metadata, strict=True):
        verdicts[wanted["tag"], is_held_out(wanted)].append(right)
    if not verdicts:
        raise ValueError("There are no pictures to score.")

    def shares(*kinds: bool) -> dict[str, Share]:
        results = {task: [right for kind in kinds for right in verdicts.get((task, kind), [])] for task in TASKS}
        return {task: wilson_share(sum(right), len(right)) for task, right in results.items() if right}

    tasks, seen, held_out = shares(False, True), shares(False), shares(True)
    both = [task for task in TASKS if task in seen and task in held_out]
    return ShapesReport(
        tasks=tasks,
        overall=mean_of_shares(tasks) if len(tasks) == len(TASKS) else None,
        seen=seen,
        held_out=held_out,
        seen_mean=mean_of_shares({task: seen[task] for task in both}) if both else None,
        held_out_mean=mean_of_shares({task: held_out[task] for task in both}) if both else None,
        pictures=len(metadata),
        prompts=len({wanted["prompt"] for wanted in metadata}),
        seeds=sorted(set(seeds)),
    )
