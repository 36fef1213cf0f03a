"""The trainable unit: one `nn.Module` whose forward takes a batch and returns the loss.

The hooks of DDP and FSDP2 run only through the forward of the one module that they wrap, so encoder, generator and
objective live together here. MLLM and autoencoder are inside but frozen: they get no gradient, and
`trainable_state` leaves them out of everything that is saved.
"""

from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.distributed.tensor import DTensor

from ..flow_matching import TimestepSampling, flow_matching_loss, interpolate, sample_timesteps, velocity_target
from ..generators import predict_velocity
from ..modeling_iomm import IOMMConditionEncoder, draw_image_mask
from ..pipeline_iomm import draw_latents
from .alignment import VisionAlignment


class IOMMTrainingModule(nn.Module):
    r"""
    IOMM's objective over a batch, the same in both stages: image-only, text and unconditional samples differ only in the
    token sequences that the collator gave them (paper, Sec. 3 and Algorithm 1).

    Args:
        encoder ([`IOMMConditionEncoder`]): Its adapter and connector train.
        transformer (`FluxTransformer2DModel`, `ZImageTransformer2DModel` or `UNet2DConditionModel`): The generator, trained.
        vae (`AutoencoderKL`): Frozen.
        mask_ratio (`float`): Share r of image tokens hidden, in [0, 1).
        timestep_sampling (`str`, *optional*, defaults to `"uniform"`): Law of t.
        timestep_shift (`float`, *optional*, defaults to 1.0): See [`~iomm_hf.flow_matching.shift_time`].
        compile (`str`, *optional*, defaults to `"none"`): `"whole"` compiles the generator's call here, `"blocks"` its repeated
            blocks, wherever they are called.
        alignment ([`VisionAlignment`], *optional*): Made for `transformer`; trained with it.
        alignment_weight (`float`, *optional*, defaults to 0.5): Its share of what is minimised.
    """

    def __init__(
        self,
        encoder: IOMMConditionEncoder,
        transformer: ModelMixin,
        vae: AutoencoderKL,
        mask_ratio: float,
        timestep_sampling: TimestepSampling = "uniform",
        timestep_shift: float = 1.0,
        compile: Literal["none", "blocks", "whole"] = "none",
        alignment: VisionAlignment | None = None,
        alignment_weight: float = 0.5,
    ):
        super().__init__()
        self.encoder = encoder
        self.transformer = transformer.requires_grad_(True)
        self.vae = vae.requires_grad_(False).eval()
        self.mask_ratio = mask_ratio
        self.timestep_sampling = timestep_sampling
        self.timestep_shift = timestep_shift
        self.predict_velocity = torch.compile(predict_velocity) if compile == "whole" else predict_velocity
        if compile == "blocks":
            self.transformer.compile_repeated_blocks()
        self.alignment = alignment
        self.alignment_weight = alignment_weight

    def train(self, mode: bool = True) -> "IOMMTrainingModule":
        super().train(mode)
        self.vae.eval()  # the encoder keeps its own MLLM in eval mode
        return self

    def trainable_parameters(self) -> list[torch.Tensor]:
        """What trains; of sharded weights this rank's part, with the same memory."""
        return [local_part(parameter) for parameter in self.parameters() if parameter.requires_grad]

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of what trains, for checkpoints; of sharded weights this rank's part."""
        return {
            name: local_part(parameter.detach())
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def forward(self, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What is minimised, as terms to add up: `loss`, the mean over a batch of [`~iomm_hf.data.collate.IOMMCollator`],
        and `alignment`, weighted, where there is one. Beside it, to be looked at, each sample's `losses` and `timesteps`."""
        losses, timesteps = self.losses_and_timesteps(batch)
        terms = {"loss": losses.mean()}
        if self.alignment is not None:
            terms["alignment"] = self.alignment_weight * self.alignment(batch["vision_tokens"])
        return terms, {"losses": losses.detach(), "timesteps": timesteps}

    def sample_losses(self, batch: dict[str, Any], conditions_from: torch.Tensor | None = None) -> torch.Tensor:
        r"""
        One loss per sample, (B,). Time, mask and noise of a sample come from its own seed, in this order, so they do not
        depend on its neighbours.

        Args:
            batch (`dict`): From the collator.
            conditions_from (`torch.LongTensor` of shape `(B,)`, *optional*): Gives sample `i` the condition of sample
                `conditions_from[i]`, everything else unchanged: the control that shows whether conditions are used.
        """
        return self.losses_and_timesteps(batch, conditions_from)[0]

    def losses_and_timesteps(
        self, batch: dict[str, Any], conditions_from: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`sample_losses`] and the times that they were drawn at, both (B,)."""
        device = batch["seed"].device
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"].tolist()]
        timestep = sample_timesteps(generators, self.timestep_sampling, self.timestep_shift).to(device)
        image_mask = None
        if "pixel_values" in batch or "image_features" in batch:
            ids = batch["input_ids"]
            image_mask = draw_image_mask(ids, self.encoder.image_token_id, self.mask_ratio, generators)

        with torch.no_grad():
            posterior = self.posterior(batch)
            noise, posterior_noise = (
                torch.stack([torch.randn(posterior.mean.shape[1:], generator=generator) for generator in generators])
                for _ in range(2)
            )
            noise = noise.to(device)
            latents = draw_latents(self.vae, posterior, posterior_noise.to(device)).float()

        output = self.encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch.get("pixel_values"),
            image_mask=image_mask,
            image_features=batch.get("image_features"),
        )
        condition, condition_mask = output.condition, output.condition_mask
        if conditions_from is not None:
            condition = condition[conditions_from]
            condition_mask = None if condition_mask is None else condition_mask[conditions_from]
        velocity = self.predict_velocity(
            self.transformer, interpolate(latents, noise, timestep), timestep, condition, condition_mask
        )
        return flow_matching_loss(velocity, velocity_target(latents, noise)), timestep

    def posterior(self, batch: dict[str, Any]) -> DiagonalGaussianDistribution:
        """What the autoencoder makes of the batch's pictures, (B, C, h, w): computed here, or cached."""
        if "pixels" in batch:
            return self.vae.encode(batch["pixels"].to(self.vae.dtype) / 127.5 - 1).latent_dist
        return DiagonalGaussianDistribution(torch.cat([batch["latent_mean"], batch["latent_logvar"]], dim=1))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
