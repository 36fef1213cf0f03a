"""Losses by time and by source: from batches to the log, over steps and ranks."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iomm_hf.cost import estimate_training
from iomm_hf.training import FinetuneConfig, PretrainConfig, train
from iomm_hf.training.metrics import BANDS, losses_by_group, mean_losses_by_group


def test_means_over_steps_are_those_over_their_samples():
    generator = torch.Generator().manual_seed(0)
    losses, times = torch.rand(3, 8, generator=generator), torch.rand(3, 8, generator=generator)
    times[0, 0] = 1.0  # pure noise belongs to the last band
    sources = torch.randint(0, 2, (3, 8), generator=generator)
    rows = [losses_by_group(*step, num_sources=3) for step in zip(losses, times, sources, strict=True)]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    groups = mean_losses_by_group(means, ["a", "b", "c"])
    assert groups["loss_by_source"] == pytest.approx(
        {"a": losses[sources == 0].mean().item(), "b": losses[sources == 1].mean().item()}
    )
    assert len(groups["loss_by_time"]) == BANDS == 4
    assert groups["loss_by_time"]["0.75-1"] == pytest.approx(losses[times >= 0.75].mean().item())
    assert groups["loss_by_time"]["0-0.25"] == pytest.approx(losses[times < 0.25].mean().item())


def test_a_run_logs_them(settings, parts):
    settings |= {"pairs": [{"path": str(parts / "pairs"), "caption_column": "json.prompt"}], "max_steps": 4}
    train(FinetuneConfig(**settings | {"log_every": 4, "batch_size": 8, "gradient_accumulation": 2}))
    [row] = map(json.loads, Path(settings["output_dir"], "log.jsonl").read_text().splitlines())
    pictures, pairs = row["loss_by_source"].items()
    assert pictures[0] == f"0: {parts / 'images'}" and pairs[0] == f"1: {parts / 'pairs'}"
    assert min(pictures[1], pairs[1]) < row["loss"] < max(pictures[1], pairs[1])
    assert list(row["loss_by_time"]) == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    assert row["seconds_waiting"] > 0
    run = json.loads(Path(settings["output_dir"], "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__ and run["config"]["batch_size"] == 8


def test_utilisation_is_the_share_of_the_peak_that_counted_flops_reach(settings, parts):
    settings |= {"pairs": [{"path": str(parts / "pairs"), "caption_column": "json.prompt"}], "max_steps": 2}
    validation = {"validate_every": 2, "validation_prompts": ["a red circle"], "validation_steps": 2}
    config = FinetuneConfig(**settings | validation | {"log_every": 1, "tracker": "tensorboard", "peak_tflops": 0.5})
    train(config)
    run = Path(settings["output_dir"])
    [_, row] = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    flops = estimate_training("tiny", wording_tokens=31, mixed_precision="no").flops
    counted = sum(flops.values()) - (1 - 0.5 * 0.9) * flops["vision tower"]
    assert row["utilisation"] == pytest.approx(row["images_per_second"] * counted / 0.5e12, rel=1e-6)
    tracked = EventAccumulator(str(run / "tracker/iomm")).Reload()
    logged = tracked.Tags()["scalars"]
    assert {"utilisation", "grad_norm", "learning_rate", "images_per_second"} <= {*logged}
    assert any(name.startswith("loss_by_time/") for name in logged)
    assert len(tracked.Images("validation")) == 1
    with pytest.raises(ValueError, match="peak_tflops must be positive, got 0"):
        FinetuneConfig(**settings | {"peak_tflops": 0})


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_have_the_log_and_the_validation_pictures_offline(settings, tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    module = pytest.importorskip(tracker)
    settings |= {"max_steps": 2, "log_every": 1, "validate_every": 2, "validation_prompts": ["a red circle"]}
    train(PretrainConfig(**settings | {"validation_steps": 1, "tracker": tracker}))
    if tracker == "wandb":
        module.teardown()  # its service writes the rest
    written = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in {".wandb", ".db", ".db-wal"}
    )
    names = ["grad_norm", "learning_rate", "images_per_second", "loss_by_time/", "loss_by_source/", "validation"]
    assert [name for name in names if name.encode() not in written] == []
    assert [Image.open(path).size for path in tmp_path.rglob("media/**/*.png")] == [(64, 64)]
