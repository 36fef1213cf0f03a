"""Loss curves of runs, and sheets of what they draw: from prompts, and from reference pictures.

    python recipes/show_runs.py --runs outputs/mine/stage1 outputs/mine/stage2 --prompts "a red circle" "two stars" \
        --images held_out_pictures/ --output_dir outputs/mine
    python recipes/show_runs.py --logs outputs/shapes/vae-log.jsonl outputs/shapes/vision-log.jsonl --output_dir outputs/shapes
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.images import resize_and_crop
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.drawing import draw_batches
from iomm_hf.evaluation.figures import draw_sheet, plot_logs, plot_losses
from iomm_hf.training.config import as_source


@dataclass
class ShowConfig:
    runs: list[str] = field(default_factory=list, metadata={"help": "Folders of finished runs, in order."})
    prompts: list[str] = field(default_factory=list, metadata={"help": "What to draw."})
    images: list[str] = field(default_factory=list, metadata={"help": "Sources of eight reference pictures to vary."})
    logs: list[str] = field(default_factory=list, metadata={"help": "Logs of stage 0, for curves.png."})
    output_dir: str = field(default="outputs", metadata={"help": "Folder for loss.png, sheet.png and variations.png."})
    num_inference_steps: int = field(default=20, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Strength of guidance."})
    seed: int = field(default=0, metadata={"help": "Noise of the first column; the next ones count on."})

    def __post_init__(self):
        if not self.runs and not self.logs:
            raise ValueError("Give finished runs, --runs FOLDER, or logs of stage 0, --logs FILE.")


def main(config: ShowConfig):
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if config.logs:
        plot_logs(config.logs, output / "curves.png")
    if not config.runs:
        print(f"Wrote {output / 'curves.png'}")
        return
    plot_losses({Path(run).name: run for run in config.runs}, output / "loss.png")
    pipes = {Path(run).name: IOMMPipeline.from_pretrained(Path(run) / "final") for run in config.runs}

    def draw(pipe: IOMMPipeline, count: int, **inputs):
        seeds = range(config.seed, config.seed + count)
        return draw_batches(pipe, seeds, config.num_inference_steps, config.guidance_scale, **inputs)

    if config.prompts:
        rows = {name: draw(pipe, len(config.prompts), prompt=config.prompts) for name, pipe in pipes.items()}
        draw_sheet(rows, config.prompts, output / "sheet.png")
    if config.images:
        resolution = next(iter(pipes.values())).resolution
        stream = build_stream([as_source(source) for source in config.images], seed=config.seed)
        pictures = [resize_and_crop(sample["image"], resolution) for sample in islice(stream, 8)]
        rows = {"reference": pictures}
        rows |= {name: draw(pipe, len(pictures), image=pictures) for name, pipe in pipes.items()}
        draw_sheet(rows, [""] * len(pictures), output / "variations.png")
    print(f"Wrote {', '.join(str(path) for path in sorted(output.glob('*.png')))}")


if __name__ == "__main__":
    main(*TrlParser(ShowConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
