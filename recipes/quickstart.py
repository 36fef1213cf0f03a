"""IOMM from nothing in about ten minutes on two CPU cores: data, frozen parts, both stages, pictures, score.

    make quickstart        # or: python recipes/quickstart.py

It runs the very recipes that a cluster runs, on a world of coloured shapes that this package draws itself. What takes
hours is cut to minutes, so the pictures are rough: look at how they change from stage to stage.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.evaluation.figures import draw_sheet, plot_losses
from iomm_hf.evaluation.shapes import ShapesReport, benchmark_plan, benchmark_prompts, score_pictures


RECIPES = Path(__file__).parent
FOLDER = Path("outputs/quickstart")  # the two YAML files name it too
TASKS = ("single_object", "colors")  # one object a scene: the other four tasks take longer than ten minutes
PROMPTS = [
    "a red circle",
    "a blue square",
    "a green star",
    "a purple ring",
    "a yellow heart",
    "an orange cross",
    "a pink diamond",
    "a brown triangle",
]


@dataclass
class QuickstartConfig:
    stage0_minutes: float = field(default=2.5, metadata={"help": "Minutes for autoencoder and MLLM, side by side."})
    num_images: int = field(default=8000, metadata={"help": "Unlabelled pictures to draw."})
    num_pairs: int = field(default=2000, metadata={"help": "Pairs of picture and caption to draw."})
    pictures_per_task: int = field(default=50, metadata={"help": "Pictures of each task to score."})


def say(title: str, text: str):
    print(f"\n=== {title} ===\n{text}\n", flush=True)


def run(script: str, *arguments: str, share: int = 1, log: Path | None = None) -> subprocess.Popen:
    """Starts a recipe on a `share`-th of the cores; with `log` in the background, silently."""
    stream = None if log is None else log.open("w")
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // share))}
    command = [sys.executable, str(RECIPES / script), *arguments]
    return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)


def wait(process: subprocess.Popen, log: Path | None = None):
    if process.wait():
        hint = f"; see {log}" if log is not None else ""
        sys.exit(f"{process.args[1]} failed with exit code {process.returncode}{hint}.")


def draw(pipe: IOMMPipeline, prompts: list[str], seeds: list[int], steps: int = 20) -> list[Image.Image]:
    images: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(prompts), 16), desc="Drawing", unit="batch"):
        part = slice(start, start + 16)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        images += pipe(prompts[part], generator=generators, num_inference_steps=steps).images
    return images


def score(pipe: IOMMPipeline, pictures_per_task: int) -> ShapesReport:
    plan = benchmark_plan(benchmark_prompts(TASKS), pictures_per_task=pictures_per_task)
    prompts, seeds = [picture.metadata["prompt"] for picture in plan], [picture.seed for picture in plan]
    images = draw(pipe, prompts, seeds)
    return score_pictures(images, [picture.metadata for picture in plan], seeds=seeds)


def main(config: QuickstartConfig):
    started = time.monotonic()
    folder = FOLDER
    if folder.exists():
        print(f"Removing the last quickstart in {folder}.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)

    say("1/5 Data", "Drawing pictures of coloured shapes: most have no text at all, a few have a caption.")
    write_shards(folder / "data/images", config.num_images, captions=False, samples_per_shard=1000, tasks=TASKS)
    write_shards(folder / "data/pairs", config.num_pairs, seed=1, samples_per_shard=500, tasks=TASKS)

    say(
        "2/5 Frozen parts",
        "An autoencoder (pictures <-> latents) and a small multimodal LLM (it looks and reads) learn side by side.\n"
        "At full size both are downloaded ready-made. From here on they stay frozen.",
    )
    minutes = str(config.stage0_minutes)
    log = folder / "mllm.log"
    vision = run(
        "warm_up_vision.py",
        "--output_dir",
        str(folder / "mllm"),
        "--minutes",
        minutes,
        "--tasks",
        *TASKS,
        share=2,
        log=log,
    )
    seeing = ["--images", str(folder / "data/images"), "--output_dir", str(folder / "vae"), "--shapes"]
    wait(run("train_autoencoder.py", *seeing, "--minutes", minutes, share=2))
    print("Waiting for the MLLM ...", flush=True)
    wait(vision, log)
    print(log.read_text().strip().splitlines()[-1])

    say(
        "3/5 Stage 1: pictures alone",
        "The MLLM sees 15 % of each picture's patches and the generator learns to draw the whole from what it says.\n"
        "No caption is read.",
    )
    wait(run("pretrain_image_only.py", "--config", str(RECIPES / "configs/shapes-pretrain.yaml")))

    say("4/5 Stage 2: mixed", "Half pictures alone, half pairs: now the generator learns to follow text.")
    wait(run("finetune_mixed.py", "--config", str(RECIPES / "configs/shapes-finetune.yaml")))

    say("5/5 Results", "The same prompts and the same noise, before and after each stage.")
    final = folder / "stage2/final"
    pipe = IOMMPipeline.from_pretrained(final)
    seeds = list(range(len(PROMPTS)))
    after_1 = draw(IOMMPipeline.from_pretrained(folder / "stage1/final"), PROMPTS, seeds)
    after_2 = draw(pipe, PROMPTS, seeds)
    untrained = IOMMPipeline.from_pretrained(final)
    torch.manual_seed(0)
    untrained.transformer = type(pipe.transformer)(**dict(pipe.transformer.config))
    sheet = {"untrained": draw(untrained, PROMPTS, seeds), "after stage 1": after_1, "after stage 2": after_2}
    draw_sheet(sheet, PROMPTS, folder / "sheet.png")
    plot_losses({"stage 1": folder / "stage1", "stage 2": folder / "stage2"}, folder / "loss.png")
    report = score(pipe, config.pictures_per_task)
    (folder / "score.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")

    print(f"\nShare of pictures that show their prompt, judged by rule ({config.pictures_per_task} a task):")
    for task, share in report.tasks.items():
        print(f"  {task:15} {share.accuracy:5.0%}   [{share.low:.0%}, {share.high:.0%}]")
    print(
        f"\nWhat you have now ({(time.monotonic() - started) / 60:.1f} minutes):\n"
        f"  {folder / 'sheet.png'}   pictures from text, before and after each stage\n"
        f"  {folder / 'loss.png'}    the loss of both stages\n"
        f"  {final}   a whole model:\n\n"
        "    from iomm_hf import IOMMPipeline\n"
        f'    pipe = IOMMPipeline.from_pretrained("{final}")\n'
        '    pipe("a red circle").images[0].show()\n\n'
        "What it is: the real method, classes and recipes, cut to minutes on a toy world. What it is not: a model of use\n"
        "to anybody, or evidence for or against the paper. Longer runs of the same recipes draw better."
    )


if __name__ == "__main__":
    main(*TrlParser(QuickstartConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
