"""AdamW for everything, or Muon for the matrices and AdamW for the rest."""

import torch
from torch import nn
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
