"""The recipes that make the small frozen parts: a few real steps each, and folders that the rest can load."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from iomm_hf import IOMMProcessor
from iomm_hf.data.images import to_tensor
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.streams import SourceConfig, build_stream
from iomm_hf.modeling_iomm import hash_weight_files, load_mllm
from iomm_hf.training.stage0 import Budget


def recipe(name: str):
    path = Path(__file__).parents[2] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_shards(folder, 80, captions=False, samples_per_shard=40)
    return str(folder)


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_autoencoder_learns_is_normalised_and_repeatable(pictures, tmp_path):
    module = recipe("train_autoencoder")
    settings = {"images": [pictures], "max_steps": 100, "batch_size": 4, "crop": 16, "held_out": 16}
    hashes = set()
    for name in ("one", "two"):
        module.main(module.AutoencoderConfig(output_dir=str(tmp_path / name), **settings))
        hashes.add(hash_weight_files(tmp_path / name))
    assert len(hashes) == 1
    first, second = losses(tmp_path / "one-log.jsonl")
    assert second < 0.7 * first
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert summary["steps"] == 100 and summary["held_out"] == 16 and summary["psnr"] > 10
    assert (tmp_path / "one/reconstructions.png").is_file()

    vae = AutoencoderKL.from_pretrained(tmp_path / "one")
    stream = build_stream([SourceConfig(pictures)])
    batch = torch.stack([to_tensor(sample["image"]) for sample, _ in zip(stream, range(32), strict=False)])
    with torch.no_grad():
        latents = vae.encode(batch / 127.5 - 1).latent_dist.mean
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.2 and 0.8 < scaled.std() < 1.2  # of 32 other pictures


def test_a_crop_is_the_busiest_of_its_candidates():
    module = recipe("train_autoencoder")
    pictures = torch.full((50, 3, 64, 64), 128, dtype=torch.uint8)
    pictures[::2, :, ::2] = 0  # every other picture is striped
    shares = []
    for candidates in (1, 4):
        config = module.AutoencoderConfig(images=["x"], max_steps=1, batch_size=200, candidates=candidates)
        crops = module.random_crops(pictures, config, np.random.default_rng(0))
        assert crops.shape == (200, 3, 32, 32)
        shares.append((crops.std((1, 2, 3)) > 0.1).float().mean().item())
    assert 0.4 < shares[0] < 0.6 and shares[1] > 0.85  # 15 of 16 by chance


def test_a_budget_of_minutes_lowers_the_rate_and_ends():
    weight = torch.nn.Parameter(torch.ones(1))
    budget = Budget(torch.optim.SGD([weight], lr=1.0), minutes=0.005, warmup=1)
    rates = []
    for _ in budget:
        budget.update(weight.square().sum() * 1e-6)
        rates.append(budget.optimizer.param_groups[0]["lr"])
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[-1] < 0.2


def test_a_loss_that_is_not_finite_stops_the_run():
    weight = torch.nn.Parameter(torch.ones(1))
    budget = Budget(torch.optim.SGD([weight], lr=1.0), max_steps=5)
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        for _ in budget:
            budget.update(weight.sum() * float("nan"))
    assert weight.item() == 1


def test_vision_warm_up_learns_and_leaves_an_internvl_folder(tmp_path):
    module = recipe("warm_up_vision")
    settings = {
        "label_steps": 100,
        "caption_steps": 100,
        "num_scenes": 64,
        "held_out": 8,
        "batch_size": 4,
    }
    output = tmp_path / "mllm"
    module.main(module.VisionConfig(output_dir=str(output), **settings))
    for log in ("mllm-labels-log.jsonl", "mllm-captions-log.jsonl"):
        first, second = losses(tmp_path / log)
        assert second < 0.9 * first, log
    assert json.loads((output / "summary.json").read_text())["patch_colors"] > 0.2  # one in eight by chance
    processor = IOMMProcessor.from_pretrained(output)
    mllm = load_mllm(output)
    assert not mllm.training and processor.image_token_id == mllm.config.image_token_id


def test_captions_never_name_what_is_held_out():
    from iomm_hf.data.shapes import HELD_OUT_COLOR_PAIRS, corpus_scene, describe

    captions = [describe(corpus_scene(0, i)[0]) for i in range(500)]
    assert not [text for text in captions if any(f"{color} {shape}" in text for color, shape in HELD_OUT_COLOR_PAIRS)]


@pytest.mark.parametrize(
    ("name", "config", "settings", "message"),
    [
        ("train_autoencoder", "AutoencoderConfig", {"images": []}, "at least one source"),
        ("train_autoencoder", "AutoencoderConfig", {"images": ["x"], "crop": 65}, "got 65"),
        ("train_autoencoder", "AutoencoderConfig", {"images": ["x"], "candidates": 0}, "candidates .* got 0"),
        ("train_autoencoder", "AutoencoderConfig", {"images": ["x"]}, "either minutes or max_steps"),
        (
            "train_autoencoder",
            "AutoencoderConfig",
            {"images": ["x"], "max_steps": 9, "minutes": 1.0},
            "either minutes",
        ),
        ("train_autoencoder", "AutoencoderConfig", {"images": ["x"], "minutes": 0.0}, "minutes=0.0"),
        ("warm_up_vision", "VisionConfig", {"caption_share": 1.0}, "got 1.0"),
        ("warm_up_vision", "VisionConfig", {"num_scenes": 3}, "32, 3 and"),
        ("warm_up_vision", "VisionConfig", {"label_steps": 9}, "label_steps and caption_steps"),
    ],
)
def test_bad_settings_are_refused(name, config, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(recipe(name), config)(**settings)


def test_too_few_pictures_are_refused(pictures, tmp_path):
    module = recipe("train_autoencoder")
    config = module.AutoencoderConfig(images=[pictures], output_dir=str(tmp_path / "vae"), max_steps=1, held_out=100)
    with pytest.raises(ValueError, match="Only 80 pictures"):
        module.main(config)
    assert not (tmp_path / "vae").exists()


def test_crops_that_the_autoencoder_cannot_halve_are_refused(tmp_path):
    module = recipe("train_autoencoder")
    config = module.AutoencoderConfig(images=["x"], output_dir=str(tmp_path / "vae"), max_steps=1, crop=30)
    with pytest.raises(ValueError, match="multiples of the autoencoder's factor 4, got 30 and 64"):
        module.main(config)
