"""Chats on disk: what datasets reads back is what was written, and nothing is mixed or half-written."""

import datasets
import numpy as np
import pytest
from PIL import Image

from iomm_hf.data.chat import ChatExample, write_chat


def examples(count: int) -> list[ChatExample]:
    return [ChatExample(Image.new("RGB", (8 + i, 8), (i, 0, 0)), f"Which is {i}?", f"the {i}th") for i in range(count)]


def test_chats_are_read_by_datasets_in_trls_format(tmp_path):
    shards = write_chat(tmp_path, iter(examples(10)), samples_per_shard=4)
    assert [shard.name for shard in shards] == [f"train-0000{i}.parquet" for i in range(3)]
    data = datasets.load_dataset(str(tmp_path), split="train")
    assert len(data) == 10
    for row, example in zip(data, examples(10), strict=True):
        assert row["prompt"] == [{"role": "user", "content": example.question}]
        assert row["completion"] == [{"role": "assistant", "content": example.answer}]
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(example.image))


def test_two_corpora_never_mix(tmp_path):
    write_chat(tmp_path, examples(3))
    with pytest.raises(FileExistsError, match="already holds train-00000.parquet"):
        write_chat(tmp_path, examples(2))


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        write_chat(tmp_path / "none", [])
    with pytest.raises(ValueError, match="samples_per_shard, got 0"):
        write_chat(tmp_path / "none", examples(1), samples_per_shard=0)


def test_a_broken_source_leaves_whole_shards_alone(tmp_path):
    def breaks():
        yield from examples(5)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_chat(tmp_path, breaks(), samples_per_shard=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-00000.parquet", "train-00001.parquet"]
    assert len(datasets.load_dataset(str(tmp_path), split="train")) == 4
