"""Writes the shapes world to disk as a Hub dataset: WebDataset or parquet shards and a dataset card.

The recipes read it like any streamed Hub dataset, so what they exercise is what a full-size run uses. The same
arguments give the same bytes: no clock, user or host name enters a shard. Each file is written under a temporary name
and renamed, the card last: a folder with a card is complete.
"""

import io
import json
import math
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ..files import write_whole
from .shapes import TASKS, corpus_scene, render


try:
    import pyarrow
    import pyarrow.parquet

    is_pyarrow_available = True
except ImportError:
    is_pyarrow_available = False


EXTENSIONS = {"webdataset": "tar", "parquet": "parquet"}
LICENSE = "apache-2.0"  # of the cards; the pictures come from this package's code and nothing else


class Sample(NamedTuple):
    key: str
    png: bytes
    prompt: str
    metadata: str  # GenEval's, as JSON


CARD = """---
license: {license}
pretty_name: Shapes world
task_categories:
- {category}
tags:
- synthetic
- geneval
size_categories:
- {size_category}
configs:
- config_name: default
  data_files:
  - split: train
    path: "train-*.{extension}"
---

# Shapes world

{num_samples} synthetic pictures of {image_size}x{image_size} px, {captioned}: one to four of eight shapes in eight
colours on plain or graded backgrounds. Drawn by the function below; nothing was collected, and no picture shows
a person, a work or a place.

| | |
|---|---|
| samples | {num_samples} |
| shards | {num_shards}, {layout} |
| image size | {image_size} px |
| seed | {seed} |
| tasks | {tasks} |
| held-out combinations | {held_out} |

{fields}

Held-out combinations serve to measure composition: 8 of the 64 colour-shape pairs, 8 of the 56 ordered pairs of
`two_object` and of `position`, and 15 % of the ordered pairs of `color_attr` (`iomm_hf.data.shapes.is_held_out`).

```python
from iomm_hf.data.shapes_writer import write_shards

write_shards("shapes", {arguments})
```
"""


def write_shards(
    folder: str | os.PathLike,
    num_samples: int,
    *,
    seed: int = 0,
    image_size: int = 64,
    captions: bool = True,
    layout: str = "webdataset",
    samples_per_shard: int = 2500,
    tasks: Sequence[str] = TASKS,
    show_held_out: bool | None = None,
) -> list[Path]:
    """
    Write a corpus of the shapes world.

    Sample `i` is `corpus_scene(seed, i)`, so a larger corpus begins with a smaller one. A WebDataset sample is a `png`
    and, with captions, a `json` with `prompt` and `metadata`; a parquet row has `image` and, with captions, `prompt`
    and `metadata`. `metadata` is GenEval's JSON as a string in both, because Arrow has no type for its mixed lists.

    Args:
        folder (`str` or `os.PathLike`): Where to write; made if missing. Shards of the same corpus are replaced.
        num_samples (`int`): Samples to write.
        seed (`int`, *optional*, defaults to 0): The corpus.
        image_size (`int`, *optional*, defaults to 64): Side of the pictures in pixels.
        captions (`bool`, *optional*, defaults to `True`): Whether captions are written, or pictures alone.
        layout (`str`, *optional*, defaults to `"webdataset"`): `"webdataset"` or `"parquet"`.
        samples_per_shard (`int`, *optional*, defaults to 2500): Samples of all shards but the last.
        tasks (`Sequence[str]`, *optional*, defaults to all six): Kinds of scenes; see `sample_scene`.
        show_held_out (`bool`, *optional*, defaults to `not captions`):
            Whether pictures may show held-out combinations. Without captions they may, since a picture alone names
            nothing: image-only pre-training then sees what no caption tells.

    Returns:
        `list[Path]`: The shards, in order.

    Raises:
        ImportError: If the layout is parquet and PyArrow is missing.
        FileExistsError: If the folder holds shards that this call would not replace.
        ValueError: If the layout or a task is unknown, a number is not positive, or captions would name held-out
            combinations.

    Example:

    ```python
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     [shard.name for shard in write_shards(folder, 10, samples_per_shard=5)]
    ['train-00000-of-00002.tar', 'train-00001-of-00002.tar']
    ```
    """
    if layout not in EXTENSIONS:
        raise ValueError(f"Unknown layout {layout!r}: expected one of {', '.join(EXTENSIONS)}.")
    if layout == "parquet" and not is_pyarrow_available:
        raise ImportError("Writing parquet needs PyArrow. Install it with `pip install iomm-hf[train]`.")
    sizes = {"num_samples": num_samples, "image_size": image_size, "samples_per_shard": samples_per_shard}
    for name, number in sizes.items():
        if number <= 0:
            raise ValueError(f"Expected a positive {name}, got {number}.")
    if show_held_out is None:
        show_held_out = not captions
    if captions and show_held_out:
        raise ValueError("A corpus with captions must not show held-out combinations: its captions would name them.")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    extension = EXTENSIONS[layout]
    num_shards = math.ceil(num_samples / samples_per_shard)
    shards = [folder / f"train-{i:05d}-of-{num_shards:05d}.{extension}" for i in range(num_shards)]
    present = sorted(path for pattern in ("train-*.tar", "train-*.parquet") for path in folder.glob(pattern))
    strangers = [path.name for path in present if path not in shards]
    if strangers:
        raise FileExistsError(
            f"{folder} holds shards of another corpus, such as {strangers[0]}: choose an empty folder."
        )

    card_path = folder / "README.md"
    card_path.unlink(missing_ok=True)
    samples = iter(
        tqdm(
            _draw_samples(num_samples, seed, image_size, tasks, show_held_out),
            total=num_samples,
            desc="Drawing shapes",
            unit="scene",
        )
    )
    write = _write_tar if layout == "webdataset" else _write_parquet
    for shard in shards:
        temporary = shard.with_name(f"{shard.name}.tmp")
        write(temporary, islice(samples, samples_per_shard), captions)
        temporary.replace(shard)

    arguments = {
        "num_samples": num_samples,
        "seed": seed,
        "image_size": image_size,
        "captions": captions,
        "layout": layout,
        "samples_per_shard": samples_per_shard,
        "tasks": list(tasks),
        "show_held_out": show_held_out,
    }
    if captions:
        fields = (
            "`prompt` is the caption, `metadata` the same in GenEval's JSON (`tag`, `include`, `exclude`, `prompt`)."
        )
    else:
        fields = "Samples are pictures alone: no caption, no label."
    card = CARD.format(
        license=LICENSE,
        category="text-to-image" if captions else "unconditional-image-generation",
        size_category=_size_category(num_samples),
        extension=extension,
        num_samples=num_samples,
        num_shards=num_shards,
        layout="WebDataset" if layout == "webdataset" else "parquet",
        image_size=image_size,
        seed=seed,
        tasks=", ".join(f"`{task}`" for task in tasks),
        captioned="each with a caption" if captions else "without captions",
        held_out="may be shown" if show_held_out else "never shown as a pair of colour and shape, never named",
        fields=fields,
        arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()).replace("'", '"'),
    )
    write_whole(card_path, card.encode())
    return shards


def _size_category(num_samples: int) -> str:
    """The Hub's name for a data set's size."""
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if num_samples < limit:
            return name
    return "1M<n<10M"


def _draw_samples(
    num_samples: int, seed: int, image_size: int, tasks: Sequence[str], show_held_out: bool
) -> Iterator[Sample]:
    for index in range(num_samples):
        scene, metadata = corpus_scene(seed, index, tasks=tasks, show_held_out=show_held_out)
        png = io.BytesIO()
        Image.fromarray(render(scene, image_size)).save(png, format="PNG")
        yield Sample(f"{index:08d}", png.getvalue(), metadata["prompt"], json.dumps(metadata))


def _write_tar(path: Path, samples: Iterable[Sample], captions: bool) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            members = {"png": sample.png}
            if captions:
                members["json"] = json.dumps({"prompt": sample.prompt, "metadata": sample.metadata}).encode()
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")  # its time stamp is 0, its owner empty
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_parquet(path: Path, samples: Iterable[Sample], captions: bool) -> None:
    rows = list(samples)
    columns = {
        "image": pyarrow.array(
            [{"bytes": row.png, "path": f"{row.key}.png"} for row in rows],
            pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        )
    }
    features = {"image": {"_type": "Image"}}
    if captions:
        columns["prompt"] = pyarrow.array([row.prompt for row in rows])
        columns["metadata"] = pyarrow.array([row.metadata for row in rows])
        features |= {name: {"dtype": "string", "_type": "Value"} for name in ("prompt", "metadata")}
    # With this key `datasets` decodes the struct as an image.
    hub_schema = json.dumps({"info": {"features": features}})
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": hub_schema})
    # Small row groups, so that a streaming reader starts after a little of the file.
    pyarrow.parquet.write_table(table, path, row_group_size=500)
