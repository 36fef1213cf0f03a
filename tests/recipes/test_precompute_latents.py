"""The cache of what frozen parts make of pictures: whole, resumable, read by runs, and refused by those it is not for."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from iomm_hf.data.cache import CACHE_FILE, KEY_COLUMN
from iomm_hf.data.images import to_tensor
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream
from iomm_hf.tiny import tiny_encoder, tiny_vae
from iomm_hf.training import FinetuneConfig, PretrainConfig, train
from iomm_hf.training.setup import cache_identity


@pytest.fixture(scope="module")
def module(recipe):
    return recipe("precompute_latents")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    folder = tmp_path_factory.mktemp("cache")
    tiny_encoder(processor).mllm.save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "mllm")
    for seed in (0, 1):
        tiny_vae(seed=seed).save_pretrained(folder / f"vae{seed}")
    write_shards(folder / "images", 20, captions=False, samples_per_shard=10)
    write_shards(folder / "pairs", 9, seed=1, samples_per_shard=5)
    return folder


@pytest.fixture
def settings(folder):
    parts = {"preset": "tiny", "mllm": str(folder / "mllm"), "vae": str(folder / "vae0")}
    return {**parts, "samples_per_shard": 8, "batch_size": 3}


def read(cache: Path, count: int, **columns) -> dict[bytes, tuple]:
    """Pixels -> caption and cached mean of one epoch."""
    stream = SampleStream(SourceConfig(str(cache), **columns))
    samples = [sample for sample, _ in zip(stream, range(count), strict=False)]
    assert {sample["epoch"] for sample in samples} == {0}
    return {sample["image"].tobytes(): (sample["caption"], sample["cached"]) for sample in samples}


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_killed_one_goes_on_and_both_stages_train_on_it(module, folder, settings, tmp_path, monkeypatch):
    images = {"source": str(folder / "images"), "output_dir": str(tmp_path / "images")}
    compute, calls = module.compute, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second shard
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(module, "compute", killed)
    with pytest.raises(KeyboardInterrupt):
        module.main(module.CacheConfig(**images, **settings))
    assert [path.name for path in (tmp_path / "images").glob("*.parquet*")] == ["train-00000.parquet"]
    monkeypatch.setattr(module, "compute", compute)
    module.main(module.CacheConfig(**images, **settings))
    assert len(list((tmp_path / "images").glob("*.parquet"))) == 3
    cached = read(tmp_path / "images", 20)
    originals = {
        sample["image"].tobytes()
        for sample, _ in zip(SampleStream(SourceConfig(str(folder / "images"))), range(20), strict=False)
    }
    assert cached.keys() == originals and len(originals) == 20
    for _, item in cached.values():
        assert item.mean.shape == (4, 16, 16) and item.vision_tokens.shape == (16, 128)

    pairs = {"path": str(folder / "pairs"), "caption_column": "json.prompt"}
    module.main(module.CacheConfig(source=pairs, output_dir=str(tmp_path / "pairs"), **settings))
    assert all(caption for caption, _ in read(tmp_path / "pairs", 9, caption_column="caption").values())

    run = {key: settings[key] for key in ("preset", "mllm", "vae")} | {
        "images": [str(tmp_path / "images")],
        "pairs": [{"path": str(tmp_path / "pairs"), "caption_column": "caption"}],
        "batch_size": 4,
        "max_steps": 2,
        "num_workers": 0,
        "validate_every": 0,
        "mixed_precision": "bf16",  # rounds the MLLM that the cache knows by its hash
    }
    final = train(FinetuneConfig(output_dir=str(tmp_path / "run"), **run))
    rows = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["skipped"] == {} and "alignment" not in rows[-1]

    aligned = FinetuneConfig(output_dir=str(tmp_path / "aligned"), alignment_weight=0.5, **run)
    final = train(aligned)
    rows = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["alignment"] < 1
    assert train(replace(aligned, max_steps=3)) == final  # resumes with head and average
    with pytest.raises(ValueError, match="made with another vae than this run's"):
        train(FinetuneConfig(output_dir=str(tmp_path / "other"), **run | {"vae": str(folder / "vae1")}))
    with pytest.raises(ValueError, match="another cache"):
        module.main(module.CacheConfig(**images, **settings | {"vision_tokens": False}))
    info = json.loads((tmp_path / "images" / CACHE_FILE).read_text())
    assert info["resolution"] == 64 and len(info["vae"]) == len(info["vision tower"]) == 64


def test_a_shard_is_closed_at_its_bytes(module, folder, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    module.main(module.CacheConfig(source=str(folder / "images"), output_dir=str(tmp_path / "c"), **settings))
    progress = json.loads((tmp_path / "c/progress.json").read_text())
    assert (progress["shards"], progress["samples"]) == (7, 20)  # a batch of three each
    keys = {
        sample["key"] for sample, _ in zip(SampleStream(SourceConfig(str(tmp_path / "c"))), range(20), strict=False)
    }
    assert len(keys) == 20


@torch.no_grad()
def test_the_cache_holds_the_posterior_of_each_picture(module, folder, settings, tmp_path):
    module.main(module.CacheConfig(source=str(folder / "images"), output_dir=str(tmp_path / "c"), **settings))
    vae = tiny_vae()
    for sample, _ in zip(SampleStream(SourceConfig(str(tmp_path / "c"))), range(4), strict=False):
        pixels = module.to_tensor(sample["image"])[None] / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        assert (posterior.mean[0] - sample["cached"].mean).abs().max() < 2e-3
        assert (posterior.logvar[0] - sample["cached"].logvar).abs().max() < 2e-2


@pytest.fixture(scope="module")
def original_run(folder, tmp_path_factory):
    """Settings of a run on the pictures themselves, and what became of it."""
    folder_of_eight = tmp_path_factory.mktemp("eight")
    write_shards(folder_of_eight / "images", 8, captions=False, samples_per_shard=4)
    settings = {
        "preset": "tiny",
        "mllm": str(folder / "mllm"),
        "vae": str(folder / "vae0"),
        "images": [str(folder_of_eight / "images")],
        "batch_size": 8,  # an epoch, since the cache has an order of its own
        "max_steps": 3,
        "save_every": 1,
        "keep_checkpoints": 3,
        "log_every": 1,
        "num_workers": 0,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "condition_dropout": 0.3,
        "validate_every": 0,
    }
    return settings, *outcome(settings, folder_of_eight / "run")


def outcome(settings: dict, folder: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses and gradient norms by step, and all trained weights after the first and the last step."""
    train(PretrainConfig(output_dir=str(folder), **settings))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = [load_file(folder / f"checkpoint-0000000{step}/state/trainable.safetensors") for step in (1, 3)]
    return (
        torch.tensor([[row["loss"], row["grad_norm"]] for row in rows], dtype=torch.float64),
        [torch.cat([state[name].flatten() for name in sorted(state)]) for state in weights],
    )


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("kept", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-5),
        ({}, 5e-4),  # rounded to float16
        # The tower reads the PNG; nobody reads the JPEG.
        pytest.param({"dtype": "float32", "vision_tokens": False}, 1e-5, marks=pytest.mark.slow),
        pytest.param({"dtype": "float32", "jpeg_quality": 50}, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_a_run_from_the_cache_equals_one_from_the_pictures(module, settings, original_run, tmp_path, kept, tolerance):
    run, numbers, (first, last) = original_run
    module.main(module.CacheConfig(source=run["images"][0], output_dir=str(tmp_path / "c"), **settings | kept))
    cached_numbers, (_, cached_last) = outcome(run | {"images": [str(tmp_path / "c")]}, tmp_path / "run")
    assert numbers.shape == (3, 2)
    for step, differences in enumerate((cached_numbers / numbers - 1).abs()):
        assert differences.max() < 3**step * tolerance  # a difference grows from update to update
    assert (cached_last - last).norm() < 20 * tolerance * (last - first).norm()  # Adam enlarges the smallest gradients


def test_pictures_are_kept_as_jpeg_and_keys_as_they_were(module, folder, settings, tmp_path):
    config = {"source": str(folder / "images"), "output_dir": str(tmp_path / "c"), **settings, "vision_tokens": False}
    module.main(module.CacheConfig(**config, jpeg_quality=90))
    rows = [row for shard in (tmp_path / "c").glob("*.parquet") for row in pq.read_table(shard).to_pylist()]
    assert len(rows) == 20 and all(row["image"]["bytes"].startswith(b"\xff\xd8\xff") for row in rows)
    originals = {
        sample["key"]: to_tensor(sample["image"])
        for sample, _ in zip(SampleStream(SourceConfig(config["source"])), range(20), strict=False)
    }
    samples = [s for s, _ in zip(SampleStream(SourceConfig(str(tmp_path / "c"))), range(20), strict=False)]
    assert {sample["key"] for sample in samples} == originals.keys() and len(originals) == 20
    for sample in samples:
        assert sample["cached"].vision_tokens is None
        assert 0 < (to_tensor(sample["image"]).float() - originals[sample["key"]]).abs().mean() < 8
    with pytest.raises(ValueError, match="from 1 to 100, got 0"):
        module.CacheConfig(**config, jpeg_quality=0)


def test_a_cache_without_keys_of_an_earlier_version_is_read(module, folder, settings, tmp_path):
    module.main(module.CacheConfig(source=str(folder / "pairs"), output_dir=str(tmp_path / "c"), **settings))
    for shard in (tmp_path / "c").glob("*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns(KEY_COLUMN), shard)
    stream = SampleStream(SourceConfig(str(tmp_path / "c")))
    keys = {sample["key"] for sample, _ in zip(stream, range(9), strict=False)}
    assert len(keys) == 9 and all(key.startswith(f"{stream.fingerprint}/") for key in keys)


def test_a_cache_belongs_to_what_sees_and_not_to_what_speaks(processor):
    mllm, vae = tiny_encoder(processor).mllm, tiny_vae()
    before = cache_identity(mllm, vae, 64)
    with torch.no_grad():
        mllm.model.language_model.layers[0].mlp.down_proj.weight += 1
    assert cache_identity(mllm, vae, 64) == before
    with torch.no_grad():
        next(mllm.model.multi_modal_projector.parameters()).add_(1)
    after = cache_identity(mllm, vae, 64)
    assert [name for name in before if after[name] != before[name]] == ["vision tower"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard must be positive, got 0"),
        ({"batch_size": -1}, "batch_size must be positive, got -1"),
        ({"dtype": "bfloat16"}, "dtype must be one of 'float16', 'float32', got 'bfloat16'"),
        ({"init_from": "run/final"}, "init_from='run/final' brings its own parts; leave out preset, mllm, vae."),
        (
            {"init_from": "run/final", "preset": None, "mllm": None, "vae": None, "vae_subfolder": "vae"},
            "brings its own parts; leave out vae_subfolder",
        ),
        ({"vae": None, "vae_subfolder": "vae"}, "vae_subfolder='vae' is a folder inside `vae`, which is missing"),
    ],
)
def test_what_would_never_end_or_do_nothing_is_refused(module, settings, change, message):
    with pytest.raises(ValueError, match=message):
        module.CacheConfig(**{"source": "x", "output_dir": "y"} | settings | change)
