"""A run's real ingredients at the smallest size: frozen parts in folders, pictures and pairs in tars."""

import pytest

from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.tiny import tiny_encoder, tiny_pipeline, tiny_vae


@pytest.fixture(scope="session")
def parts(tmp_path_factory, processor):
    """Folders `mllm`, `vae`, `images` (24 pictures in 3 tars) and `pairs` (16 in 2)."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_encoder(processor).mllm.save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "mllm")
    tiny_vae().save_pretrained(folder / "vae")
    write_shards(folder / "images", 24, captions=False, samples_per_shard=8)
    write_shards(folder / "pairs", 16, seed=1, samples_per_shard=8)
    return folder


@pytest.fixture
def settings(parts, tmp_path):
    """Settings of a run of a few seconds."""
    return {
        "output_dir": str(tmp_path / "run"),
        "preset": "tiny",
        "mllm": str(parts / "mllm"),
        "vae": str(parts / "vae"),
        "images": [str(parts / "images")],
        "batch_size": 3,
        "shuffle_block": 8,
        "num_workers": 0,
        "max_steps": 12,
        "save_every": 4,
        "log_every": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "validate_every": 0,
    }


@pytest.fixture
def flux_settings(settings, flux, tmp_path):
    tiny_pipeline(flux).save_pretrained(tmp_path / "flux")
    settings = {name: value for name, value in settings.items() if name not in ("mllm", "vae")}
    return settings | {"init_from": str(tmp_path / "flux"), "max_steps": 2, "log_every": 1}
