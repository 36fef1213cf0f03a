"""The models that benchmarks time: a Flux of any size between the small world's own parts, and any preset with random weights."""

from dataclasses import replace

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import InternVLConfig

from iomm_hf import IOMMConditionEncoder, IOMMConfig, IOMMPipeline
from iomm_hf.cost import FLUX_AUTOENCODER, INTERNVL3_2B
from iomm_hf.presets import PRESETS, Preset, build_transformer
from iomm_hf.tiny import tiny_mllm_config, tiny_processor


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


def random_pipeline(preset: Preset, device: torch.device) -> IOMMPipeline:
    """A preset's pipeline in float32 with random weights, made on `device`. Full-size ones read the small world's tokens."""
    if preset.mllm_config:
        processor = tiny_processor(preset)
        mllm_config = tiny_mllm_config(processor, preset)
    else:
        mllm_config = InternVLConfig(**INTERNVL3_2B)
        view = {"vision_config": {"image_size": mllm_config.vision_config.image_size}, "image_seq_length": 256}
        processor = tiny_processor(replace(preset, mllm_config=view))
        mllm_config.image_token_id = processor.image_token_id
    with device:
        encoder = IOMMConditionEncoder(IOMMConfig(mllm_config=mllm_config, **preset.condition_config))
        vae = AutoencoderKL(**(preset.vae_config or FLUX_AUTOENCODER))
    return IOMMPipeline(
        text_encoder=encoder,
        processor=processor,
        transformer=build_transformer(preset, str(device)),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=preset.shift),
        resolution=preset.resolution,
    )
