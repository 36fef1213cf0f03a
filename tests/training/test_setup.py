"""What a run decides before it reads data."""

from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training.module import IOMMTrainingModule


def test_the_generators_blocks_are_what_a_launcher_may_wrap(flux):
    pipeline = tiny_pipeline(flux)
    module = IOMMTrainingModule(pipeline.text_encoder, pipeline.transformer, pipeline.vae, mask_ratio=0.5)
    blocks = {type(part).__name__ for part in module.transformer.modules()}
    assert set(module._no_split_modules) == {"FluxTransformerBlock", "FluxSingleTransformerBlock"} <= blocks
