"""Training steps and drawing of a full-size preset on one GPU, against what `iomm-hf estimate` foretells.

    python benchmarks/full_size.py --preset base --cases 16 32+checkpointing 16+cached 16+compiled
    python benchmarks/full_size.py --preset base --frozen_dir FOLDER    # random frozen parts, for the recipes to run with

Weights are random and the batch stays the same, as neither changes what a step costs: image-only samples, bf16 autocast,
clipping, optimizer and averaged weights as in the recipes. What a step waits for its data is not in it.
"""

import gc
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import random_pipeline
from PIL import Image
from timing import record, seconds
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.cost import estimate_training
from iomm_hf.data.collate import IOMMCollator
from iomm_hf.generators import predict_velocity
from iomm_hf.presets import get_preset
from iomm_hf.training import IOMMTrainingModule, PretrainConfig
from iomm_hf.training.attention import attention_kernel
from iomm_hf.training.optimizers import AveragedWeights, build_optimizers, clip_gradients


OPTIONS = ("checkpointing", "cached", "compiled")


@dataclass
class FullSizeConfig:
    preset: str = field(default="base", metadata={"help": "Which sizes: base, large or xl."})
    cases: list[str] = field(
        default_factory=lambda: ["16", "32+checkpointing", "16+cached", "16+compiled"],
        metadata={"help": f"Samples a step, and what is on: {', '.join(OPTIONS)} ('cached': latents)."},
    )
    resolution: int | None = field(default=None, metadata={"help": "Side of the pictures, px. Default: the preset's."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon."})
    ema: bool = field(default=True, metadata={"help": "Hold averaged weights."})
    draw: int = field(default=4, metadata={"help": "Pictures to draw at once, 20 steps with guidance; 0 for none."})
    rounds: int = field(default=5, metadata={"help": "Timed steps, after two that do not count."})
    frozen_dir: str | None = field(default=None, metadata={"help": "Write frozen parts here and stop."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of full_size-PRESET-PIXELS.json."})


def case_of(text: str) -> tuple[int, set[str]]:
    batch_size, *options = text.split("+")
    if not batch_size.isdecimal() or set(options) - set(OPTIONS):
        raise ValueError(f"A case is a batch size and any of {', '.join(OPTIONS)}, joined by '+', got {text!r}.")
    return int(batch_size), set(options)


def make_batch(module: IOMMTrainingModule, collator: IOMMCollator, batch_size: int, cached: bool) -> dict[str, Any]:
    picture = Image.effect_noise((collator.resolution, collator.resolution), 64).convert("RGB")
    sample = {"image": picture, "caption": None, "cached": None, "epoch": 0, "skipped": {}}
    batch = collator([sample | {"key": str(i)} for i in range(batch_size)])
    batch = {name: value.to(module.vae.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    if cached:
        with torch.no_grad():
            posterior = module.posterior(batch)
        del batch["pixels"]
        batch |= {"latent_mean": posterior.mean, "latent_logvar": posterior.logvar}
    return batch


def switch_checkpointing(module: IOMMTrainingModule, on: bool):
    if on:
        module.encoder.activation_checkpointing_enable()
        module.transformer.enable_gradient_checkpointing()
    else:
        module.encoder.activation_checkpointing_disable()
        module.transformer.disable_gradient_checkpointing()


def run_steps(config: FullSizeConfig, module: IOMMTrainingModule, collator: IOMMCollator) -> dict[str, Any]:
    """By case: median seconds of a step, the peak of what PyTorch allocates, and the estimate of both."""
    device = module.vae.device
    on_gpu = device.type == "cuda"
    precision = "bf16" if on_gpu else "no"
    parameters = module.trainable_parameters()
    optimizers = build_optimizers(PretrainConfig(images=["-"], optimizer=config.optimizer), module)
    ema = AveragedWeights(parameters, decay=0.999) if config.ema else None

    def step(batch):
        with attention_kernel(device, precision):
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = module(batch)[0]["loss"]
            loss.backward()
        clip_gradients(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)

    results: dict[str, Any] = {}
    for case in config.cases:
        batch_size, options = case_of(case)
        switch_checkpointing(module, "checkpointing" in options)
        module.predict_velocity = torch.compile(predict_velocity) if "compiled" in options else predict_velocity
        batch = make_batch(module, collator, batch_size, "cached" in options)
        wording = int((batch["input_ids"][0] != module.encoder.image_token_id).sum())
        cost = estimate_training(
            config.preset,
            collator.resolution,
            wording_tokens=wording,
            batch_size=batch_size,
            mixed_precision=precision,
            optimizer=config.optimizer,
            ema=config.ema,
            gradient_checkpointing="checkpointing" in options,
            cached_latents="cached" in options,
        )
        gc.collect()
        torch.cuda.empty_cache()
        one_step = partial(step, batch)
        try:
            first = seconds(one_step)
            one_step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            median = statistics.median(seconds(one_step) for _ in range(config.rounds))
        except torch.OutOfMemoryError:
            module.zero_grad()
            results[case] = "out of memory"
            continue
        estimated = sum(cost.memory.values())
        results[case] = {
            "first step, s": round(first, 1),
            "a step, s": round(median, 4),
            "images/s": round(batch_size / median, 2),
            "TFLOP/s counted": round(batch_size * sum(cost.flops.values()) / median / 1e12, 1),
            "GB estimated": round(estimated / 1e9, 1),
        }
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
            results[case] |= {"GB measured": round(peak / 1e9, 1), "measured / estimated": round(peak / estimated, 3)}
        print(case, results[case], flush=True)
    return results


def draw(config: FullSizeConfig, pipe: IOMMPipeline, resolution: int) -> float:
    """Seconds a picture: everything in bf16 on a GPU, conditions and decoding included."""
    pipe.to(dtype=torch.bfloat16 if pipe.device.type == "cuda" else torch.float32)
    pipe.text_encoder.eval()
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)

    def pictures():
        pipe(["a star"] * config.draw, height=resolution, width=resolution, num_inference_steps=20, guidance_scale=3.0)

    pictures()
    return round(seconds(pictures) / config.draw, 3)


def main(config: FullSizeConfig):
    for case in config.cases:
        case_of(case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = get_preset(config.preset)
    resolution = config.resolution or preset.resolution
    torch.manual_seed(0)
    pipe = random_pipeline(preset, device)
    if config.frozen_dir:
        pipe.text_encoder.mllm.save_pretrained(Path(config.frozen_dir, "mllm"))
        pipe.processor.save_pretrained(Path(config.frozen_dir, "mllm"))
        pipe.vae.save_pretrained(Path(config.frozen_dir, "vae"))
        print(f"Wrote {config.frozen_dir}/mllm and {config.frozen_dir}/vae")
        return
    if device.type == "cuda":
        for parameter in pipe.text_encoder.mllm.parameters():  # as the recipes hold it
            parameter.data = parameter.data.to(torch.bfloat16)
    module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, preset.mask_ratio).train()
    results = run_steps(config, module, IOMMCollator(pipe.processor, resolution, condition_dropout=0.0))
    if config.draw:
        results["a picture, s"] = draw(config, pipe, resolution)
    settings = {"preset": config.preset, "resolution": resolution, "optimizer": config.optimizer, "ema": config.ema}
    record(f"full_size-{config.preset}-{resolution}", settings | results, config.output_dir)


if __name__ == "__main__":
    main(*TrlParser(FullSizeConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
