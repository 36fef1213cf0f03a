"""Settings that would mean something else than they seem to are refused."""

import pytest

from iomm_hf.presets import get_preset
from iomm_hf.training import FinetuneConfig, LoraTrainingConfig, PretrainConfig
from iomm_hf.training.config import changed_settings
from iomm_hf.training.setup import load_frozen_parts


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler must be of constant, .*, got 'piecewise_constant'"),
        ({"vae_subfolder": "vae"}, "vae_subfolder='vae' is a folder inside `vae`, which is missing"),
    ],
)
def test_what_would_fail_later_or_do_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(images=["x"], **settings)


def test_a_run_records_no_preset_of_which_it_takes_nothing():
    assert PretrainConfig(images=["x"], init_from="tiny-run/final", mask_ratio=0.5).preset is None
    assert PretrainConfig(images=["x"]).preset == "base"
    assert LoraTrainingConfig(images=["x"]).preset is None


def test_a_preset_of_which_nothing_is_taken_does_not_stop_a_run():
    begun = {"images": ["x"], "init_from": "tiny-run/final", "mask_ratio": 0.5}
    before, now = PretrainConfig(**begun, preset="base").to_dict(), PretrainConfig(**begun).to_dict()
    assert changed_settings(before, now) == []
    assert changed_settings(before, PretrainConfig(**begun | {"mask_ratio": 0.4}).to_dict()) == [
        "mask_ratio: 0.5 -> 0.4"
    ]


@pytest.mark.parametrize("part", ["mllm", "vae"])
def test_a_revision_of_what_comes_with_the_package_is_refused(part):
    with pytest.raises(ValueError, match=f"{part}_revision='v1' is of a part on the Hub: name it as {part}"):
        load_frozen_parts(get_preset("tiny"), **{f"{part}_revision": "v1"})


def test_an_unknown_optimizer_is_not_taken_for_another():
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon', got 'AdamW'"):
        PretrainConfig(images=["x"], optimizer="AdamW")
