"""Endless, shuffled streams of pictures that resume exactly: tars, parquet files and image folders, local or on the Hub.

`datasets` reads the formats; the order is ours, because its shuffle buffer loses samples on resume. A consumer (one data
loader worker of one rank) reads a block of encoded samples, permutes it with a seed of (source, seed, epoch, consumer,
block) and decodes them one by one. The state is the place where the block starts plus an offset; a resume reads the block
again. Getting to a place costs about 0.15 ms a sample in a tar and next to nothing in parquet files and image folders.
"""

import hashlib
import json
import logging
import math
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .cache import CACHE_COLUMN, KEY_COLUMN, read_cache_info, unpack
from .images import BadImage, load_image
from .sources import (
    RETRIES,
    SourceConfig,
    check_end_of_tar,
    ending,
    find_image_column,
    hub_commits,
    open_source,
    pinned,
    read_captions,
    stem,
)


logger = logging.getLogger(__name__)

MAX_WARNINGS = 5  # detailed ones, for each reason and reader


class _Raw(NamedTuple):
    """A sample that is not decoded yet."""

    key: str
    origin: str
    image: Any  # {"bytes": ..., "path": ...}
    caption: Any
    cache: Any  # bytes of `data.cache`
    position: int  # of its shard in the consumer's order
    example: int  # its index in the shard


class SampleStream(IterableDataset):
    """
    Endless, shuffled samples of one source, split over ranks and workers, with an exact state.

    All consumers together use each key once an epoch: each takes whole shards where there are enough of them, otherwise
    every n-th sample of each shard. A second iteration goes on where the first stopped. A block stays in memory in its
    encoded form: 1024 photographs of 200 kB are 200 MB.

    Args:
        source ([`SourceConfig`]):
            What to read; on the Hub, at the commit where it stands now, so that a state does not fit a set that has changed.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order.
        block_size (`int`, *optional*, defaults to 1024):
            Number of samples that are shuffled together.
        rank (`int`, *optional*, defaults to 0):
            Index of this process.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes.
        max_caption_bytes (`int`, *optional*):
            Length in UTF-8 above which a caption is skipped. A byte-level tokenizer never makes more tokens than bytes.

    Yields:
        `dict` with `key` (unique, and the same for any number of consumers; that of the original where it is cached),
        `origin` (where the sample lies, for messages), `epoch`, `image` (PIL, RGB), `caption` (`str`, or `None` if none
        are read), `cached` ([`~iomm_hf.data.cache.Cached`], or `None` where the source holds none) and `skipped`: how many
        unusable samples this consumer met since its last one, by reason.

    Raises:
        ValueError: at construction if the source cannot be opened or lacks a column; while iterating if a consumer
            finds no usable sample in an epoch.

    Example:

    ```python
    >>> import tempfile
    >>> from PIL import Image
    >>> from iomm_hf.data.sources import SourceConfig
    >>> from iomm_hf.data.streams import SampleStream
    >>> folder = tempfile.mkdtemp()
    >>> Image.new("RGB", (32, 24), "red").save(f"{folder}/red.png")
    >>> sample = next(iter(SampleStream(SourceConfig(folder))))
    >>> sample["image"].size, sample["epoch"], sample["caption"]
    ((32, 24), 0, None)
    ```
    """

    def __init__(
        self,
        source: SourceConfig,
        *,
        seed: int = 0,
        block_size: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        max_caption_bytes: int | None = None,
    ):
        if seed < 0 or block_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "expected seed >= 0, block_size >= 1 and 0 <= rank < world_size, "
                f"got seed={seed}, block_size={block_size}, rank={rank}, world_size={world_size}"
            )
        source = pinned(source, hub_commits([source]))
        self.source, self.seed, self.block_size = source, seed, block_size
        self.rank, self.world_size, self.max_caption_bytes = rank, world_size, max_caption_bytes
        dataset, self.files = open_source(source)
        present = dataset.column_names or []
        columns = [source.image_column or find_image_column(source, dataset)]
        self.caption_key = ""
        self.captions: dict[str, str] | None = None
        if source.caption_file is not None:
            if "__key__" not in present:
                raise ValueError(f"caption_file goes with tars, which {source.path!r} is none of")
            self.captions = read_captions(source)
        elif source.caption_column is not None:
            column = source.caption_column
            if column not in present:  # asked first, because a column's own name may hold a dot
                column, _, self.caption_key = column.partition(".")
            columns.append(column)
        if missing := [column for column in columns if column not in present]:
            raise ValueError(f"source {source.path!r} has no column {missing[0]!r}; its columns are {present}")
        feature = dataset.features[columns[-1]]
        keys = feature if isinstance(feature, dict) else {}
        if self.caption_key and self.caption_key not in keys and not isinstance(feature, datasets.Json):
            raise ValueError(f"column {columns[-1]!r} of {source.path!r} has no key {self.caption_key!r}: {feature}")
        self.columns = columns
        self.in_tars = "__key__" in present
        # A path in a table is its author's word, and could name any file or address; those of an imagefolder are the source's.
        self.follows_paths = dataset.info.builder_name == "imagefolder"
        is_cached = CACHE_COLUMN in present
        self.cache_info = read_cache_info(map(str, self.files)) if is_cached else None
        self.keeps_keys = is_cached and KEY_COLUMN in present
        extra = ["__key__"] * self.in_tars + [CACHE_COLUMN] * is_cached + [KEY_COLUMN] * self.keeps_keys
        dataset = dataset.select_columns(columns + extra)
        dataset = dataset.cast_column(columns[0], datasets.Image(decode=False))
        if self.in_tars and self.caption_key:
            # The struct inferred from a tar's first samples would fail at the first sample with other keys.
            dataset = dataset.cast_column(columns[1], datasets.Json())
        self.dataset = dataset

        # A local folder may move as long as `path` reads the same; the address of a Hub file holds its commit.
        names = [file if "://" in file else Path(file).name for file in self.files]
        identity = [source.path, names, columns, self.caption_key, source.min_side, source.max_pixels]
        if self.captions is not None:
            identity.append(self.captions)
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        self._state: dict[str, Any] | None = None
        self._skipped: Counter[str] = Counter()  # since the last sample
        self._skipped_in_all: Counter[str] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last sample that was yielded, in plain JSON values."""
        start = {"epoch": 0, "block": 0, "position": 0, "example": 0, "offset": 0}
        return dict(self._state or {"identity": self._identity(), **start})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from a state of the same source, seed, block size and consumer; any other raises a `ValueError`.

        With data loader workers each worker has its own state: save and load through torchdata's `StatefulDataLoader`.
        """
        check_identity(state["identity"], self._identity())
        self._state = dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state = self.state_dict()
        # Once more, for a stream that was iterated or loaded here and is now read by a worker.
        check_identity(state["identity"], self._identity())
        consumer, _ = _consumer(self.rank, self.world_size)
        self._skipped.clear()
        while True:
            usable = state["offset"] > 0
            reader = self._read(state["epoch"], state["position"], state["example"])
            while block := list(islice(reader, self.block_size)):
                if state["offset"] > 0:
                    self._skipped.clear()  # damaged shards met in this block were reported before the state was taken
                order = self._rng(state["epoch"], consumer, state["block"]).permutation(len(block))
                for offset in range(state["offset"], len(block)):
                    sample = self._decode(block[order[offset]])
                    if sample is not None:
                        usable = True
                        self._state = {**state, "offset": offset + 1}
                        yield {**sample, "epoch": state["epoch"], "skipped": dict(self._skipped)}
                        self._skipped.clear()
                next_start = {"position": block[-1].position, "example": block[-1].example + 1}
                state = {**state, **next_start, "block": state["block"] + 1, "offset": 0}
            if not usable:
                raise ValueError(
                    f"source {self.source.path!r} gave consumer {consumer} of {state['identity']['num_consumers']} no "
                    f"usable sample in epoch {state['epoch']}; skipped: {dict(self._skipped)}. It is empty, has fewer "
                    "samples than there are consumers (ranks x workers), or all samples are bad."
                )
            if self._skipped_in_all:
                logger.warning("%s: skipped up to now: %s", self.source.path, dict(self._skipped_in_all))
            state = {**state, "epoch": state["epoch"] + 1, "block": 0, "position": 0, "example": 0, "offset": 0}

    def _read(self, epoch: int, start_position: int, start_example: int) -> Iterator[_Raw]:
        """The samples of one epoch that belong to this consumer, from a place on, in stored order inside a shard."""
        consumer, num_consumers = _consumer(self.rank, self.world_size)
        num_shards = self.dataset.num_shards
        shards = self._rng(epoch).permutation(num_shards).tolist()
        take_whole_shards = num_shards >= num_consumers
        if take_whole_shards:
            shards = shards[consumer::num_consumers]
        for position in range(start_position, len(shards)):
            shard = shards[position]
            file = self.files[shard] if len(self.files) == num_shards else self.source.path
            start = start_example if position == start_position else 0
            attempts = 0
            while True:
                rows, index = self.dataset.shard(num_shards, shard).skip(start), start - 1
                try:
                    # Inside of a worker `iter(rows)` would split the shard among the workers once more, and leave nothing
                    # to all but the first; `rows.iter` never does. One row at a time, because a damaged shard would take
                    # the rest of its batch along, another one after a resume.
                    for index, row in enumerate(rows.iter(batch_size=1), start):
                        if take_whole_shards or (shard + index) % num_consumers == consumer:
                            values = [row[column][0] for column in self.columns]
                            if self.captions is not None:
                                values.append(self.captions.get(stem(row["__key__"][0])))
                            origin = f"{file}::{row['__key__'][0] if self.in_tars else index}"
                            key = row[KEY_COLUMN][0] if self.keeps_keys else f"{self.fingerprint}/{shard}/{index}"
                            cache = row[CACHE_COLUMN][0] if self.cache_info is not None else None
                            yield _Raw(key, origin, values[0], values[-1], cache, position, index)
                    if self.in_tars and ending(Path(file)) == ".tar":
                        check_end_of_tar(file)
                    break
                except (tarfile.TarError, EOFError, ValueError, OSError) as error:
                    # pyarrow's word for damaged bytes is a bare OSError; the disk's have a number, the network's a class.
                    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                        raise
                    # A cut connection looks like damage; only damage is at the same place again.
                    attempts = 1 if index >= start else attempts + 1
                    if "://" not in file or attempts > RETRIES:
                        message = f"left out from example {index + 1} on: {type(error).__name__}: {error}"
                        self._skip("corrupt_shard", file, message)
                        break
                    start = index + 1

    def _decode(self, raw: _Raw) -> dict[str, Any] | None:
        caption = None
        if self.source.caption_column is not None:
            caption = raw.caption
            if self.caption_key:
                caption = caption.get(self.caption_key) if isinstance(caption, dict) else None
            if not isinstance(caption, str) or not caption.strip():
                message = f"expected text in {self.source.caption_column}, got {str(caption)[:80]!r}"
                self._skip("bad_caption", raw.origin, message)
                return None
            caption = caption.strip()
            length = len(caption.encode(errors="replace"))
            if self.max_caption_bytes is not None and length > self.max_caption_bytes:
                message = f"{length} bytes, more than the {self.max_caption_bytes} that fit: {caption[:80]!r}..."
                self._skip("long_caption", raw.origin, message)
                return None
        image = raw.image
        if isinstance(image, dict) and not self.follows_paths:
            image = image["bytes"]
        try:
            image = load_image(image, max_pixels=self.source.max_pixels, min_side=self.source.min_side)
        except BadImage as error:
            self._skip(error.reason, raw.origin, error.message)
            return None
        cached = None
        if self.cache_info is not None:
            try:
                cached = unpack(raw.cache)
            except ValueError as error:
                self._skip("bad_cache", raw.origin, str(error))
                return None
        return {"key": raw.key, "origin": raw.origin, "image": image, "caption": caption, "cached": cached}

    def _skip(self, reason: str, origin: str, message: str) -> None:
        self._skipped[reason] += 1
        self._skipped_in_all[reason] += 1
        if self._skipped_in_all[reason] <= MAX_WARNINGS:
            logger.warning("skipped %s (%s): %s", origin, reason, message)
        if self._skipped_in_all[reason] == MAX_WARNINGS:
            logger.warning("%s: more of %s are counted and no longer listed", self.source.path, reason)

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self.fingerprint, 16), *place])

    def _identity(self) -> dict[str, Any]:
        consumer, num_consumers = _consumer(self.rank, self.world_size)
        return {
            "path": self.source.path,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "block_size": self.block_size,
            "max_caption_bytes": self.max_caption_bytes,
            "consumer": consumer,
            "num_consumers": num_consumers,
        }


class MixedStream(IterableDataset):
    """
    Draws each sample from one of several streams.

    Args:
        streams (`Sequence[SampleStream]`):
            Streams of different sources, made for the same rank and world size.
        weights (`Sequence[float]`):
            One positive weight a stream; its share of the samples is its weight over their sum, in expectation.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Yields:
        `dict`: the stream's sample and `source`, the index of its stream.

    Raises:
        ValueError: if streams and weights do not go together, or two streams read the same source in the same way.
    """

    def __init__(self, streams: Sequence[SampleStream], weights: Sequence[float], *, seed: int = 0):
        if not streams or len(streams) != len(weights):
            raise ValueError(f"expected one weight a stream, got {len(streams)} streams and {len(weights)} weights")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights must be positive numbers, got {list(weights)}")
        if len({(stream.rank, stream.world_size) for stream in streams}) > 1:
            raise ValueError("all streams must be made for the same rank and world size")
        paths = {stream.fingerprint: stream.source.path for stream in streams}
        if len(paths) < len(streams):
            raise ValueError(f"a source is listed twice, which weight is for: {[s.source.path for s in streams]}")
        self.streams, self.weights, self.seed = list(streams), [float(weight) for weight in weights], seed
        self._draws = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of draws and the state of every stream, in plain JSON values."""
        states = [stream.state_dict() for stream in self.streams]
        return {"identity": self._identity(), "draws": self._draws, "streams": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same streams, weights and seed; any other raises a `ValueError`."""
        check_identity(state["identity"], self._identity())
        for stream, stream_state in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
        self._draws = state["draws"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        consumer, _ = _consumer(self.streams[0].rank, self.streams[0].world_size)
        bounds = (np.cumsum(self.weights) / np.sum(self.weights))[:-1]
        iterators = [iter(stream) for stream in self.streams]
        while True:
            # A generator for each draw, so that the counter is its whole state.
            draw = np.random.default_rng([self.seed, consumer, self._draws]).random()
            source = int(np.searchsorted(bounds, draw, side="right"))
            self._draws += 1
            yield {**next(iterators[source]), "source": source}

    def _identity(self) -> dict[str, Any]:
        return {"sources": [s.fingerprint for s in self.streams], "weights": self.weights, "seed": self.seed}


def build_stream(
    image_sources: Sequence[SourceConfig] = (),
    paired_sources: Sequence[SourceConfig] = (),
    mix_ratio: float | None = None,
    *,
    seed: int = 0,
    block_size: int = 1024,
    rank: int = 0,
    world_size: int = 1,
    max_caption_bytes: int | None = None,
) -> MixedStream:
    """
    The data of a training stage: pictures alone (stage 1), pairs alone, or both (stage 2).

    Args:
        image_sources (`Sequence[SourceConfig]`, *optional*):
            Sources without captions.
        paired_sources (`Sequence[SourceConfig]`, *optional*):
            Sources with a `caption_column`.
        mix_ratio (`float`, *optional*):
            The paper's lambda: the share of image-only samples, 0 to 1. A group whose share is 0 is not opened. May
            be left out if only one group is given.
        seed, block_size, rank, world_size, max_caption_bytes:
            As for [`SampleStream`].

    Returns:
        [`MixedStream`], whose `source` counts the image sources first, as far as they are opened.

    Raises:
        ValueError: if the ratio and the groups do not go together, or a source is in the wrong group.

    Example:

    ```python
    >>> stream = build_stream(  # doctest: +SKIP
    ...     [SourceConfig("photos/")], [SourceConfig("pairs/*.tar", caption_column="txt")], mix_ratio=0.5
    ... )
    ```
    """
    if mix_ratio is None:
        if bool(image_sources) == bool(paired_sources):
            raise ValueError("expected mix_ratio for two groups of sources, or sources in exactly one group")
        mix_ratio = 1.0 if image_sources else 0.0
    if not 0 <= mix_ratio <= 1:
        raise ValueError(f"mix_ratio is the share of image-only samples and must lie in [0, 1], got {mix_ratio}")
    if captioned := [source.path for source in image_sources if source.caption_column is not None]:
        raise ValueError(f"image-only sources read no captions, leave out the caption_column of {captioned}")
    if bare := [source.path for source in paired_sources if source.caption_column is None]:
        raise ValueError(f"paired sources need a caption_column: {bare}")
    streams, weights = [], []
    for name, sources, share in (("image", image_sources, mix_ratio), ("paired", paired_sources, 1 - mix_ratio)):
        if share == 0:
            continue
        if not sources:
            raise ValueError(
                f"mix_ratio {mix_ratio} takes {share:.0%} of samples from {name} sources, but none is given"
            )
        total = sum(source.weight for source in sources)
        for source in sources:
            stream = SampleStream(
                source,
                seed=seed,
                block_size=block_size,
                rank=rank,
                world_size=world_size,
                max_caption_bytes=max_caption_bytes,
            )
            streams.append(stream)
            weights.append(share * source.weight / total)
    return MixedStream(streams, weights, seed=seed)


def _consumer(rank: int, world_size: int) -> tuple[int, int]:
    """Index of this consumer and their number, over all workers of all ranks."""
    worker = get_worker_info()
    if worker is None:
        return rank, world_size
    return rank * worker.num_workers + worker.id, world_size * worker.num_workers


def check_identity(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse the state of another stream with a `ValueError`."""
    differing = {name: (saved.get(name), value) for name, value in expected.items() if saved.get(name) != value}
    if differing:
        raise ValueError(
            "the state belongs to another stream, whose order is another: (state, this stream) differ in "
            f"{differing}. Resume with the same sources, seed, block size, ranks and workers."
        )
