"""The recipes that make the small frozen parts: a few real steps each, and folders that the rest can load."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderKL
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from iomm_hf import IOMMProcessor, shipped_model
from iomm_hf.data.chat import write_chat
from iomm_hf.data.images import to_tensor
from iomm_hf.data.shapes import corpus_scene, render
from iomm_hf.data.shapes_chat import NOUN_LABELS, shapes_chat
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream
from iomm_hf.modeling_iomm import hash_weight_files, load_mllm
from iomm_hf.tiny import tiny_vae
from iomm_hf.training.stage0 import Budget


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_shards(folder, 80, captions=False, samples_per_shard=40)
    return str(folder)


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_autoencoder_learns_is_normalised_and_repeatable(recipe, pictures, tmp_path, monkeypatch):
    module = recipe("train_autoencoder")
    monkeypatch.chdir(Path(pictures).parent)  # the order of pictures derives from the path that is given
    settings = {"images": [Path(pictures).name], "max_steps": 150, "batch_size": 4, "crop": 16, "held_out": 16}
    hashes = set()
    for name in ("one", "two"):
        module.main(module.AutoencoderConfig(output_dir=str(tmp_path / name), **settings))
        hashes.add(hash_weight_files(tmp_path / name))
    assert len(hashes) == 1
    first, *_, last = losses(tmp_path / "one-log.jsonl")
    assert last < 0.7 * first
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert summary["steps"] == 150 and summary["held_out"] == 16 and summary["psnr"] > 10
    assert (tmp_path / "one/reconstructions.png").is_file()

    vae = AutoencoderKL.from_pretrained(tmp_path / "one")
    stream = build_stream([SourceConfig(pictures)])
    batch = torch.stack([to_tensor(sample["image"]) for sample, _ in zip(stream, range(32), strict=False)])
    with torch.no_grad():
        latents = vae.encode(batch / 127.5 - 1).latent_dist.sample()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.2
    covariance = torch.cov(scaled.transpose(0, 1).flatten(1))
    assert (covariance - torch.eye(len(covariance))).abs().max() < 0.6  # of 32 other pictures


def test_whitening_changes_latents_and_no_picture(recipe):
    module = recipe("train_autoencoder")
    pictures = torch.stack([torch.from_numpy(render(corpus_scene(5, i)[0])).permute(2, 0, 1) for i in range(48)])
    vae = tiny_vae()
    before = module.reconstruct(vae, pictures).int()
    module.whiten_latents(vae, pictures)
    assert (module.reconstruct(vae, pictures).int() - before).abs().max() <= 1  # rounding alone
    with torch.no_grad():
        posterior = vae.encode(pictures / 127.5 - 1).latent_dist
    channels = posterior.sample().transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.cov(channels), torch.eye(len(channels)), atol=0.05, rtol=0)
    assert posterior.var.std((0, 2, 3)).max() < 1e-6  # a constant for each channel


def test_averaged_latents_are_asked_to_decode_to_the_averaged_picture(recipe):
    module = recipe("train_autoencoder")
    vae = tiny_vae()
    scenes = (
        torch.stack([torch.from_numpy(render(corpus_scene(6, i)[0])).permute(2, 0, 1) for i in range(4)]) / 127.5 - 1
    )
    losses = []
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        config = module.AutoencoderConfig(images=["x"], max_steps=1, scale_weight=weight, latent_noise=0)
        losses.append(module.autoencoder_loss(vae, scenes, config))
    torch.manual_seed(0)
    latents = vae.encode(scenes).latent_dist.sample()
    half, target = vae.decode(F.avg_pool2d(latents, 2)).sample, F.interpolate(scenes, scale_factor=0.5, mode="area")
    expected = 2.0 * (F.mse_loss(half, target) + F.l1_loss(half, target))
    torch.testing.assert_close(losses[1] - losses[0], expected)
    assert expected > 0.1  # random weights are far from it


def test_channels_are_held_to_a_standard_normal(recipe):
    divergence = recipe("train_autoencoder").divergence_from_standard
    latents = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert divergence(latents).abs() < 0.01
    torch.testing.assert_close(
        divergence(3 * latents), torch.tensor(4 * (9 - 1 - np.log(9)) / 2).float(), atol=0.05, rtol=0
    )
    repeated = latents[:, :1].expand(-1, 4, -1, -1) + 0.1 * latents  # as loud, but all channels say the same
    assert divergence(repeated) > 4


def test_the_decoder_hears_its_latents_through_noise(recipe):
    module = recipe("train_autoencoder")
    vae = AutoencoderKL.from_pretrained(shipped_model() / "vae", torch_dtype=torch.float32)
    scenes = (
        torch.stack([torch.from_numpy(render(corpus_scene(6, i)[0])).permute(2, 0, 1) for i in range(4)]) / 127.5 - 1
    )
    losses = []
    for noise in (0.0, 1e-4, 5.0):
        torch.manual_seed(0)
        config = module.AutoencoderConfig(images=["x"], max_steps=1, scale_weight=0, latent_noise=noise)
        loss = module.autoencoder_loss(vae, scenes, config)
        standard = module.STANDARD_WEIGHT * module.divergence_from_standard(vae.encode(scenes).latent_dist.mean)
        losses.append((loss - standard * (noise > 0)).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01) and losses[2] > 2 * losses[0]


def test_colours_of_the_shipped_autoencoder_are_apart(recipe):
    distance = recipe("train_autoencoder").least_color_distance
    vae = AutoencoderKL.from_pretrained(shipped_model() / "vae", torch_dtype=torch.float32)
    assert distance(vae) > 0.6
    vae.encoder.conv_out.weight.data.mul_(0.5)
    vae.encoder.conv_out.bias.data.mul_(0.5)
    assert distance(vae) < 0.5  # half as loud, half as far


def test_a_crop_is_the_busiest_of_its_candidates(recipe):
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


def test_vision_warm_up_learns_and_leaves_an_internvl_folder(tmp_path, vision):
    first, second = losses(vision.with_name("vision-log.jsonl"))
    assert second < 0.9 * first
    summary = json.loads((vision / "summary.json").read_text())
    assert summary["colors_right"] > 0.2 and summary["object_patches"] > 50  # one in eight by chance
    processor = IOMMProcessor.from_pretrained(vision)
    mllm = load_mllm(vision)
    assert not mllm.training and processor.image_token_id == mllm.config.image_token_id


@pytest.fixture(scope="module")
def vision(recipe, tmp_path_factory):
    module = recipe("warm_up_vision")
    output = tmp_path_factory.mktemp("stage0") / "vision"
    settings = {"max_steps": 100, "num_scenes": 64, "held_out": 8, "batch_size": 4}
    module.main(module.VisionConfig(output_dir=str(output), **settings))
    return output


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_mllm_learns_from_chats_and_comes_out_whole(recipe, tmp_path, vision, lora):
    module = recipe("sft_mllm")
    write_chat(tmp_path / "chat", shapes_chat(64, text_share=0.3))  # pictures and texts in one batch
    settings = ["--model_name_or_path", str(vision), "--dataset_name", str(tmp_path / "chat")]
    settings += ["--output_dir", str(tmp_path / "mllm"), "--max_steps", "20", "--per_device_train_batch_size", "4"]
    settings += ["--learning_rate", "3e-3", "--warmup_steps", "2", "--logging_steps", "10", "--save_strategy", "steps"]
    settings += ["--dataloader_num_workers", "0"]
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings += ["--use_peft", "--lora_r", "8", "--lora_target_modules", *targets]
    config = str(Path(__file__).parents[2] / "recipes/configs/shapes-mllm.yaml")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    module.main(*parser.parse_args_and_config(["--config", config, *settings]))

    (checkpoint,) = (tmp_path / "mllm").glob("checkpoint-*")
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert log[1]["loss"] < log[0]["loss"]
    before, after = load_mllm(vision).state_dict(), load_mllm(tmp_path / "mllm/final").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    tower = {name for name in before if "vision_tower" in name and "lambda" not in name}
    attention = {name for name in changed if "language_model" in name and "q_proj.weight" in name}
    assert attention and (not any("embed_tokens" in name for name in changed) if lora else changed & tower)
    assert IOMMProcessor.from_pretrained(tmp_path / "mllm/final").image_seq_length == 16


def test_text_warm_up_learns_and_leaves_the_vision_tower(recipe, vision, tmp_path):
    module = recipe("warm_up_text")
    settings = {"max_steps": 100, "num_scenes": 64, "held_out": 16, "batch_size": 4, "learning_rate": 3e-3}
    hashes = set()
    for name in ("one", "two"):
        module.main(module.TextConfig(init_from=str(vision), output_dir=str(tmp_path / name), **settings))
        hashes.add(hash_weight_files(tmp_path / name))
    assert len(hashes) == 1
    first, second = losses(tmp_path / "one-log.jsonl")
    assert second < 0.9 * first
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert summary["read_shape"] > 0.3 and summary["held_out"] == 16  # one in eight by chance
    before, after = load_mllm(vision).state_dict(), load_mllm(tmp_path / "one").state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize(
    "caption", ["two crosses and a red star", "a ring left of a heart", "a red ring and a blue ring"]
)
def test_the_tokens_of_nouns_are_labelled(recipe, caption):
    processor = IOMMProcessor.from_pretrained(shipped_model() / "processor")
    example = recipe("warm_up_text").read_example(processor, caption)
    labelled = np.flatnonzero(example.labels[:, 0] >= 0)
    told = [
        "".join(processor.tokenizer.decode([token]) for token in example.input_ids[: place + 1]) for place in labelled
    ]
    words = caption.split()
    assert told[0].endswith(": " + " ".join(words[: words.index(told[0].split()[-1]) + 1]))
    assert told[1].endswith(caption) and told[2].endswith(f"{caption}<|im_end|>")
    shapes = [NOUN_LABELS["shape"][place] for place in example.labels[labelled, 0]]
    assert all(shape in text.split()[-1] for shape, text in zip(shapes[:2], told[:2], strict=True))
    assert shapes[2:] == [shapes[place % 2] for place in range(len(example.input_ids) - labelled[1] - 1)]


def test_pairs_become_chats_and_bad_ones_are_reported(recipe, tmp_path, caplog):
    module = recipe("make_chat")
    write_shards(tmp_path / "pairs", 12, samples_per_shard=12)
    (shard,) = (tmp_path / "pairs").glob("*.tar")
    with tarfile.open(shard, "a") as tar:
        for name, content in (("99.jpg", b"not a picture"), ("99.json", b'{"prompt": "nothing"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    config = module.ChatConfig(
        pairs=[{"path": str(tmp_path / "pairs"), "caption_column": "json.prompt"}],
        output_dir=str(tmp_path / "chat"),
        question="What is it?",
        resolution=32,
    )
    module.main(config)
    chats = load_dataset(str(tmp_path / "chat"), split="train")
    assert {row["prompt"][0]["content"] for row in chats} == {"What is it?"}
    assert {row["images"][0].size for row in chats} == {(32, 32)}
    expected = [corpus_scene(0, index)[1]["prompt"] for index in range(12)]
    assert sorted(row["completion"][0]["content"] for row in chats) == sorted(expected)
    assert "skipped up to now" in caplog.text


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
        ("make_chat", "ChatConfig", {"pairs": []}, "at least one source"),
        ("make_chat", "ChatConfig", {"pairs": ["x"]}, "needs a caption_column"),
        ("warm_up_vision", "VisionConfig", {"num_scenes": 3}, "32, 3 and"),
        ("warm_up_vision", "VisionConfig", {"max_steps": 9, "minutes": 1.0}, "either minutes or max_steps"),
        ("warm_up_text", "TextConfig", {"init_from": "x", "held_out": 0}, "32, 8000 and 0"),
        ("warm_up_text", "TextConfig", {"init_from": "x"}, "either minutes or max_steps"),
    ],
)
def test_bad_settings_are_refused(recipe, name, config, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(recipe(name), config)(**settings)


def test_too_few_pictures_are_refused(recipe, pictures, tmp_path):
    module = recipe("train_autoencoder")
    config = module.AutoencoderConfig(images=[pictures], output_dir=str(tmp_path / "vae"), max_steps=1, held_out=100)
    with pytest.raises(ValueError, match="Only 80 pictures"):
        module.main(config)
    assert not (tmp_path / "vae").exists()


def test_crops_that_the_autoencoder_cannot_halve_are_refused(recipe, tmp_path):
    module = recipe("train_autoencoder")
    config = module.AutoencoderConfig(images=["x"], output_dir=str(tmp_path / "vae"), max_steps=1, crop=30)
    with pytest.raises(ValueError, match="multiples of twice the autoencoder's factor 4, got 30 and 64"):
        module.main(config)
