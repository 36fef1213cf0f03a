"""`IOMMPipeline` against diffusers' `FluxPipeline`: the same transformer, autoencoder, conditions, noise, steps and tokens.

    python benchmarks/pipeline.py

Both draw the same picture (checked first). Conditions are given, because FluxPipeline has other text encoders; no guidance.
"""

from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from models import flux_preset
from timing import compare, record
from trl import TrlParser

from iomm_hf.tiny import tiny_pipeline


@dataclass
class PipelineConfig:
    width: int = field(default=512, metadata={"help": "Width of the Flux; its heads are 64 wide."})
    layers: int = field(default=2, metadata={"help": "Double blocks; twice as many single ones."})
    resolution: int = field(default=256, metadata={"help": "Side of the picture in pixels."})
    steps: int = field(default=8, metadata={"help": "Sampling steps."})
    rounds: int = field(default=10, metadata={"help": "Timed pictures of both."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of pipeline.json."})


def main(config: PipelineConfig):
    ours = tiny_pipeline(flux_preset(config.width, config.layers))
    theirs = FluxPipeline(
        # Ours hands the scheduler its sigmas shifted; theirs computes a shift from the number of tokens, here 1.
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=ours.scheduler.config.shift),
        vae=ours.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=ours.transformer,
    )
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        condition = ours.text_encoder(**ours.processor.encode([ours.processor.text_to_image("a star")])).condition
    latents = torch.randn(
        1, 4, config.resolution // 4, config.resolution // 4, generator=torch.Generator().manual_seed(0)
    )
    packed = FluxPipeline._pack_latents(latents, *latents.shape)
    size = {"height": config.resolution, "width": config.resolution, "num_inference_steps": config.steps}

    def draw_ours():
        return ours(prompt_embeds=condition, guidance_scale=1.0, latents=latents, output_type="pt", **size).images

    def draw_theirs():
        embeddings = {"prompt_embeds": condition, "pooled_prompt_embeds": condition.mean(1)}
        return theirs(**embeddings, latents=packed, output_type="pt", **size).images

    difference = (draw_ours() - draw_theirs()).abs().max().item()
    assert difference < 1e-3, f"the two pictures differ by {difference}"
    record(
        "pipeline",
        {
            "width": config.width,
            "steps": config.steps,
            "time, ours / FluxPipeline": compare(draw_ours, draw_theirs, config.rounds),
        },
        config.output_dir,
    )


if __name__ == "__main__":
    main(*TrlParser(PipelineConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
