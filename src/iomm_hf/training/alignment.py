"""Alignment of the generator's hidden states with the frozen vision tokens (REPA, arXiv:2410.06940); not in the paper.

What the picture shows where, the MLLM's vision tower knows already: an early layer of the generator that is asked for it,
through a small head, learns it sooner than from the velocity alone. The head trains with the run and draws nothing, so
finished pipelines do not hold it.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, ModelMixin
from torch import nn


class VisionAlignment(nn.Module):
    r"""
    Mean of 1 - cosine between a head over the image tokens behind Flux's last double block and the picture's vision tokens.

    A vision token covers a square of image tokens; the head reads them side by side.

    Args:
        transformer (`FluxTransformer2DModel`): The generator; a hook on it keeps the hidden states of each forward pass.
        vision_dim (`int`): Width of a vision token.
        tokens_per_side (`int`): Image tokens along a side of the training picture.
        vision_tokens_per_side (`int`): Vision tokens along it.

    Raises:
        `TypeError`: another generator than Flux.
        `ValueError`: vision tokens do not cover whole image tokens.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> transformer = tiny_pipeline().transformer
    >>> alignment = VisionAlignment(transformer, vision_dim=128, tokens_per_side=8, vision_tokens_per_side=4)
    >>> alignment.head[0].in_features == 4 * transformer.inner_dim
    True
    ```
    """

    def __init__(self, transformer: ModelMixin, vision_dim: int, tokens_per_side: int, vision_tokens_per_side: int):
        super().__init__()
        if not isinstance(transformer, FluxTransformer2DModel):
            raise TypeError(f"Alignment knows FluxTransformer2DModel alone, got {type(transformer).__name__}.")
        if tokens_per_side % vision_tokens_per_side:
            raise ValueError(
                f"{tokens_per_side} image tokens a side cannot be shared by {vision_tokens_per_side} vision tokens: choose"
                " a resolution whose image tokens are a multiple of them, or leave alignment_weight at 0."
            )
        self.side = vision_tokens_per_side
        self.covered = tokens_per_side // vision_tokens_per_side
        width = transformer.inner_dim
        self.head = nn.Sequential(
            nn.Linear(self.covered**2 * width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, vision_dim),
        )
        self._hidden: list[torch.Tensor] = []
        transformer.transformer_blocks[-1].register_forward_hook(self._keep)

    def _keep(self, block, inputs, output):
        self._hidden[:] = [output[1]]  # (condition rows, image tokens)

    def forward(self, vision_tokens: torch.Tensor) -> torch.Tensor:
        """Vision tokens (B, P * P, D) of the pictures that the generator saw last -> a scalar in [0, 2]."""
        [hidden], self._hidden[:] = list(self._hidden), []
        hidden = hidden.unflatten(1, (self.side, self.covered, self.side, self.covered))  # (B, P, p, P, q, width)
        hidden = hidden.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, P * P, p q width)
        return 1 - F.cosine_similarity(self.head(hidden).float(), vision_tokens.float(), dim=-1).mean()


def vision_tokens_per_side(num_tokens: int) -> int:
    r"""
    Raises:
        `ValueError`: the MLLM's vision tokens make no square.
    """
    side = isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"Alignment needs a square of vision tokens, got {num_tokens}.")
    return side
