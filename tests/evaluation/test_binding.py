"""What ignores its condition prefers neither caption, and every scene and text is asked once."""

import pytest
from diffusers import UNet2DConditionModel

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes import BOUND_TASKS, corpus_scene
from iomm_hf.evaluation.binding import generator_binding, mllm_binding, reading
from iomm_hf.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return IOMMPipeline.from_pretrained(shipped_model())


@pytest.fixture(params=BOUND_TASKS)
def scenes(request):
    return [corpus_scene(5, index, tasks=(request.param,)) for index in range(48)]


def test_a_fresh_mllm_cannot_read():
    fresh = tiny_pipeline()
    shares = reading(fresh.text_encoder.mllm, fresh.processor, turns=16)
    assert sum(share.total for share in shares.values()) == 16
    assert all(share.correct == 0 for share in shares.values())


def test_an_mllm_is_asked_about_every_scene_once_under_each_caption(pipeline, scenes):
    share = mllm_binding(pipeline.text_encoder.mllm, pipeline.processor, scenes, batch_size=32)
    assert share == mllm_binding(pipeline.text_encoder.mllm, pipeline.processor, scenes, batch_size=7)
    assert share.total == len(scenes)


def test_a_generator_that_ignores_its_condition_prefers_neither(pipeline, scenes):
    class Deaf(UNet2DConditionModel):
        def forward(self, sample, timestep, **kwargs):
            return (sample,)

    deaf = Deaf.from_config(pipeline.transformer.config)
    pipe = type(pipeline)(**pipeline.components | {"transformer": deaf})
    share = generator_binding(pipe, scenes, draws=1)
    assert share.correct == 0 and share.total == len(scenes)
