"""The training loop against bare computation: forward, backward and optimizer step, on a batch at hand, of the same modules, and of the
stock transformer alone on conditions computed before.

    python benchmarks/training_loop.py

What the loop adds to the modules is reading and collating samples, clipping, averaging of the weights, guards, logs and Accelerate; to the
transformer alone also the condition path, which is computation and no overhead. Latents and vision tokens are cached. A round's bare steps
are timed before and after the loop's, so that a machine that drifts falls on both; of the loop's own log the first row does not count.
Clipping and averaging cost by the weight and not by the sample, so overhead falls with image tokens a step: 4,096 here, 1,024 with
`--resolution 64`, and 16,384 or more in a step of `base` on one GPU.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import flux_preset
from timing import record
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.collate import IOMMCollator
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import build_stream
from iomm_hf.flow_matching import flow_matching_loss, interpolate, velocity_target
from iomm_hf.generators import predict_velocity
from iomm_hf.pipeline_iomm import draw_latents
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, PretrainConfig, train


RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class TrainingLoopConfig:
    width: int = field(default=512, metadata={"help": "Width of the Flux; its heads are 64 wide."})
    layers: int = field(default=2, metadata={"help": "Double blocks; twice as many single ones."})
    batch_size: int = field(default=16, metadata={"help": "Samples a step."})
    resolution: int = field(default=128, metadata={"help": "Side of the pictures, px; a token is 8 x 8."})
    steps: int = field(default=10, metadata={"help": "Timed steps of a round."})
    rounds: int = field(default=5, metadata={"help": "Rounds of both."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of training_loop.json."})


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds a step, after one that does not count."""
    step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def bare_steps(config: TrainingLoopConfig, folder: Path) -> tuple[float, float]:
    """Seconds a step of the modules, and of the transformer alone."""
    pipe = IOMMPipeline.from_pretrained(folder / "start")
    samples = iter(build_stream([SourceConfig(str(folder / "cached"))]))
    batch = IOMMCollator(pipe.processor, config.resolution)([next(samples) for _ in range(config.batch_size)])
    module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, 0.5).train()
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=1e-4, fused=True)

    def step():
        module.sample_losses(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    modules = timed(step, config.steps)
    with torch.no_grad():
        encoded = module.encoder(batch["input_ids"], batch["attention_mask"], image_features=batch["image_features"])
    latents = draw_latents(pipe.vae, module.posterior(batch))
    noise, timestep = torch.randn_like(latents), torch.rand(config.batch_size)
    noised, target = interpolate(latents, noise, timestep), velocity_target(latents, noise)
    alone = torch.optim.AdamW(pipe.transformer.parameters(), lr=1e-4, fused=True)

    def step_alone():
        velocity = predict_velocity(pipe.transformer, noised, timestep, encoded.condition, encoded.condition_mask)
        flow_matching_loss(velocity, target).mean().backward()
        alone.step()
        alone.zero_grad()

    return modules, timed(step_alone, config.steps)


def loop_steps(config: TrainingLoopConfig, folder: Path, run: str) -> float:
    """Seconds a step, from the second row of its log."""
    train(
        PretrainConfig(
            output_dir=str(folder / run),
            init_from=str(folder / "start"),
            images=[str(folder / "cached")],
            batch_size=config.batch_size,
            resolution=config.resolution,
            max_steps=2 * config.steps,
            log_every=config.steps,
            num_workers=0,
            validate_every=0,
            mask_ratio=0.5,
        )
    )
    row = json.loads((folder / run / "log.jsonl").read_text().splitlines()[1])
    return config.batch_size / row["images_per_second"]


def main(config: TrainingLoopConfig):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny_pipeline(flux_preset(config.width, config.layers)).save_pretrained(folder / "start")
        pictures = {"image_size": config.resolution, "captions": False, "layout": "parquet"}
        write_shards(folder / "pictures", 16 * config.batch_size, **pictures)
        cache = ["--source", str(folder / "pictures"), "--init_from", str(folder / "start")]
        cache += ["--resolution", str(config.resolution)]
        subprocess.run(
            [sys.executable, str(RECIPES / "precompute_latents.py"), *cache, "--output_dir", str(folder / "cached")],
            check=True,
        )
        times = []
        for i in range(config.rounds):
            before = bare_steps(config, folder)
            loop = loop_steps(config, folder, f"run-{i}")
            after = bare_steps(config, folder)
            times.append((loop, *(statistics.fmean(both) for both in zip(before, after, strict=True))))
    ratios = [loop / bare for loop, bare, _ in times]
    ratios_alone = [loop / alone for loop, _, alone in times]
    record(
        "training_loop",
        {
            "width": config.width,
            "batch_size": config.batch_size,
            "resolution": config.resolution,
            "seconds a step, loop, modules and transformer": [
                round(statistics.median(side), 4) for side in zip(*times, strict=True)
            ],
            "time, loop / modules": round(statistics.median(ratios), 3),
            "by round": [round(ratio, 3) for ratio in ratios],
            "time, loop / transformer": round(statistics.median(ratios_alone), 3),
            "by round, transformer": [round(ratio, 3) for ratio in ratios_alone],
        },
        config.output_dir,
    )


if __name__ == "__main__":
    main(*TrlParser(TrainingLoopConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
