"""Counts against closed forms, and the memory model against training steps that were measured."""

from dataclasses import replace

import pytest
import torch

from iomm_hf import IOMMConfig
from iomm_hf.cost import MetaModel, count_flops, estimate_training, meta_parts
from iomm_hf.data.collate import sample_seed
from iomm_hf.presets import get_preset
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, LoraTrainingConfig
from iomm_hf.training.lora import add_lora
from iomm_hf.training.optimizers import AveragedWeights


PREFIX = 20
XL = {"preset": "xl", "gradient_checkpointing": True, "optimizer": "muon", "ema": False}


def test_adapter_flops_are_the_closed_form():
    model = MetaModel(meta_parts(get_preset("tiny")), 64, PREFIX, torch.float32)
    width, queries = 128, get_preset("tiny").condition_config["num_queries"]
    expected = 2 * width * width * (2 * queries + 2 * PREFIX) + 4 * queries * PREFIX * width  # q, out, k, v; attention
    expected += 2 * queries * 8 * width * width
    assert count_flops(model.adapt) == expected


def test_prefix_flops_are_the_closed_form():
    model = MetaModel(meta_parts(get_preset("tiny")), 64, PREFIX, torch.float32)
    width, key_width, hidden, layers = 128, 64, 384, 4
    weights = 2 * width * width + 2 * width * key_width + 3 * width * hidden
    attention = 4 * PREFIX * PREFIX * width
    rotary = 2 * PREFIX * 16  # frequencies times positions, a matrix product
    assert count_flops(lambda: model.prefix()[0].last_hidden_state) == pytest.approx(
        layers * (2 * PREFIX * weights + attention), abs=2 * rotary
    )


def test_flux_flops_are_the_closed_form(flux):
    model = MetaModel(meta_parts(flux), 64, PREFIX, torch.float32)
    width, image, text, channels = 128, 64, PREFIX + flux.condition_config["num_queries"], 16
    tokens = image + text
    double = (
        2 * tokens * 12 * width**2 + 2 * 2 * 6 * width**2
    )  # four projections, MLP of 4; modulation of both streams
    single = 2 * tokens * 12 * width**2 + 2 * 3 * width**2
    attention = 4 * tokens**2 * width
    outside = 2 * image * 2 * channels * width + 2 * text * width**2 + 2 * 2 * width**2
    embeddings = 2 * (256 * width + width**2) + 2 * 2 * width**2  # time and pooled condition
    expected = double + 2 * single + 3 * attention + outside + embeddings
    forward = count_flops(lambda: model.generate().detach())
    assert forward == pytest.approx(expected, rel=0.01)
    assert count_flops(model.generate, backward=True) == pytest.approx(3 * forward, rel=0.03)


def test_z_image_flops_are_the_closed_form():
    xl = get_preset("xl")
    model = MetaModel(meta_parts(xl), 512, PREFIX, torch.float32)
    width, hidden, image, text, channels = 3840, 10240, 32 * 32, IOMMConfig().num_queries, 4 * 16
    modulation = 2 * 256 * 4 * width

    def block(tokens: int) -> int:  # four projections, a gated MLP, attention
        return 2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width

    expected = 2 * (block(image) + modulation) + 2 * block(text) + 30 * (block(image + text) + modulation)
    expected += 2 * image * channels * width + 2 * text * 1536 * width  # in
    expected += 2 * image * width * channels + 2 * 256 * width + 2 * 2 * 256 * 1024  # out, its modulation, time
    # Twice as much on the way back, but for the first products, whose input takes no gradient.
    assert count_flops(model.generate, backward=True) == pytest.approx(3 * expected, rel=1e-3)


def test_vision_tower_flops_are_the_closed_form():
    model = MetaModel(meta_parts(get_preset("base")), 512, PREFIX, torch.float32)
    width, patches, layers, read, language = 1024, 32 * 32, 24, 16 * 16, 1536
    tokens = patches + 1
    expected = layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) + 2 * patches * 3 * 14**2 * width
    expected += 2 * read * (4 * width * language + language**2)  # four patches become one token
    assert count_flops(model.see) == pytest.approx(expected, rel=1e-6)


def test_autoencoder_flops_are_the_closed_form():
    model = MetaModel(meta_parts(get_preset("base")), 512, PREFIX, torch.float32)

    def conv(side: int, inside: int, outside: int, kernel: int = 3) -> int:
        return 2 * side**2 * inside * outside * kernel**2

    def resnet(side: int, inside: int, outside: int) -> int:
        shortcut = conv(side, inside, outside, 1) if inside != outside else 0
        return conv(side, inside, outside) + conv(side, outside, outside) + shortcut

    expected, inside = conv(512, 3, 128), 128
    for side, width in ((512, 128), (256, 256), (128, 512), (64, 512)):
        expected += resnet(side, inside, width) + resnet(side, width, width)
        expected += conv(side // 2, width, width) if side > 64 else 0  # on the way to half the side
        inside = width
    attention = 2 * 64**2 * 4 * 512**2 + 4 * 64**4 * 512
    expected += 2 * resnet(64, 512, 512) + attention + conv(64, 512, 2 * 16)
    assert count_flops(model.encode_latents) == pytest.approx(expected, rel=1e-6)


def test_the_plain_pass_is_the_closed_form():
    model = MetaModel(meta_parts(get_preset("tiny")), 64, PREFIX, torch.float32)
    width, key_width, hidden, layers, rows = (
        128,
        64,
        384,
        4,
        PREFIX + get_preset("tiny").condition_config["num_queries"],
    )
    weights = 2 * width * width + 2 * width * key_width + 3 * width * hidden
    forward = layers * (2 * rows * weights + 4 * rows**2 * width)
    # Frozen weights take no gradient, so their products come back once; attention's two products come back as four.
    backward = layers * (2 * rows * weights + 8 * rows**2 * width)
    assert count_flops(model.plain, backward=True) == pytest.approx(forward + backward, rel=0.01)


@pytest.mark.slow
def test_a_step_of_base_costs_at_most_four_fifths_of_the_plain_one():
    """`benchmarks/step_flops.py` prints the parts."""
    base, wording, tokens = get_preset("base"), 40, 256
    everything = MetaModel(meta_parts(base), 512, wording + tokens, torch.bfloat16)
    ours = MetaModel(meta_parts(base), 512, wording + round(0.15 * tokens), torch.bfloat16)
    online = sum(map(count_flops, (everything.encode_latents, everything.see)))
    trained = (everything.adapt, everything.plain, everything.generate)
    plain = online + sum(count_flops(part, backward=True) for part in trained)
    assert sum(ours.flops(cached_latents=True).values()) / plain <= 0.80
    assert sum(ours.flops(cached_latents=True, cached_vision_tokens=True).values()) / plain <= 0.74


def measured_peak(preset, batch_size: int, lora_rank: int | None) -> int:
    """Peak of live bytes over building everything and two steps, gradients held as DDP's buckets hold them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pipe = tiny_pipeline(preset)
        module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, mask_ratio=0.5).train()
        if lora_rank is not None:
            add_lora(module, LoraTrainingConfig(images=["-"], lora_rank=lora_rank))
        parameters = module.trainable_parameters()
        optimizer = torch.optim.AdamW(parameters, fused=True)
        ema = AveragedWeights(parameters, decay=0.9)
        side = preset.resolution
        inputs = pipe.processor.encode([pipe.processor.unconditional()] * batch_size)
        batch = {
            **inputs,
            "pixels": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8),
            "seed": torch.tensor([sample_seed(0, str(i), 0) for i in range(batch_size)]),
        }
        for _ in range(2):
            module(batch)[0]["loss"].backward()
            optimizer.step()
            ema.step(parameters)
            optimizer.zero_grad(set_to_none=False)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("changes", "batch_size", "lora_rank", "dominant"),
    [
        ({}, 64, None, "activations"),
        ({"num_attention_heads": 16}, 1, None, "weights"),
        # What one block makes in passing is not counted: next to what two or three blocks of a LoRA keep, it would be much.
        ({"num_single_layers": 8}, 32, 4, "activations"),
        ({"num_attention_heads": 16}, 1, 4, "weights"),
    ],
    ids=["activations", "weights", "activations of a LoRA", "weights beside a LoRA"],
)
def test_memory_is_what_training_takes(flux, changes, batch_size, lora_rank, dominant):
    preset = replace(flux, transformer_config=flux.transformer_config | changes)
    inputs = tiny_pipeline(preset).processor
    wording = inputs.encode([inputs.unconditional()])["input_ids"].shape[1]
    cost = estimate_training(
        preset,
        wording_tokens=wording,
        mask_ratio=0.99,
        batch_size=batch_size,
        mixed_precision="no",
        lora_rank=lora_rank,
    )
    total = sum(cost.memory.values())
    assert (cost.memory["activations"] > total / 2) == (dominant == "activations")
    assert total == pytest.approx(measured_peak(preset, batch_size, lora_rank), rel=0.15)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"preset": "base", "batch_size": 16}, 103.1),
        ({"preset": "base", "batch_size": 32, "gradient_checkpointing": True}, 47.2),
        # pretrain_image_only.py, frozen parts of full_size.py --frozen_dir
        (
            {
                "preset": "base",
                "batch_size": 16,
                "gradient_checkpointing": True,
                "gradient_accumulation": 2,
                "ema": False,
            },
            38.6,
        ),
        ({"preset": "large", "batch_size": 8}, 97.7),
        ({"preset": "large", "batch_size": 16, "gradient_checkpointing": True}, 63.1),
        pytest.param({**XL, "batch_size": 8}, 82.2, marks=pytest.mark.slow),
        pytest.param({**XL, "batch_size": 16}, 86.6, marks=pytest.mark.slow),
    ],
    ids=["base", "base-checkpointed", "base-accumulated", "large", "large-checkpointed", "xl-8", "xl-16"],
)
def test_memory_is_what_a_gpu_took(options, measured):
    """GB that PyTorch had allocated at most on an H200: benchmarks/results/h200, written by benchmarks/full_size.py."""
    assert sum(estimate_training(**options).memory.values()) / 1e9 == pytest.approx(measured, rel=0.07)


def test_options_change_what_they_should(flux):
    plain = estimate_training(flux, gpus=1)
    shared = estimate_training(
        flux, gpus=4, sharding="fsdp", optimizer="muon", ema=False, cached_latents=True, gradient_checkpointing=True
    )
    assert shared.memory["gradients"] == plain.memory["gradients"] // 4 and shared.memory["EMA"] == 0
    assert shared.memory["optimizer"] < plain.memory["optimizer"] / 4
    assert shared.flops["autoencoder"] == 0 < plain.flops["autoencoder"]
    assert shared.flops["generator"] > 1.2 * plain.flops["generator"]
    assert shared.memory["activations"] < plain.memory["activations"] / 2


def test_the_papers_run_costs_about_what_the_paper_says():
    """1000 GPU hours for what is inferred to be 110M images, at a utilisation that is an assumption; hence the tolerance."""
    cost = estimate_training("base", utilisation=0.4)
    assert cost.gpu_hours == pytest.approx(1000, rel=0.3)
    assert cost.images_per_second == pytest.approx(31, rel=0.3)


def test_a_lora_fits_where_training_does_not():
    whole, lora = (estimate_training("base", mask_ratio=0.5, lora_rank=rank, ema=False) for rank in (None, 16))
    assert whole.largest_batch["24"] == {"plain": 0, "checkpointed": 0}
    assert lora.largest_batch["24"]["plain"] > 0
    assert lora.weights["generator"] == whole.weights["generator"]
    # Four layers of a double block's attention, three of a single one's; what comes back passes all layers of the generator.
    assert lora.weights["LoRA"] == (10 * 4 + 20 * 3) * 2 * 16 * 1536
    assert whole.flops["generator"] / 3 < lora.flops["generator"] / 2 < whole.flops["generator"] / 2.5


@pytest.mark.parametrize(
    "wrong", [{"mask_ratio": 1.0}, {"utilisation": 0}, {"gpus": 0}, {"sharding": "zero"}, {"lora_rank": 0}]
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        estimate_training("tiny", **wrong)


def test_a_lora_is_not_shared_out():
    with pytest.raises(ValueError, match="A LoRA trains with ddp and adamw, got fsdp and adamw"):
        estimate_training("tiny", lora_rank=4, sharding="fsdp")
