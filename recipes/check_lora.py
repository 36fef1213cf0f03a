"""Whether a LoRA changes the style: trains one on a few restyled scenes of the shapes world and draws with and without it.

    python recipes/check_lora.py --output_dir outputs/lora-check        # the model that comes with the package
    python recipes/check_lora.py --pictures 16 --steps 200 --output_dir outputs/lora-check

The style is a navy ground with teal stripes under the scenes' own objects; nobody tells the model, the pictures have no captions. A
picture's ground is read off its outermost two pixels, where the shapes world leaves room: its mean colour is nearer to that of
the style's pictures or to that of the world's own. Prompts and noise are the same for every scale. The same command goes on where it
was stopped; `style.json` and `style.png` are left in the folder.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from trl import TrlParser

from iomm_hf import IOMMPipeline, training
from iomm_hf.data.shapes import Background, Scene, corpus_scene, render
from iomm_hf.evaluation.drawing import draw_plan
from iomm_hf.evaluation.figures import draw_sheet
from iomm_hf.evaluation.shapes import benchmark_plan, wilson_share
from iomm_hf.files import write_json


STRIPES = np.array([(12, 20, 80), (0, 120, 130)])  # navy and teal, sRGB


@dataclass
class CheckLoraConfig:
    output_dir: str = field(default="outputs/lora-check", metadata={"help": "Folder of everything."})
    lora_config: str = field(default="recipes/configs/shapes-lora.yaml", metadata={"help": "Settings of the LoRA."})
    checkpoint: str | None = field(default=None, metadata={"help": "Pipeline to adapt. Default: the shipped one."})
    pictures: int = field(default=64, metadata={"help": "Pictures in the style, all that the LoRA sees."})
    steps: int | None = field(default=None, metadata={"help": "Steps of its training. Default: as the settings say."})
    pictures_per_task: int = field(default=16, metadata={"help": "Drawn of each of the benchmark's six tasks."})
    scales: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Scales of the LoRA, beside none."}
    )
    num_inference_steps: int = field(default=30, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Strength of guidance."})
    seed: int = field(default=2 * 10**6, metadata={"help": "Corpus of the scenes; another one than was trained on."})


def restyled(scene: Scene, size: int = 64, period: int = 12) -> np.ndarray:
    """The scene's objects on the style's ground, (size, size, 3) in sRGB."""

    def on(level: float) -> np.ndarray:
        return render(Scene(scene.objects, Background((level,) * 3, (level,) * 3, 0.0)), size).astype(float)

    black = on(0.0)
    ground = (on(255.0) - black) / 255  # the share of a pixel that no object covers
    rows, columns = np.mgrid[:size, :size]
    stripes = STRIPES[(rows + columns) % period // (period // 2)]
    return np.rint(black + ground * stripes).astype(np.uint8)


def ground_color(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Mean colour of the outermost two pixels, (3,) in [0, 1]."""
    pixels = np.asarray(picture, dtype=float) / 255
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[2:-2, 2:-2] = False
    return pixels[frame].mean(0)


def measure(pictures: list[Image.Image], style: np.ndarray, world: np.ndarray) -> dict[str, Any]:
    """How near the pictures' grounds are to the style's mean colour and to the world's."""
    grounds = np.stack([ground_color(picture) for picture in pictures])
    distances = np.linalg.norm(grounds - style, axis=1)
    share = wilson_share(int((distances < np.linalg.norm(grounds - world, axis=1)).sum()), len(pictures))
    half = 1.96 * distances.std(ddof=1) / len(pictures) ** 0.5
    mean = float(distances.mean())
    return {"in_style": asdict(share), "distance_to_style": {"mean": mean, "low": mean - half, "high": mean + half}}


def main(config: CheckLoraConfig):
    output = Path(config.output_dir)
    scenes = [corpus_scene(config.seed, index, show_held_out=True)[0] for index in range(config.pictures)]
    style_pictures = [Image.fromarray(restyled(scene)) for scene in scenes]
    folder = output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(style_pictures):
        picture.save(folder / f"{number:04d}.png")

    flags = ["--config", config.lora_config, "--images", str(folder), "--output_dir", str(output / "run")]
    flags += ["--init_from", config.checkpoint] if config.checkpoint is not None else []
    flags += ["--max_steps", str(config.steps)] if config.steps is not None else []
    (settings,) = TrlParser(training.LoraTrainingConfig).parse_args_and_config(flags)
    lora = training.train(settings)

    pipeline = IOMMPipeline.from_pretrained(settings.init_from, dtype=torch.float32)
    plan = benchmark_plan(pictures_per_task=config.pictures_per_task)
    style = np.mean([ground_color(picture) for picture in style_pictures], axis=0)
    world = np.mean([ground_color(render(scene)) for scene in scenes], axis=0)

    def draw() -> list[Image.Image]:
        return draw_plan(pipeline, plan, config.num_inference_steps, config.guidance_scale)

    drawn = {"without": draw()}
    pipeline.load_lora_weights(lora, adapter_name="style")
    for scale in config.scales:
        pipeline.set_adapters("style", scale)
        drawn[f"scale {scale:g}"] = draw()

    rows = {"the style": style_pictures, **drawn}
    result = {name: measure(pictures, style, world) for name, pictures in rows.items()}
    for name, found in result.items():
        share, distance = found["in_style"], found["distance_to_style"]
        print(
            f"{name:10} in style {share['correct']} of {share['total']} = {share['accuracy']:.3f}"
            f" [{share['low']:.3f}, {share['high']:.3f}], distance to the style's ground {distance['mean']:.3f}"
            f" [{distance['low']:.3f}, {distance['high']:.3f}]"
        )
    write_json(
        output / "style.json",
        result | {"steps": settings.max_steps, "batch_size": settings.batch_size, "settings": asdict(config)},
    )
    columns = range(0, len(plan), max(1, len(plan) // 12))[:12]
    titles = [plan[column].metadata["prompt"] for column in columns]
    sheet = {name: [pictures[column] for column in columns] for name, pictures in drawn.items()}
    examples = {"pictures it saw": [style_pictures[number % len(style_pictures)] for number in range(len(titles))]}
    draw_sheet(examples | sheet, titles, output / "style.png")
    print(f"Wrote {output / 'style.json'} and {output / 'style.png'}")


if __name__ == "__main__":
    main(*TrlParser(CheckLoraConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
