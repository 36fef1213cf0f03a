"""What users of diffusers and transformers expect of any pipeline and model, beside what is IOMM's own."""

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from PIL import Image

from iomm_hf import IOMMConditionEncoder, IOMMConfig, IOMMPipeline, IOMMProcessor
from iomm_hf.tiny import tiny_encoder, tiny_pipeline


@pytest.fixture(scope="module")
def pipe(flux):
    pipe = tiny_pipeline(flux)
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero: make every weight count
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(count))


def draw(pipe, *args, **kwargs):
    return pipe(*args, **{"num_inference_steps": 2, "output_type": "latent"} | kwargs).images


def test_a_batch_equals_its_prompts_alone(pipe):
    prompts, start = ["a red circle", "two stars above a ring", "a"], noise(3)
    together = draw(pipe, prompts, latents=start)
    for i, prompt in enumerate(prompts):
        assert (draw(pipe, prompt, latents=start[i : i + 1])[0] - together[i]).abs().max() < 1e-4


def test_num_images_per_prompt_repeats_prompts_in_order(pipe):
    start = noise(4)
    images = draw(pipe, ["a star", "a ring"], num_images_per_prompt=2, latents=start)
    assert len(images) == 4
    again = draw(pipe, ["a star", "a star", "a ring", "a ring"], latents=start)
    assert (images - again).abs().max() < 1e-4


def test_generators_make_pictures_repeatable_one_each(pipe):
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    together = draw(pipe, ["a star"] * 2, generator=seeds)
    alone = draw(pipe, "a star", generator=torch.Generator().manual_seed(4))
    assert (together[1] - alone[0]).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_output_types(pipe):
    kwargs = {"latents": noise(2), "prompt": ["a", "b"]}
    pil = draw(pipe, output_type="pil", **kwargs)
    array = draw(pipe, output_type="np", **kwargs)
    tensor = draw(pipe, output_type="pt", **kwargs)
    assert isinstance(pil[0], Image.Image) and pil[0].size == (64, 64)
    assert array.shape == (2, 64, 64, 3) and array.min() >= 0 and array.max() <= 1
    assert tensor.shape == (2, 3, 64, 64)
    assert np.abs(np.asarray(pil[1]) / 255 - array[1]).max() < 1 / 255
    assert np.abs(tensor.permute(0, 2, 3, 1).numpy() - array).max() < 1e-6
    as_tuple = pipe(num_inference_steps=2, output_type="np", return_dict=False, **kwargs)
    assert isinstance(as_tuple, tuple) and np.array_equal(as_tuple[0], array)


def test_callbacks_see_each_step_may_change_it_and_may_stop(pipe):
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {}

    plain = draw(pipe, "a star", latents=noise(1), num_inference_steps=4)
    recorded = draw(pipe, "a star", latents=noise(1), num_inference_steps=4, callback_on_step_end=record)
    assert torch.equal(plain, recorded) and pipe.num_timesteps == 4
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and all(shape == (1, 4, 16, 16) for _, _, shape in seen)
    assert [time for _, time, _ in seen] == sorted((time for _, time, _ in seen), reverse=True)

    def zero_at_the_end(pipe, step, timestep, tensors):
        assert set(tensors) == {"latents", "prompt_embeds"}
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    names = ["latents", "prompt_embeds"]
    changed = draw(
        pipe,
        "a star",
        num_inference_steps=4,
        callback_on_step_end=zero_at_the_end,
        callback_on_step_end_tensor_inputs=names,
    )
    assert changed.abs().max() == 0

    def stop_after_two(pipe, step, timestep, tensors):
        stopped.append(tensors["latents"])
        pipe._interrupt = step == 1
        return {}

    stopped = []
    result = draw(pipe, "a star", num_inference_steps=4, callback_on_step_end=stop_after_two)
    assert len(stopped) == 2 and torch.equal(result, stopped[-1])
    assert torch.equal(
        draw(pipe, "a star", latents=noise(1), num_inference_steps=4), plain
    )  # the next call runs again


def test_a_callback_may_change_the_guidance(pipe):
    def no_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {}

    kwargs = {"prompt": "a star", "latents": noise(1), "num_inference_steps": 2}
    first = []
    guided = draw(pipe, **kwargs, callback_on_step_end=lambda p, i, t, x: first.append(x["latents"]) or {})
    changed = draw(pipe, **kwargs, callback_on_step_end=no_guidance)
    plain = draw(pipe, "a star", latents=first[0], num_inference_steps=1, sigmas=[0.5], guidance_scale=1.0)
    assert (changed - guided).abs().max() > 1e-4
    assert (changed - plain).abs().max() < 1e-4


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_embeddings_replace_prompts_and_need_no_encoder(pipe, guidance_scale):
    expected = draw(pipe, ["a star", "a ring"], latents=noise(2), guidance_scale=guidance_scale)
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipe.encode_prompt(
            ["a star", "a ring"], do_classifier_free_guidance=guidance_scale > 1
        )
    assert embeds.shape[:2] == mask.shape and (negative is None) == (negative_mask is None) == (guidance_scale == 1)
    blind = IOMMPipeline(**pipe.components | {"text_encoder": None, "processor": None})
    blind.set_progress_bar_config(disable=True)
    images = draw(
        blind,
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=negative_mask,
        latents=noise(2),
        guidance_scale=guidance_scale,
    )
    assert (images - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        draw(blind, prompt_embeds=embeds, guidance_scale=4.0)


def test_encoding_needs_no_generator(pipe):
    reader = IOMMPipeline(**pipe.components | {"transformer": None, "vae": None, "scheduler": None})
    with torch.no_grad():
        assert reader.encode_prompt("a star")[0].shape[::2] == (1, 128)


def test_components_build_the_same_pipeline_and_dtype_moves(pipe):
    again = IOMMPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, "a star", latents=noise(1)), draw(pipe, "a star", latents=noise(1)))
    half = tiny_pipeline().to(torch.float64)
    half.set_progress_bar_config(disable=True)
    assert {half.text_encoder.dtype, half.transformer.dtype, half.vae.dtype} == {torch.float64}
    assert draw(half, "a star", output_type="np").dtype in (np.float32, np.float64)


def test_vae_slicing_changes_nothing_and_tiling_little(pipe):
    expected = draw(pipe, ["a", "b"], latents=noise(2), output_type="np")
    pipe.vae.enable_slicing()
    assert np.abs(draw(pipe, ["a", "b"], latents=noise(2), output_type="np") - expected).max() < 1e-5
    pipe.vae.disable_slicing()
    kwargs = {"latents": torch.cat([noise(2), noise(3)[:2]], dim=3), "width": 128, "output_type": "np"}
    whole = draw(pipe, ["a", "b"], **kwargs)
    pipe.vae.enable_tiling()
    tiled = draw(pipe, ["a", "b"], **kwargs)
    pipe.vae.disable_tiling()
    assert tiled.shape == (2, 64, 128, 3) and 0 < np.abs(tiled - whole).mean() < 0.1  # tiles are blended


def test_config_round_trip(pipe, tmp_path):
    config = pipe.text_encoder.config
    config.save_pretrained(tmp_path)
    loaded = IOMMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert IOMMConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert loaded.mllm_config.model_type == "internvl" and loaded.hidden_size == 128
    assert IOMMConfig().hidden_size == IOMMConfig().get_text_config().hidden_size


def test_tuple_output_equals_dict_output(pipe):
    inputs = pipe.processor.encode([pipe.processor.text_to_image("a star")])
    for encoder in (pipe.text_encoder, tiny_encoder(pipe.processor, condition_tokens="all")):
        with torch.no_grad():
            as_dict, as_tuple = encoder(**inputs), encoder(**inputs, return_dict=False)
        assert all(torch.equal(one, two) for one, two in zip(as_dict.to_tuple(), as_tuple, strict=True))


def test_a_model_from_a_config_is_seeded_and_has_no_uninitialised_weight(pipe):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(IOMMConditionEncoder(pipe.text_encoder.config))
    for (name, one), two in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, two), name
    assert abs(models[0].adapter.queries.std() - 128**-0.5) < 0.01


def test_from_pipe_takes_over_parts_and_settings(pipe):
    other = IOMMPipeline.from_pipe(pipe, resolution=48)
    other.set_progress_bar_config(disable=True)
    assert all(other.components[name] is part for name, part in pipe.components.items())
    assert other.resolution == 48 and IOMMPipeline.from_pipe(other).resolution == 48 and pipe.resolution == 64
    assert torch.equal(
        draw(other, "a star", latents=noise(1), height=64, width=64), draw(pipe, "a star", latents=noise(1))
    )


def test_caches_of_the_generator_work_and_leave_no_trace(pipe):
    def draw_slowly():
        return draw(pipe, "a star", latents=noise(1), num_inference_steps=4)

    expected = draw_slowly()
    outcomes = {}
    for threshold in (0.0, 1e6):  # never and always close enough to the step before
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        outcomes[threshold] = draw_slowly()
        assert torch.equal(draw_slowly(), outcomes[threshold])  # nothing is left over from the picture before
        pipe.transformer.disable_cache()
    assert (outcomes[0.0] - expected).abs().max() < 1e-5
    assert (outcomes[1e6] - expected).abs().max() > 1e-4
    assert torch.equal(draw_slowly(), expected)
    # steps without guidance have a batch of their own, and a cache of their own
    interval = {"latents": noise(1), "num_inference_steps": 6, "guidance_interval": (0.4, 0.6)}
    expected = draw(pipe, "a star", **interval)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    cached = draw(pipe, "a star", **interval)
    pipe.transformer.disable_cache()
    assert (cached - expected).abs().max() < 1e-5


def test_pyramid_attention_broadcast_reads_the_running_step(pipe):
    times = []
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: times.append(pipe.current_timestep) or pipe.current_timestep,
    )
    expected = draw(pipe, "a star", latents=noise(1), num_inference_steps=4)
    pipe.transformer.enable_cache(config)
    skipping = draw(pipe, "a star", latents=noise(1), num_inference_steps=4)
    pipe.transformer.disable_cache()
    assert sorted(set(map(float, times)), reverse=True) == [1000.0, 750.0, 500.0, 250.0]
    assert pipe.current_timestep is None and (skipping - expected).abs().max() > 1e-4


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload_changes_nothing(pipe, level, flux):
    offloaded = tiny_pipeline(flux)
    offloaded.transformer.load_state_dict(pipe.transformer.state_dict())
    offloaded.set_progress_bar_config(disable=True)
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    offloaded.enable_group_offload(onload_device=torch.device("cpu"), offload_type=level, **blocks)
    expected = draw(pipe, "a star", latents=noise(1), output_type="np")
    assert np.abs(draw(offloaded, "a star", latents=noise(1), output_type="np") - expected).max() < 1e-5


@pytest.mark.parametrize("sequential", [False, True])
def test_offload_changes_neither_pictures_nor_answers(pipe, sequential, flux):
    offloaded = tiny_pipeline(flux)
    offloaded.transformer.load_state_dict(pipe.transformer.state_dict())
    offloaded.set_progress_bar_config(disable=True)
    if sequential:  # as `enable_sequential_cpu_offload` does, which itself wants an accelerator
        for name in ("text_encoder", "transformer", "vae"):
            cpu_offload(offloaded.components[name], torch.device("cpu"), offload_buffers=name == "text_encoder")
            assert next(offloaded.components[name].parameters()).is_meta
    else:
        offloaded.enable_model_cpu_offload(device="cpu")
    picture = Image.new("RGB", (64, 64), "red")
    kwargs = {"prompt": "a star", "image": picture, "latents": noise(1), "output_type": "np"}
    answer = pipe.ask(picture, "What is it?", max_new_tokens=4)
    for _ in range(2):  # and again, after everything was put away
        assert offloaded.ask(picture, "What is it?", max_new_tokens=4) == answer
        assert np.abs(draw(offloaded, **kwargs) - draw(pipe, **kwargs)).max() < 1e-5


def test_asking_brings_the_offloaded_encoder_in(pipe, flux):
    """`generate` is no `forward`, so the hook that moves a model has to be called."""
    offloaded = tiny_pipeline(flux)
    offloaded.enable_model_cpu_offload(device="cpu")
    hook, moved = offloaded.text_encoder._hf_hook, []
    plain = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: moved.append(module) or plain(module, *args, **kwargs)
    offloaded.ask(Image.new("RGB", (64, 64)), "What is it?", max_new_tokens=1)
    assert moved[0] is offloaded.text_encoder


def test_asking_brings_the_group_offloaded_encoder_in_and_out(pipe, flux):
    offloaded = tiny_pipeline(flux)
    offloaded.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    group, moved = offloaded.text_encoder._diffusers_hook.get_hook("group_offloading").group, []
    for name in ("onload_", "offload_"):
        plain = getattr(group, name)
        setattr(group, name, lambda plain=plain, name=name: moved.append(name) or plain())
    answer = offloaded.ask(Image.new("RGB", (64, 64)), "What is it?", max_new_tokens=4)
    assert moved == ["onload_", "offload_"]
    assert answer == pipe.ask(Image.new("RGB", (64, 64)), "What is it?", max_new_tokens=4)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_maps(pipe, device_map, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = IOMMPipeline.from_pretrained(tmp_path, device_map=device_map)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, "a star", latents=noise(1)), draw(pipe, "a star", latents=noise(1)))


def test_weights_may_be_stored_in_eight_bits(pipe, flux):
    small = tiny_pipeline(flux)
    small.transformer.load_state_dict(pipe.transformer.state_dict())
    small.set_progress_bar_config(disable=True)
    small.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in small.transformer.parameters()}
    difference = draw(small, "a star", latents=noise(1)) - draw(pipe, "a star", latents=noise(1))
    assert 0 < difference.abs().max() < 0.1


@pytest.mark.slow
def test_repeated_blocks_compile_without_a_break(pipe, flux):
    compiled = tiny_pipeline(flux)
    compiled.transformer.load_state_dict(pipe.transformer.state_dict())
    compiled.set_progress_bar_config(disable=True)
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    difference = draw(compiled, "a star", latents=noise(1)) - draw(pipe, "a star", latents=noise(1))
    assert difference.abs().max() < 1e-4


def test_each_part_may_have_its_own_dtype(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"vae": torch.float32, "text_encoder": torch.bfloat16, "default": torch.float16}
    loaded = IOMMPipeline.from_pretrained(tmp_path, dtype=dtypes)
    assert {name: loaded.components[name].dtype for name in ("vae", "text_encoder", "transformer")} == {
        "vae": torch.float32,
        "text_encoder": torch.bfloat16,
        "transformer": torch.float16,
    }


def test_a_referenced_autoencoder_gets_its_dtype_too(pipe, tmp_path):
    pipe.text_encoder.mllm.save_pretrained(tmp_path / "mllm")
    pipe.vae.save_pretrained(tmp_path / "vae")
    referring = tiny_pipeline()
    referring.text_encoder.config.mllm_name_or_path = str(tmp_path / "mllm")
    referring.register_to_config(vae_name_or_path=str(tmp_path / "vae"))
    referring.save_pretrained(tmp_path / "pipe", include_frozen=False)
    for dtypes, expected in (({"vae": torch.bfloat16}, torch.bfloat16), ({"default": torch.float16}, torch.float16)):
        assert IOMMPipeline.from_pretrained(tmp_path / "pipe", dtype=dtypes).vae.dtype == expected


def test_reference_pictures_as_arrays_and_tensors(pipe):
    array = np.random.default_rng(0).random((1, 64, 64, 3), dtype=np.float32)
    array = np.round(array * 255) / np.float32(255)
    expected = draw(pipe, "a star", image=Image.fromarray((array[0] * 255).round().astype(np.uint8)), latents=noise(1))
    for image in (array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(draw(pipe, "a star", image=image, latents=noise(1)), expected)


def test_variants_of_the_weights(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises((OSError, ValueError)):
        IOMMPipeline.from_pretrained(tmp_path)
    loaded = IOMMPipeline.from_pretrained(tmp_path, variant="fp16")
    for name in ("text_encoder", "transformer", "vae"):
        assert all("fp16" in file.name for file in (tmp_path / name).glob("*.safetensors"))
        weights = loaded.components[name].state_dict()
        assert all(torch.equal(weight, weights[key]) for key, weight in pipe.components[name].state_dict().items())


def test_attention_of_the_mllm_is_a_choice(pipe):
    encoder = tiny_encoder(pipe.processor, condition_tokens="queries")
    inputs = pipe.processor.encode([pipe.processor.text_to_image(text) for text in ("a star", "two red rings")])
    with torch.no_grad():
        expected = encoder(**inputs).condition
        encoder.set_attn_implementation("eager")
        assert encoder.mllm.model.language_model.config._attn_implementation == "eager"
        assert (encoder(**inputs).condition - expected).abs().max() < 1e-4


def test_hidden_states_of_the_query_rows(pipe):
    encoder = tiny_encoder(pipe.processor, condition_tokens="queries", num_queries=16)
    inputs = pipe.processor.encode([pipe.processor.text_to_image("a star")])
    layers = encoder.config.get_text_config().num_hidden_layers
    with torch.no_grad():
        assert encoder(**inputs).hidden_states is None
        output = encoder(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == layers + 1
        assert all(states.shape == (1, 16, 128) for states in output.hidden_states)
        assert torch.equal(output.hidden_states[-1], output.condition)
        some = encoder(**inputs, output_hidden_states=[0, -1]).hidden_states
        assert torch.equal(some[0], output.hidden_states[0]) and some[1] is None and some[-1] is not None
        as_tuple = encoder(**inputs, output_hidden_states=1, return_dict=False)
        with pytest.raises(ValueError, match=rf"of the {layers + 1} states of the query rows, got \[100\]"):
            encoder(**inputs, output_hidden_states=[100])
    assert torch.equal(as_tuple[0], output.condition) and torch.equal(as_tuple[1][1], output.hidden_states[1])


def test_unknown_inputs_of_the_model_are_refused(pipe):
    inputs = pipe.processor.encode([pipe.processor.text_to_image("a star")])
    with pytest.raises(TypeError, match="image_masks"):
        pipe.text_encoder(**inputs, image_masks=None)


def test_frozen_weights_of_other_shapes_are_refused_even_on_request(pipe, tmp_path):
    pipe.text_encoder.save_pretrained(tmp_path)
    config = IOMMConfig.from_pretrained(tmp_path)
    config.mllm_config.text_config.intermediate_size *= 2
    with pytest.raises(OSError, match="other shapes"):
        IOMMConditionEncoder.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)


def test_weights_load_part_by_part_and_from_disk(pipe, tmp_path):
    pipe.text_encoder.save_pretrained(tmp_path / "model")
    device_map = {"mllm": "disk", "adapter": "cpu"}
    loaded = IOMMConditionEncoder.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    inputs = pipe.processor.encode([pipe.processor.text_to_image("a star")])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).condition, pipe.text_encoder(**inputs).condition)


def test_processor_folder_and_kwargs(pipe, tmp_path):
    pipe.processor.save_pretrained(tmp_path)
    assert {"tokenizer.json", "processor_config.json", "chat_template.jinja"} <= {f.name for f in tmp_path.iterdir()}
    processor = IOMMProcessor.from_pretrained(tmp_path)
    assert processor.to_dict() == pipe.processor.to_dict()
    text, image = f"a {processor.image_token}", Image.new("RGB", (64, 64), "white")
    batch = processor(text=text, images=image, return_tensors="pt", padding="max_length", max_length=76)
    assert batch["input_ids"].shape == (1, 76) and batch["pixel_values"].min() > 0
    nested = processor(
        text=text,
        images=image,
        images_kwargs={"rescale_factor": -1.0},
        text_kwargs={"padding": "max_length", "max_length": 76},
        return_tensors="pt",
    )
    assert nested["input_ids"].shape == (1, 76) and nested["pixel_values"].max() < 0
    with pytest.raises(ValueError, match="rescale_factor"):
        processor(text=text, images=image, images_kwargs={"rescale_factor": -1.0}, rescale_factor=1.0)
    with pytest.raises(ValueError):  # image tokens are never cut off in silence
        processor(text=text, images=image, truncation=True, max_length=3)


class EndGuidance(PipelineCallback):
    """As diffusers' `SDCFGCutoffCallback`, whose `prompt_embeds` hold both branches."""

    tensor_inputs = ["prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.config.cutoff_step_index:
            pipeline._guidance_scale = 1.0
            pipeline._image_guidance_scale = None
        return callback_kwargs


@pytest.mark.parametrize(
    "cutoff, more",
    [
        (SDCFGCutoffCallback, {"prompt": "a star", "latents": noise(1)}),  # diffusers' own is for one prompt
        (EndGuidance, {"prompt": ["a star", "a ring"], "latents": noise(2)}),
        (EndGuidance, {"prompt": "a star", "image": Image.new("RGB", (64, 64)), "image_guidance_scale": 1.5}),
    ],
    ids=["diffusers", "batch", "image"],
)
def test_a_callback_ends_guidance_as_an_interval_does(pipe, cutoff, more):
    kwargs = {"latents": noise(1), "num_inference_steps": 4} | more
    cut_off = draw(pipe, **kwargs, callback_on_step_end=cutoff(cutoff_step_ratio=None, cutoff_step_index=1))
    assert (cut_off - draw(pipe, **kwargs, guidance_interval=(0.0, 0.5))).abs().max() < 1e-4
    assert (cut_off - draw(pipe, **kwargs)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_conditions_of_a_wrong_shape_are_named(pipe, name):
    with torch.no_grad():
        embeds, _, negative, _ = pipe.encode_prompt(["a star"])
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape \(batch, rows, "):
        draw(pipe, **given | {name: given[name][0]})


def test_a_callback_may_not_return_fewer_conditions(pipe):
    with pytest.raises(ValueError, match=r"prompt_embeds of the shape \(1, .*expected \(2, "):
        draw(
            pipe,
            ["a star", "a ring"],
            callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
        )


def test_masks_of_whole_numbers_serve_as_those_of_truth_values(pipe):
    with torch.no_grad():
        embeds, mask, *_ = pipe.encode_prompt(["a star", "a ring left of a heart"], do_classifier_free_guidance=False)
    assert not mask.all()
    kwargs = {"prompt_embeds": embeds, "latents": noise(2), "guidance_scale": 1.0}
    expected = draw(pipe, prompt_embeds_mask=mask, **kwargs)
    assert torch.equal(draw(pipe, prompt_embeds_mask=mask.long(), **kwargs), expected)


def test_a_blank_negative_prompt_is_none(pipe):
    kwargs = {"prompt": ["a star", "a ring"], "latents": noise(2)}
    expected = draw(pipe, **kwargs)
    assert torch.equal(draw(pipe, negative_prompt="", **kwargs), expected)
    assert torch.equal(draw(pipe, negative_prompt=["", " "], **kwargs), expected)
