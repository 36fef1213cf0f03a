"""Whether variations show their reference: each looks for its source among all, by the frozen MLLM's vision tokens.

python recipes/check_variations.py --checkpoint outputs/mine/stage1/final --images held_out_pictures/
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.images import resize_and_crop
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.figures import draw_sheet
from iomm_hf.evaluation.variations import measure_variations
from iomm_hf.files import write_json
from iomm_hf.training.config import as_source


@dataclass
class VariationsConfig:
    checkpoint: str = field(metadata={"help": "Pipeline folder or Hub id."})
    images: list[str] = field(default_factory=list, metadata={"help": "Sources of held-out pictures."})
    pictures: int = field(default=64, metadata={"help": "References to vary and to be found among."})
    num_inference_steps: int = field(default=30, metadata={"help": "Sampling steps."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Strength of guidance."})
    seed: int = field(default=0, metadata={"help": "Which pictures, and the noise."})
    output_dir: str = field(default="outputs/variations", metadata={"help": "Folder for the JSON file and the sheet."})

    def __post_init__(self):
        if not self.images:
            raise ValueError("Give held-out pictures: --images FOLDER.")


def main(config: VariationsConfig):
    pipeline = IOMMPipeline.from_pretrained(config.checkpoint)
    stream = build_stream([as_source(source) for source in config.images], seed=config.seed)
    samples = islice(stream, config.pictures)
    pictures = [resize_and_crop(sample["image"], pipeline.resolution) for sample in samples]
    result, variations = measure_variations(
        pipeline, pictures, config.num_inference_steps, config.guidance_scale, seed=config.seed
    )
    for name, share in (("own reference", result.top1), ("another's", result.control)):
        print(f"found {name}: {share.accuracy:.1%} [{share.low:.1%}, {share.high:.1%}] of {share.total}")
    print(f"by chance: {result.chance:.1%}")
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "variations.json", result.to_dict() | {"checkpoint": config.checkpoint})
    draw_sheet(
        {"reference": pictures[:8], "variation": variations[:8]}, [""] * len(pictures[:8]), output / "variations.png"
    )


if __name__ == "__main__":
    main(*TrlParser(VariationsConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
