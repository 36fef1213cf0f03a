"""Several ranks: one builds the model for all, and FSDP2 divides what trains among them.

Only the first rank reads weights or draws fresh ones; the others get the model's outline, without a byte of weights, and
then what is theirs, one tensor at a time. So host memory does not grow with the ranks, and under FSDP2 no device ever
holds all trained weights. Weights, gradients and reductions are float32, autocast computes in bf16, as under DDP.

FSDP2 is called directly, on CPUs and GPUs alike. Through Accelerate (1.15) it turns into DDP on CPU ranks without a word, its
checkpoints pair each optimizer with a model of its own (Muon and AdamW share one) and hold the frozen parts too, and its
bf16 policy rounds what enters the model, times and positions included, where autocast does not.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..pipeline_iomm import IOMMPipeline
from .module import IOMMTrainingModule


def outline(pipeline: IOMMPipeline) -> IOMMPipeline:
    """A copy whose weights have shapes alone; buffers, which are small and not always saved, stay real."""
    weights = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        for component in pipeline.components.values()
        if isinstance(component, nn.Module)
        for weight in component.parameters()
    }
    return copy.deepcopy(pipeline, weights)  # which takes these for copies that it has already made


def build_once(build: Callable[[], IOMMPipeline], accelerator: Accelerator) -> IOMMPipeline:
    """The pipeline that `build` makes, on the first rank, and its outline on all others; [`place`] fills it."""
    if accelerator.num_processes == 1:
        return build()
    pipeline = build() if accelerator.is_main_process else None
    [received] = broadcast_object_list([None if pipeline is None else outline(pipeline)])
    return received if pipeline is None else pipeline


def shard(module: IOMMTrainingModule, accelerator: Accelerator):
    """Divides what trains among all ranks: each block of the generator that its class names (`_no_split_modules`) is
    gathered when it runs, everything around them at once. Frozen weights stay whole."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = module.transformer._no_split_modules or []
    blocks = [part for part in module.transformer.modules() if type(part).__name__ in names]
    for block in reversed(blocks):  # inner ones first
        fully_shard(block, mesh=mesh)
    fully_shard(
        module, mesh=mesh, ignored_params={weight for weight in module.parameters() if not weight.requires_grad}
    )


@torch.no_grad()
def place(module: IOMMTrainingModule, accelerator: Accelerator, sharded: bool):
    r"""
    Puts the module on every rank's device with the first rank's weights: all of them, or `sharded`, this rank's part of
    those that train.

    Raises:
        `RuntimeError`: a weight that trains was not divided.
    """
    if accelerator.num_processes == 1:
        module.to(accelerator.device)
        return
    whole = {name: weight.detach() for name, weight in module.named_parameters()}
    if sharded:
        shard(module, accelerator)
    module._apply(
        lambda tensor: (
            torch.empty_like(tensor, device=accelerator.device) if tensor.is_meta else tensor.to(accelerator.device)
        )
    )
    module.encoder.mllm.tie_weights()  # a weight under two names has become two
    for name, weight in module.named_parameters():
        source = whole.pop(name)
        if accelerator.is_main_process:
            source = source.to(accelerator.device)
        else:
            source = torch.empty(weight.shape, dtype=weight.dtype, device=accelerator.device)
        if isinstance(weight, DTensor):
            weight.copy_(distribute_tensor(source, weight.device_mesh, weight.placements))  # from the first rank's
        else:
            dist.broadcast(source, src=0)
            weight.copy_(source)
    if sharded:
        check_sharded(module)


def check_sharded(module: IOMMTrainingModule):
    r"""
    Raises:
        `RuntimeError`: a weight that trains is whole on every rank, or a frozen one is not.
    """
    for name, weight in module.named_parameters():
        if isinstance(weight, DTensor) != weight.requires_grad:
            raise RuntimeError(
                f"fully_shard divides what trains and nothing else, but {name} is a {type(weight).__name__}."
            )


@contextmanager
def gathered(module: IOMMTrainingModule) -> Iterator[None]:
    """Inside, a sharded module's parts can be called by themselves and their weights read, but for the blocks', which are
    gathered when they run. Every rank must enter, and call the same."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
