"""A small visual world in which GenEval's six tasks can be drawn and scored exactly, on a CPU and offline.

Eight upright shapes in eight colours, one to four objects a scene, never overlapping, on plain or graded backgrounds
of almost no chroma. Scenes keep fractions of the picture's side, so one scene renders at any size; rendering evaluates
signed distances, which gives anti-aliased edges. Scene `index` of corpus `seed` depends on these two numbers alone, so
any order and any number of workers draws the same corpus.

A caption comes with GenEval's own metadata, and some combinations are held out of every caption (see `is_held_out`).
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")

# sRGB in 0..255. Brown is the colour nearest to the greys, so it bounds how much chroma a background may have.
COLORS = {
    "red": (222, 28, 38),
    "green": (28, 156, 60),
    "blue": (36, 84, 226),
    "yellow": (246, 214, 28),
    "purple": (132, 40, 172),
    "orange": (250, 128, 18),
    "pink": (252, 134, 196),
    "brown": (136, 74, 26),
}

# In the order of GenEval's own tables.
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BOUND_TASKS = ("position", "color_attr")  # whose words, bound otherwise, say something else

# Relation -> (axis, sign of subject minus reference along it); y grows downwards, as in pixels.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}

# Half the side of an object's bounding square, as a fraction of the picture's side, by the number of objects.
RADIUS_RANGES = {1: (0.17, 0.30), 2: (0.15, 0.21), 3: (0.14, 0.185), 4: (0.13, 0.17)}
BORDER = 2 / 64  # kept free around the scene
GAP = 3 / 64  # kept free between two bounding squares, so that blur does not join their objects

# A relation counts as unmistakable when the other axis' offset is at most this share of its own.
RELATION_SLACK = 0.4

# Each shape once and each colour once.
HELD_OUT_COLOR_PAIRS = frozenset(
    {
        ("yellow", "circle"),
        ("purple", "square"),
        ("orange", "triangle"),
        ("pink", "star"),
        ("brown", "heart"),
        ("red", "cross"),
        ("green", "diamond"),
        ("blue", "ring"),
    }
)


def _shape_pairs(step: int) -> frozenset[tuple[str, str]]:
    # 8 of the 56 ordered pairs, each shape once on either side: a fixed step through the list of shapes.
    return frozenset((shape, SHAPES[(i + step) % len(SHAPES)]) for i, shape in enumerate(SHAPES))


HELD_OUT_TWO_OBJECT = _shape_pairs(3)  # ("circle", "star"): "a circle and a star"
HELD_OUT_POSITION = _shape_pairs(2)  # ("circle", "triangle"): "a circle left of a triangle", in all four relations

HELD_OUT_SHARE = 0.15

Metadata = dict[str, Any]


@dataclass(frozen=True)
class SceneObject:
    """One object: its centre (`x`, `y`) and half side `radius` are fractions of the picture's side."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """A linear ramp between two sRGB colours in 0..255 along `angle` (radians); a plain one has two equal ends."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    angle: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: Background


def _check(kind: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"Unknown {kind} {value!r}: expected one of {', '.join(allowed)}.")


# Shapes


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """
    Distance to the outline of a shape of radius 1 at the origin, negative inside. Every shape fits the square
    [-1, 1] x [-1, 1]. Near the outline, where anti-aliasing reads it, the distance is exact except at corners.

    Args:
        shape (`str`): One of `SHAPES`.
        x, y (`np.ndarray`): Coordinates in radii, y downwards, of shapes that broadcast together.

    Returns:
        `np.ndarray`: Distances in radii.

    Raises:
        ValueError: If the shape is unknown.

    Example:

    ```python
    >>> float(signed_distance("circle", np.array(0.0), np.array(0.0)))
    -1.0
    ```
    """
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.28
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86
    if shape == "diamond":
        return (np.abs(x) / 0.74 + np.abs(y) - 1.0) / np.hypot(1 / 0.74, 1.0)
    if shape == "cross":
        near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
        return np.maximum(near - 0.34, far - 0.98)
    if shape == "triangle":
        # Apex (0, -0.95), base from (-1, 0.85) to (1, 0.85).
        side = (np.abs(x) * 1.8 - (y + 0.95)) / np.hypot(1.8, 1.0)
        return np.maximum(side, y - 0.85)
    if shape == "star":
        # Fold the plane into half of one of five points: there the outline is one line, from tip to notch.
        scale, notch, half = 1.05, 0.48, np.pi / 5
        y = y / scale - 0.095  # the star's box, not its hub, is centred
        x = x / scale
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
        length = np.hypot(x, y)
        dx, dy = notch * np.cos(half) - 1.0, notch * np.sin(half)
        return scale * (dy * (length * np.cos(angle) - 1.0) - dx * length * np.sin(angle)) / np.hypot(dx, dy)
    if shape == "heart":
        # Two circles over a square standing on its corner; the closed form is Inigo Quilez' `sdHeart`.
        scale = 0.6036
        x, y = np.abs(x) * scale, 0.5518 - y * scale
        lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
        foot = np.maximum(x + y, 0.0) / 2
        body = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - foot) ** 2 + (y - foot) ** 2)) * np.sign(x - y)
        return np.where(x + y > 1.0, lobe, body) / scale
    raise ValueError(f"Unknown shape {shape!r}: expected one of {', '.join(SHAPES)}.")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """
    Share of each pixel that a shape covers.

    Args:
        shape (`str`): One of `SHAPES`.
        x, y (`np.ndarray`): Pixel centres relative to the shape's centre, in pixels.
        radius (`float`): The shape's radius in pixels.

    Returns:
        `np.ndarray`: Coverage in [0, 1].
    """
    return np.clip(0.5 - radius * signed_distance(shape, x / radius, y / radius), 0.0, 1.0)


def _object_coverage(item: SceneObject, size: int) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and coverage of the window that holds an object."""
    center_x, center_y, radius = item.x * size, item.y * size, item.radius * size
    left, right = max(int(center_x - radius - 1), 0), min(int(center_x + radius + 2), size)
    top, bottom = max(int(center_y - radius - 1), 0), min(int(center_y + radius + 2), size)
    x = np.arange(left, right)[None, :] + 0.5 - center_x
    y = np.arange(top, bottom)[:, None] + 0.5 - center_y
    return slice(top, bottom), slice(left, right), coverage(item.shape, x, y, radius)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """
    Draw a scene.

    Args:
        scene (`Scene`): What to draw.
        size (`int`, *optional*, defaults to 64): Side of the picture in pixels.

    Returns:
        `np.ndarray` of `uint8`: The picture in sRGB, shape `(size, size, 3)`.

    Example:

    ```python
    >>> scene, metadata = sample_scene(np.random.default_rng([0, 1]))
    >>> render(scene).shape
    (64, 64, 3)
    ```
    """
    background = scene.background
    start, end = np.asarray(background.start), np.asarray(background.end)
    if background.start == background.end:
        picture = np.empty((size, size, 3))
        picture[:] = start
    else:
        along = (np.arange(size) + 0.5) / size - 0.5
        ramp = np.cos(background.angle) * along[None, :] + np.sin(background.angle) * along[:, None]
        reach = (abs(np.cos(background.angle)) + abs(np.sin(background.angle))) / 2
        picture = start + (ramp / (2 * reach) + 0.5)[..., None] * (end - start)  # (size, size, 3)
    for item in scene.objects:
        rows, columns, alpha = _object_coverage(item, size)
        window = picture[rows, columns]
        window += alpha[..., None] * (np.asarray(COLORS[item.color], dtype=np.float64) - window)
    return np.rint(picture).astype(np.uint8)


def patch_labels(scene: Scene, size: int = 64, patch: int = 8, min_coverage: float = 0.25) -> np.ndarray:
    """
    Dense labels for warming up a vision tower: which shape and which colour each patch shows.

    Args:
        scene (`Scene`): The scene.
        size (`int`, *optional*, defaults to 64): Side of the picture in pixels.
        patch (`int`, *optional*, defaults to 8): Side of a patch in pixels.
        min_coverage (`float`, *optional*, defaults to 0.25):
            A patch of which no object covers this share is background.

    Returns:
        `np.ndarray` of `int64`: Shape `(size // patch, size // patch, 2)`. The last axis holds the shape's and the
        colour's place in `SHAPES` and `COLORS`, counted from 1; 0 is background.

    Raises:
        ValueError: If `size` is no multiple of `patch`.

    Example:

    ```python
    >>> scene = scene_for(make_metadata("colors", "red", "circle"), np.random.default_rng(0))
    >>> sorted(set(patch_labels(scene)[..., 0].flatten().tolist()))
    [0, 1]
    ```
    """
    if size % patch:
        raise ValueError(f"Patches must tile the picture: size {size} is no multiple of patch {patch}.")
    side = size // patch
    labels = np.zeros((side, side, 2), dtype=np.int64)
    best = np.full((side, side), min_coverage)
    color_names = tuple(COLORS)
    for item in scene.objects:
        full = np.zeros((size, size))
        rows, columns, alpha = _object_coverage(item, size)
        full[rows, columns] = alpha
        share = full.reshape(side, patch, side, patch).mean(axis=(1, 3))
        wins = share >= best
        labels[wins] = SHAPES.index(item.shape) + 1, color_names.index(item.color) + 1
        best = np.where(wins, share, best)
    return labels


# Captions and metadata


def with_article(words: str) -> str:
    """`a` or `an` before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _counted(count: int, words: str) -> str:
    if count == 1:
        return with_article(words)
    return f"{NUMBER_WORDS[count]} {words}{'es' if words.endswith('s') else 's'}"


def make_metadata(task: str, *words: str) -> Metadata:
    """
    Caption and GenEval metadata from the words that tell one prompt of a task from another.

    Args:
        task (`str`): One of `TASKS`.
        words (`str`):
            By task: `single_object` shape; `two_object` shape, shape; `counting` number word, shape; `colors` colour,
            shape; `position` subject shape, relation, reference shape; `color_attr` colour, shape, colour, shape.

    Returns:
        `dict`: `tag`, `include`, for counting `exclude`, and `prompt`, as in GenEval's `evaluation_metadata.jsonl`.

    Raises:
        ValueError: If the task or a word is unknown, or their number is wrong.

    Example:

    ```python
    >>> make_metadata("position", "heart", "left of", "star")["prompt"]
    'a heart left of a star'
    >>> make_metadata("counting", "three", "cross")["exclude"]
    [{'class': 'cross', 'count': 4}]
    ```
    """
    _check("task", task, TASKS)
    kinds = {
        "single_object": ("shape",),
        "two_object": ("shape", "shape"),
        "counting": ("number", "shape"),
        "colors": ("color", "shape"),
        "position": ("shape", "relation", "shape"),
        "color_attr": ("color", "shape", "color", "shape"),
    }[task]
    if len(words) != len(kinds):
        raise ValueError(f"Task {task!r} takes {len(kinds)} words ({', '.join(kinds)}), got {len(words)}: {words}.")
    vocabulary = {
        "shape": SHAPES,
        "color": tuple(COLORS),
        "relation": tuple(RELATIONS),
        "number": tuple(NUMBER_WORDS.values()),
    }
    for kind, word in zip(kinds, words, strict=True):
        _check(kind, word, vocabulary[kind])

    metadata: Metadata = {"tag": task}
    if task == "single_object":
        metadata["include"] = [{"class": words[0], "count": 1}]
        metadata["prompt"] = with_article(words[0])
    elif task == "two_object":
        metadata["include"] = [{"class": word, "count": 1} for word in words]
        metadata["prompt"] = f"{with_article(words[0])} and {with_article(words[1])}"
    elif task == "counting":
        count = next(number for number, word in NUMBER_WORDS.items() if word == words[0])
        metadata["include"] = [{"class": words[1], "count": count}]
        metadata["exclude"] = [{"class": words[1], "count": count + 1}]
        metadata["prompt"] = _counted(count, words[1])
    elif task == "colors":
        metadata["include"] = [{"class": words[1], "count": 1, "color": words[0]}]
        metadata["prompt"] = with_article(f"{words[0]} {words[1]}")
    elif task == "position":
        # GenEval lists the reference first, so that "position" can point back at it.
        metadata["include"] = [
            {"class": words[2], "count": 1},
            {"class": words[0], "count": 1, "position": [words[1], 0]},
        ]
        metadata["prompt"] = f"{with_article(words[0])} {words[1]} {with_article(words[2])}"
    else:
        pairs = (words[:2], words[2:])
        metadata["include"] = [{"class": shape, "count": 1, "color": color} for color, shape in pairs]
        metadata["prompt"] = " and ".join(with_article(f"{color} {shape}") for color, shape in pairs)
    return metadata


def _prompt_words(task: str) -> Iterator[tuple[str, ...]]:
    shape_pairs = itertools.permutations(SHAPES, 2)
    if task == "single_object":
        yield from ((shape,) for shape in SHAPES)
    elif task == "two_object":
        yield from shape_pairs
    elif task == "counting":
        yield from itertools.product(NUMBER_WORDS.values(), SHAPES)
    elif task == "colors":
        yield from itertools.product(COLORS, SHAPES)
    elif task == "position":
        yield from ((a, relation, b) for (a, b), relation in itertools.product(shape_pairs, RELATIONS))
    else:
        color_pairs = list(itertools.permutations(COLORS, 2))
        yield from ((c, a, d, b) for (a, b), (c, d) in itertools.product(shape_pairs, color_pairs))


@lru_cache(maxsize=1)
def _held_out_color_attr() -> frozenset[str]:
    # The 15 % of prompts whose SHA-256 comes first: a choice that no library's random stream can change.
    prompts = [make_metadata("color_attr", *words)["prompt"] for words in _prompt_words("color_attr")]
    prompts.sort(key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return frozenset(prompts[: round(HELD_OUT_SHARE * len(prompts))])


def is_held_out(metadata: Metadata) -> bool:
    """
    Whether a prompt is kept out of every training caption.

    Held out are the prompts that name one of the eight `HELD_OUT_COLOR_PAIRS`, and by task: of `two_object` and
    `position` the 8 of 56 ordered pairs of shapes in `HELD_OUT_TWO_OBJECT` and `HELD_OUT_POSITION` (subject first, all
    four relations), of `color_attr` 15 % of its 3136 ordered pairs. The reversed pair may stay in training: what is
    tested is composition, not new words.

    Args:
        metadata (`dict`): Metadata as `make_metadata` gives it.

    Returns:
        `bool`: Whether it is held out.

    Raises:
        ValueError: If the task is unknown.

    Example:

    ```python
    >>> is_held_out(make_metadata("colors", "yellow", "circle"))
    True
    ```
    """
    task, include = metadata["tag"], metadata["include"]
    _check("task", task, TASKS)
    if any((item.get("color"), item["class"]) in HELD_OUT_COLOR_PAIRS for item in include):
        return True
    if task == "two_object":
        return (include[0]["class"], include[1]["class"]) in HELD_OUT_TWO_OBJECT
    if task == "position":
        return (include[1]["class"], include[0]["class"]) in HELD_OUT_POSITION
    if task == "color_attr":
        return metadata["prompt"] in _held_out_color_attr()
    return False


@lru_cache(maxsize=2 * len(TASKS))
def _allowed_words(task: str, show_held_out: bool) -> tuple[tuple[str, ...], ...]:
    words = _prompt_words(task)
    return tuple(w for w in words if show_held_out or not is_held_out(make_metadata(task, *w)))


def list_metadata(task: str, *, show_held_out: bool = True) -> list[Metadata]:
    """
    All distinct prompts of a task, in a fixed order: 8, 56, 24, 64, 224 and 3136 in the order of `TASKS`.

    Args:
        task (`str`): One of `TASKS`.
        show_held_out (`bool`, *optional*, defaults to `True`): Whether held-out prompts are among them.

    Returns:
        `list[dict]`: Their metadata.

    Raises:
        ValueError: If the task is unknown.

    Example:

    ```python
    >>> len(list_metadata("two_object")), len(list_metadata("two_object", show_held_out=False))
    (56, 48)
    ```
    """
    _check("task", task, TASKS)
    return [make_metadata(task, *words) for words in _allowed_words(task, show_held_out)]


def _exchanged_words(metadata: Metadata) -> tuple[str, ...]:
    first, second = metadata["include"]
    if metadata["tag"] == "position":
        return second["class"], OPPOSITE[second["position"][0]], first["class"]
    return second["color"], first["class"], first["color"], second["class"]


def exchange(metadata: Metadata) -> Metadata:
    """
    The same words bound otherwise: the opposite relation, or the two colours exchanged.

    Args:
        metadata (`dict`): Metadata of `position` or `color_attr`, as `make_metadata` gives them.

    Raises:
        ValueError: If the task is another one, whose words cannot be bound otherwise.

    Example:

    ```python
    >>> exchange(make_metadata("color_attr", "red", "circle", "blue", "star"))["prompt"]
    'a blue circle and a red star'
    ```
    """
    if metadata["tag"] not in BOUND_TASKS:
        raise ValueError(f"Only {' and '.join(BOUND_TASKS)} bind words to each other, got task {metadata['tag']!r}.")
    return make_metadata(metadata["tag"], *_exchanged_words(metadata))


def falsify(metadata: Metadata, rng: np.random.Generator, *, show_held_out: bool = True) -> Metadata:
    """
    Metadata that differ from the given ones in one meaningful thing, so that each is false of the other's scenes:
    another shape, another colour, another number, the opposite relation, a crossing one, or swapped colours.

    Serves as the false half of the scorer's test, and as the "no" answers when a captioner learns to match.

    Args:
        metadata (`dict`): Metadata as `make_metadata` gives it.
        rng (`np.random.Generator`): Chooses the change.
        show_held_out (`bool`, *optional*, defaults to `True`): Whether the result may be a held-out prompt.

    Returns:
        `dict`: The changed metadata, of the same task.

    Raises:
        ValueError: If the task is unknown.

    Example:

    ```python
    >>> falsify(make_metadata("counting", "two", "star"), np.random.default_rng(0))["prompt"]
    'two crosses'
    ```
    """
    task, include = metadata["tag"], metadata["include"]
    _check("task", task, TASKS)
    named = [item["class"] for item in include]
    others = [shape for shape in SHAPES if shape not in named]
    changes: list[list[tuple[str, ...]]]  # one list for each kind of change, so that kinds are equally likely
    if task == "single_object":
        changes = [[(shape,) for shape in others]]
    elif task == "two_object":
        changes = [[(shape, named[1]) for shape in others], [(named[0], shape) for shape in others]]
    elif task == "counting":
        number = NUMBER_WORDS[include[0]["count"]]
        changes = [
            [(word, named[0]) for word in NUMBER_WORDS.values() if word != number],
            [(number, shape) for shape in others],
        ]
    elif task == "colors":
        color = include[0]["color"]
        changes = [
            [(color, shape) for shape in others],
            [(name, named[0]) for name in COLORS if name != color],
        ]
    elif task == "position":
        reference, subject = named
        relation = include[1]["position"][0]
        changes = [
            [_exchanged_words(metadata)],
            [(subject, word, reference) for word in RELATIONS if word not in (relation, OPPOSITE[relation])],
            [(shape, relation, reference) for shape in others] + [(subject, relation, shape) for shape in others],
        ]
    else:
        first, second = (item["color"] for item in include)
        rest = [name for name in COLORS if name not in (first, second)]
        changes = [
            [_exchanged_words(metadata)],
            [(c, named[0], second, named[1]) for c in rest] + [(first, named[0], c, named[1]) for c in rest],
            [(first, shape, second, named[1]) for shape in others]
            + [(first, named[0], second, shape) for shape in others],
        ]
    options = [[make_metadata(task, *words) for words in kind] for kind in changes]
    if not show_held_out:
        options = [[option for option in kind if not is_held_out(option)] for kind in options]
    options = [kind for kind in options if kind]
    kind = options[rng.integers(len(options))]
    return kind[rng.integers(len(kind))]


# Scenes


def _sample_background(rng: np.random.Generator) -> Background:
    # Light or dark, never between, and tinted by at most 0.02 a channel: a tenth of brown's chroma.
    low, high = (0.84, 0.98) if rng.random() < 0.5 else (0.02, 0.18)
    ends = rng.uniform(low, high, size=(2, 1)) + rng.uniform(-0.02, 0.02, size=(2, 3))
    start, end = (tuple(row) for row in (255 * ends).tolist())
    angle = rng.uniform(0, 2 * np.pi)
    return Background(start, start if rng.random() < 0.5 else end, angle)


def _place(
    count: int, relations: list[tuple[int, str, int]], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Radii (N,) and centres (N, 2) of objects that keep their distance and fulfil (subject, relation, reference)."""
    pairs = list(itertools.combinations(range(count), 2))
    first, second = np.array([a for a, _ in pairs], dtype=int), np.array([b for _, b in pairs], dtype=int)
    while True:
        # Rejection sampling, 64 layouts at a time; new radii each round, because the largest four hardly fit.
        radii = rng.uniform(*RADIUS_RANGES[count], size=count)
        reach = 0.5 - BORDER - radii
        centers = 0.5 + rng.uniform(-1, 1, size=(64, count, 2)) * reach[:, None]
        distance = np.abs(centers[:, first] - centers[:, second]).max(axis=-1)  # (64, pairs)
        valid = (distance >= radii[first] + radii[second] + GAP).all(axis=1)
        for subject, relation, reference in relations:
            valid &= _holds(relation, centers[:, subject] - centers[:, reference])
        if valid.any():
            return radii, centers[valid.argmax()]


def _holds(relation: str, offset: np.ndarray) -> np.ndarray:
    """Whether a relation holds unmistakably for offsets (..., 2) between centres."""
    axis, sign = RELATIONS[relation]
    along = sign * offset[..., axis]
    return (along > 0) & (np.abs(offset[..., 1 - axis]) <= RELATION_SLACK * along)


def scene_for(metadata: Metadata, rng: np.random.Generator, *, show_held_out: bool = True) -> Scene:
    """
    A random scene of which the metadata are true, with no object that they do not name.

    Args:
        metadata (`dict`): GenEval metadata over this world's shapes, colours and relations, at most four objects.
        rng (`np.random.Generator`): Chooses colours left open, sizes, places and the background.
        show_held_out (`bool`, *optional*, defaults to `True`):
            Whether a colour left open may make one of `HELD_OUT_COLOR_PAIRS`. A pair that the metadata name is drawn.

    Returns:
        `Scene`: The scene.

    Raises:
        ValueError: If a shape, colour or relation is unknown, or there are not one to four objects.

    Example:

    ```python
    >>> scene = scene_for(make_metadata("counting", "three", "star"), np.random.default_rng(0))
    >>> [item.shape for item in scene.objects]
    ['star', 'star', 'star']
    ```
    """
    names: list[tuple[str, str]] = []  # (shape, colour) of each object
    groups: list[list[int]] = []  # the objects of each `include` entry
    relations: list[tuple[int, str, int]] = []
    for item in metadata["include"]:
        shape = item["class"]
        _check("shape", shape, SHAPES)
        if "color" in item:
            _check("color", item["color"], tuple(COLORS))
            choices = [item["color"]]
        else:
            choices = [color for color in COLORS if show_held_out or (color, shape) not in HELD_OUT_COLOR_PAIRS]
        group = list(range(len(names), len(names) + item["count"]))
        # Several of a kind share one colour half of the time: both are what people draw for "three stars".
        colors = rng.choice(len(choices), size=len(group))
        if rng.random() < 0.5:
            colors[:] = colors[0]
        names += [(shape, choices[color]) for color in colors]
        if "position" in item:
            relation, reference = item["position"]
            _check("relation", relation, tuple(RELATIONS))
            relations += [(a, relation, b) for a in group for b in groups[reference]]
        groups.append(group)
    if len(names) not in RADIUS_RANGES:
        raise ValueError(f"A scene holds 1 to {max(RADIUS_RANGES)} objects, got {len(names)}: {metadata}.")
    radii, centers = _place(len(names), relations, rng)
    objects = tuple(
        SceneObject(shape, color, x, y, radius)
        for (shape, color), radius, (x, y) in zip(names, radii.tolist(), centers.tolist(), strict=True)
    )
    return Scene(objects, _sample_background(rng))


def sample_scene(
    rng: np.random.Generator, *, tasks: Sequence[str] = TASKS, show_held_out: bool = False
) -> tuple[Scene, Metadata]:
    """
    A random training scene with its caption.

    Args:
        rng (`np.random.Generator`): Source of all choices.
        tasks (`Sequence[str]`, *optional*, defaults to all six):
            Kinds to draw from, equally likely; name a kind twice to double its share.
        show_held_out (`bool`, *optional*, defaults to `False`):
            With `False` the caption is none of the held-out prompts and the scene shows none of
            `HELD_OUT_COLOR_PAIRS`. With `True` both may be: right for images without captions.

    Returns:
        `tuple[Scene, dict]`: The scene and its metadata; the caption is `metadata["prompt"]`.

    Raises:
        ValueError: If a task is unknown.

    Example:

    ```python
    >>> scene, metadata = sample_scene(np.random.default_rng([0, 3]), tasks=("colors",))
    >>> metadata["tag"]
    'colors'
    ```
    """
    for task in tasks:
        _check("task", task, TASKS)
    task = tasks[int(rng.integers(len(tasks)))]
    choices = _allowed_words(task, show_held_out)
    metadata = make_metadata(task, *choices[rng.integers(len(choices))])
    return scene_for(metadata, rng, show_held_out=show_held_out), metadata


def corpus_scene(
    seed: int, index: int, *, tasks: Sequence[str] = TASKS, show_held_out: bool = False
) -> tuple[Scene, Metadata]:
    """
    Scene `index` of the corpus `seed`: the same whoever draws it, and in whatever order. See `sample_scene`.

    Example:

    ```python
    >>> corpus_scene(0, 7) == corpus_scene(0, 7)
    True
    ```
    """
    return sample_scene(np.random.default_rng([seed, index]), tasks=tasks, show_held_out=show_held_out)


# Descriptions


def relation_between(subject: SceneObject, reference: SceneObject) -> str | None:
    """
    The relation of a subject to a reference, or `None` where it is not unmistakable (see `RELATION_SLACK`).

    Example:

    ```python
    >>> relation_between(SceneObject("star", "red", 0.2, 0.5, 0.1), SceneObject("ring", "red", 0.8, 0.5, 0.1))
    'left of'
    ```
    """
    offset = np.array([subject.x - reference.x, subject.y - reference.y])
    return next((relation for relation in RELATIONS if _holds(relation, offset)), None)


def describe(scene: Scene) -> str:
    """
    A full description of a scene that names what is there and no held-out combination.

    Two objects are told by their relation where it is unmistakable, others as a list, from the upper left to the lower
    right unless that names a held-out ordered pair. Where colours cannot be named without one, shapes are named alone.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `str`: For instance "a red circle left of a blue star" or "two red stars and a brown star".

    Example:

    ```python
    >>> background = Background((250, 250, 250), (250, 250, 250), 0.0)
    >>> circle, star = SceneObject("circle", "red", 0.2, 0.5, 0.1), SceneObject("star", "blue", 0.8, 0.5, 0.1)
    >>> describe(Scene((circle, star), background))
    'a red circle left of a blue star'
    >>> describe(Scene((SceneObject("circle", "yellow", 0.5, 0.5, 0.2),), background))
    'a circle'
    ```
    """
    for with_colors in (True, False):
        if with_colors and any((item.color, item.shape) in HELD_OUT_COLOR_PAIRS for item in scene.objects):
            continue
        for order in itertools.permutations(sorted(scene.objects, key=lambda item: item.x + item.y)):
            text = _describe_in_order(order, with_colors)
            if text is not None:
                return text
    raise ValueError(f"No order of naming avoids every held-out pair: {scene.objects}.")


def _describe_in_order(order: tuple[SceneObject, ...], with_colors: bool) -> str | None:
    groups = Counter((item.color if with_colors else "", item.shape) for item in order)
    relation = relation_between(order[0], order[1]) if len(order) == 2 else None
    held_out_shapes = HELD_OUT_TWO_OBJECT if relation is None else HELD_OUT_POSITION
    for (color, shape), (other_color, other_shape) in itertools.combinations(groups, 2):
        if (shape, other_shape) in held_out_shapes:
            return None
        different = shape != other_shape and color != other_color
        if (
            with_colors
            and different
            and is_held_out(make_metadata("color_attr", color, shape, other_color, other_shape))
        ):
            return None
    if relation is not None:
        names = [f"{item.color} {item.shape}" if with_colors else item.shape for item in order]
        return f"{with_article(names[0])} {relation} {with_article(names[1])}"
    phrases = [_counted(count, f"{color} {shape}".strip()) for (color, shape), count in groups.items()]
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
