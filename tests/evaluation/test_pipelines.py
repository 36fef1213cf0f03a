"""Pipelines of any class: loaded without foreign code or pickles, and named by what they are."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from iomm_hf import shipped_model
from iomm_hf.evaluation.benchmarks import load_benchmark
from iomm_hf.evaluation.generation import generate
from iomm_hf.evaluation.pipelines import averaged, call_arguments, load_pipeline
from iomm_hf.tiny import seeded, train_tokenizer


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A tiny random pipeline of another class, as a folder."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    tokenizer = train_tokenizer(["a photo of a bench"], vocab_size=300)
    tokenizer.model_max_length = 32
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **ends,
    )
    with seeded(0):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
        StableDiffusionPipeline(
            vae,
            CLIPTextModel(text),
            tokenizer,
            unet,
            DDIMScheduler(steps_offset=1, clip_sample=False),
            None,
            None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def test_another_librarys_pipeline_draws_a_benchmark(stable_diffusion, tmp_path):
    pipeline, about = load_pipeline(stable_diffusion, device="cpu")
    assert about["class"] == "StableDiffusionPipeline" and about["scheduler"]["class"] == "DDIMScheduler"
    assert set(about["weights_sha256"]) == {"text_encoder", "unet", "vae"} and about["ema"] is None
    benchmark = load_benchmark("geneval", limit=1)
    assert generate(pipeline, benchmark, tmp_path, about=about, asked={"num_inference_steps": 1}, batch_size=2) == 4
    settings = json.loads((tmp_path / "generation.json").read_text())
    assert settings["arguments"] == {"num_inference_steps": 1, "guidance_scale": 7.5}  # its own default, not ours
    pictures = [path.read_bytes() for path in sorted((tmp_path / "pictures").rglob("*.png"))]
    assert len(set(pictures)) == 4
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no argument true_cfg_scale"):
        call_arguments(pipeline, {"true_cfg_scale": 4.0})


def test_precision_and_revision_are_checked_before_anything_is_loaded():
    with pytest.raises(ValueError, match="has no revision 'main'"):
        load_pipeline(shipped_model(), revision="main")
    with pytest.raises(ValueError, match="got 'int8'"):
        load_pipeline(shipped_model(), dtype="int8")
    with pytest.raises(ValueError, match="The device 'abacus' cannot be used"):
        load_pipeline(shipped_model(), device="abacus")
    with pytest.raises(OSError, match=r"holds no model_index\.json"):
        load_pipeline(shipped_model().parent)


def test_pickles_are_not_read(stable_diffusion, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(stable_diffusion, folder)
    [weights] = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(folder, device="cpu")


def test_averaged_weights_are_known_from_their_run(tmp_path):
    (tmp_path / "final").mkdir()
    assert averaged(tmp_path / "final") is None
    for decay, expected in ((0.999, True), (0, False), (None, False)):
        (tmp_path / "run.json").write_text(json.dumps({"config": {"ema_decay": decay}}))
        assert averaged(tmp_path / "final") is expected
