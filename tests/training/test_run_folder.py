"""A run's folder: one run at a time, resumed by the same settings alone, with a record of what it ran on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher

from iomm_hf.training import LoraTrainingConfig, PretrainConfig, train
from iomm_hf.training.run_folder import hold_folder, keep_log_until


def rows(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


HOLDER = """
import os, sys, time
from pathlib import Path
from accelerate import Accelerator
from iomm_hf.training.run_folder import hold_folder

with hold_folder(Path(sys.argv[1]), Accelerator(cpu=True)):
    if os.fork():  # the child is a loader's worker that outlives the run
        print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(settings):
    run = Path(settings["output_dir"])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        (run / ".writing-checkpoint-00000002").mkdir()
        with pytest.raises(RuntimeError, match=f"Another run is at work in {run}.*choose another output_dir"):
            train(PretrainConfig(**settings))
        assert (run / ".writing-checkpoint-00000002").is_dir()  # it is the other's
        holder.kill()
        holder.wait()
        with hold_folder(run, Accelerator(cpu=True)):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def enter_from_own_folder(home: Path, shared: bool):
    accelerator = Accelerator(cpu=True)
    os.chdir(home / str(accelerator.process_index))
    if shared:
        with hold_folder(home / "run", accelerator):
            pass
        return
    with (
        pytest.raises(RuntimeError, match=r"must be shared by all machines.*wrote in run, ranks \[1\] do not see"),
        hold_folder(Path("run"), accelerator),
    ):
        pass


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("shared", [True, False])
def test_ranks_that_see_different_folders_are_refused(tmp_path, shared):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    debug_launcher(enter_from_own_folder, (tmp_path, shared), num_processes=2)
    assert {path.name for path in (tmp_path / ("." if shared else "0") / "run").iterdir()} == {".lock"}


def test_resuming_with_other_settings_is_refused(settings):
    train(PretrainConfig(**settings | {"max_steps": 4}))
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.01"):
        train(PretrainConfig(**settings | {"learning_rate": 0.01}))
    with pytest.raises(ValueError, match="resume it"):
        train(PretrainConfig(**settings | {"resume": False}))
    train(PretrainConfig(**settings | {"max_steps": 6, "log_every": 1}))  # longer and chattier is the same run
    record = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert record["config"]["max_steps"] == 6 and record["config"]["log_every"] == 1
    assert record["resumed"][0]["settings_before"] == {"max_steps": 4, "log_every": 2}
    assert rows(settings["output_dir"])[-1]["step"] == 6
    assert [row["learning_rate"] for row in rows(settings["output_dir"])] == [1e-3] * 4  # warmed up in two steps


def test_more_steps_are_refused_where_the_rate_depends_on_them(settings):
    settings |= {"lr_scheduler": "linear"}
    train(PretrainConfig(**settings | {"max_steps": 4}))
    with pytest.raises(ValueError, match=r"max_steps: 4 -> 8, over which lr_scheduler linear spreads the rate"):
        train(PretrainConfig(**settings | {"max_steps": 8}))
    train(PretrainConfig(**settings | {"max_steps": 4, "log_every": 1}))  # as it was


def test_other_software_is_noted_and_warned_of(settings, caplog):
    train(PretrainConfig(**settings | {"max_steps": 4}))
    run = Path(settings["output_dir"])
    state = run / "checkpoint-00000004/state/trainer.json"
    content = json.loads(state.read_text())
    for version in (content["software"]["versions"]["torch"], "1.0"):
        caplog.clear()
        content["software"]["versions"]["torch"] = version
        state.write_text(json.dumps(content))
        train(PretrainConfig(**settings | {"max_steps": 4}))
        assert (f"torch 1.0 -> {torch.__version__}" in caplog.text) == (version == "1.0")
        assert ("Resuming on other software" in caplog.text) == (version == "1.0")
    started = json.loads((run / "run.json").read_text())
    assert [part["step"] for part in started["resumed"]] == [4, 4]
    assert started["resumed"][1]["versions"] == started["versions"]
    assert started["resumed"][1]["commit"] == started["commit"]


def test_a_row_that_a_full_disk_cut_short_is_dropped(tmp_path):
    log, whole = tmp_path / "log.jsonl", '{"step": 2, "loss": 1.0}\n'
    log.write_text(whole + '{"step": 4, "loss": 0.5}\n{"step": 6, "lo')
    keep_log_until(log, 2)
    assert log.read_text() == whole and [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    log.write_text('{"step": 2, "lo\n' + whole)
    with pytest.raises(json.JSONDecodeError):  # no accident of ours
        keep_log_until(log, 2)


def test_a_finished_run_without_checkpoints_is_not_written_over(settings):
    final = train(PretrainConfig(**settings))
    for checkpoint in final.parent.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    log = (final.parent / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a finished run without its checkpoints; choose another output_dir"):
        train(PretrainConfig(**settings))
    assert (final.parent / "log.jsonl").read_text() == log


def test_a_lora_is_not_told_to_start_from_its_checkpoint():
    assert "init_from" not in LoraTrainingConfig(images=["x"]).start_anew(Path("run/checkpoint-00000001"))
    assert "--init_from run/c" in PretrainConfig(images=["x"]).start_anew(Path("run/c"))
