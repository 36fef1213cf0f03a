"""The trainable unit: what gets a gradient, and that neither batch nor ranks change a sample's loss."""

import pytest
import torch

from iomm_hf.data.cache import Cached, pack, unpack
from iomm_hf.data.collate import IOMMCollator
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule


def make_module(**options) -> IOMMTrainingModule:
    pipe = tiny_pipeline(**options)
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero: make every weight count
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, mask_ratio=0.5).train()


@pytest.fixture(scope="module", params=["queries", "all", "flux"])
def module(request, flux):
    if request.param == "flux":
        return make_module(preset=flux)
    return make_module(connector_layers=1, condition_tokens=request.param)


@pytest.fixture
def samples(parts):
    pairs = SourceConfig(str(parts / "pairs"), caption_column="json.prompt")
    stream = iter(build_stream([SourceConfig(str(parts / "images"))], [pairs], 0.5))
    chosen = [next(stream) for _ in range(6)]
    assert 0 < sum(sample["caption"] is None for sample in chosen) < 6
    return chosen


@pytest.fixture
def collate(processor):
    return IOMMCollator(processor, resolution=64, condition_dropout=0.2)


def gradients(module, loss) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_gradients_reach_what_trains_and_nothing_else(module, samples, collate):
    found = gradients(module, module(collate(samples))[0]["loss"])
    assert found.keys() == module.trainable_state().keys()
    assert all(name.startswith(("encoder.adapter.", "encoder.connector.", "transformer.")) for name in found)
    assert all(torch.isfinite(gradient).all() and gradient.abs().max() > 0 for gradient in found.values())


def test_frozen_parts_stay_in_eval_mode(module):
    module.train()
    assert module.encoder.adapter.training and module.transformer.training
    assert not module.encoder.mllm.training and not module.vae.training
    module.eval()
    assert not any(part.training for part in module.modules())
    module.train()


@torch.no_grad()
def test_a_samples_loss_is_the_same_alone_in_a_batch_and_in_any_order(module, samples, collate):
    losses = module.sample_losses(collate(samples))
    assert losses.shape == (6,) and torch.isfinite(losses).all()
    for i, sample in enumerate(samples):
        assert module.sample_losses(collate([sample]))[0] == pytest.approx(losses[i].item(), rel=1e-4)
    backwards = module.sample_losses(collate(samples[::-1]))
    assert torch.allclose(backwards.flip(0), losses, rtol=1e-4)
    assert module(collate(samples))[0]["loss"] == pytest.approx(losses.mean().item())


def test_two_ranks_average_to_the_gradient_of_one(module, samples, collate):
    """DDP averages the ranks' gradients; their batches are padded to different lengths."""
    whole = gradients(module, module(collate(samples))[0]["loss"])
    halves = [gradients(module, module(collate(part))[0]["loss"]) for part in (samples[:3], samples[3:])]
    total = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    for name, gradient in whole.items():
        average = (halves[0][name] + halves[1][name]) / 2
        # Next to nothing beside the whole: a key's bias has no gradient at all but for rounding.
        assert (average - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8 * total, name


@torch.no_grad()
def test_conditions_can_be_exchanged_alone(module, samples, collate):
    batch = collate(samples)
    own = module.sample_losses(batch)
    assert torch.equal(module.sample_losses(batch, conditions_from=torch.arange(6)), own)
    exchanged = module.sample_losses(batch, conditions_from=torch.arange(6).roll(1))
    assert (exchanged != own).any()


@torch.no_grad()
def test_other_draws_for_another_epoch(module, samples, collate):
    later = collate([sample | {"epoch": 1} for sample in samples])
    assert (module.sample_losses(later) != module.sample_losses(collate(samples))).all()


def test_bf16_autocast_trains(module, samples, collate):
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(collate(samples[:2]))[0]["loss"]
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert {gradient.dtype for gradient in gradients(module, loss).values()} == {torch.float32}


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointed"])
@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_a_compiled_generator_gives_the_same_gradients(flux, samples, collate, what, checkpointed):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = make_module(preset=flux)
    batch = collate(samples)
    plain = gradients(module, module(batch)[0]["loss"])
    compiled = IOMMTrainingModule(module.encoder, module.transformer, module.vae, mask_ratio=0.5, compile=what).train()
    if checkpointed:
        compiled.transformer.enable_gradient_checkpointing()
    fused = gradients(compiled, compiled(batch)[0]["loss"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert plain.keys() == fused.keys()
    for name, gradient in plain.items():
        assert torch.allclose(fused[name], gradient, rtol=1e-3, atol=1e-5), name


@torch.no_grad()
def test_cached_samples_give_the_losses_of_the_pictures_themselves(module, samples, collate):
    batch = collate(samples)
    posterior = module.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist
    inputs = collate.processor.encode([collate.processor.image_only(sample["image"]) for sample in samples])
    tokens = module.encoder.image_features(inputs["pixel_values"])
    cached = [
        sample | {"cached": unpack(pack(Cached(mean, logvar, vision)))}
        for sample, mean, logvar, vision in zip(samples, posterior.mean, posterior.logvar, tokens, strict=True)
    ]
    from_cache = collate(cached)
    assert "pixels" not in from_cache and "pixel_values" not in from_cache
    assert torch.allclose(module.sample_losses(from_cache), module.sample_losses(batch), rtol=5e-3)
    without_tokens = [sample | {"cached": sample["cached"]._replace(vision_tokens=None)} for sample in cached]
    assert torch.allclose(module.sample_losses(collate(without_tokens)), module.sample_losses(batch), rtol=5e-3)
