"""IOMM in about seven minutes on two CPU cores: what a trained model draws, then both stages from nothing.

    make quickstart        # or: python recipes/quickstart.py

It runs the very recipes that a cluster runs, on a world of coloured shapes that this package draws itself. The frozen parts
come with the package; what takes hours is cut to minutes, so look at how the pictures change from stage to stage.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.evaluation.drawing import draw_plan
from iomm_hf.evaluation.figures import draw_sheet, plot_losses
from iomm_hf.evaluation.shapes import (
    BenchmarkPicture,
    ShapesReport,
    benchmark_plan,
    benchmark_prompts,
    score_pictures,
)


RECIPES = Path(__file__).parent
FOLDER = Path("outputs/quickstart")  # the two YAML files name it too
TASKS = ("single_object", "colors")  # one object a scene: the other four tasks take longer than minutes
PROMPTS = [
    "a red circle",
    "a blue square",
    "a green star",
    "a purple ring",
    "two pink diamonds",
    "a brown triangle and an orange heart",
    "a star left of a circle",
    "a yellow cross",
]


@dataclass
class QuickstartConfig:
    num_images: int = field(default=8000, metadata={"help": "Unlabelled pictures to draw."})
    num_pairs: int = field(default=4000, metadata={"help": "Pairs of picture and caption to draw."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Steps of each stage. Default: as in the YAML files."}
    )
    pictures_per_task: int = field(default=50, metadata={"help": "Pictures of each task to score."})


def say(title: str, text: str):
    print(f"\n=== {title} ===\n{text}\n", flush=True)


def run(script: str, config: str, max_steps: int | None):
    """Runs a recipe in a process of its own."""
    command = [sys.executable, str(RECIPES / script), "--config", str(RECIPES / "configs" / config)]
    if max_steps is not None:
        command += ["--max_steps", str(max_steps)]
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"{script} failed with exit code {done.returncode}.")


def draw(pipe: IOMMPipeline, prompts: list[str]) -> list:
    return draw_plan(pipe, [BenchmarkPicture({"prompt": prompt}, seed=0) for prompt in prompts])


def score(pipe: IOMMPipeline, pictures_per_task: int) -> ShapesReport:
    plan = benchmark_plan(benchmark_prompts(TASKS), pictures_per_task=pictures_per_task)
    metadata = [picture.metadata for picture in plan]
    return score_pictures(draw_plan(pipe, plan), metadata, seeds=[picture.seed for picture in plan])


def main(config: QuickstartConfig):
    if FOLDER.exists():
        print(f"Removing the last quickstart in {FOLDER}.")
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True)

    say("1/5 A trained model", "The small model that comes with this package draws from text.")
    started = time.monotonic()
    trained = IOMMPipeline.from_pretrained(shipped_model())
    rows = {"shipped model": draw(trained, PROMPTS)}
    draw_sheet(rows, PROMPTS, FOLDER / "shipped.png")
    print(
        f"Loaded and drawn in {time.monotonic() - started:.0f} seconds: see {FOLDER / 'shipped.png'}."
        " Now the same from nothing, cut to minutes."
    )

    say(
        "2/5 Data",
        f"{config.num_images} pictures of coloured shapes without a word, and {config.num_pairs} with a caption.",
    )
    write_shards(FOLDER / "data/images", config.num_images, captions=False, samples_per_shard=1000, tasks=TASKS)
    write_shards(FOLDER / "data/pairs", config.num_pairs, seed=1, samples_per_shard=500, tasks=TASKS)

    say(
        "3/5 Stage 1: pictures alone",
        "A frozen multimodal LLM looks at half of each picture, the rest hidden, and the generator learns to draw\n"
        "the whole from what it says. No caption is read.",
    )
    run("pretrain_image_only.py", "quickstart-pretrain.yaml", config.max_steps)

    say("4/5 Stage 2: mixed", "Half pictures alone, half pairs: now the generator learns to follow text.")
    run("finetune_mixed.py", "quickstart-finetune.yaml", config.max_steps)

    say("5/5 Results", "The same prompts and the same noise, before and after each stage.")
    final = FOLDER / "stage2/final"
    pipe = IOMMPipeline.from_pretrained(final)
    untrained = IOMMPipeline.from_pretrained(final)
    torch.manual_seed(0)
    untrained.transformer = type(pipe.transformer)(**dict(pipe.transformer.config)).eval()
    after_stage_1 = IOMMPipeline.from_pretrained(FOLDER / "stage1/final")
    models = {"untrained": untrained, "after stage 1": after_stage_1, "after stage 2": pipe}
    rows = {name: draw(model, PROMPTS) for name, model in models.items()} | rows
    draw_sheet(rows, PROMPTS, FOLDER / "sheet.png")
    plot_losses({"stage 1": FOLDER / "stage1", "stage 2": FOLDER / "stage2"}, FOLDER / "loss.png")
    reports = {name: score(model, config.pictures_per_task) for name, model in (models | {"shipped": trained}).items()}
    scores = {name: report.to_dict() for name, report in reports.items()}
    (FOLDER / "score.json").write_text(json.dumps(scores, indent=2) + "\n")

    print(f"\nShare of pictures that show their prompt, judged by rule ({config.pictures_per_task} a task):")
    for task in TASKS:
        shares = {name: report.tasks[task] for name, report in reports.items()}
        print(
            f"  {task:14}" + "  ".join(f"{n} {s.accuracy:.0%} [{s.low:.0%}, {s.high:.0%}]" for n, s in shares.items())
        )
    print(
        f"\nWhat you have now ({(time.monotonic() - started) / 60:.1f} minutes of work):\n"
        f"  {FOLDER / 'sheet.png'}   pictures from text, before and after each stage, and the shipped model's\n"
        f"  {FOLDER / 'loss.png'}    the loss of both stages\n"
        f"  {final}   a whole model:\n\n"
        "    from iomm_hf import IOMMPipeline\n"
        f'    pipe = IOMMPipeline.from_pretrained("{final}")\n'
        '    pipe("a red circle").images[0].show()\n\n'
        "What it is: the real method, classes and recipes, cut to minutes on a toy world. What it is not: a model of use\n"
        "to anybody, or evidence for or against the paper. The shipped model is what hours of the same recipes give."
    )


if __name__ == "__main__":
    main(*TrlParser(QuickstartConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
