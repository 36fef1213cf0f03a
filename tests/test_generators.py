"""Each generator family's conventions: padding changes nothing, signs and times are right, released weights drop in."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn

from iomm_hf import IOMMPipeline, predict_velocity
from iomm_hf.generators import condition_width, flux_patch_size, latent_multiple
from iomm_hf.tiny import tiny_transformer, tiny_vae


def test_masks_are_truth_values():
    latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 128)
    with pytest.raises(ValueError, match=r"must be of torch.bool, got torch.int64"):
        predict_velocity(tiny_z_image(), latents, torch.rand(2), condition, torch.ones(2, 3, dtype=torch.long))


def tiny_z_image() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=128,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 64, 64],
    ).eval()
    for parameter in model.parameters():  # its pad tokens start at zero; make every weight count
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def tiny_flux(flux) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = tiny_transformer(flux)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(params=["flux", "z_image", "unet"], scope="module")
def generator(request, tiny_flux):
    return {"flux": tiny_flux, "z_image": tiny_z_image(), "unet": tiny_transformer()}[request.param]


@pytest.fixture
def inputs():
    torch.manual_seed(2)
    return torch.randn(3, 4, 16, 12), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 9, 128)


def test_velocity_has_the_latents_shape(generator, inputs):
    latents, timestep, condition = inputs
    assert condition_width(generator) == condition.shape[-1]
    with torch.no_grad():
        velocity = predict_velocity(generator, latents, timestep, condition)
        other = predict_velocity(generator, latents, timestep, condition + 1)
    assert velocity.shape == latents.shape
    assert (velocity - other).abs().max() > 1e-3  # the condition matters


@torch.no_grad()
def test_batch_equals_single(generator, inputs):
    latents, timestep, condition = inputs
    together = predict_velocity(generator, latents, timestep, condition)
    for i in range(3):
        alone = predict_velocity(generator, latents[i : i + 1], timestep[i : i + 1], condition[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-4


@torch.no_grad()
def test_padded_condition_rows_change_nothing(generator, inputs):
    latents, timestep, condition = inputs
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1, :3] = False
    padded = predict_velocity(generator, latents, timestep, condition, mask)
    loud = predict_velocity(generator, latents, timestep, torch.where(mask[..., None], condition, 100.0), mask)
    assert (padded - loud).abs().max() < 1e-4
    for i in range(3):
        alone = predict_velocity(generator, latents[i : i + 1], timestep[i : i + 1], condition[i : i + 1, mask[i]])
        assert (padded[i] - alone[0]).abs().max() < 1e-4


class ExactFlux(FluxTransformer2DModel):
    """Answers with the exact velocity of one known image and noise, in Flux's own packing."""

    def forward(self, hidden_states, timestep, **kwargs):
        assert ((timestep >= 0) & (timestep <= 1)).all()
        self.times.append(timestep[0].item())
        batch, channels, rows, columns = self.velocity.shape
        tokens = self.velocity.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, h, w, p, q)
        return (tokens.permute(0, 2, 3, 1, 4, 5).reshape(batch, rows * columns // 4, channels * 4),)


class ExactZImage(ZImageTransformer2DModel):
    """The same in Z-Image's conventions: lists with a frame axis, x - z, and 1 - t."""

    def forward(self, x, t, cap_feats, **kwargs):
        self.times.append(1 - t[0].item())
        return (list(-self.velocity.unsqueeze(2)),)


class ExactUNet(UNet2DConditionModel):
    """And in a U-Net's: latents as they are, times up to 1000."""

    def forward(self, sample, timestep, **kwargs):
        self.times.append(timestep[0].item() / 1000)
        return (self.velocity,)


@pytest.mark.parametrize("exact", [ExactFlux, ExactZImage, ExactUNet])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_exact_velocity_samples_back_to_the_clean_latent(exact, shift, tiny_flux):
    torch.manual_seed(3)
    clean, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    base = next(model for model in (tiny_flux, tiny_z_image(), tiny_transformer()) if issubclass(exact, type(model)))
    generator = exact.from_config(base.config)
    generator.velocity, generator.times = noise - clean, []
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = IOMMPipeline(text_encoder=None, processor=None, transformer=generator, vae=tiny_vae(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        prompt_embeds=torch.zeros(2, 3, 128),
        latents=noise,
        guidance_scale=1.0,
        num_inference_steps=7,
        output_type="latent",
    ).images
    assert (latents - clean).abs().max() < 1e-5
    assert len(generator.times) == 7
    assert abs(generator.times[0] - 1) < 1e-6 and generator.times == sorted(generator.times, reverse=True)


def test_flux_tokens_are_fluxs_own_packing(tiny_flux):
    """ExactFlux above packs by unfold; FLUX's own pipeline must agree with it and with us."""
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 8)
    expected = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    seen = {}

    class Spy(FluxTransformer2DModel):
        def forward(self, hidden_states, img_ids, **kwargs):
            seen.update(tokens=hidden_states, ids=img_ids)
            return (hidden_states,)

    back = predict_velocity(Spy.from_config(tiny_flux.config), latents, torch.ones(2), torch.zeros(2, 3, 128))
    assert torch.equal(seen["tokens"], expected)
    assert torch.equal(back, latents)
    assert torch.equal(seen["ids"], FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


def test_agrees_with_diffusers_z_image_pipeline():
    """A released Z-Image transformer drops in: same weights, embeddings and noise give the same latents."""
    transformer = tiny_z_image()
    vae = tiny_vae()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(4)
    embeds, negative, noise = torch.randn(2, 5, 128), torch.randn(2, 5, 128), torch.randn(2, 4, 16, 16)
    theirs = ZImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    ours = IOMMPipeline(text_encoder=None, processor=None, transformer=transformer, vae=vae, scheduler=scheduler)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    sigmas = torch.linspace(1, 1 / 5, 5).tolist()
    expected = theirs(
        prompt_embeds=list(embeds),
        negative_prompt_embeds=list(negative),
        latents=noise.clone(),
        sigmas=sigmas,
        num_inference_steps=5,
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    # Z-Image counts guidance from the conditional branch: its scale is ours minus one.
    latents = ours(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        latents=noise.clone(),
        num_inference_steps=5,
        guidance_scale=4.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert (latents - noise).abs().max() > 0.1
    assert (latents - expected).abs().max() < 1e-4


def test_what_does_not_fit_is_refused(inputs, tiny_flux):
    latents, timestep, condition = inputs
    with pytest.raises(TypeError, match="AutoencoderKL is not a supported generator"):
        latent_multiple(AutoencoderKL(), 4)
    with pytest.raises(TypeError, match="AutoencoderKL is not a supported generator"):
        condition_width(AutoencoderKL())
    with pytest.raises(ValueError, match="in_channels=16"):
        flux_patch_size(tiny_flux, 3)
    for model, rows in ((tiny_flux, 15), (tiny_transformer(), 14)):
        with pytest.raises(ValueError, match=f"{rows}x12"):
            predict_velocity(model, latents[:, :, :rows], timestep, condition)


@torch.no_grad()
def test_z_image_draws_up_to_its_axes_and_refuses_more():
    model, timestep = tiny_z_image(), torch.tensor([0.5])
    for height, rows in ((128, 9), (2, 96)):
        latents = torch.randn(1, 4, height, 2)
        assert predict_velocity(model, latents, timestep, torch.randn(1, rows, 128)).shape == latents.shape
    for height, rows in ((130, 9), (2, 97)):
        with pytest.raises(ValueError, match=f"{height}x2 and {rows} rows .*axes_lens=.128, 64, 64."):
            predict_velocity(model, torch.randn(1, 4, height, 2), timestep, torch.randn(1, rows, 128))
