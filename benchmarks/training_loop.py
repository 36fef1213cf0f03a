"""The training loop against bare computation: forward, backward and optimizer step, on a batch at hand, of the same modules, and of the
stock transformer alone on conditions computed before.

    python benchmarks/training_loop.py

What the loop adds to the modules is reading and collating samples, clipping, averaging of the weights, guards, logs and Accelerate; to the
transformer alone also the condition path, which is computation and no overhead. Latents and vision tokens are cached. Between two steps of
the loop, in its own process, each bare step is timed once, so that a machine that drifts falls on all three.
Clipping and averaging cost by the weight and not by the sample, so overhead falls with image tokens a step: 4,096 here, 1,024 with
`--resolution 64`, and 16,384 or more in a step of `base` on one GPU.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import flux_preset
from timing import Ratio, record, seconds
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
from iomm_hf.training import IOMMTrainingModule, PretrainConfig, loop, train


RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class TrainingLoopConfig:
    width: int = field(default=512, metadata={"help": "Width of the Flux; its heads are 64 wide."})
    layers: int = field(default=2, metadata={"help": "Double blocks; twice as many single ones."})
    batch_size: int = field(default=16, metadata={"help": "Samples a step."})
    resolution: int = field(default=128, metadata={"help": "Side of the pictures, px; a token is 8 x 8."})
    rounds: int = field(default=20, metadata={"help": "Timed steps of each, after two that do not count."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of training_loop.json."})


def bare_steps(config: TrainingLoopConfig, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the modules, and of the transformer alone."""
    pipe = IOMMPipeline.from_pretrained(folder / "start")
    samples = iter(build_stream([SourceConfig(str(folder / "cached"))]))
    batch = IOMMCollator(pipe.processor, config.resolution)([next(samples) for _ in range(config.batch_size)])
    module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, 0.5).train()
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=1e-4, fused=True)

    def step():
        module.sample_losses(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

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

    return step, step_alone


def time_in_turn(config: TrainingLoopConfig, folder: Path) -> list[tuple[float, float, float]]:
    """Seconds of each step of a run, of the modules' and of the transformer's after it."""
    step, step_alone = bare_steps(config, folder)
    step(), step_alone()
    times: list[tuple[float, float, float]] = []
    update, began = loop.update, None

    def update_between(*arguments):
        """The loop's own, before which the bare steps run; a step lasts until the next begins."""
        nonlocal began
        if began is not None:
            took = time.perf_counter() - began
            times.append((took, seconds(step), seconds(step_alone)))
        began = time.perf_counter()
        return update(*arguments)

    loop.update = update_between
    train(
        PretrainConfig(
            output_dir=str(folder / "run"),
            init_from=str(folder / "start"),
            images=[str(folder / "cached")],
            batch_size=config.batch_size,
            resolution=config.resolution,
            max_steps=config.rounds + 3,
            log_every=5,
            num_workers=0,
            validate_every=0,
            mask_ratio=0.5,
        )
    )
    return times[2:]


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
        took, modules, transformer = map(list, zip(*time_in_turn(config, folder), strict=True))
    record(
        "training_loop",
        {
            "width": config.width,
            "batch_size": config.batch_size,
            "resolution": config.resolution,
            "time, loop / modules": Ratio.of(took, modules),
            "time, loop / transformer": Ratio.of(took, transformer),
        },
        config.output_dir,
    )


if __name__ == "__main__":
    main(*TrlParser(TrainingLoopConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
