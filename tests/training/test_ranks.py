"""Two real CPU ranks: killed and resumed exactly, every key used once, and no silent change of their number."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from iomm_hf.data.streams import SampleStream, SourceConfig
from iomm_hf.training.checkpoints import list_checkpoints


RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_image_only.py"


def launch(settings: dict, config: Path, ranks: int) -> subprocess.Popen:
    config.write_text(yaml.safe_dump(settings))
    # `accelerate launch --cpu --num_processes 2` starts one process; torchrun starts what it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(RECIPE)]
    return subprocess.Popen(
        [*command, "--config", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_after_first_checkpoint(process: subprocess.Popen, run: Path):
    """SIGKILL for every process of the run, as soon as its first checkpoint stands."""
    deadline = time.monotonic() + 240
    while not list_checkpoints(run):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.02)
    kill(process)


def kill(process: subprocess.Popen):
    """SIGKILL, to the ranks and workers too: the launcher puts them in sessions of their own."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family)
    process.communicate()


def assert_same_state(first: Path, second: Path, ranks: int):
    for name in ("trainable.safetensors", "ema.safetensors"):
        one, two = load_file(first / "state" / name), load_file(second / "state" / name)
        assert all(torch.equal(value, two[key]) for key, value in one.items()), name
    one, two = (torch.load(path / "state/optimizer.bin", weights_only=True)["state"] for path in (first, second))
    assert all(torch.equal(value, two[key][name]) for key, state in one.items() for name, value in state.items())
    for rank in range(ranks):
        one, two = (json.loads((path / f"state/rank-{rank}.json").read_text()) for path in (first, second))
        assert one == two


def test_two_ranks_killed_and_resumed_equal_an_unbroken_run(settings, tmp_path):
    settings |= {"max_steps": 8, "save_every": 2, "keep_checkpoints": 9, "batch_size": 2}
    unbroken = tmp_path / "unbroken"
    finish(launch(settings | {"output_dir": str(unbroken)}, tmp_path / "unbroken.yaml", ranks=2))
    run = Path(settings["output_dir"])
    kill_after_first_checkpoint(launch(settings, tmp_path / "run.yaml", ranks=2), run)
    assert not (run / "final").exists()
    killed_at = list_checkpoints(run)[-1].name
    assert killed_at != "checkpoint-00000008"
    finish(launch(settings, tmp_path / "run.yaml", ranks=2))
    name = "checkpoint-00000008"
    assert json.loads((run / name / "state/trainer.json").read_text())["num_processes"] == 2
    assert_same_state(unbroken / name, run / name, ranks=2)

    process = launch(settings | {"max_steps": 10}, tmp_path / "one.yaml", ranks=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "written by 2 processes" in output


@pytest.mark.slow
def test_one_process_killed_at_any_moment_resumes(settings, tmp_path):
    settings |= {"max_steps": 12, "save_every": 1, "num_workers": 2}
    finish(launch(settings | {"output_dir": str(tmp_path / "unbroken")}, tmp_path / "unbroken.yaml", ranks=1))
    run = Path(settings["output_dir"])
    for pause in (0.0, 0.7, 0.3):
        process = launch(settings, tmp_path / "run.yaml", ranks=1)
        time.sleep(pause)
        done = len(list_checkpoints(run))
        while process.poll() is None and len(list_checkpoints(run)) <= done and not (run / "final").exists():
            time.sleep(0.01)
        if process.poll() is None:
            kill(process)
    finish(launch(settings, tmp_path / "run.yaml", ranks=1))
    name = "checkpoint-00000012"
    for part in ("trainable.safetensors", "ema.safetensors"):
        one, two = (load_file(path / name / "state" / part) for path in (tmp_path / "unbroken", run))
        assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_an_epoch_over_two_ranks_uses_each_key_once(parts):
    used = []
    for rank in range(2):
        stream = SampleStream(SourceConfig(str(parts / "images")), block_size=8, rank=rank, world_size=2)
        for sample in stream:
            if sample["epoch"] == 1:
                break
            used.append(sample["key"])
    assert len(used) == len(set(used)) == 24
