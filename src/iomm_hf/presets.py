"""The paper's models as data, and the small one that two CPU cores train.

`base`, `large` and `xl` are configurations, not trained models; a test pins each count to the paper's. What each part is,
where it comes from and under which licence stands beside it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Preset:
    r"""
    One size of IOMM.

    Args:
        transformer_class (`str`): diffusers class of the generator.
        transformer_config (`dict`): Its configuration.
        condition_config (`dict`): Fields of [`IOMMConfig`] beside the MLLM's.
        mllm (`str`, *optional*): Hub id of the frozen MLLM; `None` where it is made from `mllm_config`.
        mllm_config (`dict`, *optional*): `InternVLConfig` of an MLLM made from nothing.
        vae (`str`, *optional*): Hub id of the frozen autoencoder; `None` where it is made from `vae_config`.
        vae_subfolder (`str`, *optional*): Its folder in that repository.
        vae_config (`dict`, *optional*): `AutoencoderKL` configuration.
        resolution (`int`): Side of the pictures in pixels.
        mask_ratio (`float`): Share r of image tokens hidden in image-only training.
        shift (`float`): Timestep shift of the sampler (neighbours use 3 at full size).
    """

    transformer_class: str
    transformer_config: dict[str, Any]
    condition_config: dict[str, Any] = field(default_factory=dict)
    mllm: str | None = None
    mllm_config: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None
    vae_subfolder: str | None = None
    vae_config: dict[str, Any] = field(default_factory=dict)
    resolution: int = 512
    mask_ratio: float = 0.85
    shift: float = 3.0


# The paper's MLLM; its autoencoder is not named, ours is FLUX's. Repository ids are those of the libraries' own
# documentation; revisions are resolved and recorded when a run starts.
FULL_SIZE_PARTS: dict[str, Any] = {
    "mllm": "OpenGVLab/InternVL3-2B-hf",
    "vae": "black-forest-labs/FLUX.1-schnell",
    "vae_subfolder": "vae",
}

PRESETS = {
    # Sizes follow trials on 64 px scenes: see results/shapes/README.md.
    "tiny": Preset(
        transformer_class="UNet2DConditionModel",
        transformer_config={
            "sample_size": 16,
            "block_out_channels": (48, 96, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (1, 3, 4),  # numbers of heads, 32 wide: diffusers' own misnomer
            "cross_attention_dim": 128,
            "norm_num_groups": 16,
        },
        # All rows: a U-Net's rows cannot attend to each other, so it wants those that already hold an object each.
        condition_config={"num_queries": 4, "condition_tokens": "all", "adapter_head_dim": 32},
        mllm_config={
            "vision_config": {
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 512,
                "image_size": (64, 64),
                "patch_size": (8, 8),
                "layer_scale_init_value": 1.0,  # InternVL's 0.1 hardly learns at this depth
            },
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 384,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            },
            "image_seq_length": 16,
            "downsample_ratio": 0.5,
        },
        vae_config={
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (16, 32, 48),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "mid_block_add_attention": False,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "sample_size": 64,
            "shift_factor": 0.0,
        },
        resolution=64,
        mask_ratio=0.5,  # its 16 image tokens are large: at the paper's 0.85 two would be left
        shift=1.0,
    ),
    "base": Preset(  # IOMM-B: 1.573B
        transformer_class="FluxTransformer2DModel",
        transformer_config={
            "in_channels": 64,
            "num_layers": 10,
            "num_single_layers": 20,
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "joint_attention_dim": 1536,
            "pooled_projection_dim": 1536,
        },
        **FULL_SIZE_PARTS,
    ),
    "large": Preset(  # IOMM-L: 2.730B
        transformer_class="FluxTransformer2DModel",
        transformer_config={
            "in_channels": 64,
            "num_layers": 10,
            "num_single_layers": 19,
            "num_attention_heads": 16,
            "attention_head_dim": 128,
            "joint_attention_dim": 1536,
            "pooled_projection_dim": 1536,
        },
        **FULL_SIZE_PARTS,
    ),
    "xl": Preset(  # IOMM-XL: 6.155B
        transformer_class="ZImageTransformer2DModel",
        transformer_config={"cap_feat_dim": 1536},
        mask_ratio=0.45,
        **FULL_SIZE_PARTS,
    ),
}


def get_preset(name: str) -> Preset:
    r"""
    A preset by name.

    Raises:
        `ValueError`: an unknown name; the message lists the known ones.

    Example:

    ```python
    >>> from iomm_hf import get_preset
    >>> get_preset("base").mask_ratio
    0.85
    ```
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def build_transformer(preset: Preset, device: str = "cpu"):
    """A fresh generator in float32; `device="meta"` counts weights without memory."""
    import diffusers

    with torch.device(device):
        return getattr(diffusers, preset.transformer_class)(**preset.transformer_config)
