"""Every launcher of `recipes/accelerate/` really starts a run, on two CPU ranks; cpu.yaml starts those of `test_ranks.py`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


RECIPES = Path(__file__).parents[2] / "recipes"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(name: str, flags: list[str], config: Path, more: tuple[str, ...] = ()) -> subprocess.Popen:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"accelerate/{name}.yaml"), *flags]
    recipe = [str(RECIPES / "pretrain_image_only.py"), "--config", str(config), *more]
    return subprocess.Popen(
        [sys.executable, *launcher, *recipe],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen):
    for process in processes:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-3000:]


@pytest.fixture
def config(settings, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"max_steps": 2, "save_every": 2, "batch_size": 2}))
    return path


def state_of(config: Path) -> tuple[set[str], dict]:
    """Names of the files that hold trained weights, and the trainer's state."""
    state = Path(yaml.safe_load(config.read_text())["output_dir"], "checkpoint-00000002/state")
    return {path.name for path in state.glob("trainable*")}, json.loads((state / "trainer.json").read_text())


@pytest.mark.parametrize(
    ("name", "flags", "files"),
    [
        ("ddp", (), {"trainable.safetensors"}),
        ("fsdp2", ("--fully_shard", "true"), {"trainable-rank-0.safetensors", "trainable-rank-1.safetensors"}),
    ],
)
def test_launchers_of_one_machine(config, name, flags, files):
    finish(launch(name, ["--num_processes", "2", "--main_process_port", str(free_port())], config, flags))
    written, trainer = state_of(config)
    assert written == files and trainer["num_processes"] == 2


def test_fsdp_without_settings_that_shard_is_refused(config):
    process = launch("fsdp2", ["--num_processes", "2", "--main_process_port", str(free_port())], config)
    output, _ = process.communicate(timeout=900)
    assert process.returncode != 0 and "Launched with FSDP, but fully_shard is off" in output, output[-3000:]
    assert not Path(yaml.safe_load(config.read_text())["output_dir"]).exists()


def test_two_machines_train_one_model(config):
    common = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    common += ["--main_process_port", str(free_port())]
    finish(*(launch("multi-node", [*common, "--machine_rank", str(rank)], config) for rank in range(2)))
    written, trainer = state_of(config)
    assert written == {"trainable.safetensors"} and trainer["num_processes"] == 2
