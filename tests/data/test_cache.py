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
        read_cache_info(str(tmp_path / "train-00000.parquet"))
    (tmp_path / CACHE_FILE).write_text(json.dumps({"resolution": 64}))
    assert read_cache_info(str(tmp_path / "train-00000.parquet")) == {"resolution": 64}
