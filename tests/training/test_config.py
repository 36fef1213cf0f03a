"""Settings that would mean something else than they seem to are refused."""

import pytest

from iomm_hf.training import FinetuneConfig, LoraTrainingConfig
from iomm_hf.training.config import changed_settings


PAIRS = [{"path": "y", "caption_column": "txt"}]


def test_a_pipeline_to_start_from_needs_its_share_of_hidden_tokens():
    settings = {"images": ["x"], "pairs": PAIRS, "init_from": "tiny-run/final"}
    with pytest.raises(
        ValueError, match="init_from='tiny-run/final' does not say .* give a mask_ratio, or the preset"
    ):
        FinetuneConfig(**settings)
    assert FinetuneConfig(**settings, preset="tiny").preset == "tiny"
    assert FinetuneConfig(**settings, mask_ratio=0.5).mask_ratio == 0.5
    assert LoraTrainingConfig(**settings).mask_ratio == 0.85  # its own default
    assert FinetuneConfig(images=["x"], pairs=PAIRS).preset == "base"


@pytest.mark.parametrize(
    ("scheduler", "free"), [("constant_with_warmup", True), ("constant", True), ("cosine", False)]
)
def test_the_number_of_steps_may_change_where_the_rate_does_not_depend_on_it(scheduler, free):
    short, long = (
        FinetuneConfig(images=["x"], pairs=PAIRS, lr_scheduler=scheduler, max_steps=steps, log_every=steps).to_dict()
        for steps in (10, 20)
    )
    assert (changed_settings(short, long) == []) == free
