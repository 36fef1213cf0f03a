"""How cost grows: a training step against batch, queries and resolution, files against weights, and the import.

    python benchmarks/growth.py

Steps are those of a Flux with random parts, forward and backward, in turn with the smallest of their series.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from models import flux_preset
from timing import compare, record, seconds
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.collate import sample_seed
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, PretrainConfig
from iomm_hf.training.checkpoints import keep_models_out, load_checkpoint, save_checkpoint
from iomm_hf.training.optimizers import AveragedWeights, build_optimizers
from iomm_hf.training.setup import build_pipeline


@dataclass
class GrowthConfig:
    width: int = field(default=256, metadata={"help": "Width of the Flux; its heads are 32 wide."})
    batch_sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Samples a step."})
    queries: list[int] = field(default_factory=lambda: [16, 64, 256], metadata={"help": "Learned queries."})
    resolutions: list[int] = field(default_factory=lambda: [64, 128, 256], metadata={"help": "Sides in pixels."})
    rounds: int = field(default=5, metadata={"help": "Timed steps of both."})
    output_dir: str = field(default="benchmarks/results", metadata={"help": "Folder of growth.json."})


def make_step(config: GrowthConfig, batch_size: int = 4, queries: int = 16, resolution: int = 64):
    """Forward and backward of one batch of unconditional samples on random latents."""
    pipe = tiny_pipeline(flux_preset(config.width, 2, queries, head_dim=32))
    module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, 0.5).train()
    shape = (batch_size, 4, resolution // 4, resolution // 4)
    batch = {
        **pipe.processor.encode([pipe.processor.unconditional()] * batch_size),
        "latent_mean": torch.randn(shape),
        "latent_logvar": torch.full(shape, -10.0),
        "seed": torch.tensor([sample_seed(0, str(i), 0) for i in range(batch_size)]),
    }
    return lambda: module.sample_losses(batch).mean().backward()


def save_and_load(save: Callable[[Path], None], load: Callable[[Path], Any], rounds: int) -> dict[str, float]:
    """Megabytes, and median seconds, of what is written into a folder and read from it."""
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "saved")
            times.append((seconds(partial(save, folder)), seconds(partial(load, folder))))
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    saved, loaded = map(statistics.median, zip(*times, strict=True))
    return {"MB": round(size / 1e6, 1), "save_s": round(saved, 3), "load_s": round(loaded, 3)}


def pipeline_and_checkpoint(width: int, rounds: int) -> dict[str, Any]:
    """A pipeline's folder, and a run's checkpoint, which reaches the disk: weights, averages and AdamW's two moments."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_pipeline(flux_preset(width, 2, head_dim=32)).save_pretrained(folder)
        config = PretrainConfig(images=["-"], init_from=folder, output_dir=folder, mask_ratio=0.5)
        pipe = build_pipeline(config)
        module = IOMMTrainingModule(pipe.text_encoder, pipe.transformer, pipe.vae, 0.5).train()
        weights = module.trainable_parameters()
        optimizers = build_optimizers(config, module)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for optimizer in optimizers:
            optimizer.step()
        ema = AveragedWeights(weights, decay=0.999)
        accelerator = Accelerator()
        keep_models_out(accelerator)
        trainer = {"step": 1, "num_processes": 1}
        return {
            "trained_MB": round(sum(weight.nbytes for weight in weights) / 1e6, 1),
            "pipeline": save_and_load(pipe.save_pretrained, IOMMPipeline.from_pretrained, rounds),
            "checkpoint": save_and_load(
                lambda path: save_checkpoint(path, accelerator, pipe, module, optimizers, ema, {}, trainer),
                lambda path: load_checkpoint(path, accelerator, module, optimizers, ema),
                rounds,
            ),
        }


def main(config: GrowthConfig):
    results = {}
    series = {"batch_size": config.batch_sizes, "queries": config.queries, "resolution": config.resolutions}
    for name, values in series.items():
        smallest = make_step(config, **{name: values[0]})
        for value in values[1:]:
            label = f"step, {name} {value} / {values[0]}"
            results[label] = compare(make_step(config, **{name: value}), smallest, config.rounds, label)
    for width in (config.width, 2 * config.width, 4 * config.width):
        results[f"files, {width} wide"] = pipeline_and_checkpoint(width, config.rounds)
    bare, ours = (
        [sys.executable, "-c", f"import {modules}"]
        for modules in ("torch, diffusers, transformers", "torch, diffusers, transformers, iomm_hf")
    )
    results["import, iomm_hf / its libraries"] = compare(
        lambda: subprocess.run(ours, check=True), lambda: subprocess.run(bare, check=True), config.rounds, "Importing"
    )
    record("growth", {"width": config.width, **results}, config.output_dir)


if __name__ == "__main__":
    main(*TrlParser(GrowthConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
