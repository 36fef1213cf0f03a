"""Alignment of the generator's hidden states with the frozen vision tokens (REPA, arXiv:2410.06940); not in the paper.

What the picture shows where, the MLLM's vision tower knows already: an early layer of the generator that is asked for it,
through a small head, learns it sooner than from the velocity alone. The head trains with the run and draws nothing, so
finished pipelines do not hold it.
"""

from math import isqrt

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, ModelMixin, UNet2DConditionModel
from torch import nn


class VisionAlignment(nn.Module):
    r"""
    Mean of 1 - cosine between a head over the generator's image tokens and the picture's vision tokens.

    The image tokens are those behind Flux's last double block, or the cells behind a U-Net's middle block. A vision token
    covers a square of them; the head reads them side by side.

    Args:
        transformer (`FluxTransformer2DModel` or `UNet2DConditionModel`): The generator; a hook on it keeps the hidden
            states of each forward pass.
        vision_dim (`int`): Width of a vision token.
        tokens_per_side (`int`): Image tokens along a side of the training picture.
        vision_tokens_per_side (`int`): Vision tokens along it.

    Raises:
        `TypeError`: another generator than these.
        `ValueError`: vision tokens do not cover whole image tokens.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> transformer = tiny_pipeline().transformer
    >>> alignment = VisionAlignment(transformer, vision_dim=128, tokens_per_side=4, vision_tokens_per_side=4)
    >>> alignment.head[0].in_features == transformer.config.block_out_channels[-1]
    True
    ```
    """

    def __init__(self, transformer: ModelMixin, vision_dim: int, tokens_per_side: int, vision_tokens_per_side: int):
        super().__init__()
        if isinstance(transformer, FluxTransformer2DModel):
            width, block, keep = transformer.inner_dim, transformer.transformer_blocks[-1], self._keep_tokens
        elif isinstance(transformer, UNet2DConditionModel):
            width, block, keep = transformer.config.block_out_channels[-1], transformer.mid_block, self._keep_cells
        else:
            raise TypeError(
                f"Alignment knows FluxTransformer2DModel and UNet2DConditionModel, got {type(transformer).__name__}."
            )
        if tokens_per_side % vision_tokens_per_side:
            raise ValueError(
                f"{tokens_per_side} image tokens a side cannot be shared by {vision_tokens_per_side} vision tokens: choose"
                " a resolution whose image tokens are a multiple of them, or leave alignment_weight at 0."
            )
        self.side = vision_tokens_per_side
        self.covered = tokens_per_side // vision_tokens_per_side
        self.head = nn.Sequential(
            nn.Linear(self.covered**2 * width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, vision_dim),
        )
        self._hidden: list[torch.Tensor] = []
        block.register_forward_hook(keep)

    def _keep_tokens(self, block, inputs, output):
        self._hidden[:] = [output[1]]  # (condition rows, image tokens)

    def _keep_cells(self, block, inputs, output):
        self._hidden[:] = [output.flatten(2).transpose(1, 2)]  # (B, width, P p, P q) -> (B, P p P q, width)

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
