"""Batches of several sizes: whole batches of one size, nothing lost or repeated, exact after a resume."""

import io
import json
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from iomm_hf.data.buckets import BATCHES, BucketedStream, bucket_sizes, parse_aspect_ratio
from iomm_hf.data.cache import CACHE_COLUMN, CACHE_FILE, Cached, pack
from iomm_hf.data.collate import IOMMCollator
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream


SIZES = [(32, 64), (48, 48), (64, 32)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 noisy pictures, from 1:3 to 3:1, in 4 shards."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        height, width = rng.integers(30, 90, 2)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}})
    for shard in range(4):
        pq.write_table(pa.Table.from_pylist(rows[10 * shard : 10 * shard + 10]), folder / f"{shard}.parquet")
    return SourceConfig(str(folder))


@pytest.fixture
def build(source):
    def build(batch_size=3, sizes=SIZES, seed=0, rank=0, world_size=1):
        stream = build_stream([source], seed=seed, block_size=8, rank=rank, world_size=world_size)
        return BucketedStream(stream, sizes, batch_size, seed=seed)

    return build


def facts(sample):
    return {**sample, "image": (sample["image"].size, sample["image"].tobytes())}


def as_is(samples):
    return [facts(sample) for sample in samples]


def test_sizes_have_the_area_of_the_square_and_the_shape_of_the_ratio():
    ratios = ["9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9"]
    for ratio, (width, height) in zip(ratios, bucket_sizes(ratios, 512, 16), strict=True):
        assert width % 16 == height % 16 == 0
        assert width * height == pytest.approx(512**2, rel=0.04)
        assert width / height == pytest.approx(parse_aspect_ratio(ratio), rel=0.04)
    with pytest.raises(ValueError, match="1:1 and 9:10 are both 64x64 pixels at resolution 64"):
        bucket_sizes(["1:1", "9:10"], 64, 16)


@pytest.mark.parametrize("wrong", ["3/4", "0:1", "1:5", "a:b", "", 184])
def test_what_is_no_ratio_is_refused(wrong):
    with pytest.raises(ValueError, match=f"got {wrong!r}"):
        parse_aspect_ratio(wrong)


def test_batches_have_one_size_and_most_pictures_their_own(build):
    samples = list(islice(build(), 2 * 3 * BATCHES))
    sizes = [{sample["size"] for sample in samples[start : start + 3]} for start in range(0, len(samples), 3)]
    assert all(len(size) == 1 for size in sizes)
    assert set.union(*sizes) == set(SIZES)
    assert sizes[:BATCHES] != sorted(sizes[:BATCHES], key=lambda size: [w / h for w, h in size])
    own = [sample["image"].size == sample["size"] for sample in samples]
    assert sum(own) > 0.9 * len(own)


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_key_once_an_epoch(build, world_size):
    used = Counter()
    for rank in range(world_size):
        # Three epochs of this rank and a group, behind which none of the first epoch is waiting.
        count = 3 * 40 // world_size + 3 * BATCHES
        used.update(
            sample["key"] for sample in islice(build(rank=rank, world_size=world_size), count) if sample["epoch"] == 0
        )
    assert len(used) == 40 and set(used.values()) == {1}


@pytest.mark.parametrize("before", [0, 1, 30, 3 * BATCHES - 1, 3 * BATCHES, 3 * BATCHES + 20])
def test_resume_is_exact(build, before):
    expected = as_is(islice(build(), before + 60))
    first = build()
    assert as_is(islice(first, before)) == expected[:before]
    second = build()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert as_is(islice(second, 60)) == expected[before:]
    assert as_is(islice(first, 60)) == expected[before:]  # and so is a second iteration


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_in_a_stateful_data_loader(build, num_workers):
    def loader():
        return StatefulDataLoader(build(), batch_size=3, num_workers=num_workers, collate_fn=as_is)

    expected = list(islice(loader(), 24))
    assert all(len({sample["size"] for sample in batch}) == 1 for batch in expected)
    first = loader()
    assert list(islice(first, 7)) == expected[:7]
    second = loader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(islice(second, 17)) == expected[7:]


@pytest.mark.parametrize(
    "change", [{"batch_size": 4}, {"sizes": SIZES[:2]}, {"seed": 1}, {"rank": 1, "world_size": 2}]
)
def test_a_state_of_another_order_is_refused(build, change):
    with pytest.raises(ValueError, match="belongs to another stream"):
        build(**change).load_state_dict(build().state_dict())


def test_one_square_bucket_is_the_plain_stream_in_another_order(build, source, processor):
    collator = IOMMCollator(processor, resolution=48)
    plain, bucketed = build_stream([source], block_size=8), build(sizes=[(48, 48)])
    one, two = ({}, {})
    for samples, batches in ((plain, one), (bucketed, two)):
        for sample in islice(samples, 3 * BATCHES):
            batch = collator([sample])
            batches[batch["keys"][0]] = (batch["seed"].item(), batch["pixels"], batch["input_ids"])
    assert one.keys() == two.keys()
    for key, (seed, pixels, ids) in one.items():
        assert seed == two[key][0] and torch.equal(pixels, two[key][1]) and torch.equal(ids, two[key][2])


def test_the_collator_crops_to_the_size_and_refuses_two(build, processor):
    samples = list(islice(build(), 3 * BATCHES))
    collator = IOMMCollator(processor, resolution=48)
    for start in range(0, len(samples), 3):
        width, height = samples[start]["size"]
        assert collator(samples[start : start + 3])["pixels"].shape == (3, 3, height, width)
    mixed = [next(sample for sample in samples if sample["size"] == size) for size in SIZES[:2]]
    with pytest.raises(ValueError, match=r"Samples of \[\(32, 64\), \(48, 48\)\] in one batch"):
        collator(mixed)


def test_caches_of_squares_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "PNG")
    cached = pack(Cached(torch.zeros(4, 12, 12), torch.zeros(4, 12, 12)))
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, CACHE_COLUMN: cached}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    (tmp_path / CACHE_FILE).write_text("{}")
    with pytest.raises(ValueError, match="cached latents of square pictures"):
        BucketedStream(build_stream([SourceConfig(str(tmp_path))]), SIZES, 2)
