"""The six recipes: what is there is not run again, what is missing is trained, and the report says no more than seeds allow."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from iomm_hf.tiny import tiny_pipeline


RECIPE = Path(__file__).parents[2] / "recipes/compare_recipes.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("compare_recipes", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(module, tmp_path):
    for stage in ("pretrain", "finetune"):
        settings = yaml.safe_load((RECIPE.parent / f"configs/compare-{stage}.yaml").read_text())
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(settings | {"max_steps": 1, "batch_size": 2}))
    return module.CompareConfig(
        output_dir=str(tmp_path / "runs"),
        results_dir=str(tmp_path / "results"),
        pretrain=str(tmp_path / "pretrain.yaml"),
        finetune=str(tmp_path / "finetune.yaml"),
        num_images=8,
        num_pairs=8,
        seeds=[0],
        pictures_per_task=1,
        num_inference_steps=1,
        num_processes=1,
    )


def test_only_what_is_missing_is_run(module, config, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "untrained")
    results = tmp_path / "results"
    results.mkdir()
    for recipe in module.PAPER.keys() - {("image", "mix")}:
        module.score(config, tmp_path / "untrained", results / f"{'-'.join(recipe)}-0.json")
    module.main(config)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "data",
        "image-0",
        "image-mix-0",
        "study.json",
    ]
    finetuned = yaml.safe_load((tmp_path / "runs/image-mix-0/settings.yaml").read_text())
    assert finetuned["init_from"] == str(tmp_path / "runs/image-0/final") and finetuned["mix_ratio"] == 0.5
    pretrained = yaml.safe_load((tmp_path / "runs/image-0/settings.yaml").read_text())
    assert pretrained["pairs"] == [] and pretrained["mix_ratio"] == 1.0
    table = (results / "table.md").read_text()
    assert "| image | mix | 0.89 | 0.000 | 0.000 [0.000, " in table
    assert table.count("not told apart") == len(module.COMPARISONS)  # one seed tells nothing
    assert all((results / name).stat().st_size > 5_000 for name in ("scores.png", "sheet.png"))
    with pytest.raises(ValueError, match="a study with another num_pairs"):
        module.main(replace(config, num_pairs=4))


def test_differences_are_told_apart_by_seeds_alone(module, tmp_path):
    overall = {
        ("image", "mix"): [0.60, 0.62, 0.61],
        ("image", "pair"): [0.40, 0.43, 0.41],
        ("pair", "mix"): [0.50, 0.70, 0.60],
    }
    for (pretraining, finetuning), values in overall.items():
        for seed, value in enumerate(values):
            report = {
                "overall": {"value": value, "low": value - 0.02, "high": value + 0.02},
                "tasks": {task: {"accuracy": value} for task in module.TASKS},
            }
            name = f"{pretraining}-{finetuning}-{seed}"
            (tmp_path / f"{name}.json").write_text(json.dumps(report))
            module.Image.new("RGB", (64 * len(module.PROMPTS), 64)).save(tmp_path / f"{name}.png")
    module.write_report(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| image > mix against image > pair | +0.02 | +0.197 [+0.182, +0.211] | 3 | above 0 |" in table
    line = next(line for line in table.splitlines() if line.startswith("| image > mix against pair > mix"))
    assert line.endswith("not told apart |")
