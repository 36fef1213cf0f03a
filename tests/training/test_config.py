"""Settings that would mean something else than they seem to are refused."""

import pytest
from trl import TrlParser

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
        (
            {"lr_scheduler": "piecewise_constant"},
            "lr_scheduler must be one of 'constant', .*, got 'piecewise_constant'",
        ),
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


@pytest.mark.parametrize(
    "line, message",
    [
        ("optimizer: AdamW", "optimizer must be one of 'adamw', 'muon', got 'AdamW'"),
        ("timestep_sampling: logitnormal", "timestep_sampling must be one of .*, got 'logitnormal'"),
        ("mixed_precision: fp16", "mixed_precision must be one of 'no', 'bf16', got 'fp16'"),
        ("images: pictures", "images must be a list, got 'pictures': put it in brackets"),
        ("pairs: {path: pairs, caption_column: txt}", "pairs must be a list, got {'path'"),
        ("validation_prompts: a star", "validation_prompts must be a list, got 'a star'"),
        ("validate_every: -1", "validate_every must be 0 or more, got -1"),
        ("resolution: 0", "resolution must be positive, got 0"),
    ],
)
def test_what_a_yaml_file_says_is_checked_as_flags_are(tmp_path, line, message):
    file = tmp_path / "run.yaml"
    file.write_text("images: [x]\n" * (not line.startswith("images")) + f"mix_ratio: 1.0\n{line}\n")
    with pytest.raises(ValueError, match=message):
        TrlParser(FinetuneConfig).parse_args_and_config(["--config", str(file)])


def test_a_lora_trains_with_adamw():
    with pytest.raises(ValueError, match="A LoRA trains with adamw, got optimizer='muon'"):
        LoraTrainingConfig(images=["x"], optimizer="muon")
