"""Which optimizer moves which weight, and how fast; what gradients are clipped to; the average."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, PretrainConfig
from iomm_hf.training.optimizers import AveragedWeights, build_optimizers, clip_gradients


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


def weights_with_gradients(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2, 2))]
    for weight in weights[:2]:  # the last took no part
        weight.grad = scale * torch.randn(weight.shape, generator=generator)
    return weights


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_gradients_are_clipped_as_torch_clips_them(scale):
    weights, expected = weights_with_gradients(scale), weights_with_gradients(scale)
    norm = torch.nn.utils.clip_grad_norm_(expected, 1.0)
    assert clip_gradients(weights, 1.0) == pytest.approx(norm.item())
    assert (norm > 1) == (scale >= 1)
    for weight, other in zip(weights[:2], expected[:2], strict=True):
        torch.testing.assert_close(weight.grad, other.grad)
    assert weights[2].grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told_and_clips_nothing(value):
    weights = weights_with_gradients(10.0)
    weights[1].grad[0] = value
    before = copy.deepcopy(weights[0].grad)
    assert not torch.isfinite(torch.tensor(clip_gradients(weights, 1.0)))
    assert torch.equal(weights[0].grad, before)


def test_the_average_is_that_of_diffusers():
    weights = weights_with_gradients(1.0)
    ours, theirs = AveragedWeights(weights, decay=0.9), EMAModel(weights, decay=0.9)
    for _ in range(12):
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.8).add_(0.1)
        ours.step(weights)
        theirs.step(weights)
    assert ours.cur_decay_value == theirs.cur_decay_value and ours.optimization_step == theirs.optimization_step
    torch.testing.assert_close(ours.shadow_params, theirs.shadow_params)
    assert not torch.equal(ours.shadow_params[0], weights[0])
