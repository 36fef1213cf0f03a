"""What a run decides before it reads data."""

import pytest
from accelerate import DistributedType

from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training.module import IOMMTrainingModule
from iomm_hf.training.setup import refuse_sharding


@pytest.mark.parametrize("launcher", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_runs_are_refused_at_the_start(launcher):
    with pytest.raises(ValueError, match=f"Launched with {launcher.value}"):
        refuse_sharding(launcher)
    refuse_sharding(DistributedType.MULTI_GPU)
    refuse_sharding(DistributedType.NO)


def test_the_generators_blocks_are_what_a_launcher_may_wrap(flux):
    pipeline = tiny_pipeline(flux)
    module = IOMMTrainingModule(pipeline.text_encoder, pipeline.transformer, pipeline.vae, mask_ratio=0.5)
    blocks = {type(part).__name__ for part in module.transformer.modules()}
    assert set(module._no_split_modules) == {"FluxTransformerBlock", "FluxSingleTransformerBlock"} <= blocks
