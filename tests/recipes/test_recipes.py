"""Every recipe explains its fields, and every YAML file fits its recipe."""

import dataclasses
from pathlib import Path

import pytest
from trl import TrlParser

from iomm_hf.training import FinetuneConfig, PretrainConfig
from iomm_hf.training.config import TrainingConfig


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted([*(ROOT / "recipes/configs").glob("*.yaml"), *(ROOT / "results").rglob("*.yaml")])


def config_classes(module):
    found = [
        thing
        for name, thing in vars(module).items()
        if isinstance(thing, type) and dataclasses.is_dataclass(thing) and name.endswith(("Config", "Arguments"))
    ]
    return [thing for thing in found if not any(other is not thing and issubclass(other, thing) for other in found)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_help_explains_every_field(path, recipe):
    module = recipe(path.stem)
    configs = config_classes(module)
    text = " ".join(TrlParser(configs).format_help().split())
    for field in (field for config in configs for field in dataclasses.fields(config) if field.init):
        assert f"--{field.name}" in text
        if config_is_ours(configs):
            assert field.metadata["help"]
    assert f"recipes/{path.name}" in module.__doc__  # it says how it is run


def config_is_ours(configs) -> bool:
    return all(not config.__module__.startswith(("trl.", "transformers.")) for config in configs)


def settings_of(path: Path, recipe) -> list[type]:
    """The settings that a YAML file is for, by its name."""
    recipes = {
        "check": "check_condition_use",
        "chat": "make_chat",
        "mllm": "sft_mllm",
        "cache": "precompute_latents",
        "lora": "train_lora",
    }
    for word, name in recipes.items():
        if word in path.stem:
            return config_classes(recipe(name))
    return [FinetuneConfig if "finetune" in path.stem or path.stem.startswith("compare") else PretrainConfig]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_yaml_files_fit_their_recipe(path, recipe, tmp_path):
    flags = [] if path.stem.startswith("check") else ["--output_dir", str(tmp_path)]
    if path.stem.startswith("compare"):  # its script fills in the data
        flags += ["--images", "pictures", "--mix_ratio", "1"]
    for parsed in TrlParser(settings_of(path, recipe)).parse_args_and_config(["--config", str(path), *flags]):
        if isinstance(parsed, TrainingConfig):
            size = path.stem.split("-")[0]
            assert parsed.preset == (size if size in ("base", "large", "xl") else "tiny")


def test_flags_override_yaml_and_unknown_fields_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("images: [one]\nlearning_rate: 0.5\n")
    (parsed,) = TrlParser(PretrainConfig).parse_args_and_config(
        ["--config", str(path), "--images", "two", "three", "--no_resume"]
    )
    assert parsed.images == ["two", "three"] and parsed.learning_rate == 0.5 and parsed.resume is False
    path.write_text("images: [one]\nlearning_rat: 0.5\n")
    with pytest.raises(ValueError, match="learning_rat"):
        TrlParser(PretrainConfig).parse_args_and_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (PretrainConfig, {}, "at least one source"),
        (PretrainConfig, {"images": ["x"], "pairs": ["y"]}, "finetune_mixed"),
        (PretrainConfig, {"images": ["x"], "mask_ratio": 1.0}, "got 1.0"),
        (PretrainConfig, {"images": ["x"], "batch_size": 0}, "batch_size must be positive, got 0"),
        (PretrainConfig, {"images": ["x"], "ema_decay": 1.0}, "got 1.0"),
        (PretrainConfig, {"images": ["x"], "mixed_precision": "fp16"}, "'fp16'"),
        (PretrainConfig, {"images": [{"folder": "x"}]}, "needs `path`"),
        (FinetuneConfig, {"images": ["x"]}, "mix_ratio=0.5 needs pairs"),
        (FinetuneConfig, {"pairs": ["x"]}, "mix_ratio=0.5 needs pictures"),
        (FinetuneConfig, {"images": ["x"], "pairs": ["y"], "mix_ratio": 1.5}, "got 1.5"),
    ],
)
def test_bad_settings_are_refused_with_the_value(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
