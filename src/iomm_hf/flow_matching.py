"""Flow matching as the paper has it (Sec. 3): a straight line from the image to noise, and its constant velocity.

x_t = (1 - t) x + t z with z ~ N(0, I); the generator learns z - x, so t = 1 is noise and t = 0 the image. Samplers take
their steps from a diffusers scheduler; nothing here draws pictures.
"""

from collections.abc import Sequence
from typing import Literal

import torch


TimestepSampling = Literal["uniform", "logit_normal"]


def expand_time(timestep: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, ...) in the shape of `like`."""
    return timestep.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    r"""
    The point x_t between image and noise.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, ...)`): x.
        noise (`torch.Tensor` of the same shape): z.
        timestep (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1].

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.flow_matching import interpolate
    >>> interpolate(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]))
    tensor([[0.2500, 0.2500]])
    ```
    """
    t = expand_time(timestep, latents)
    return (1 - t) * latents + t * noise


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """dx_t / dt = z - x, what the generator learns to predict."""
    return noise - latents


def flow_matching_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in float32, one value per sample: (B, ...) -> (B,)."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


def shift_time(timestep: torch.Tensor, shift: float) -> torch.Tensor:
    """Moves times towards noise: t -> s t / (1 + (s - 1) t). The identity at `shift=1`."""
    return shift * timestep / (1 + (shift - 1) * timestep)


def sample_timesteps(
    generators: Sequence[torch.Generator], sampling: TimestepSampling = "uniform", shift: float = 1.0
) -> torch.Tensor:
    r"""
    One time per sample, each from that sample's own generator, so that it does not depend on the batch around it.

    Args:
        generators (one CPU `torch.Generator` per sample): Sources of randomness.
        sampling (`str`, *optional*, defaults to `"uniform"`): `"uniform"` (the paper) or `"logit_normal"` (sigmoid of
            a standard normal, more weight in the middle).
        shift (`float`, *optional*, defaults to 1.0): See [`shift_time`].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, in [0, 1].

    Raises:
        `ValueError`: an unknown `sampling`, or a `shift` that is not positive.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    if sampling == "uniform":
        timesteps = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    elif sampling == "logit_normal":
        timesteps = torch.cat([torch.randn(1, generator=generator) for generator in generators]).sigmoid()
    else:
        raise ValueError(f"timestep sampling must be 'uniform' or 'logit_normal', got {sampling!r}.")
    return shift_time(timesteps, shift)
