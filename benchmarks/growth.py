"""How cost grows: a training step against batch, queries and resolution, a checkpoint against its weights, and the import.

    python benchmarks/growth.py

Steps are those of a Flux with random parts, forward and backward, in turn with the smallest of their series.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import flux_preset
from timing import compare, record
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.collate import sample_seed
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule


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


def save_and_load(width: int) -> dict[str, float]:
    """Seconds and megabytes of a whole pipeline."""
    pipe = tiny_pipeline(flux_preset(width, 2, head_dim=32))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        pipe.save_pretrained(folder)
        saved = time.perf_counter()
        IOMMPipeline.from_pretrained(folder)
        loaded = time.perf_counter()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"MB": round(size / 1e6, 1), "save_s": round(saved - started, 3), "load_s": round(loaded - saved, 3)}


def main(config: GrowthConfig):
    results = {}
    series = {"batch_size": config.batch_sizes, "queries": config.queries, "resolution": config.resolutions}
    for name, values in series.items():
        smallest = make_step(config, **{name: values[0]})
        for value in values[1:]:
            label = f"step, {name} {value} / {values[0]}"
            results[label] = compare(make_step(config, **{name: value}), smallest, config.rounds, label)
    for width in (config.width, 2 * config.width, 4 * config.width):
        results[f"checkpoint, {width} wide"] = save_and_load(width)
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
