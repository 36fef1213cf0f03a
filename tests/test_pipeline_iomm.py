"""What is IOMM's own about the pipeline: three kinds of input, guidance, frozen parts left out, clear refusals."""

import json

import pytest
import torch
from PIL import Image

from iomm_hf import IOMMPipeline
from iomm_hf.modeling_iomm import hash_weight_files
from iomm_hf.pipeline_iomm import decode_latents, draw_latents, join_conditions
from iomm_hf.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero: make every weight count
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *args, seed=0, steps=2, **kwargs):
    kwargs = {"output_type": "latent", "num_inference_steps": steps} | kwargs
    return pipe(*args, generator=torch.Generator().manual_seed(seed), **kwargs).images


def test_prompt_edit_and_variation_are_different_conditions(pipe, images):
    by_text = draw(pipe, "make it blue")
    edited = draw(pipe, "make it blue", images[0])
    varied = draw(pipe, image=images[0])
    other = draw(pipe, image=images[1])
    pictures = [by_text, edited, varied, other]
    assert all(picture.shape == (1, 4, 16, 16) for picture in pictures)
    for i, one in enumerate(pictures):
        assert all((one - two).abs().max() > 1e-4 for two in pictures[:i])


def test_negative_prompt_changes_the_picture_and_defaults_to_the_unconditional_instruction(pipe):
    default = draw(pipe, "a red circle")
    assert (draw(pipe, "a red circle", negative_prompt="a blue star") - default).abs().max() > 1e-4
    unconditional = pipe.text_encoder(**pipe.processor.encode([pipe.processor.unconditional()])).condition.detach()
    assert torch.allclose(draw(pipe, "a red circle", negative_prompt_embeds=unconditional), default, atol=1e-5)


def test_guidance_extrapolates_from_the_negative_branch(pipe):
    """One step from the same noise is linear in the velocity, so guidance must be linear in its scale."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    without, double, triple = (
        draw(pipe, "a red circle", latents=noise, guidance_scale=scale, steps=1) for scale in (1.0, 2.0, 3.0)
    )
    assert (double - without).abs().max() > 1e-4
    assert torch.allclose(triple - double, double - without, atol=1e-4)


def test_all_condition_rows_pad_both_branches(pipe):
    all_rows = tiny_pipeline(condition_tokens="all")
    all_rows.set_progress_bar_config(disable=True)
    all_rows.transformer = pipe.transformer
    prompts = ["a red circle left of a blue star", "a"]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    together = draw(all_rows, prompts, latents=noise)
    for i, prompt in enumerate(prompts):
        assert (draw(all_rows, prompt, latents=noise[i : i + 1]) - together[i]).abs().max() < 1e-4


def test_sizes_default_to_the_trained_resolution_and_others_work(pipe):
    assert draw(pipe, "a star", output_type="pil")[0].size == (64, 64)
    assert draw(pipe, "a star", height=32, width=96, output_type="pil")[0].size == (96, 32)


def test_latents_are_scaled_and_shifted_both_ways(pipe):
    vae = tiny_pipeline().vae
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = draw_latents(vae, posterior)
        assert torch.allclose(latents, (posterior.mean - 0.25) * 2)
        noise = torch.randn_like(latents)
        assert torch.allclose(draw_latents(vae, posterior, noise), (posterior.mean + posterior.std * noise - 0.25) * 2)
        assert torch.allclose(decode_latents(vae, latents), vae.decode(posterior.mean).sample, atol=1e-5)


def test_joined_conditions_are_padded_with_hidden_rows():
    joined, mask = join_conditions(torch.ones(1, 2, 4), None, torch.ones(1, 3, 4), torch.tensor([[True, True, False]]))
    assert joined.shape == (2, 3, 4)
    assert mask.tolist() == [[True, True, False], [True, True, False]]
    joined, mask = join_conditions(torch.ones(1, 2, 4), None, torch.ones(1, 2, 4), None)
    assert joined.shape == (2, 2, 4) and mask is None


def test_frozen_parts_left_out_come_back_from_their_references(pipe, tmp_path):
    pipe.text_encoder.mllm.save_pretrained(tmp_path / "mllm")
    pipe.vae.save_pretrained(tmp_path / "parts" / "vae")
    with pytest.raises(ValueError, match="vae_name_or_path"):
        pipe.save_pretrained(tmp_path / "nowhere", include_frozen=False)
    referring = IOMMPipeline(
        **pipe.components,
        vae_name_or_path=str(tmp_path / "parts"),
        vae_subfolder="vae",
        vae_hash=hash_weight_files(tmp_path / "parts" / "vae"),
    )
    referring.text_encoder.config.mllm_name_or_path = str(tmp_path / "mllm")
    referring.text_encoder.config.mllm_hash = hash_weight_files(tmp_path / "mllm")
    referring.save_pretrained(tmp_path / "light", include_frozen=False)
    assert json.loads((tmp_path / "light/model_index.json").read_text())["vae"] == [None, None]
    assert not (tmp_path / "light/vae").exists()
    assert referring.vae is pipe.vae and referring.config["vae"][1] == "AutoencoderKL"

    loaded = IOMMPipeline.from_pretrained(tmp_path / "light")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, "a star"), draw(pipe, "a star"))

    weights = tmp_path / "parts/vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(OSError, match="not the one"):
        IOMMPipeline.from_pretrained(tmp_path / "light")
    weights.unlink()
    with pytest.raises(OSError, match="parts"):
        IOMMPipeline.from_pretrained(tmp_path / "light")
    pipe.text_encoder.config.mllm_name_or_path = pipe.text_encoder.config.mllm_hash = None


def test_understanding_answers_through_the_same_encoder(pipe, images):
    question = pipe.processor.encode([pipe.processor.understand("What is it?", images[0])])
    answer = pipe.text_encoder.generate(**question, max_new_tokens=4, do_sample=False)
    assert torch.equal(answer, pipe.text_encoder.mllm.generate(**question, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give a `prompt`"),
        ({"prompt": "a", "height": 60}, "multiples of 16, got 60 and 64"),
        ({"prompt": "a", "width": -64}, "got 64 and -64"),
        ({"prompt": "a", "num_inference_steps": 0}, "got 0"),
        ({"prompt": 5}, "must be a str .*got 5"),
        ({"prompt": []}, r"got \[\]"),
        ({"prompt": ["a", "b"], "image": [Image.new("RGB", (8, 8))]}, "`image` has 1 entries, the others have 2"),
        ({"prompt": "a", "image": "picture.png"}, "got str"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x", "y", "z"]}, "`negative_prompt` has 3"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 128)}, "replace `prompt`"),
        ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 2, 128)}, "replace"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 8)}, r"shape \(1, 4, 16, 16\), got \(1, 4, 8, 8\)"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators .* batch of 1"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\]"),
        ({"prompt": "circle " * 1200}, "longer than the 1024"),
    ],
)
def test_bad_input_is_refused_with_the_value(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"num_inference_steps": 1} | arguments)
