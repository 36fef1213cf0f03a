"""What a run shows of itself on the way: pictures of its validation prompts, and its score in the shapes world."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.utils import make_image_grid

from ..data.collate import sample_seed
from ..evaluation.drawing import draw_plan
from ..evaluation.shapes import benchmark_plan, score_pictures
from ..files import write_json, write_whole
from ..pipeline_iomm import IOMMPipeline
from .checkpoints import save_pipeline, whole_folder
from .config import TrainingConfig
from .module import IOMMTrainingModule
from .run_folder import keep_log_until


@torch.no_grad()
def draw_validation(
    config: TrainingConfig,
    pipeline: IOMMPipeline,
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    resolution: int,
):
    """Draws the validation prompts, each from its own fixed noise, into `samples/` and the trackers. Every rank draws them,
    since sharded weights are gathered by all."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.eval()
    pipeline.transformer.eval()
    prompts = config.validation_prompts
    with accelerator.autocast():  # a bf16 run holds the MLLM in bf16, the rest in float32
        images = pipeline(  # type: ignore[union-attr]  # return_dict is on
            prompts,
            height=resolution,
            width=resolution,
            num_inference_steps=config.validation_steps,
            guidance_scale=config.validation_guidance,
            generator=[torch.Generator().manual_seed(sample_seed(config.seed, prompt, 0)) for prompt in prompts],
        ).images
    if not accelerator.is_main_process:
        return
    columns = min(len(images), 8)
    images += [images[0].copy().point(lambda _: 255)] * (-len(images) % columns)  # white in the last row's gaps
    grid = make_image_grid(images, rows=len(images) // columns, cols=columns)
    png = io.BytesIO()
    grid.save(png, format="PNG")
    write_whole(output_dir / "samples" / f"step-{step:08d}.png", png.getvalue())
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":  # Accelerate's wrapper of it takes no pictures
            import trackio

            tracker.log({"validation": trackio.Image(grid)}, step=step)
        elif hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=step, **layout)


@torch.no_grad()
def evaluate(
    config: TrainingConfig,
    pipeline: IOMMPipeline,
    module: IOMMTrainingModule,
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
):
    """Scores the first pictures of the shapes benchmark into `evals.jsonl` and the trackers; a record goes to `best/`.
    Every rank draws them, as for validation."""
    scores = output_dir / "evals.jsonl"
    row: dict[str, Any] = {}
    is_best = False
    plan = benchmark_plan(pictures_per_task=config.eval_pictures)
    how = {"pictures": len(plan), "steps": config.validation_steps, "guidance_scale": config.validation_guidance}
    pipeline.text_encoder.eval()
    pipeline.transformer.eval()
    with accelerator.autocast():
        images = draw_plan(pipeline, plan, config.validation_steps, config.validation_guidance)
    if accelerator.is_main_process:
        report = score_pictures(images, [picture.metadata for picture in plan])
        overall = report.overall.value  # type: ignore[union-attr]  # the plan holds all six tasks
        row = {"step": step, "overall": overall, **{task: share.accuracy for task, share in report.tasks.items()}}
        keep_log_until(scores, step - 1)
        earlier = [json.loads(line) for line in scores.read_text().splitlines()] if scores.exists() else []
        with scores.open("a") as log:
            log.write(json.dumps(row | how) + "\n")
        # Scores of fewer pictures or other sampling are no record to beat; earlier versions did not note how they sampled.
        alike = [old for old in earlier if all(old.get(name, value) == value for name, value in how.items())]
        is_best = overall > max((old["overall"] for old in alike), default=-1.0)
    (row, is_best) = broadcast_object_list([row, is_best])
    accelerator.log({f"shapes/{name}": value for name, value in row.items() if name != "step"}, step=step)
    if is_best:
        with whole_folder(output_dir / "best", accelerator) as folder:
            save_pipeline(folder, accelerator, pipeline, module, include_frozen=False)
            if accelerator.is_main_process:
                write_json(folder / "score.json", row)
