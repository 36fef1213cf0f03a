"""One call over the diffusers models that IOMM trains: latents in, velocity out.

Packing, position ids, pooled input, padding masks, signs and the direction of time are each family's own business and
live here and nowhere else. Everybody outside speaks the paper's language: latents (B, C, H, W), t in [0, 1] with 1 for
noise, and the velocity z - x.

This file imports torch and diffusers alone, because published checkpoints carry a copy of it.
"""

from math import isqrt
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, UNet2DConditionModel, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.utils.torch_utils import is_compiled_module


def unwrap(transformer: ModelMixin) -> ModelMixin:
    return transformer._orig_mod if is_compiled_module(transformer) else transformer


def flux_patch_size(transformer: FluxTransformer2DModel, latent_channels: int) -> int:
    """Side of the square of latents that Flux takes as one token: 2 for FLUX's own 64 = 16 x 2 x 2 channels."""
    in_channels = transformer.config.in_channels
    patch = isqrt(in_channels // latent_channels)
    if latent_channels * patch**2 != in_channels:
        raise ValueError(
            f"A transformer with in_channels={in_channels} cannot take latents of {latent_channels} channels: the ratio"
            " must be a square, the latents of one token."
        )
    return patch


def latent_multiple(transformer: ModelMixin, latent_channels: int) -> int:
    """Latent heights and widths must be divisible by this."""
    model = unwrap(transformer)
    if isinstance(model, FluxTransformer2DModel):
        return flux_patch_size(model, latent_channels)
    if isinstance(model, ZImageTransformer2DModel):
        return model.config.all_patch_size[0]
    if isinstance(model, UNet2DConditionModel):
        return 2 ** (len(model.config.block_out_channels) - 1)
    raise unsupported(model)


def condition_width(transformer: ModelMixin) -> int:
    """Width D of the condition rows that it reads."""
    model = unwrap(transformer)
    if isinstance(model, FluxTransformer2DModel):
        return model.config.joint_attention_dim
    if isinstance(model, ZImageTransformer2DModel):
        return model.config.cap_feat_dim
    if isinstance(model, UNet2DConditionModel):
        return model.config.cross_attention_dim
    raise unsupported(model)


def unsupported(transformer: ModelMixin) -> TypeError:
    return TypeError(
        f"{type(transformer).__name__} is not a supported generator; use FluxTransformer2DModel,"
        " ZImageTransformer2DModel or UNet2DConditionModel."
    )


def predict_velocity(
    transformer: ModelMixin,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    condition: torch.Tensor,
    condition_mask: torch.Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    r"""
    The velocity z - x that a generator predicts.

    Args:
        transformer (`FluxTransformer2DModel`, `ZImageTransformer2DModel` or `UNet2DConditionModel`): The generator.
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x_t.
        timestep (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1], 1 for noise.
        condition (`torch.Tensor` of shape `(batch_size, rows, dim)`): The encoder's output h.
        condition_mask (`torch.BoolTensor` of shape `(batch_size, rows)`, *optional*): False on padding; padded rows
            change nothing.
        attention_kwargs (`dict`, *optional*): Passed on to the transformer, such as a LoRA `scale`.

    Returns:
        `torch.Tensor` of the shape of `latents`.

    Raises:
        `TypeError`: another class of transformer.
        `ValueError`: latents that cannot be cut into whole tokens, or more positions than a Z-Image transformer has.
    """
    model = unwrap(transformer)
    multiple = latent_multiple(model, latents.shape[1])
    if latents.shape[2] % multiple or latents.shape[3] % multiple:
        raise ValueError(f"Latents of {latents.shape[2]}x{latents.shape[3]} are not divisible by {multiple}.")
    if condition_mask is not None and condition_mask.dtype != torch.bool:
        raise ValueError(f"condition_mask must be of torch.bool, got {condition_mask.dtype}: attention would add it.")
    if isinstance(model, FluxTransformer2DModel):
        family = flux_velocity
    elif isinstance(model, ZImageTransformer2DModel):
        family = z_image_velocity
    else:
        family = unet_velocity
    return family(transformer, latents, timestep, condition, condition_mask, attention_kwargs)


def flux_velocity(transformer, latents, timestep, condition, condition_mask, attention_kwargs) -> torch.Tensor:
    """Flux predicts z - x itself and multiplies t by 1000 itself. Its pooled input, which the paper does not name, is the
    mean of the valid condition rows (our choice)."""
    batch, channels, height, width = latents.shape
    patch = flux_patch_size(unwrap(transformer), channels)
    rows, columns = height // patch, width // patch
    # (B, C, h p, w q) -> (B, h w, C p q), FLUX's own order
    tokens = latents.reshape(batch, channels, rows, patch, columns, patch)
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)

    image_ids = torch.zeros(rows, columns, 3, device=latents.device, dtype=latents.dtype)
    image_ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    image_ids[..., 2] = torch.arange(columns, device=latents.device)
    condition_ids = torch.zeros(condition.shape[1], 3, device=latents.device, dtype=latents.dtype)

    attention_kwargs = dict(attention_kwargs or {})
    if condition_mask is None:
        pooled = condition.mean(1)
    else:
        weights = condition_mask[..., None].to(condition.dtype)
        pooled = (condition * weights).sum(1) / weights.sum(1)
        image_mask = condition_mask.new_ones(batch, rows * columns)
        attention_kwargs["attention_mask"] = torch.cat([condition_mask, image_mask], dim=1)[:, None, None, :]
    velocity = transformer(
        hidden_states=tokens,
        encoder_hidden_states=condition,
        pooled_projections=pooled,
        timestep=timestep,
        img_ids=image_ids.flatten(0, 1),
        txt_ids=condition_ids,
        joint_attention_kwargs=attention_kwargs or None,
        return_dict=False,
    )[0]
    velocity = velocity.reshape(batch, rows, columns, channels, patch, patch)
    return velocity.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def z_image_velocity(transformer, latents, timestep, condition, condition_mask, attention_kwargs) -> torch.Tensor:
    """Z-Image takes 1 - t, predicts x - z, and wants lists: images with a frame axis, conditions without padding."""
    conditions = (
        list(condition) if condition_mask is None else [c[m] for c, m in zip(condition, condition_mask, strict=True)]
    )
    config = unwrap(transformer).config
    # Of positions: the condition's rows from 1 on, padded to multiples of 32, the image after them; its rows; its columns.
    rows = -(-max(map(len, conditions)) // SEQ_MULTI_OF) * SEQ_MULTI_OF + 2
    sides = [side // config.all_patch_size[0] for side in latents.shape[2:]]
    if any(needed > length for needed, length in zip([rows, *sides], config.axes_lens, strict=True)):
        raise ValueError(
            f"Latents of {latents.shape[2]}x{latents.shape[3]} and {max(map(len, conditions))} rows of condition need"
            f" positions {[rows, *sides]}, this generator has axes_lens={list(config.axes_lens)}. Draw smaller or say less."
        )
    velocity = transformer(
        list(latents.unsqueeze(2)),
        1 - timestep,
        conditions,
        joint_attention_kwargs=attention_kwargs,
        patch_size=config.all_patch_size[0],
        f_patch_size=config.all_f_patch_size[0],
        return_dict=False,
    )[0]
    return -torch.stack(velocity).squeeze(2)


def unet_velocity(transformer, latents, timestep, condition, condition_mask, attention_kwargs) -> torch.Tensor:
    """A U-Net takes latents as they are and times up to 1000; its attention reads the condition."""
    return transformer(
        latents,
        timestep * 1000,
        encoder_hidden_states=condition,
        encoder_attention_mask=condition_mask,
        cross_attention_kwargs=attention_kwargs,
        return_dict=False,
    )[0]
