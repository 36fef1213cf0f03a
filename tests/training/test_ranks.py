"""Real processes: two CPU ranks and one, killed and resumed exactly; every key used once; no silent change of ranks."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream
from iomm_hf.training import PretrainConfig, train
from iomm_hf.training.checkpoints import list_checkpoints


RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "pretrain_image_only.py"
LAUNCHER = ("-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate/cpu.yaml"))


def kill(process: subprocess.Popen):
    """SIGKILL, to the ranks and workers too: the launcher puts them in sessions of their own."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.kill()
        psutil.wait_procs(family)


@pytest.fixture
def launch(tmp_path):
    """Starts the recipe on a number of ranks; whatever still runs at the end is killed."""
    started = []

    def start(settings: dict, ranks: int) -> subprocess.Popen:
        config = tmp_path / f"{len(started)}.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable] if ranks == 1 else [sys.executable, *LAUNCHER, "--num_processes", str(ranks)]
        with config.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [*command, str(RECIPE), "--config", str(config)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        started.append((process, config.with_suffix(".log")))
        return process

    def finish(settings: dict, ranks: int):
        process = start(settings, ranks)
        assert process.wait(timeout=300) == 0, started[-1][1].read_text()[-3000:]

    start.finish = finish
    yield start
    for process, _ in started:
        kill(process)


def wait_for_another_checkpoint(process: subprocess.Popen, run: Path):
    before = len(list_checkpoints(run))
    while len(list_checkpoints(run)) == before and process.poll() is None:
        time.sleep(0.02)


def assert_same_state(first: Path, second: Path, ranks: int):
    for name in ("trainable.safetensors", "ema.safetensors"):
        one, two = load_file(first / "state" / name), load_file(second / "state" / name)
        assert all(torch.equal(value, two[key]) for key, value in one.items()), name
    one, two = (torch.load(path / "state/optimizer.bin", weights_only=True)["state"] for path in (first, second))
    assert all(torch.equal(value, two[key][name]) for key, state in one.items() for name, value in state.items())
    for rank in range(ranks):
        one, two = (json.loads((path / f"state/rank-{rank}.json").read_text()) for path in (first, second))
        assert one == two


def test_two_ranks_killed_and_resumed_equal_an_unbroken_run(launch, settings, tmp_path):
    # 8 steps of 2 x 2 read 32 samples of 24: the runs cross an epoch.
    settings |= {"max_steps": 8, "save_every": 2, "keep_checkpoints": 9, "batch_size": 2}
    run, unbroken, last = Path(settings["output_dir"]), tmp_path / "unbroken", "checkpoint-00000008"
    launch.finish(settings | {"output_dir": str(unbroken)}, ranks=2)
    process = launch(settings, ranks=2)
    wait_for_another_checkpoint(process, run)
    kill(process)
    assert list_checkpoints(run) and not (run / last).exists()
    launch.finish(settings, ranks=2)
    assert json.loads((run / last / "state/trainer.json").read_text())["num_processes"] == 2
    assert_same_state(unbroken / last, run / last, ranks=2)
    with pytest.raises(ValueError, match="written by 2 processes"):
        train(PretrainConfig(**settings | {"max_steps": 10}))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(launch, settings):
    """It reaches the loaders' workers too, as from a terminal or a scheduler, and they must deliver what is under way."""
    settings |= {"max_steps": 1000, "save_every": 1000, "log_every": 1, "num_workers": 1}
    process, log = launch(settings, ranks=2), Path(settings["output_dir"], "log.jsonl")
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.1)
    ranks = [child for child in psutil.Process(process.pid).children() if RECIPE.name in " ".join(child.cmdline())]
    workers = [worker for rank in ranks for worker in rank.children(recursive=True)]
    for worker in workers:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    ranks[1].send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    [checkpoint] = list_checkpoints(log.parent)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step == len(log.read_text().splitlines()) < 1000
    launch.finish(settings | {"max_steps": step + 1}, ranks=2)


def test_what_a_stopped_run_prints_resumes_it(settings, tmp_path):
    config, log = tmp_path / "run.yaml", Path(settings["output_dir"], "log.jsonl")
    config.write_text(yaml.safe_dump(settings | {"max_steps": 1000, "save_every": 1000, "log_every": 1}))
    command = shlex.join([sys.executable, str(RECIPE), "--config", str(config)])
    steps = []
    for _ in range(2):
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(f"exec {command}", shell=True, stdout=subprocess.PIPE, stderr=errors, text=True)
        before = log.read_text() if log.exists() else ""
        while (not log.exists() or len(log.read_text()) <= len(before)) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
        stopped, _, command = printed.strip().partition(" To go on: ")
        steps.append(int(stopped.partition("after step ")[2].partition(",")[0]))
    assert 0 < steps[0] < steps[1] < 1000


@pytest.mark.slow
def test_one_process_killed_at_any_moment_resumes(launch, settings, tmp_path):
    settings |= {"max_steps": 30, "save_every": 3, "num_workers": 2, "keep_checkpoints": 20}
    run, unbroken, last = Path(settings["output_dir"]), tmp_path / "unbroken", "checkpoint-00000030"
    launch.finish(settings | {"output_dir": str(unbroken)}, ranks=1)
    for pause in (0.0, 0.15, 0.4):  # while it saves or renames, while it trains
        process = launch(settings, ranks=1)
        wait_for_another_checkpoint(process, run)
        time.sleep(pause)
        kill(process)
    assert list_checkpoints(run) and not (run / last).exists()
    launch.finish(settings, ranks=1)
    assert_same_state(unbroken / last, run / last, ranks=1)


def test_an_epoch_over_two_ranks_uses_each_key_once(parts):
    used = []
    for rank in range(2):
        stream = SampleStream(SourceConfig(str(parts / "images")), block_size=8, rank=rank, world_size=2)
        for sample in stream:
            if sample["epoch"] == 1:
                break
            used.append(sample["key"])
    assert len(used) == len(set(used)) == 24
