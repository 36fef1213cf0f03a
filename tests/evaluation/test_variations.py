"""Variations are told from each other by what the frozen MLLM sees."""

import pytest
import torch
from PIL import Image

from iomm_hf.data.shapes import corpus_scene, render
from iomm_hf.evaluation.variations import measure_variations, nearest, picture_features
from iomm_hf.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pictures():
    return [Image.fromarray(render(corpus_scene(5, index)[0])) for index in range(6)]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_a_picture_finds_itself_and_a_slightly_noisy_copy_finds_its_source(pipe, pictures):
    references = picture_features(pipe, pictures)
    assert nearest(references, references).tolist() == [0, 1, 2, 3, 4, 5]
    noisy = references + 0.05 * references.std() * torch.randn(
        references.shape, generator=torch.Generator().manual_seed(0)
    )
    assert nearest(noisy, references).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_untrained_model_finds_no_more_than_by_chance(pipe, pictures):
    result, variations = measure_variations(pipe, pictures, num_inference_steps=1)
    assert len(variations) == 6 and variations[0].size == (64, 64)
    assert result.pictures == result.top1.total == result.control.total == 6 and result.chance == 1 / 6
    assert result.top1.low < 1 / 6  # its pictures do not depend on their references
    again, _ = measure_variations(pipe, pictures, num_inference_steps=1)
    assert again == result
    with pytest.raises(ValueError, match="1 pictures"):
        measure_variations(pipe, pictures[:1])
