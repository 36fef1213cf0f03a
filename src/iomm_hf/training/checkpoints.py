"""Checkpoints of a run: a pipeline folder anybody can load, plus `state/`, what an exact resume needs.

A checkpoint is written under a temporary name and renamed, so it is there whole or not at all; frozen weights stay out of
it and are referenced. `state/` is local: JSON, safetensors and Accelerate's own files, never published.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..pipeline_iomm import IOMMPipeline
from .module import IOMMTrainingModule


STATE = "state"
PREFIX = "checkpoint-"
TEMPORARY = ".writing-"


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in output_dir.glob(f"{PREFIX}*") if (path / STATE / "trainer.json").is_file())


def remove_leftovers(output_dir: Path):
    """Deletes what a killed run was writing."""
    for path in output_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def write_json(path: Path, content: Any):
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


@contextmanager
def whole_folder(path: Path, accelerator: Accelerator):
    """Gives a temporary folder that becomes `path` when every rank has written its part, and vanishes on an error."""
    temporary = path.with_name(TEMPORARY + path.name)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError | RuntimeError):  # torch reports a full disk as RuntimeError
            raise OSError(
                f"Could not write {path}: {error}. Nothing was left under that name; earlier checkpoints are whole. Free"
                " some space and start the same command again: the run continues from the newest one."
            ) from error
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()


@contextmanager
def ema_weights(ema: EMAModel | None, module: IOMMTrainingModule):
    """Inside, the module holds its averaged weights."""
    if ema is None:
        yield
        return
    parameters = module.trainable_parameters()
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def keep_frozen_out(accelerator: Accelerator, module: IOMMTrainingModule):
    """Makes Accelerate's save_state and load_state handle trained weights alone, as one safetensors file."""

    def save(models: list, weights: list, output_dir: str):
        weights.clear()
        if accelerator.is_main_process:
            state = {name: tensor.contiguous() for name, tensor in module.trainable_state().items()}
            save_file(state, Path(output_dir) / "trainable.safetensors")

    def load(models: list, input_dir: str):
        models.clear()
        load_tensors(module.trainable_state(), load_file(Path(input_dir) / "trainable.safetensors"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def load_tensors(targets: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]):
    """Copies tensors by name; both sides must have the same names."""
    if targets.keys() != saved.keys():
        raise ValueError(
            f"The saved state does not fit this model: {sorted(targets.keys() ^ saved.keys())[:4]} differ."
        )
    for name, target in targets.items():
        target.copy_(saved[name])


def save_checkpoint(
    path: Path,
    accelerator: Accelerator,
    pipeline: IOMMPipeline,
    module: IOMMTrainingModule,
    ema: EMAModel | None,
    rank_state: dict[str, Any],
    trainer_state: dict[str, Any],
):
    """Writes one checkpoint. The pipeline folder holds the averaged weights where there are any."""
    with whole_folder(path, accelerator) as folder:
        if accelerator.is_main_process:
            with ema_weights(ema, module):
                pipeline.save_pretrained(folder, include_frozen=False)
        state = folder / STATE
        accelerator.save_state(str(state))
        write_json(state / f"rank-{accelerator.process_index}.json", rank_state)
        if accelerator.is_main_process:
            if ema is not None:
                save_file(
                    dict(zip(module.trainable_state(), ema.shadow_params, strict=True)), state / "ema.safetensors"
                )
                trainer_state = trainer_state | {"ema_steps": ema.optimization_step}
            write_json(state / "trainer.json", trainer_state)


def load_checkpoint(
    path: Path, accelerator: Accelerator, module: IOMMTrainingModule, ema: EMAModel | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    r"""
    Restores weights, averages, optimizer and random states; returns this rank's and the trainer's state.

    Raises:
        `ValueError`: the run had another number of ranks.
    """
    state = path / STATE
    trainer_state = json.loads((state / "trainer.json").read_text())
    if trainer_state["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{path} was written by {trainer_state['num_processes']} processes and cannot be resumed exactly by"
            f" {accelerator.num_processes}. Launch as many, or start a new output_dir with --init_from {path}."
        )
    accelerator.load_state(str(state))
    if ema is not None:
        load_tensors(
            dict(zip(module.trainable_state(), ema.shadow_params, strict=True)), load_file(state / "ema.safetensors")
        )
        ema.optimization_step = trainer_state["ema_steps"]
    rank_state = json.loads((state / f"rank-{accelerator.process_index}.json").read_text())
    return rank_state, trainer_state


def rotate(output_dir: Path, keep: int):
    """Deletes all but the newest checkpoints."""
    for path in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(path)
