"""The generators that benchmarks time: a Flux of any size between the small world's own parts."""

from dataclasses import replace

from iomm_hf.presets import PRESETS, Preset


def flux_preset(width: int, layers: int, num_queries: int = 16, head_dim: int = 64) -> Preset:
    """A preset with `layers` double blocks and twice as many single ones, `width` wide, on tokens of 2 x 2 latents."""
    return replace(
        PRESETS["tiny"],
        transformer_class="FluxTransformer2DModel",
        transformer_config={
            "in_channels": 16,
            "num_layers": layers,
            "num_single_layers": 2 * layers,
            "num_attention_heads": width // head_dim,
            "attention_head_dim": head_dim,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 128,
            "axes_dims_rope": (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        },
        condition_config={"num_queries": num_queries, "adapter_head_dim": 32},
    )
