"""What is IOMM's own about the pipeline: kinds of input, guidance, questions, frozen parts left out, clear refusals."""

import json

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PipelineQuantizationConfig,
    QuantoConfig,
    UniPCMultistepScheduler,
)
from optimum.quanto import QLinear
from PIL import Image

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes_chat import DESCRIBE
from iomm_hf.modeling_iomm import IOMMConditionEncoder, hash_weight_files
from iomm_hf.pipeline_iomm import decode_latents, draw_latents, guide, join_conditions
from iomm_hf.tiny import tiny_pipeline


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


def test_one_batch_mixes_drawing_editing_several_references_and_varying(pipe, images):
    prompts = ["a red star", "make it blue", "put both in one picture", None]
    references = [None, images[0], [images[1], images[2]], images[3]]
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    together = draw(pipe, prompts, references, latents=noise)
    alone = [
        draw(pipe, prompts[0], latents=noise[:1]),
        draw(pipe, prompts[1], images[0], latents=noise[1:2]),
        draw(pipe, prompts[2], [references[2]], latents=noise[2:3]),
        draw(pipe, image=images[3], latents=noise[3:]),
    ]
    assert (together - torch.cat(alone)).abs().max() < 1e-4


def test_every_reference_of_an_edit_counts(pipe, images):
    def edit(*pictures):
        return draw(pipe, "put both in one picture", [list(pictures)])

    both = edit(images[0], images[1])
    for others in ((images[0],), (images[0], images[2]), (images[1], images[0])):
        assert (edit(*others) - both).abs().max() > 1e-4
    varied = draw(pipe, image=[[images[0], images[1]]])
    assert (varied - draw(pipe, image=images[0])).abs().max() > 1e-4


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


@pytest.fixture
def edit_once(pipe, images):
    """One step of an edit is linear in the velocity."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return lambda **kwargs: draw(
        pipe, "make it blue", images[0], num_images_per_prompt=2, latents=noise, steps=1, **kwargs
    )


def test_picture_and_text_are_guided_apart(pipe, images, edit_once):
    assert torch.allclose(edit_once(guidance_scale=3, image_guidance_scale=3), edit_once(guidance_scale=3), atol=1e-4)
    by_image = [edit_once(guidance_scale=3, image_guidance_scale=scale) for scale in (1, 2, 3)]
    assert (by_image[1] - by_image[0]).abs().max() > 1e-3
    assert torch.allclose(by_image[2] - by_image[1], by_image[1] - by_image[0], atol=1e-4)
    # At the scales 0 and 1 nothing but the picture's own branch is left.
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    varied = draw(pipe, image=images[0], num_images_per_prompt=2, latents=noise, steps=1, guidance_scale=1)
    assert torch.allclose(edit_once(guidance_scale=0, image_guidance_scale=1), varied, atol=1e-4)


def test_rescaling_gives_the_guided_velocity_the_spread_of_the_unguided_one():
    negative, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    spread = {
        rescale: guide([negative, conditional], 5.0, None, rescale).std(dim=(1, 2, 3)) for rescale in (0.0, 0.5, 1.0)
    }
    assert torch.allclose(spread[1.0], conditional.std(dim=(1, 2, 3)))
    assert torch.allclose(spread[0.5], (spread[0.0] + spread[1.0]) / 2)
    assert (spread[0.0] > 2 * spread[1.0]).all()


def test_the_pipeline_rescales_as_far_as_it_is_told(pipe):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    steps = {
        rescale: draw(pipe, "a star", latents=noise, steps=1, guidance_scale=5.0, guidance_rescale=rescale) - noise
        for rescale in (0.0, 0.5, 1.0)
    }
    assert (steps[1.0] - steps[0.0]).abs().max() > 1e-4
    assert torch.allclose(steps[0.5], (steps[0.0] + steps[1.0]) / 2, atol=1e-4)  # one step is linear in the velocity


def test_guidance_interval_guides_its_steps_only_and_spares_the_rest(pipe):
    sizes = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    halves = draw(pipe, "a red star", steps=4, guidance_interval=(0.25, 0.75))
    hook.remove()
    assert sizes == [1, 2, 2, 1]

    def switch(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0 if step + 1 in (1, 2) else 1.0
        return {}

    unguided_first = draw(pipe, "a red star", steps=4, guidance_interval=(0.25, 1.0), callback_on_step_end=switch)
    assert torch.allclose(halves, unguided_first, atol=1e-5)
    assert (halves - draw(pipe, "a red star", steps=4)).abs().max() > 1e-4


def test_previews_show_where_the_drawing_leads(pipe):
    previews = []

    def preview(pipe, step, timestep, tensors):
        previews.append(pipe.decode(tensors["denoised"], "np"))
        return {}

    pictures = draw(
        pipe,
        "a red star",
        steps=4,
        output_type="np",
        callback_on_step_end=preview,
        callback_on_step_end_tensor_inputs=["denoised"],
    )
    distances = [np.abs(picture - pictures).mean() for picture in previews]
    assert len(previews) == 4 and previews[0].shape == (1, 64, 64, 3)
    assert distances[-1] < 1e-5 and distances[0] > distances[-1]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module")
def trained():
    pipe = IOMMPipeline.from_pretrained(shipped_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_other_solvers_end_where_many_steps_of_euler_end(trained):
    """The trained model's path is curved, so a wrong sign, time or shift would lead elsewhere."""
    euler = trained.scheduler
    kwargs = {"prompt": "a red circle", "height": 32, "width": 32, "guidance_scale": 1.0}
    exact = draw(trained, **kwargs, steps=64)
    euler_error = (draw(trained, **kwargs, steps=12) - exact).std()
    assert euler_error < 0.5 * exact.std()  # two pictures that have nothing in common: 1.4
    try:
        for scheduler in (
            FlowMatchHeunDiscreteScheduler.from_config(euler.config),
            UniPCMultistepScheduler.from_config(euler.config, **FLOW),
            DPMSolverMultistepScheduler.from_config(euler.config, **FLOW),
        ):
            trained.scheduler = scheduler
            assert (draw(trained, **kwargs, steps=12) - exact).std() < euler_error, type(scheduler)
    finally:
        trained.scheduler = euler


def test_schedulers_that_add_noise_take_it_from_the_seeds(pipe):
    euler = pipe.scheduler
    seeds = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    try:
        for scheduler in (
            FlowMatchLCMScheduler.from_config(euler.config),
            FlowMatchEulerDiscreteScheduler.from_config(euler.config, stochastic_sampling=True),
        ):
            pipe.scheduler = scheduler
            both = pipe(["a star"] * 2, num_inference_steps=2, output_type="latent", generator=seeds(3, 4)).images
            assert torch.allclose(draw(pipe, "a star", seed=4)[0], both[1], atol=1e-4)
            assert not torch.allclose(draw(pipe, "a star", seed=3)[0], both[1], atol=1e-2)
    finally:
        pipe.scheduler = euler


def test_a_scheduler_is_kept_by_save_and_from_pipe(pipe, tmp_path):
    heun = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    other = IOMMPipeline.from_pipe(IOMMPipeline.from_pipe(pipe, scheduler=heun))
    assert other.scheduler is heun
    other.save_pretrained(tmp_path)
    assert type(IOMMPipeline.from_pretrained(tmp_path).scheduler) is FlowMatchHeunDiscreteScheduler


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (EulerDiscreteScheduler, {}, "EulerDiscreteScheduler does not integrate a velocity; use FlowMatchEuler"),
        (UniPCMultistepScheduler, {}, "set for noise prediction; build it with"),
        (DPMSolverMultistepScheduler, FLOW | {"use_karras_sigmas": True}, "without use_karras_sigmas"),
        (FlowMatchEulerDiscreteScheduler, {"invert_sigmas": True}, "invert_sigmas=False"),
        (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, "one `shift`"),
    ],
)
def test_schedulers_that_lead_elsewhere_are_refused(pipe, scheduler, settings, message):
    euler = pipe.scheduler
    try:
        pipe.scheduler = scheduler(**settings)
        with pytest.raises(ValueError, match=message):
            draw(pipe, "a star")
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
        with pytest.raises(ValueError, match="leave out `sigmas`"):
            draw(pipe, "a star", sigmas=[1.0, 0.5])
    finally:
        pipe.scheduler = euler


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
    for width, height in ((96, 32), (32, 96)):
        assert draw(pipe, "a star", height=height, width=width, output_type="pil")[0].size == (width, height)


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


def test_conditions_without_a_row_or_parts_without_a_vae_are_refused(pipe):
    embeds = torch.randn(2, 3, pipe.text_encoder.config.hidden_size)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    with pytest.raises(ValueError, match="`prompt_embeds_mask` hides every row of an entry"):
        draw(pipe, prompt_embeds=embeds, prompt_embeds_mask=mask)
    without = IOMMPipeline(**pipe.components | {"vae": None})
    with pytest.raises(ValueError, match="no vae or no transformer. One whose vae lies elsewhere"):
        draw(without, "a star")


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
    with pytest.raises(ValueError, match="only max_shard_size and variant are options, got .'push_to_hub'"):
        referring.save_pretrained(tmp_path / "light", include_frozen=False, push_to_hub=True)
    referring.save_pretrained(tmp_path / "sharded", include_frozen=False, max_shard_size="100KB", variant="fp16")
    for part in ("text_encoder", "transformer"):
        assert len(list((tmp_path / "sharded" / part).glob("*.index.fp16.json"))) == 1
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


def test_references_are_fetched_as_the_pipeline_is(pipe, tmp_path):
    commit, cache = "c0ffee" + 34 * "0", tmp_path / "cache"  # in the layout of the Hub's cache
    for name, part in (("mllm", pipe.text_encoder.mllm), ("vae", pipe.vae)):
        part.save_pretrained(cache / f"models--user--{name}" / "snapshots" / commit)
        (cache / f"models--user--{name}" / "refs").mkdir()
        (cache / f"models--user--{name}" / "refs" / "main").write_text(commit)
    referring = IOMMPipeline(**pipe.components, vae_name_or_path="user/vae")
    referring.text_encoder.config.mllm_name_or_path = "user/mllm"
    referring.save_pretrained(tmp_path / "light", include_frozen=False)
    pipe.text_encoder.config.mllm_name_or_path = None

    loaded = IOMMPipeline.from_pretrained(tmp_path / "light", cache_dir=cache, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, "a star"), draw(pipe, "a star"))
    with pytest.raises(OSError, match="The frozen weights 'user/mllm'"):
        IOMMPipeline.from_pretrained(
            tmp_path / "light", vae=pipe.vae, cache_dir=tmp_path / "empty", local_files_only=True
        )

    with pytest.raises(ValueError, match="device_map would not reach text_encoder and vae"):
        IOMMPipeline.from_pretrained(tmp_path / "light", device_map="balanced")
    with pytest.raises(ValueError, match="device_map would not reach the MLLM"):
        IOMMConditionEncoder.from_pretrained(tmp_path / "light/text_encoder", device_map="cpu")


@pytest.fixture
def int8():
    return PipelineQuantizationConfig(
        quant_mapping={"text_encoder": transformers.QuantoConfig("int8"), "transformer": QuantoConfig("int8")}
    )


def quantized_layers(part):
    return sum(isinstance(layer, QLinear) for layer in part.modules())


def test_quantised_parts_draw_and_answer_almost_alike(trained, int8, tmp_path):
    quantized = IOMMPipeline.from_pretrained(shipped_model(), quantization_config=int8)
    quantized.set_progress_bar_config(disable=True)
    assert quantized_layers(quantized.transformer) > 50 and quantized_layers(quantized.text_encoder.mllm) > 20
    plain, rounded = (draw(pipe, "a red circle", steps=10, output_type="np") for pipe in (trained, quantized))
    assert 0 < np.abs(plain - rounded).mean() < 0.01
    picture = Image.fromarray((plain[0] * 255).astype("uint8"))
    assert quantized.describe(picture) == trained.describe(picture) == "a red circle"


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}])
def test_a_referenced_mllm_is_quantised_as_it_comes(trained, int8, options, tmp_path):
    trained.text_encoder.mllm.save_pretrained(tmp_path / "mllm")
    trained.vae.save_pretrained(tmp_path / "vae")
    referring = IOMMPipeline(**trained.components, vae_name_or_path=str(tmp_path / "vae"))
    referring.text_encoder.config.mllm_name_or_path = str(tmp_path / "mllm")
    referring.save_pretrained(tmp_path / "light", include_frozen=False)
    trained.text_encoder.config.mllm_name_or_path = None

    quantized = IOMMPipeline.from_pretrained(tmp_path / "light", quantization_config=int8, **options)
    quantized.set_progress_bar_config(disable=True)
    assert quantized_layers(quantized.text_encoder.mllm) > 20 and not quantized_layers(quantized.text_encoder.adapter)
    assert quantized_layers(quantized.transformer) > 50
    plain, rounded = (draw(pipe, "a red circle", steps=10) for pipe in (trained, quantized))
    assert 0 < (plain - rounded).abs().mean() < 0.05 * plain.std()
    with pytest.raises(ValueError, match="save with include_frozen=False"):
        quantized.text_encoder.save_pretrained(tmp_path / "whole")


def test_understanding_answers_through_the_same_encoder(pipe, images):
    question = pipe.processor.encode([pipe.processor.understand("What is it?", images[0])])
    answer = pipe.text_encoder.generate(**question, max_new_tokens=4, do_sample=False)
    assert torch.equal(answer, pipe.text_encoder.mllm.generate(**question, max_new_tokens=4, do_sample=False))
    text = pipe.processor.tokenizer.decode(answer[0, question["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pipe.ask(images[0], "What is it?", max_new_tokens=4) == text.strip()


def test_questions_in_batches_are_answered_as_alone(trained, images):
    red = trained("a red circle", num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]
    pictures, questions = (
        [red, images[0], images[1]],
        ["Describe the image.", "Is there a star?", "How many are there?"],
    )
    together = trained.ask(pictures, questions, max_new_tokens=12)
    assert together == [trained.ask(*pair, max_new_tokens=12) for pair in zip(pictures, questions, strict=True)]
    assert together[0] == trained.describe(red, max_new_tokens=12) and together[0]
    assert (
        trained.describe([red], max_new_tokens=12) == trained.ask([red], DESCRIBE, max_new_tokens=12) == together[:1]
    )
    two = trained.ask([[red, images[0]]], DESCRIBE, max_new_tokens=12)
    assert two == trained.ask([[red, images[0]]], [DESCRIBE], max_new_tokens=12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "What?"), "Give an `image`"),
        (([[]], "What?"), "at least one picture"),
        ((Image.new("RGB", (8, 8)), "  "), "none of them blank, got '  '"),
        ((Image.new("RGB", (8, 8)), ["a?", "b?"]), "`question` has 2 entries, `image` has 1"),
        ((Image.new("RGB", (8, 8)), "What?", 0), "at least 1, got 0"),
        ((Image.new("RGB", (8, 8)), "What?", 2000), "max_new_tokens=2000 are more than the 1024"),
        ((torch.full((1, 3, 8, 8), torch.nan), "What?"), r"in \[0, 1\], got values from nan"),
    ],
)
def test_bad_questions_are_refused_with_the_value(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.ask(*arguments)


def test_one_question_has_one_answer(pipe):
    with pytest.raises(ValueError, match="num_return_sequences=3"):
        pipe.ask(Image.new("RGB", (8, 8)), "What?", do_sample=True, num_return_sequences=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give a `prompt`"),
        ({"prompt": "a", "height": 60}, "multiples of 16, got 60 and 64"),
        ({"prompt": "a", "width": -64}, "got 64 and -64"),
        ({"prompt": "a", "height": 0}, "multiples of 16, got 0 and 64"),
        ({"prompt": "a", "width": 64.0}, "width must be a whole number, got 64.0"),
        ({"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
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
        ({"prompt": " "}, "is blank, got ' '"),
        ({"prompt": ["a", ""]}, "is blank, got ''"),
        ({"prompt": ["a", None], "image": [Image.new("RGB", (8, 8)), None]}, "both missing for entry 1"),
        ({"prompt": "a", "image": []}, "an empty list"),
        ({"prompt": "a", "image": Image.new("RGB", (0, 8))}, "0x8 pixels"),
        ({"image": Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32))}, "mode F with values that are NaN"),
        ({"prompt": "a", "image": [Image.new("RGB", (8, 8))] * 2}, "a list in the list"),
        ({"image": [Image.new("RGB", (8, 8)), None]}, "must hold a picture"),
        ({"image": np.full((1, 8, 8, 3), np.nan)}, "got values from nan"),
        ({"image": np.full((1, 8, 8, 3), 255)}, r"in \[0, 1\], got values from 255 to 255"),
        ({"image": torch.zeros(3, 8, 8)}, r"\(batch, 3, height, width\), got \(3, 8, 8\)"),
        ({"prompt_embeds": torch.full((1, 2, 128), torch.nan)}, "`prompt_embeds` holds 256 values that are NaN"),
        ({"prompt_embeds": torch.zeros(0, 2, 128)}, r"\(batch, rows, 128\), got \(0, 2, 128\)"),
        ({"prompt_embeds": torch.zeros(1, 2, 64)}, r"\(batch, rows, 128\), got \(1, 2, 64\)"),
        ({"prompt_embeds": torch.zeros(1, 2, 128), "prompt_embeds_mask": torch.ones(1, 3)}, r"shape \(1, 2\)"),
        ({"prompt": "a", "latents": torch.full((1, 4, 16, 16), torch.inf)}, "`latents` holds 1024 values"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a finite number from 0, got nan"),
        ({"prompt": "a", "guidance_rescale": 2}, "from 0 to 1, got 2"),
        ({"prompt": "a", "guidance_interval": (0.5, 0.5)}, r"got \(0.5, 0.5\)"),
        ({"prompt": "a", "image_guidance_scale": 2.0}, "needs a `prompt` and an `image`"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "at least 1, got 0"),
        ({"prompt": "a", "sigmas": []}, r"got \[\]"),
        ({"prompt": "a", "sigmas": [1.0, float("nan")]}, "got .*nan"),
        ({"prompt": "a", "sigmas": [0.5, 1.0]}, r"must fall from noise to picture, got \[0.5, 1.0\]"),
    ],
)
def test_bad_input_is_refused_with_the_value(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"num_inference_steps": 1} | arguments)
