"""Scores a checkpoint on the shapes benchmark, beside its ceilings and controls.

    python recipes/score_shapes.py --checkpoint outputs/mine/stage2/final --output_dir outputs/mine/score
    python recipes/score_shapes.py --controls false --pictures_per_task 32
    python recipes/score_shapes.py --checkpoint outputs/mine/stage2/final --beside pairs-only=outputs/other/final

Ceilings: rendered truth, and rendered truth through the autoencoder. Controls: the same checkpoint with each prompt replaced
by another's, and the same parts with an untrained generator. A score means something only above the controls. Variations of
rendered truth read a picture that fits the prompt in place of it: where they score no better, it is not the text that holds the
model back. Rivals, such as training on pairs alone at equal steps, are scored on the same prompts and noise.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.collate import sample_seed
from iomm_hf.data.shapes import TASKS
from iomm_hf.evaluation.drawing import draw_batches, draw_plan
from iomm_hf.evaluation.figures import draw_sheet
from iomm_hf.evaluation.options import ScoringOptions
from iomm_hf.evaluation.pipelines import load_pipeline
from iomm_hf.evaluation.shapes import ShapesReport, benchmark_plan, render_truth, score_pictures
from iomm_hf.files import write_json
from iomm_hf.pipeline_iomm import decode_latents, draw_latents


@dataclass
class ScoreConfig(ScoringOptions):
    output_dir: str = field(default="outputs/score", metadata={"help": "Folder for score.json and sheet.png."})
    pictures_per_task: int = field(default=200, metadata={"help": "Pictures of each of the six tasks."})
    controls: bool = field(
        default=True, metadata={"help": "Also score ceilings, variations, shuffled prompts and no training."}
    )


@torch.no_grad()
def through_autoencoder(pipeline: IOMMPipeline, pictures: list[np.ndarray]) -> list[np.ndarray]:
    drawn = []
    for part in torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).split(64):
        latents = draw_latents(pipeline.vae, pipeline.vae.encode(part.to(pipeline.device) / 127.5 - 1).latent_dist)
        drawn.append(((decode_latents(pipeline.vae, latents) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return list(torch.cat(drawn).permute(0, 2, 3, 1).cpu().numpy())


def main(config: ScoreConfig):
    pipeline, about = load_pipeline(config.checkpoint)
    device = pipeline.device
    plan = benchmark_plan(pictures_per_task=config.pictures_per_task)
    metadata, seeds = [picture.metadata for picture in plan], [picture.seed for picture in plan]
    settings = config.sampling | {"batch_size": 200 if device.type == "cuda" else 16}
    reports: dict[str, ShapesReport] = {}

    def score(name: str, pictures: list):
        reports[name] = score_pictures(pictures, metadata, seeds=seeds)

    drawn = draw_plan(pipeline, plan, **settings)
    score("model", drawn)
    if config.controls:
        truth = render_truth(plan, pipeline.resolution)
        score("rendered truth", truth)
        score("truth through the autoencoder", through_autoencoder(pipeline, truth))
        scenes = [Image.fromarray(picture) for picture in truth]
        noise = [sample_seed(picture.seed, picture.metadata["prompt"], 0) for picture in plan]
        score("variations of rendered truth", draw_batches(pipeline, noise, **settings, image=scenes))
        score("shuffled prompts", draw_plan(pipeline, plan, **settings, shuffle_conditions=True))
        torch.manual_seed(0)
        pipeline.transformer = type(pipeline.transformer)(**dict(pipeline.transformer.config)).eval().to(device)
        score("untrained generator", draw_plan(pipeline, plan, **settings))

    for name, rival in config.rivals.items():
        score(name, draw_plan(IOMMPipeline.from_pretrained(rival).to(device), plan, **settings))

    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(
        output / "score.json",
        {"checkpoint": config.checkpoint, "weights_sha256": about["weights_sha256"], "beside": config.rivals}
        | config.sampling
        | {name: report.to_dict() for name, report in reports.items()},
    )
    firsts = {task: [i for i, item in enumerate(metadata) if item["tag"] == task][:6] for task in TASKS}
    columns = min(len(chosen) for chosen in firsts.values())
    draw_sheet(
        {task: [drawn[i] for i in chosen[:columns]] for task, chosen in firsts.items()},
        {task: [metadata[i]["prompt"] for i in chosen[:columns]] for task, chosen in firsts.items()},
        output / "sheet.png",
    )
    for name, report in reports.items():
        tasks = "  ".join(f"{task} {share.accuracy:.2f}" for task, share in report.tasks.items())
        print(
            f"{name:30} overall {report.overall.value:.3f} [{report.overall.low:.3f}, {report.overall.high:.3f}]  {tasks}"
        )
    report = reports["model"]
    if report.seen_mean is not None and report.held_out_mean is not None:
        print(
            f"seen prompts {report.seen_mean.value:.3f}, held-out prompts {report.held_out_mean.value:.3f} (same tasks)"
        )
    print(f"Wrote {output / 'score.json'} and sheet.png")


if __name__ == "__main__":
    main(*TrlParser(ScoreConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
