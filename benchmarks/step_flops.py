"""A whole training step of `base` at 512 px by counted FLOPs: ours against everything computed online with a plain graph.

    python benchmarks/step_flops.py

Counted on the meta device from the real classes (`iomm_hf.cost`), for one image-only sample, forward and backward, nothing
recomputed. Plain means: autoencoder and vision tower run at each visit, masked tokens stay in the sequence, and the MLLM
runs over all rows with a graph. Then what else would make a step cheaper; what that does to quality is not measured.
"""

import logging
from dataclasses import dataclass, field, replace

import torch
from timing import record
from trl import TrlParser

from iomm_hf.cost import MetaModel, count_flops, meta_parts
from iomm_hf.presets import Preset, get_preset


@dataclass
class StepFlopsConfig:
    preset: str = field(default="base", metadata={"help": "Which sizes: base or large."})
    resolution: int = field(default=512, metadata={"help": "Side of the pictures in pixels."})
    mask_ratio: float = field(default=0.85, metadata={"help": "Share r of image tokens hidden."})
    wording_tokens: int = field(default=40, metadata={"help": "Tokens of chat template and instruction, about."})
    image_tokens: int = field(default=256, metadata={"help": "Image tokens of a picture."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of step_flops.json."})


def build(config: StepFlopsConfig, preset: Preset, resolution: int, mask_ratio: float) -> MetaModel:
    prefix = config.wording_tokens + round((1 - mask_ratio) * config.image_tokens)
    return MetaModel(meta_parts(preset), resolution, prefix, torch.bfloat16)


def plain_step(config: StepFlopsConfig) -> dict[str, int]:
    model = build(config, get_preset(config.preset), config.resolution, mask_ratio=0.0)
    return {
        "autoencoder": count_flops(model.encode_latents),
        "vision tower": count_flops(model.see),
        "adapter": count_flops(model.adapt, backward=True),
        "MLLM, all rows": count_flops(model.plain, backward=True),
        "generator": count_flops(model.generate, backward=True),
    }


def candidates(config: StepFlopsConfig) -> dict[str, float]:
    """FLOPs of a step with latents and vision tokens cached, by what is changed besides; the mean of two kinds of steps where
    they share the run."""
    preset, half = get_preset(config.preset), config.resolution // 2

    def step(preset=preset, resolution=config.resolution, mask_ratio=config.mask_ratio, kept=1.0) -> int:
        model = build(config, preset, resolution, mask_ratio)
        batch, channels, height, width = model.latent
        model.latent = (batch, channels, height, round(kept * width))  # as many tokens as are kept
        return sum(model.flops(cached_latents=True, cached_vision_tokens=True).values())

    def with_queries(count: int) -> Preset:
        return replace(preset, condition_config=preset.condition_config | {"num_queries": count})

    channels = 4 * preset.transformer_config["in_channels"]
    coarse = replace(preset, transformer_config=preset.transformer_config | {"in_channels": channels})
    now, few = step(), step(with_queries(128))
    return {
        "nothing else": now,
        "`mask_ratio: 0.95`": step(mask_ratio=0.95),
        "`num_queries: 128`": few,
        "`num_queries: 64`": step(with_queries(64)),
        f"half of the steps at `resolution: {half}`": (now + step(resolution=half)) / 2,
        f"`num_queries: 128`, half of the steps at `resolution: {half}`": (few + step(with_queries(128), half)) / 2,
        "not built: a quarter of the generator's image tokens dropped": step(kept=0.75),
        "not built: patches of 4 x 4 latents in half of the steps": (now + step(coarse)) / 2,
    }


def main(config: StepFlopsConfig):
    logging.disable(logging.WARNING)
    plain = plain_step(config)
    model = build(config, get_preset(config.preset), config.resolution, config.mask_ratio)
    steps = {
        "plain": plain,
        "nothing cached": model.flops(),
        "latents cached": model.flops(cached_latents=True),
        "vision tokens too": model.flops(cached_latents=True, cached_vision_tokens=True),
    }
    total = sum(plain.values())
    print("| TFLOP a sample | " + " | ".join(steps) + " |\n|---|" + "---|" * len(steps))
    for part in dict.fromkeys(part for parts in steps.values() for part in parts):
        cells = [f"{parts[part] / 1e12:.3f}" if part in parts else "" for parts in steps.values()]
        print(f"| {part} | " + " | ".join(cells) + " |")
    around = {name: sum(parts.values()) - parts["autoencoder"] - parts["generator"] for name, parts in steps.items()}
    print("| condition path alone | " + " | ".join(f"{flops / 1e12:.3f}" for flops in around.values()) + " |")
    print("| all | " + " | ".join(f"{sum(parts.values()) / 1e12:.3f}" for parts in steps.values()) + " |")
    print("| ours / plain | " + " | ".join(f"{sum(parts.values()) / total:.3f}" for parts in steps.values()) + " |")
    tried, tower = candidates(config), plain["vision tower"]
    print("\n| latents cached, and | ours / plain | vision tokens too |\n|---|---|---|")
    for change, flops in tried.items():
        print(f"| {change} | {(flops + tower) / total:.3f} | {flops / total:.3f} |")
    print()
    ratios = {f"ours / plain, {name}": sum(parts.values()) / total for name, parts in steps.items() if name != "plain"}
    ratios |= {f"ours / plain, vision tokens too, {change}": flops / total for change, flops in tried.items()}
    rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
    record("step_flops", {"preset": config.preset, "FLOPs a sample, plain": total, **rounded}, config.output_dir)


if __name__ == "__main__":
    main(*TrlParser(StepFlopsConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
