"""Cached answers of the frozen parts: what is written is what is read, and damage is noticed."""

import json

import pytest
import torch
from safetensors.torch import save

from iomm_hf.data.cache import CACHE_FILE, Cached, pack, read_cache_info, unpack


def test_round_trip_rounds_to_half_precision():
    torch.manual_seed(0)
    cached = Cached(torch.randn(4, 16, 16), torch.randn(4, 16, 16) * 5 - 10, torch.randn(16, 128))
    for one, two in zip(cached, unpack(pack(cached)), strict=True):
        assert two.dtype == torch.float32 and (one - two).abs().max() < 1e-3 * one.abs().max()
    assert unpack(pack(cached._replace(vision_tokens=None))).vision_tokens is None


def test_round_trip_in_single_precision_rounds_nothing():
    cached = Cached(torch.randn(4, 2, 2), torch.randn(4, 2, 2), torch.randn(3, 8))
    assert all(torch.equal(one, two) for one, two in zip(cached, unpack(pack(cached, "float32")), strict=True))


@pytest.mark.parametrize(
    "blob", [None, b"", b"not a cache", pack(Cached(torch.ones(1), torch.ones(1)))[:-1], save({"x": torch.ones(1)})]
)
def test_damaged_blobs_are_refused(blob):
    with pytest.raises(ValueError, match="expected a cached picture"):
        unpack(blob)


def test_a_cache_without_its_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=CACHE_FILE):
        read_cache_info([str(tmp_path / "train-00000.parquet")])
    (tmp_path / CACHE_FILE).write_text(json.dumps({"resolution": 64}))
    assert read_cache_info([str(tmp_path / f"train-0000{n}.parquet") for n in range(2)]) == {"resolution": 64}


def test_shards_of_several_folders_are_of_one_cache(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made_with = {"vision tower": "v", "vae": name, "resolution": 64, "vision_tokens": False, "source": name}
        (tmp_path / name / CACHE_FILE).write_text(json.dumps(made_with))
        files.append(str(tmp_path / name / "train-00000.parquet"))
    assert read_cache_info(files[:1])["vae"] == "a"
    with pytest.raises(ValueError, match=r"a/iomm_cache.json and .*b/iomm_cache.json name another vae: "):
        read_cache_info(files)
