"""The check sees a condition that helps, and none where conditions are ignored."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.condition_use import measure_condition_use
from iomm_hf.tiny import tiny_pipeline


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


def test_a_trained_condition_is_seen(stream):
    pipe = IOMMPipeline.from_pretrained(shipped_model(), dtype=torch.float32)
    result = measure_condition_use(pipe, stream(), 24, mask_ratio=0.0, draws=4)
    assert result.interval[0] > 0 and result.share_better > 0.8
    assert str(result).endswith("the condition is used")


def test_one_picture_has_no_other(pipeline, stream):
    with pytest.raises(ValueError, match="17 pictures in batches of 16"):
        measure_condition_use(pipeline, stream(), 17, mask_ratio=0.5)
    with pytest.raises(ValueError, match="batches of 1 leave one"):
        measure_condition_use(pipeline, stream(), 16, mask_ratio=0.5, batch_size=1)


def test_pictures_are_not_counted_twice(pipeline, stream):
    with pytest.raises(ValueError, match="40 pictures were asked for, .*: 24 of them are different"):
        measure_condition_use(pipeline, stream(), 40, mask_ratio=0.5)
