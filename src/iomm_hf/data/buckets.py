"""Batches of several aspect ratios, so that wide and tall pictures are not cut to squares; an option, not in the paper.

Every batch has one size, all sizes about the same area. A group of `BATCHES` batches is drawn from the stream and sorted by
the nearest bucket of each picture; each run of `batch_size` neighbours is a batch and takes its middle picture's bucket. So
nothing is left over or carried on: each sample drawn is used once, in its group, and the state is where the group starts
plus an offset. The price: pictures between two buckets may be cropped twice, first to their own, then to their neighbours'.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from .collate import sample_seed
from .images import resize_and_crop
from .streams import MixedStream, check_identity


BATCHES = 16  # of a group: more leave fewer pictures between two buckets, and hold more of them in memory


def parse_aspect_ratio(text: str) -> float:
    r"""
    Width over height.

    Raises:
        `ValueError`: anything but two positive whole numbers with a colon between, at most 4 to 1.

    Example:

    ```python
    >>> from iomm_hf.data.buckets import parse_aspect_ratio
    >>> parse_aspect_ratio("3:4")
    0.75
    ```
    """
    width, _, height = str(text).partition(":")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"an aspect ratio is width:height, such as 3:4, in quotes in YAML; got {text!r}")
    if not 1 / 4 <= int(width) / int(height) <= 4:
        raise ValueError(f"aspect ratios go from 1:4 to 4:1, got {text!r}")
    return int(width) / int(height)


def bucket_sizes(aspect_ratios: Sequence[str], resolution: int, multiple: int) -> list[tuple[int, int]]:
    r"""
    Width and height of each aspect ratio: about the area of `resolution` x `resolution`.

    Args:
        aspect_ratios (`list[str]`): Width to height, such as `"3:4"`.
        resolution (`int`): Side of the square of the same area, in pixels.
        multiple (`int`): Widths and heights are divisible by it.

    Raises:
        `ValueError`: two ratios that round to the same size.

    Example:

    ```python
    >>> from iomm_hf.data.buckets import bucket_sizes
    >>> bucket_sizes(["3:4", "1:1", "16:9"], resolution=512, multiple=16)
    [(448, 592), (512, 512), (688, 384)]
    ```
    """
    sizes: dict[tuple[int, int], str] = {}
    for text in aspect_ratios:
        root = math.sqrt(parse_aspect_ratio(text))
        width, height = (max(1, round(side / multiple)) * multiple for side in (resolution * root, resolution / root))
        if (width, height) in sizes:
            raise ValueError(
                f"aspect_ratios {sizes[width, height]} and {text} are both {width}x{height} pixels at resolution"
                f" {resolution}, where sides are multiples of {multiple}; leave one out"
            )
        sizes[width, height] = text
    return list(sizes)


class BucketedStream(IterableDataset):
    r"""
    The samples of a stream in an order in which each `batch_size` of them have one size.

    Args:
        stream ([`~iomm_hf.data.streams.MixedStream`]): Where samples come from.
        sizes (`list[tuple[int, int]]`): Widths and heights of the buckets, in pixels.
        batch_size (`int`): That of the data loader.
        seed (`int`, *optional*, defaults to 0): Of the order of a group's batches.

    Yields:
        `dict`: the stream's sample, its `image` cropped to the nearest bucket, and `size`, its batch's width and height.

    Raises:
        `ValueError`: no buckets, a batch size below 1, or a source of cached latents, which are those of squares.

    Example:

    ```python
    >>> import tempfile
    >>> from itertools import islice
    >>> from PIL import Image
    >>> from iomm_hf.data.buckets import BucketedStream
    >>> from iomm_hf.data.sources import SourceConfig
    >>> from iomm_hf.data.streams import build_stream
    >>> folder = tempfile.mkdtemp()
    >>> for number, size in enumerate([(32, 24), (24, 32)]):
    ...     Image.new("RGB", size).save(f"{folder}/{number}.png")
    >>> stream = BucketedStream(build_stream([SourceConfig(folder)]), [(16, 16), (24, 16), (16, 24)], batch_size=4)
    >>> batch = list(islice(stream, 4))
    >>> len({sample["size"] for sample in batch})
    1
    ```
    """

    def __init__(self, stream: MixedStream, sizes: Sequence[tuple[int, int]], batch_size: int, *, seed: int = 0):
        if not sizes or batch_size < 1:
            raise ValueError(f"expected buckets and a positive batch_size, got {list(sizes)} and {batch_size}")
        if cached := [source.source.path for source in stream.streams if source.cache_info is not None]:
            raise ValueError(
                f"{cached} hold cached latents of square pictures, which have no other aspect ratio: leave aspect_ratios"
                " out, or read the pictures themselves."
            )
        self.stream, self.sizes, self.batch_size, self.seed = stream, list(sizes), batch_size, seed
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The stream's state where the group starts, and how many samples of the group were yielded; plain JSON values."""
        return dict(self._state or {"identity": self._identity(), "stream": self.stream.state_dict(), "offset": 0})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same stream, sizes, batch size and seed; any other raises a `ValueError`."""
        check_identity(state["identity"], self._identity())
        self.stream.load_state_dict(state["stream"])
        self._state = dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state = self.state_dict()
        self.stream.load_state_dict(state["stream"])  # behind it, if this was iterated before
        samples = map(self._fit, self.stream)
        group = list(islice(samples, BATCHES * self.batch_size))
        while True:
            start, following = self.stream.state_dict(), []
            for number, sample in enumerate(self._arrange(group), 1):
                following.append(next(samples))  # one by one, or every reader would pause for a group
                if number > state["offset"]:
                    self._state = {**state, "offset": number}
                    yield sample
            group, state = following, {**state, "stream": start, "offset": 0}

    def _fit(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Cropped at once: a group of whole photographs would be gigabytes."""
        ratio = math.log(sample["image"].width / sample["image"].height)
        size = min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))
        return {**sample, "image": resize_and_crop(sample["image"], size), "size": size}

    def _arrange(self, group: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        ordered = sorted(group, key=lambda sample: sample["size"][0] / sample["size"][1])
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        seed = sample_seed(self.seed, group[0]["key"], group[0]["epoch"])
        for i in np.random.default_rng(seed).permutation(len(batches)):
            size = batches[i][self.batch_size // 2]["size"]
            for sample in batches[i]:
                yield {**sample, "size": size}

    def _identity(self) -> dict[str, Any]:
        sizes = [list(size) for size in self.sizes]
        return {"sizes": sizes, "batch_size": self.batch_size, "batches": BATCHES, "seed": self.seed}
