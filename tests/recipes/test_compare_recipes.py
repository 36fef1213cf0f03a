"""The six recipes: what is there is not run again, what is missing is trained, and the report says no more than seeds allow."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from filelock import FileLock, Timeout

from iomm_hf.data.shapes import TASKS
from iomm_hf.evaluation.edits import KINDS
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import FinetuneConfig


@pytest.fixture(scope="module")
def module(recipe):
    return recipe("compare_recipes")


@pytest.fixture
def config(module, tmp_path):
    for stage in ("pretrain", "finetune"):
        settings = yaml.safe_load((Path(module.__file__).parent / f"configs/compare-{stage}.yaml").read_text())
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
        edits_per_kind=1,
        held_out_pairs=4,
        num_inference_steps=1,
        num_processes=1,
    )


def test_only_what_is_missing_is_run(module, config, tmp_path):
    untrained = tmp_path / "untrained/final"
    tiny_pipeline().save_pretrained(untrained)
    rows = [
        {"images": 3600, "images_per_second": 2.0, "skipped": {}},
        {"images": 7200, "images_per_second": 1.0, "skipped": {"not an image": 1}},
    ]
    (untrained.parent / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"seed": 3, "mix_ratio": 0.5, "batch_size": 4, "max_steps": 1800}
    (untrained.parent / "run.json").write_text(json.dumps({"config": settings, "commit": "0123456789"}))
    for arm in module.STUDIES["six_recipes"].arms:
        if arm.label != "image > mix":
            module.score(config, [untrained, untrained], module.score_file(config, arm, 0))
    score = json.loads(module.score_file(config, module.STUDIES["six_recipes"].arms[0], 0).read_text())
    record = settings | {"images": 7200, "skipped": {"not an image": 1}, "hours": 1.5, "commit": "0123456789"}
    assert score["trainings"] == [record, record]
    losses = score["held_out_pairs"]
    assert len(losses["own"]) == len(losses["another"]) == 4 and losses["own"] != losses["another"]
    assert score["captions_as_before_training"] == {"same": 0, "of": 3}  # the untrained model's MLLM is another
    module.main(config)
    pretrained, finetuned = (
        "pretrain_mix_ratio=1.0-seed_0",
        "pretrain_mix_ratio=1.0-finetune_mix_ratio=0.5,num_pairs=8-seed_0",
    )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.suffix != ".lock") == sorted(
        ["data", pretrained, finetuned, "study.json"]
    )
    settings = yaml.safe_load((tmp_path / "runs" / finetuned / "settings.yaml").read_text())
    assert settings["init_from"] == str(tmp_path / "runs" / pretrained / "final") and settings["mix_ratio"] == 0.5
    settings = yaml.safe_load((tmp_path / "runs" / pretrained / "settings.yaml").read_text())
    assert settings["pairs"] == [] and settings["mix_ratio"] == 1.0
    report, comparisons = tmp_path / "results/six_recipes", module.STUDIES["six_recipes"].comparisons
    table = (report / "table.md").read_text()
    assert "| image > mix | 0.89 | 0.000 | 0.000 [0.000, " in table
    assert table.count("not told apart, by the pictures of one training each") == 2 * len(comparisons)  # and edits
    # The run's own MLLM has not changed. Five fine-tunings and a pre-training of 1.5 hours; the other was run just now.
    assert "Captions of pictures as before training: 3 of 18. 6 pictures, 4 new pairs and 3 edits a score" in table
    assert " 9.0 hours by the clock" in table and "0123456" in table
    assert "python recipes/compare_recipes.py --studies six_recipes --pretrain " in table and "--seeds 0" in table
    assert all((report / name).stat().st_size > 5_000 for name in ("scores.png", "sheet.png"))
    with pytest.raises(ValueError, match="a study with another num_pairs"):
        module.main(replace(config, num_pairs=4))


def test_later_seeds_start_from_the_last_pre_training(module, config, monkeypatch):
    monkeypatch.setattr(
        module, "train", lambda config, name, settings, pairs, seed, init_from: trained.append((name, seed))
    )
    monkeypatch.setattr(module, "score", lambda *of: None)
    arm, starts = module.STUDIES["six_recipes"].arms[0], []
    for seed in (0, 1, 2):
        trained: list[tuple[str, int]] = []
        module.train_and_score(config, arm, seed)
        assert trained[1][1] == seed and trained[1][0].endswith(f"-seed_{seed}")
        starts.append(trained[0])
    assert starts == [("pretrain_mix_ratio=1.0-seed_0", 0), *[("pretrain_mix_ratio=1.0-seed_1", 1)] * 2]


def test_losses_on_new_pairs_do_not_depend_on_the_folder(module, config, tmp_path):
    pipeline = tiny_pipeline()
    here = module.held_out_losses(config, pipeline)
    assert module.held_out_losses(replace(config, output_dir=str(tmp_path / "elsewhere")), pipeline) == here


def write_scores(module, config, study: str, values: dict[str, list[float]]):
    """Scores as if they had been measured, by label and seed."""
    for arm in module.STUDIES[study].arms:
        for seed, value in enumerate(values.get(arm.label, [])):
            path = module.score_file(config, arm, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            report = {
                "overall": {"value": value, "low": value - 0.02, "high": value + 0.02},
                "tasks": {task: {"accuracy": value} for task in TASKS},
                "objects": {task: 10 * value for task in TASKS},
                "held_out_pairs": {"own": [value, value + 0.1], "another": [value + 0.2, value + 0.4]},
                "edits": {
                    "overall": {"value": 0.0, "low": 0.0, "high": 0.02},
                    "correct": {kind: {"accuracy": 0.0} for kind in KINDS},
                },
                "captions_as_before_training": {"same": 3, "of": 3},
                "trainings": [{"hours": 1.0, "commit": None}, {"hours": 0.5, "commit": None}],
                "hours": 0.25,
                "device": "cpu",
            }
            path.write_text(json.dumps(report))
            module.Image.new("RGB", (64 * len(module.PROMPTS), 64)).save(path.with_suffix(".png"))


def test_what_another_process_is_at_is_left_to_it(module, config, monkeypatch):
    """The first arm is being trained: the others are done first, and it is only read once the other has scored it."""
    arms = module.STUDIES["adapter"].arms
    locks = [FileLock(Path(config.output_dir, f"{module.score_file(config, arm, 0).stem}-score.lock")) for arm in arms]
    trained = []
    monkeypatch.setattr(module, "train", lambda config, name, *rest: trained.append(name))
    monkeypatch.setattr(
        module,
        "score",
        lambda config, runs, path: write_scores(module, config, "adapter", {arms[1].label: [0.5]}),
    )

    def other_process_ends(seconds):
        assert module.score_file(config, arms[1], 0).exists()  # done while the first was held
        write_scores(module, config, "adapter", {arms[0].label: [0.4]})
        locks[0].release()

    monkeypatch.setattr(module.time, "sleep", other_process_ends)
    locks[0].acquire()
    module.main(replace(config, studies=["adapter"]))
    assert len(trained) == 2 and all("adapter_type=plain" in name for name in trained)


def test_runs_that_differ_in_seed_or_ratio_do_not_lock_each_other(module, config, monkeypatch):
    monkeypatch.setattr(module, "run", lambda script, settings, *launch: None)
    settings = {"mix_ratio": 1.0, "max_steps": 1}
    names = [
        f"{module.name_of('pretrain', {'mix_ratio': ratio}, 8)}-seed_{seed}" for ratio in (1.0, 0.5) for seed in (0, 1)
    ]
    with FileLock(Path(config.output_dir, f"{names[0]}.lock")):
        for name in names[1:]:
            module.train(config, name, settings, 8, 0, None)
        with pytest.raises(Timeout):
            module.train(config, names[0], settings, 8, 0, None)


def test_a_published_pre_training_is_not_run_again(module, config, monkeypatch):
    ran = []
    monkeypatch.setattr(module, "run", lambda script, settings, *launch: ran.append(settings))
    name = module.name_of("pretrain", {"mix_ratio": 1.0}, 8) + "-seed_0"
    published = Path(config.results_dir, "pretrained", name, "final")
    assert module.train(config, name, {"mix_ratio": 1.0}, 8, 0, None) != published
    published.mkdir(parents=True)
    assert module.train(config, name, {"mix_ratio": 1.0}, 8, 0, None) == published
    scripts = [settings["output_dir"] for settings in ran if Path(settings["output_dir"]).name == name]
    assert len(scripts) == 1


def test_arms_that_train_alike_share_their_score(module, config):
    config = replace(config, num_pairs=1000)

    def file(study, label):
        return next(module.score_file(config, arm, 0) for arm in module.STUDIES[study].arms if arm.label == label).name

    same = [
        ("six_recipes", "image > mix"),
        ("mix_ratio", "0.5"),
        ("pairs", "pictures first, 1000"),
    ]
    assert len({file(*arm) for arm in same}) == 1
    screening = [("condition", "+ masking"), ("mask_mode", "drop"), ("mask_ratio", "r = 0.5")]
    assert len({file(*arm) for arm in screening}) == 1
    assert file("condition", "queries alone") == file("queries", "4 queries")
    names = [file(name, arm.label) for name, study in module.STUDIES.items() for arm in study.arms]
    assert len(names) == 37 and len(set(names)) == 28


@pytest.mark.parametrize(
    "study",
    ["six_recipes", "editing", "condition", "adapter", "queries", "mask_mode", "mask_ratio", "mix_ratio", "pairs"],
)
def test_every_arm_has_settings_that_its_recipe_takes(module, study):
    for arm in module.STUDIES[study].arms:
        for changes in (arm.pretrain, arm.finetune):
            FinetuneConfig(images=["x"], pairs=[{"path": "y", "caption_column": "z"}], **(changes or {}))
    labels = {arm.label for arm in module.STUDIES[study].arms}
    assert all({one, other} <= labels for one, other in module.STUDIES[study].comparisons)


def test_an_unknown_study_is_refused(module):
    with pytest.raises(ValueError, match=r"Unknown studies \['colours'\]; choose of six_recipes"):
        module.CompareConfig(studies=["colours"])
    with pytest.raises(ValueError, match=r"Unknown arms \['zero'\]; choose of residual; plain"):
        module.CompareConfig(studies=["adapter"], arms=["residual", "zero"])
    with pytest.raises(ValueError, match="pretrain_seeds must be positive, got 0"):
        module.CompareConfig(pretrain_seeds=0)
    with pytest.raises(ValueError, match=r"None of the arms \['residual'\] is one of queries: leave it out"):
        module.CompareConfig(studies=["adapter", "queries"], arms=["residual"])


def test_refused_folders_are_not_claimed(module, config):
    results = Path(config.results_dir)
    results.mkdir()
    (results / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a study with another"):
        module.claim(config)
    assert not Path(config.output_dir).exists()
