"""What a source of pictures is, and how its files are found and opened: folders, tars, parquet files, ids on the Hub.

`datasets` reads the formats; which files belong to a source, in which order, and what is refused, is decided here.
"""

import glob
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

import datasets
import fsspec
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.utils.file_utils import xopen
from huggingface_hub import HfApi, parse_hf_uri

from ..hub import UNREACHED
from .images import MAX_PIXELS, MIN_SIDE


READERS = {".tar": "webdataset", ".tar.gz": "webdataset", ".parquet": "parquet"}
READERS |= dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "imagefolder")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # captions beside the files of an imagefolder
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
HUB = "hf://datasets/"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
RETRIES = 3  # of what looks damaged and is not on this machine


@dataclass
class SourceConfig:
    """
    One source of pictures.

    Args:
        path (`str`):
            A local folder of tars, parquet files or image files, all of which are read; a path or glob that ends in
            `.tar`, `.tar.gz` or `.parquet` and may start with `hf://datasets/`; or the id of a data set on the Hub. For
            an id, `datasets` sorts files into splits by their names and can leave some out: BLIP3o-60k, where one name
            says "train" and the others nothing, needs the glob `hf://datasets/BLIP3o/BLIP3o-60k/*.tar`. A glob's
            revision stands behind the id: `hf://datasets/BLIP3o/BLIP3o-60k@<commit>/*.tar`.
        config (`str`, *optional*):
            Name of the configuration, for a Hub id.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read, for a Hub id.
        revision (`str`, *optional*):
            Branch, tag or commit, for a Hub id.
        image_column (`str`, *optional*):
            Column of the picture. If left out: the only one of type `Image`, or the first named image, jpg, jpeg, png
            or webp.
        caption_column (`str`, *optional*):
            Column of the text, or a key inside a column (`json.prompt`). `None` reads no captions.
        caption_file (`str`, *optional*):
            For tars of pictures whose texts lie in one list beside them: that `.json` or `.jsonl` file, local or
            `hf://datasets/...`. `caption_column` then names the text in its records. Text and picture are joined by file
            name, without folder and ending.
        file_column (`str`, *optional*, defaults to `"file_name"`):
            The picture's path in the records of `caption_file`.
        weight (`float`, *optional*, defaults to 1.0):
            Share among the sources of its group.
        exclude (`list[str]`, *optional*):
            Glob patterns of file names to leave out, such as `geneval_train*`. Each must match a file.
        min_side (`int`, *optional*, defaults to 8):
            Shorter edge, in pixels, below which a picture is skipped.
        max_pixels (`int`, *optional*, defaults to 64 Mpx):
            Width x height above which a picture is skipped before it is decoded.

    Example:

    ```python
    >>> from iomm_hf.data.sources import SourceConfig
    >>> SourceConfig("jackyhate/text-to-image-2M", caption_column="json.prompt").split
    'train'
    ```
    """

    path: str = field(
        metadata={"help": "Folder, glob of .tar, .tar.gz or .parquet files, or id of a data set on the Hub."}
    )
    config: str | None = field(default=None, metadata={"help": "Name of the configuration, for a Hub id."})
    split: str = field(default="train", metadata={"help": "Split to read, for a Hub id."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit, for a Hub id."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the picture; found if left out."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the text, or a key inside one (json.prompt); none: no captions."}
    )
    caption_file: str | None = field(
        default=None, metadata={"help": "List of the texts beside tars of pictures, .json or .jsonl."}
    )
    file_column: str = field(default="file_name", metadata={"help": "The picture's path in a record of caption_file."})
    weight: float = field(default=1.0, metadata={"help": "Share among the sources of its group."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Glob patterns of file names to leave out."})
    min_side: int = field(default=MIN_SIDE, metadata={"help": "Shorter edge below which a picture is skipped, px."})
    max_pixels: int = field(default=MAX_PIXELS, metadata={"help": "Width x height above which a picture is skipped."})

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: expected a folder, a glob or the id of a data set on the Hub")
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude must be a list of glob patterns, got the string {self.exclude!r}")
        if self.caption_file is not None and self.caption_column is None:
            raise ValueError(f"caption_file {self.caption_file!r} needs a caption_column: the text in its records")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight of {self.path!r} must be a positive number, got {self.weight}")
        if self.min_side < 1:
            raise ValueError(f"min_side of {self.path!r} must be at least 1 pixel, got {self.min_side}")
        if self.max_pixels < self.min_side**2:
            raise ValueError(f"max_pixels of {self.path!r} must be at least min_side squared, got {self.max_pixels}")


def hub_commits(sources: Iterable[SourceConfig]) -> dict[str, str]:
    r"""
    Where the repositories on the Hub that sources read stand now.

    Args:
        sources (`Iterable[SourceConfig]`): Any; those on this machine and those at a commit add nothing.

    Returns:
        `dict[str, str]`: The commit of each repository, by its id and, if one is given, `@` and its branch or tag.

    Raises:
        `ValueError`: one cannot be found.

    Example:

    ```python
    >>> from iomm_hf.data.sources import SourceConfig, hub_commits
    >>> hub_commits([SourceConfig("photos/*.tar")])
    {}
    >>> hub_commits([SourceConfig("hf://datasets/BLIP3o/BLIP3o-60k/*.tar")])  # doctest: +SKIP
    {'BLIP3o/BLIP3o-60k': '<40 hexadecimal digits>'}
    ```
    """
    commits: dict[str, str] = {}
    for source in sources:
        for _, repository, revision in _on_hub(source):
            name = _name(repository, revision)
            if name in commits or COMMIT.fullmatch(revision or ""):
                continue
            try:
                commits[name] = str(HfApi().dataset_info(repository, revision=revision).sha)
            except (OSError, ValueError, UNREACHED) as error:
                raise ValueError(f"cannot open {name!r}, neither here nor on the Hub: {error}") from error
    return commits


def pinned(source: SourceConfig, commits: Mapping[str, str]) -> SourceConfig:
    r"""
    A source whose data on the Hub cannot change.

    Args:
        source ([`SourceConfig`]): Any.
        commits (`Mapping[str, str]`): As [`hub_commits`] finds them; what they do not name stays as it is.

    Example:

    ```python
    >>> from iomm_hf.data.sources import SourceConfig, pinned
    >>> pinned(SourceConfig("hf://datasets/user/set/*.tar"), {"user/set": "c0ffee"}).path
    'hf://datasets/user/set@c0ffee/*.tar'
    ```
    """
    changes: dict[str, str] = {}
    for field_name, repository, revision in _on_hub(source):
        commit = commits.get(_name(repository, revision))
        if commit is not None and field_name == "revision":
            changes["revision"] = commit
        elif commit is not None:
            path = parse_hf_uri(getattr(source, field_name)).path_in_repo
            changes[field_name] = f"{HUB}{repository}@{commit}/{path}"
    return replace(source, **changes)  # type: ignore[arg-type]  # all of these are strings


def _on_hub(source: SourceConfig) -> Iterator[tuple[str, str, str | None]]:
    """The fields of a source that say what it reads on the Hub, each with repository and revision."""
    for field_name in ("path", "caption_file"):
        address = getattr(source, field_name) or ""
        if address.startswith(HUB):
            uri = parse_hf_uri(address)
            yield field_name, uri.id, uri.revision
    in_files = source.path.endswith((".tar", ".tar.gz", ".parquet"))
    if HUB_ID.fullmatch(source.path) and not in_files and not Path(source.path).exists():
        yield "revision", source.path, source.revision


def _name(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision}" if revision else repository


def open_source(source: SourceConfig) -> tuple[datasets.IterableDataset, list[str]]:
    """The streaming data set of a source and its files in order; those of tars and parquet are its shards."""
    path = Path(source.path)
    reader = None  # for a Hub id `datasets` finds the reader by itself
    if path.is_dir():
        reader, pattern = _detect_reader(path), f"{glob.escape(str(path))}/**"
    elif source.path.endswith((".tar", ".tar.gz", ".parquet")):
        reader, pattern = READERS[ending(path)], source.path
    elif path.exists() or not HUB_ID.fullmatch(source.path):
        raise ValueError(
            f"cannot open {source.path!r}: expected a folder that exists, a path or glob that ends in .tar, .tar.gz or "
            ".parquet, or the id of a data set on the Hub"
        )
    if reader and (source.config, source.split, source.revision) != (None, "train", None):
        raise ValueError(f"config, split and revision are for Hub ids, leave them out for {source.path!r}")
    try:
        if reader:
            builder = datasets.load_dataset_builder(reader, data_files={"train": pattern})
        else:
            builder = datasets.load_dataset_builder(source.path, source.config, revision=source.revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"cannot open {source.path!r}, neither here nor on the Hub: {error}") from error

    if source.split not in builder.config.data_files:
        raise ValueError(f"{source.path!r} has no split {source.split!r}, only {list(builder.config.data_files)}")
    found = builder.config.data_files[source.split]
    files = sorted(file for file in found if not reader or _is_read_by(reader, file))
    if not files:
        raise ValueError(f"cannot open {source.path!r}: no file goes by this name")
    for pattern in source.exclude:
        kept = [file for file in files if not fnmatch(Path(file).name, pattern)]
        if len(kept) == len(files):
            raise ValueError(f"exclude {pattern!r} matches none of the files of {source.path!r}: {files[:20]}")
        files = kept
    if not files:
        raise ValueError(f"exclude {source.exclude} leaves no file of {source.path!r}")
    if len([file for file in files if Path(file).name in METADATA_FILES]) > 1:
        # `datasets` keeps them in a set: their order, and with it the key of every picture, changes by the process.
        raise ValueError(f"{source.path!r} has several metadata files, whose order is not fixed: make them one")
    builder.config.data_files = DataFilesDict({source.split: DataFilesList(files, found.origin_metadata)})
    for attempt in range(RETRIES + 1):
        try:
            return builder.as_streaming_dataset(split=source.split), files
        except (tarfile.TarError, EOFError, ValueError) as error:
            if "://" not in files[0] or attempt == RETRIES:  # a cut connection looks like damage
                message = f"the first file of {source.path!r}, {files[0]}, is empty or damaged: {error}"
                raise ValueError(message) from error
    raise AssertionError("unreachable")


def _is_read_by(reader: str, file: str | Path) -> bool:
    """Whether a file belongs to a reader: the folders also hold notes, licences and lists."""
    file = Path(file)
    if file.name in METADATA_FILES:
        return reader == "imagefolder"
    return READERS.get(ending(file)) == reader


def ending(file: Path) -> str:
    """Its key in `READERS`, if it has one; names may hold other dots."""
    return "".join(file.suffixes[-2:] if file.suffix.lower() == ".gz" else file.suffixes[-1:]).lower()


def stem(path: str) -> str:
    """A file's name up to its first dot: what the files of a sample share in a tar."""
    return Path(path).name.partition(".")[0]


def read_captions(source: SourceConfig) -> dict[str, str]:
    """The texts of a `caption_file` by the name of their picture, without its folder and ending."""
    file = str(source.caption_file)
    try:
        with fsspec.open(file, "rt", encoding="utf-8") as lines:
            records = json.load(lines) if file.endswith(".json") else [json.loads(line) for line in lines]
        captions = {stem(record[source.file_column]): record[source.caption_column] for record in records}
    except OSError as error:
        raise ValueError(f"cannot open caption_file {file!r}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"caption_file {file!r} must hold records with the fields {source.file_column!r} and "
            f"{source.caption_column!r}, as a list (.json) or one a line (.jsonl): {type(error).__name__}: {error}"
        ) from error
    if len(captions) < len(records):
        raise ValueError(f"caption_file {file!r} names {len(records) - len(captions)} of its pictures twice")
    return captions


def _detect_reader(folder: Path) -> str:
    """The reader for the files of a folder; hidden ones do not count, as `datasets` passes over them too."""
    counts: Counter[str] = Counter()
    for file in folder.rglob("*"):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        if not hidden and file.name not in METADATA_FILES and ending(file) in READERS:
            counts[READERS[ending(file)]] += 1
    if len(counts) != 1:
        raise ValueError(
            f"expected files of one kind in {str(folder)!r}, either .tar or .parquet or pictures "
            f"({', '.join(READERS)}), found {dict(counts) or 'none'}; a glob picks one kind among several"
        )
    return counts.popitem()[0]


def check_end_of_tar(file: str) -> None:
    """Raise for a file cut inside of a header, which `tarfile` takes for the end without a word."""
    with xopen(file, "rb") as archive:  # two small requests, if it is not on this machine
        archive.seek(max(0, archive.seek(0, os.SEEK_END) - 1024))
        if not any(archive.read()):
            return
        archive.seek(0)
        if archive.read(262).endswith(b"ustar"):  # neither compressed nor of another dialect
            raise tarfile.ReadError("cut short, the 1024 zero bytes at the end of a tar are missing")


def find_image_column(source: SourceConfig, dataset: datasets.IterableDataset) -> str:
    features = dataset.features or {}
    of_type_image = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(of_type_image) == 1:
        return of_type_image[0]
    for name in IMAGE_COLUMNS:
        if name in features:
            return name
    raise ValueError(
        f"source {source.path!r} has no image column that can be found by itself; name one of {list(features)}"
    )
