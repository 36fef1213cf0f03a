"""Checkpoints of a run: a pipeline folder anybody can load, plus `state/`, what an exact resume needs.

A checkpoint is written under a temporary name and renamed, so it is there whole or not at all; frozen weights stay out of
it and are referenced; of a LoRA's run it holds the LoRA in place of the pipeline. `state/` is local: JSON, safetensors and
torch files read with `weights_only`, never published. Of sharded weights every rank writes and reads its own part there,
and the generator's files are shared out among the ranks: none gathers the whole.
"""

import json
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..files import REPLACED, TEMPORARY, begin_folder, bring_back, flush, replace_folder, write_json
from ..pipeline_iomm import IOMMPipeline
from .module import IOMMTrainingModule, local_part


STATE = "state"
PREFIX = "checkpoint-"


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in output_dir.glob(f"{PREFIX}*") if (path / STATE / "trainer.json").is_file())


def remove_leftovers(output_dir: Path):
    """Deletes what a killed run was writing, and brings back what it was about to replace."""
    for path in output_dir.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in output_dir.glob(f"{REPLACED}*"):
        bring_back(path.with_name(path.name.removeprefix(REPLACED)))


@contextmanager
def whole_folder(path: Path, accelerator: Accelerator):
    """Gives a temporary folder that becomes `path` when every rank has written its part, and vanishes on an error. A folder
    that it replaces is deleted last, so that one of them is whole at any moment."""
    path = path.resolve()
    temporary = path.with_name(TEMPORARY + path.name)
    if accelerator.is_main_process:
        begin_folder(path)
    accelerator.wait_for_everyone()
    try:
        yield temporary
        write_through(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # torch's writer reports a full disk as RuntimeError, in three wordings; torch raises that for everything else as well.
        wordings = "PytorchStreamWriter|inline_container|iostream"
        writer = isinstance(error, RuntimeError) and re.search(wordings, str(error))
        if writer or isinstance(error, OSError | SafetensorError):
            raise OSError(
                f"Could not write {path}: {error}. Nothing was left under that name; earlier checkpoints are whole. Free"
                " some space and start the same command again: the run continues from the newest one."
            ) from error
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(temporary, path)
    accelerator.wait_for_everyone()


def write_through(folder: Path):
    """Waits until a folder's files are on the disk: a renamed folder whose machine dies could hold empty ones."""
    for path in [*folder.rglob("*"), folder]:
        with suppress(FileNotFoundError):  # another rank's temporary name
            flush(path)


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


def keep_models_out(accelerator: Accelerator):
    """Makes Accelerate's save_state and load_state handle random states alone: it would write frozen weights too."""
    accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, input_dir: models.clear())


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]):
    """Restores an optimizer's state; tensors that belong to a sharded weight are this rank's parts."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, state in saved["state"].items():
        weight = weights[number]
        if isinstance(weight, DTensor):
            saved["state"][number] = {
                name: DTensor.from_local(
                    tensor, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
                )
                if tensor.dim()  # not the count of steps
                else tensor
                for name, tensor in state.items()
            }
    optimizer.load_state_dict(saved)


def load_tensors(targets: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]):
    """Copies tensors by name; both sides must have the same names."""
    if targets.keys() != saved.keys():
        raise ValueError(
            f"The saved state does not fit this model: {sorted(targets.keys() ^ saved.keys())[:4]} differ."
        )
    for name, target in targets.items():
        target.copy_(saved[name])


def save_pipeline(
    folder: Path,
    accelerator: Accelerator,
    pipeline: IOMMPipeline,
    module: IOMMTrainingModule,
    include_frozen: bool,
):
    """Writes the pipeline folder from the weights that the module holds, or of a LoRA's run the LoRA alone; every rank must
    call it."""
    if pipeline.get_list_adapters():
        pipeline.save_lora_weights(folder, is_main_process=accelerator.is_main_process, **pipeline.lora_layers())
        return
    if not isinstance(module, FSDPModule):
        if accelerator.is_main_process:
            pipeline.save_pretrained(folder, include_frozen=include_frozen)
        return
    encoder = {
        name: whole(tensor) for name, tensor in pipeline.text_encoder.state_dict().items()
    }  # little of it trains
    if accelerator.is_main_process:
        pipeline.text_encoder.save_pretrained(
            folder / "text_encoder", include_frozen=include_frozen, state_dict=encoder
        )
        pipeline.transformer.save_config(folder / "transformer")
        pipeline.save_frame(folder, include_frozen)
    accelerator.wait_for_everyone()
    save_in_parts(folder / "transformer", accelerator, pipeline.transformer)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered on every rank; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_in_parts(folder: Path, accelerator: Accelerator, model: ModelMixin, max_shard_size: str = "5GB"):
    """Writes a sharded model as [`~diffusers.ModelMixin.save_pretrained`] would. Its tensors are gathered one by one, and
    the ranks take turns at the files, so a rank holds one tensor on its device and one file in memory at a time."""
    state = model.state_dict()
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()},
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for number, (filename, names) in enumerate(plan.filename_to_tensors.items()):
        mine = number % accelerator.num_processes == accelerator.process_index
        part = {}
        for name in names:
            tensor = whole(state[name])
            if mine:
                part[name] = tensor.cpu().contiguous()
        if mine:
            save_file(part, folder / filename, metadata={"format": "pt"})
    if plan.is_sharded and accelerator.is_main_process:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def state_file(state: Path, name: str, accelerator: Accelerator, module: IOMMTrainingModule) -> Path:
    """Where a rank keeps its part of what is sharded, or the first rank what is whole."""
    if isinstance(module, FSDPModule):
        name = name.replace(".", f"-rank-{accelerator.process_index}.")
    return state / name


def optimizer_name(number: int) -> str:
    return f"optimizer_{number}.bin" if number else "optimizer.bin"


def save_checkpoint(
    path: Path,
    accelerator: Accelerator,
    pipeline: IOMMPipeline,
    module: IOMMTrainingModule,
    optimizers: list[Optimizer],
    ema: EMAModel | None,
    rank_state: dict[str, Any],
    trainer_state: dict[str, Any],
):
    """Writes one checkpoint. The pipeline folder holds the averaged weights where there are any."""
    with whole_folder(path, accelerator) as folder:
        with ema_weights(ema, module):
            save_pipeline(folder, accelerator, pipeline, module, include_frozen=False)
        state = folder / STATE
        accelerator.save_state(str(state))
        write_json(state / f"rank-{accelerator.process_index}.json", rank_state)
        if accelerator.is_main_process or isinstance(module, FSDPModule):
            trained = {name: tensor.contiguous() for name, tensor in module.trainable_state().items()}
            save_file(trained, state_file(state, "trainable.safetensors", accelerator, module))
            for number, optimizer in enumerate(optimizers):
                # Positions in a list, not names: parts are tensors like any other.
                parts = tree_map(local_part, optimizer.state_dict())
                torch.save(parts, state_file(state, optimizer_name(number), accelerator, module))
            if ema is not None:
                averaged = dict(zip(trained, ema.shadow_params, strict=True))
                save_file(averaged, state_file(state, "ema.safetensors", accelerator, module))
        if accelerator.is_main_process:
            if ema is not None:
                trainer_state = trainer_state | {"ema_steps": ema.optimization_step}
            write_json(state / "trainer.json", trainer_state)


def load_checkpoint(
    path: Path,
    accelerator: Accelerator,
    module: IOMMTrainingModule,
    optimizers: list[Optimizer],
    ema: EMAModel | None,
    otherwise: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    r"""
    Restores weights, averages, optimizers and random states; returns this rank's and the trainer's state. `otherwise` says what
    to do where that cannot be.

    Raises:
        `ValueError`: the run had another number of ranks.
    """
    state = path / STATE
    trainer_state = json.loads((state / "trainer.json").read_text())
    if trainer_state["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{path} was written by {trainer_state['num_processes']} processes and cannot be resumed exactly by"
            f" {accelerator.num_processes}. Launch as many, or {otherwise}."
        )
    accelerator.load_state(str(state))
    trained = module.trainable_state()
    load_tensors(trained, load_file(state_file(state, "trainable.safetensors", accelerator, module)))
    for number, optimizer in enumerate(optimizers):
        parts = torch.load(
            state_file(state, optimizer_name(number), accelerator, module), map_location="cpu", weights_only=True
        )
        load_optimizer(optimizer, parts)
    if ema is not None:
        averaged = dict(zip(trained, ema.shadow_params, strict=True))
        load_tensors(averaged, load_file(state_file(state, "ema.safetensors", accelerator, module)))
        ema.optimization_step = trainer_state["ema_steps"]
    rank_state = json.loads((state / f"rank-{accelerator.process_index}.json").read_text())
    return rank_state, trainer_state


def rotate(output_dir: Path, keep: int):
    """Deletes all but the newest checkpoints."""
    for path in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(path.rename(path.with_name(TEMPORARY + path.name)))  # half of one must not pass for a whole one
