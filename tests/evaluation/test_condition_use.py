"""The check sees a condition that helps, and none where conditions are ignored."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from iomm_hf.data.collate import IOMMCollator
from iomm_hf.data.images import to_tensor
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.condition_use import measure_condition_use
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    write_shards(folder, 24, captions=False, samples_per_shard=12)
    return lambda: build_stream([SourceConfig(str(folder))])


@pytest.fixture(scope="module")
def pipeline():
    pipe = tiny_pipeline()
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return pipe


def test_a_generator_that_ignores_its_condition_shows_no_benefit(pipeline, stream):
    class Deaf(UNet2DConditionModel):
        def forward(self, sample, timestep, **kwargs):
            return (torch.zeros_like(sample),)

    deaf = Deaf.from_config(pipeline.transformer.config)
    pipe = type(pipeline)(**pipeline.components | {"transformer": deaf})
    result = measure_condition_use(pipe, stream(), 24, mask_ratio=0.85, draws=2)
    assert result.own == result.other and result.benefit == 0 and result.share_better == 0
    assert "not shown" in str(result)


def test_an_untrained_generator_shows_no_benefit_beyond_its_interval(pipeline, stream):
    result = measure_condition_use(pipeline, stream(), 24, mask_ratio=0.5, draws=2)
    assert result.own != result.other  # the condition does reach the generator
    assert result.interval[0] < result.benefit < result.interval[1]
    assert result.benefit - result.interval[0] == pytest.approx(result.interval[1] - result.benefit)
    again = measure_condition_use(pipeline, stream(), 24, mask_ratio=0.5, draws=2)
    assert again == result


def test_a_trained_condition_is_seen(flux, stream):
    """A few steps on the very pictures measured: memorising them through their conditions must show."""
    pipe = tiny_pipeline(flux)  # a U-Net comes to use its condition later, and at another step for each order of a sum
    samples = iter(stream())
    eight = [next(samples) for _ in range(8)]
    with torch.no_grad():  # an untrained autoencoder's latents are faint and noisy; make them about N(0, 1), exact
        pipe.vae.encoder.conv_out.weight[4:] = 0
        pipe.vae.encoder.conv_out.bias[4:] = -20
        pixels = torch.stack([to_tensor(sample["image"]) for sample in eight]) / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mean
        pipe.vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, 0.0).train()
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=2e-3)
    for step in range(120):
        batch = IOMMCollator(pipe.processor, 64, condition_dropout=0.0, seed=100 + step)(eight)
        optimizer.zero_grad()
        module(batch)[0]["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.trainable_parameters(), 1.0)
        optimizer.step()
    result = measure_condition_use(pipe, iter(eight), 8, mask_ratio=0.0, draws=8, batch_size=8)
    assert result.interval[0] > 0 and result.share_better > 0.8


def test_one_picture_has_no_other(pipeline, stream):
    with pytest.raises(ValueError, match="17 pictures in batches of 16"):
        measure_condition_use(pipeline, stream(), 17, mask_ratio=0.5)
