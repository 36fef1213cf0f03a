"""Chats about pictures on disk, in TRL's conversational prompt-completion format with images.

Anything that yields a picture, a question and an answer becomes parquet shards that `recipes/sft_mllm.py` reads: scenes of
the shapes world, or pairs of a user's own.
"""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image


class ChatExample(NamedTuple):
    """One turn over one picture, or over none."""

    image: Image.Image | None
    question: str
    answer: str


def write_chat(
    folder: str | os.PathLike, examples: Iterable[ChatExample], samples_per_shard: int = 5000
) -> list[Path]:
    r"""
    Writes chats as parquet shards with the columns `images`, `prompt` and `completion`.

    Args:
        folder (`str` or `os.PathLike`): Where to write; made if missing.
        examples (iterable of `ChatExample`): What to write, in order.
        samples_per_shard (`int`, *optional*, defaults to 5000): Examples of all shards but the last.

    Returns:
        `list[Path]`: The shards, in order.

    Raises:
        ValueError: If `samples_per_shard` is not positive, or there are no examples.
        FileExistsError: If the folder holds shards already.

    Example:

    ```python
    >>> import tempfile
    >>> from PIL import Image
    >>> from iomm_hf.data.chat import ChatExample, write_chat
    >>> examples = [ChatExample(Image.new("RGB", (8, 8)), "What is it?", "a black square")]
    >>> [shard.name for shard in write_chat(tempfile.mkdtemp(), examples)]
    ['train-00000.parquet']
    ```
    """
    import datasets  # an optional dependency, and slow to import

    if samples_per_shard <= 0:
        raise ValueError(f"Expected a positive samples_per_shard, got {samples_per_shard}.")
    folder = Path(folder)
    if old := sorted(folder.glob("train-*.parquet")):
        raise FileExistsError(f"{folder} already holds {old[0].name}: choose an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    message = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features = datasets.Features({"images": datasets.List(datasets.Image()), "prompt": message, "completion": message})
    shards: list[Path] = []
    remaining = iter(examples)
    while part := list(islice(remaining, samples_per_shard)):
        rows = [
            {
                "images": [] if example.image is None else [example.image],
                "prompt": [{"role": "user", "content": example.question}],
                "completion": [{"role": "assistant", "content": example.answer}],
            }
            for example in part
        ]
        shard = folder / f"train-{len(shards):05d}.parquet"
        temporary = shard.with_name(f"{shard.name}.tmp")
        datasets.Dataset.from_list(rows, features=features).to_parquet(temporary)
        temporary.replace(shard)
        shards.append(shard)
    if not shards:
        raise ValueError("There are no examples to write.")
    return shards
