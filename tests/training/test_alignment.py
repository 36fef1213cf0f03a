"""Alignment: what the head reads, what it asks for, and that it teaches the generator."""

import pytest
import torch

from iomm_hf.data.cache import Cached
from iomm_hf.data.collate import IOMMCollator
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream
from iomm_hf.presets import build_transformer, get_preset
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, PretrainConfig
from iomm_hf.training.alignment import VisionAlignment, vision_tokens_per_side
from iomm_hf.training.setup import build_alignment


@pytest.fixture(params=["unet", "flux"])
def module(request, flux):
    pipe = tiny_pipeline(flux) if request.param == "flux" else tiny_pipeline()
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    tokens_per_side = 64 // pipe.size_multiple
    assert tokens_per_side == {"unet": 4, "flux": 8}[request.param]
    alignment = VisionAlignment(pipe.transformer, 128, tokens_per_side, vision_tokens_per_side=4)
    return IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, 0.5, alignment=alignment).train()


@pytest.fixture
def batch(module, parts, processor):
    stream = iter(build_stream([SourceConfig(str(parts / "images"))], [], 1.0))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(4):
        mean, tokens = torch.randn(4, 16, 16, generator=generator), torch.randn(16, 128, generator=generator)
        samples.append(next(stream) | {"cached": Cached(mean, torch.full_like(mean, -9), tokens)})
    return IOMMCollator(processor, resolution=64)(samples)


def test_each_vision_token_is_read_from_the_image_tokens_of_its_own_square(flux):
    transformer = tiny_pipeline(flux).transformer
    alignment = VisionAlignment(transformer, 128, tokens_per_side=8, vision_tokens_per_side=4)
    seen = []
    alignment.head.register_forward_hook(lambda head, inputs, output: seen.append(inputs[0]))
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    width = transformer.inner_dim
    alignment._hidden[:] = [(10 * row + column).reshape(1, 64, 1).expand(-1, -1, width)]
    alignment(torch.ones(1, 16, 128))
    assert seen[0].shape == (1, 16, 4 * width)
    assert seen[0][0, 6, ::width].tolist() == [24, 25, 34, 35]  # second row, third column of the 4 x 4 tokens


def test_a_unets_cells_are_read_row_by_row():
    transformer = tiny_pipeline().transformer
    alignment = VisionAlignment(transformer, 128, tokens_per_side=4, vision_tokens_per_side=4)
    seen = []
    alignment.head.register_forward_hook(lambda head, inputs, output: seen.append(inputs[0]))
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    alignment._keep_cells(None, None, (10 * row + column).expand(1, 128, 4, 4))
    alignment(torch.ones(1, 16, 128))
    assert seen[0].shape == (1, 16, 128) and seen[0][0, 6].tolist() == [12] * 128  # second row, third column


def test_alignment_adds_a_term_that_reaches_the_first_blocks_and_the_condition(module, batch):
    terms, _ = module(batch)
    assert terms.keys() == {"loss", "alignment"} and 0 < terms["alignment"] < 1  # half of a value in [0, 2]
    terms["alignment"].backward()
    reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.startswith(("transformer.transformer_blocks.", "transformer.down_blocks.")) for name in reached)
    assert any(name.startswith("encoder.adapter.") for name in reached)
    assert not any(name.startswith(("transformer.single_", "transformer.up_blocks.")) for name in reached)


def test_training_aligns(module, batch):
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=2e-3)
    before = module(batch)[0]["alignment"].item()
    for _ in range(20):
        optimizer.zero_grad()
        sum(module(batch)[0].values()).backward()
        optimizer.step()
    assert module(batch)[0]["alignment"].item() < 0.7 * before


def test_what_does_not_fit_is_refused(module, parts):
    with pytest.raises(ValueError, match="7 image tokens a side cannot be shared by 4"):
        VisionAlignment(module.transformer, 128, tokens_per_side=7, vision_tokens_per_side=4)
    with pytest.raises(ValueError, match="a square of vision tokens, got 15"):
        vision_tokens_per_side(15)
    other = build_transformer(get_preset("xl"), device="meta")
    with pytest.raises(TypeError, match="got ZImageTransformer2DModel"):
        VisionAlignment(other, 128, tokens_per_side=8, vision_tokens_per_side=4)
    with pytest.raises(ValueError, match="alignment_weight must be 0 or more, got -1"):
        PretrainConfig(images=["x"], alignment_weight=-1)
    config = PretrainConfig(images=[str(parts / "images")], alignment_weight=0.5)
    stream = build_stream(config.image_sources, [], 1.0)
    with pytest.raises(ValueError, match=r"images' lacks: run recipes/precompute_latents.py"):
        build_alignment(config, tiny_pipeline(), stream, 64)
