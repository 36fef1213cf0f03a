"""What happens to the weights in a step: clipping, AdamW for everything or Muon for the matrices, and the average.

Clipping and averaging go over all weights, whatever the batch, so each reads them no more often than it must.
"""

import math
from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from .config import TrainingConfig
from .module import IOMMTrainingModule


def build_optimizers(config: TrainingConfig, module: IOMMTrainingModule) -> list[Optimizer]:
    r"""
    The optimizers of a run; the last group of each is the generator's.

    `muon` (the paper's XL) moves the weights of linear layers by orthogonalised momentum, scaled so that AdamW's rate fits
    it, and leaves biases, queries and scales to AdamW. It iterates in bf16: on CPUs without bf16 it is of no use.
    """
    rates: dict[nn.Module, float] = {
        module.encoder: config.adapter_learning_rate or config.learning_rate,
        **({module.alignment: config.learning_rate} if module.alignment is not None else {}),
        module.transformer: config.learning_rate,
    }
    matrices = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    if config.optimizer == "adamw":
        matrices = set()

    def groups(of_muon: bool) -> list[dict]:
        chosen = {
            part: [p for p in part.parameters() if p.requires_grad and (id(p) in matrices) == of_muon]
            for part in rates
        }
        return [{"params": parameters, "lr": rates[part]} for part, parameters in chosen.items() if parameters]

    adamw = torch.optim.AdamW(
        groups(of_muon=False),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.optimizer == "adamw":
        return [adamw]
    muon = torch.optim.Muon(
        groups(of_muon=True), weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]


def clip_gradients(weights: list[nn.Parameter], max_norm: float) -> float:
    """Scales gradients down to `max_norm` and returns the norm that they had, over all ranks where they are sharded. Those
    below it, and those that are not finite, stay as they are."""
    total = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if math.isfinite(norm) and norm > max_norm:
        clip_grads_with_norm_(weights, max_norm, total)
    return norm


class AveragedWeights(EMAModel):
    """diffusers' exponential average, in one pass over the weights and without a second copy of them on the way."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.Tensor]):
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)
