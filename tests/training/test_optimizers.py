"""Which optimizer moves which weight, and how fast."""

import pytest
import torch
from torch import nn

from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, PretrainConfig
from iomm_hf.training.optimizers import build_optimizers


@pytest.fixture(scope="module")
def module():
    pipe = tiny_pipeline()
    return IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, mask_ratio=0.5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trained_weight_has_one_optimizer_and_its_parts_rate(module, name):
    config = PretrainConfig(images=["x"], optimizer=name, learning_rate=2e-3, adapter_learning_rate=3e-4)
    optimizers = build_optimizers(config, module)
    rate_of = {
        id(parameter): group["lr"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for o in optimizers for group in o.param_groups) == len(rate_of)
    assert rate_of.keys() == {id(parameter) for parameter in module.trainable_parameters()}
    assert {rate_of[id(p)] for p in module.encoder.adapter.parameters()} == {3e-4}
    assert {rate_of[id(p)] for p in module.transformer.parameters()} == {2e-3}
    assert optimizers[-1].param_groups[-1]["lr"] == 2e-3  # the log shows it as the generator's


def test_muon_takes_the_matrices_and_adamw_the_rest(module):
    muon, adamw = build_optimizers(PretrainConfig(images=["x"], optimizer="muon"), module)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    taken = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    trained = (module.encoder.adapter, module.transformer)
    assert taken == {id(p.weight) for part in trained for p in part.modules() if isinstance(p, nn.Linear)}
    assert id(module.encoder.adapter.queries) not in taken  # an embedding, though it has two dimensions
