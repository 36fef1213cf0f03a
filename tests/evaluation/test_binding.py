"""The shipped model binds words; what hears the true caption alone prefers it, and what ignores its condition neither."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes import BOUND_TASKS, corpus_scene, exchange, render
from iomm_hf.evaluation.binding import generator_binding, mllm_binding, reading
from iomm_hf.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return IOMMPipeline.from_pretrained(shipped_model())


@pytest.fixture
def scenes():
    return [corpus_scene(5, index, tasks=BOUND_TASKS) for index in range(96)]


def test_the_shipped_mllm_reads(pipeline):
    shares = reading(pipeline.text_encoder.mllm, pipeline.processor, turns=60, batch_size=32)
    assert shares["restated"].accuracy > 0.9 and shares["restated"].total + shares["asked"].total == 60


def test_the_shipped_generator_prefers_the_true_caption(pipeline, scenes):
    assert generator_binding(pipeline, scenes, draws=4).low > 0.5  # a bag of words gets half of them right


def test_a_fresh_mllm_cannot_read():
    fresh = tiny_pipeline()
    shares = reading(fresh.text_encoder.mllm, fresh.processor, turns=16)
    assert sum(share.total for share in shares.values()) == 16
    assert all(share.correct == 0 for share in shares.values())


@torch.no_grad()
def test_an_mllm_prefers_what_it_says_yes_to_more_willingly(pipeline, scenes):
    mllm, processor = pipeline.text_encoder.mllm, pipeline.processor
    yes, no = processor.tokenizer("yesno", add_special_tokens=False)["input_ids"]
    preferred = 0
    for scene, metadata in scenes[:12]:
        odds = []
        for caption in (metadata["prompt"], exchange(metadata)["prompt"]):
            question = processor.understand(f"Does the image show {caption}?", Image.fromarray(render(scene)))
            says = mllm(**processor.encode([question])).logits[0, -1].softmax(-1)
            odds.append(says[yes] / says[no])
        preferred += int(odds[0] > odds[1])
    share = mllm_binding(mllm, processor, scenes[:12], batch_size=7)
    assert (share.correct, share.total) == (preferred, 12)


def test_a_generator_that_hears_the_true_caption_alone_prefers_it(pipeline, scenes):
    prompts = [metadata["prompt"] for _, metadata in scenes]
    with torch.no_grad():
        true = [
            pipeline.text_encoder(**pipeline.processor.encode([pipeline.processor.text_to_image(prompt)])).condition[0]
            for prompt in prompts
        ]

    class Hearing(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
            known = [
                any(len(one) <= len(row) and torch.allclose(row[-len(one) :], one, atol=1e-4) for one in true)
                for row in encoder_hidden_states  # padded on the left
            ]
            return (torch.where(torch.tensor(known)[:, None, None, None], sample, sample + 10.0),)

    hearing = Hearing.from_config(pipeline.transformer.config)
    pipe = type(pipeline)(**pipeline.components | {"transformer": hearing})
    others = [scene for scene in scenes if exchange(scene[1])["prompt"] not in prompts]
    share = generator_binding(pipe, others, draws=1)
    assert share.correct == share.total == len(others) > 30


def test_a_generator_that_ignores_its_condition_prefers_neither(pipeline, scenes):
    class Deaf(UNet2DConditionModel):
        def forward(self, sample, timestep, **kwargs):
            return (sample,)

    deaf = Deaf.from_config(pipeline.transformer.config)
    pipe = type(pipeline)(**pipeline.components | {"transformer": deaf})
    share = generator_binding(pipe, scenes, draws=1)
    assert share.correct == 0 and share.total == len(scenes)
