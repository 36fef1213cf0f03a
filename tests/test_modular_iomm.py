"""The pipeline as diffusers' modular blocks draws the very same pictures."""

import pytest
import torch

from iomm_hf.modular_iomm import IOMMBlocks, IOMMDecodeStep, modular_pipeline


def test_blocks_draw_what_the_pipeline_draws(pipe, images):
    modular = modular_pipeline(pipe)
    for inputs in ({"prompt": "a star"}, {"image": images[0]}, {"prompt": "make it blue", "image": images[1]}):
        for guidance in (1.0, 3.0):
            options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "pt", **inputs}
            expected = pipe(**options, generator=torch.Generator().manual_seed(0)).images
            drawn = modular(**options, generator=torch.Generator().manual_seed(0), output="images")
            assert torch.equal(drawn, expected)
    assert modular.transformer is pipe.transformer and modular.config.resolution == pipe.resolution
    with pytest.raises(ValueError, match="Give a `prompt`"):
        modular()
    with pytest.raises(ValueError, match="`prompt` is blank"):
        modular(prompt=" ")
    with pytest.raises(ValueError, match="`image` has 1 entries, the others have 2"):
        modular(prompt=["a star", "a heart"], image=[images[0]])


def test_a_block_can_be_replaced(pipe):
    class Grey(IOMMDecodeStep):
        def __call__(self, components, state):
            components, state = super().__call__(components, state)
            state.set("images", state.get("images").mean(1, keepdim=True))
            return components, state

    blocks = IOMMBlocks()
    blocks.sub_blocks["decode"] = Grey()
    drawn = modular_pipeline(pipe, blocks)(prompt="a star", num_inference_steps=1, output_type="pt", output="images")
    assert drawn.shape == (1, 1, 64, 64)
