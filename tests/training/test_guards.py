"""Updates that are not finite are left out, losses that leap stop a run, signals stop it between two steps."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file

from iomm_hf.training import PretrainConfig, loop, train
from iomm_hf.training.checkpoints import list_checkpoints
from iomm_hf.training.guards import (
    SpikeGuard,
    StopSignals,
    check_strategy,
    take_over_fsdp,
    warn_of_short_notice,
)


MEASURED = ("images_per_second", "seconds_waiting")  # by the clock


@pytest.fixture
def before_step(monkeypatch):
    """Calls a function inside the numbered optimizer step of the next run, before it is made."""

    def arrange(number: int, function):
        calls, original = [], loop.update

        def update(*args):
            calls.append(1)
            if len(calls) == number:
                function()
            return original(*args)

        monkeypatch.setattr(loop, "update", update)

    return arrange


def scale_losses(monkeypatch, steps, factor: float):
    """The module's real losses, multiplied in these of its calls."""
    calls, original = [], loop.IOMMTrainingModule.forward

    def forward(self, batch):
        calls.append(1)
        terms, samples = original(self, batch)
        if len(calls) in steps:
            terms = {name: term * factor for name, term in terms.items()}
        return terms, samples

    monkeypatch.setattr(loop.IOMMTrainingModule, "forward", forward)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "state/trainable.safetensors")


def test_an_update_that_is_not_finite_is_left_out_and_kept_for_later(settings, monkeypatch):
    run = Path(settings["output_dir"])
    scale_losses(monkeypatch, {3}, float("nan"))
    train(PretrainConfig(**settings | {"max_steps": 4, "save_every": 1, "log_every": 1, "keep_checkpoints": 4}))
    before, skipped, after = (trained(path) for path in list_checkpoints(run)[1:])
    assert all(torch.equal(value, skipped[name]) for name, value in before.items())
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after["encoder.adapter.queries"], skipped["encoder.adapter.queries"])
    [line] = (run / "nonfinite.jsonl").read_text().splitlines()
    note = json.loads(line)
    assert note["step"] == 3 and note["grad_norm"] == "nan" and len(set(note["ranks"][0]["keys"])) == 3
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert ["loss" in row for row in rows] == [True, True, False, True] and rows[2]["grad_norm"] is None


def test_an_update_is_left_out_where_the_loss_alone_is_not_finite(settings, monkeypatch):
    original = loop.IOMMTrainingModule.forward

    def forward(self, batch):
        terms, samples = original(self, batch)
        return terms | {"loss": terms["loss"] + float("inf")}, samples  # whose gradient is as before

    monkeypatch.setattr(loop.IOMMTrainingModule, "forward", forward)
    with pytest.raises(FloatingPointError, match="2 updates in a row were not finite"):
        train(PretrainConfig(**settings | {"max_nonfinite": 2}))


def test_too_many_of_them_in_a_row_stop_the_run(settings, monkeypatch):
    scale_losses(monkeypatch, {1, 2, 4, 5, 6}, float("inf"))
    with pytest.raises(FloatingPointError, match=r"3 updates in a row were not finite, the last at step 6.*nonfinite"):
        train(PretrainConfig(**settings | {"max_nonfinite": 3}))
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-00000004"]


def test_a_resumed_run_counts_on_and_notes_none_twice(settings, monkeypatch):
    settings |= {"max_nonfinite": 3, "save_every": 4, "max_steps": 8}
    notes = Path(settings["output_dir"], "nonfinite.jsonl")
    with monkeypatch.context() as patched:
        scale_losses(patched, {3, 4, 5}, float("inf"))  # the fifth is lost with the process
        with pytest.raises(FloatingPointError, match="3 updates in a row were not finite, the last at step 5"):
            train(PretrainConfig(**settings))
    scale_losses(monkeypatch, {1}, float("inf"))
    with pytest.raises(FloatingPointError, match="3 updates in a row were not finite, the last at step 5"):
        train(PretrainConfig(**settings))
    assert [json.loads(line)["step"] for line in notes.read_text().splitlines()] == [3, 4, 5]


def test_a_loss_that_leaps_stops_the_run_before_its_checkpoint(settings, monkeypatch):
    settings |= {"log_every": 1, "batch_size": 1, "save_every": 21}
    train(PretrainConfig(**settings | {"max_steps": 21}))
    scale_losses(monkeypatch, {1}, 100.0)
    with pytest.raises(FloatingPointError, match=r"leapt to .* before step 22.*max_loss_ratio"):
        train(PretrainConfig(**settings | {"max_steps": 22}))  # what is usual is read from the log
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-00000021"]


def test_a_leap_is_one_above_many_rows_alone():
    SpikeGuard(5.0, [0.3] * 19).check(20, 100.0)  # too few to know what is usual
    SpikeGuard(0.0, [0.3] * 20).check(21, 100.0)  # turned off
    guard = SpikeGuard(5.0, [9.0] * 50 + [0.3] * 20)
    guard.check(71, 1.49)
    with pytest.raises(FloatingPointError, match=r"leapt to 1.51 before step 72, from 0.3 "):
        guard.check(72, 1.51)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_exactly(settings, tmp_path, before_step, capsys, number):
    settings |= {"log_every": 4, "max_steps": 8}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    before_step(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        train(PretrainConfig(**settings))
    assert stop.value.code == 0 and f"Stopped by {number.name} after step 6" in capsys.readouterr().out
    run = Path(settings["output_dir"])
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-00000004", "checkpoint-00000006"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers

    train(PretrainConfig(**settings))
    train(PretrainConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    one, two = (trained(folder / "checkpoint-00000008") for folder in (run, tmp_path / "unbroken"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    logs = [
        [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in log]
        for log in ((folder / "log.jsonl").read_text().splitlines() for folder in (run, tmp_path / "unbroken"))
    ]
    assert logs[0] == logs[1]  # a row whose steps a stop divides is whole again


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DEEPSPEED, but Accelerate runs NO"),
        ({"WORLD_SIZE": "2"}, "started 2 processes, but this one counts 1"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "Slurm started 8 processes, but no launcher joins them"),
    ],
)
def test_another_strategy_than_the_one_asked_for_is_refused(monkeypatch, variables, message):
    accelerator = Accelerator(cpu=True)
    check_strategy(accelerator)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        check_strategy(accelerator)


@pytest.mark.parametrize("strategy", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_strategies_of_accelerate_that_shard_are_refused_at_the_start(strategy):
    with pytest.raises(RuntimeError, match=f"Launched with {strategy.value}, .* set --fully_shard true"):
        check_strategy(SimpleNamespace(num_processes=1, distributed_type=strategy))  # no CPU run has one


def test_a_launcher_with_fsdp_needs_settings_that_shard(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match="Launched with FSDP, but fully_shard is off.*--fully_shard true"):
        train(PretrainConfig(**settings))
    take_over_fsdp(fully_shard=True)
    assert "ACCELERATE_USE_FSDP" not in os.environ  # so neither Accelerate nor transformers shards as well
    take_over_fsdp(fully_shard=False)  # nobody asks


def test_a_launcher_inside_of_slurm_joins_its_tasks(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_strategy(Accelerator(cpu=True))


def test_another_global_batch_than_asked_for_is_refused(settings):
    with pytest.raises(ValueError, match="is 1024, but 1 processes x batch_size 3 x gradient_accumulation 2 are 6"):
        train(PretrainConfig(**settings | {"gradient_accumulation": 2, "global_batch_size": 1024}))
    assert not Path(settings["output_dir"]).exists()
    train(PretrainConfig(**settings | {"gradient_accumulation": 2, "global_batch_size": 6, "max_steps": 1}))


def test_one_process_cannot_divide_the_weights(settings):
    with pytest.raises(RuntimeError, match="among several processes, but there is one"):
        train(PretrainConfig(**settings | {"fully_shard": True}))
    with pytest.raises(ValueError, match="turn off either it or fully_shard"):
        PretrainConfig(**settings | {"fully_shard": True, "compile": "blocks"})


def test_slow_checkpoints_are_warned_of_where_a_launcher_kills(monkeypatch, caplog):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    warn_of_short_notice(26.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    warn_of_short_notice(10.0)
    assert not caplog.records
    warn_of_short_notice(26.0)
    assert "took 26 s" in caplog.text and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=260" in caplog.text
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    warn_of_short_notice(26.0)
    assert len(caplog.records) == 1
