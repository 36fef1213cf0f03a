"""Whether a checkpoint uses its conditions: held-out pictures' loss under their own and under another's.

python recipes/check_condition_use.py --checkpoint outputs/mine/final --images held_out_pictures/
python recipes/check_condition_use.py --config results/real-drawings/check-captions.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import TrlParser

from iomm_hf import IOMMPipeline
from iomm_hf.data.streams import build_stream
from iomm_hf.evaluation.condition_use import measure_condition_use
from iomm_hf.files import write_json
from iomm_hf.training.config import as_source


@dataclass
class CheckConfig:
    checkpoint: str = field(metadata={"help": "Pipeline folder or Hub id."})
    images: list[str] = field(default_factory=list, metadata={"help": "Held-out pictures, conditioned on themselves."})
    pairs: list[str] = field(default_factory=list, metadata={"help": "Held-out pairs, conditioned on their captions."})
    mask_ratio: float = field(default=0.85, metadata={"help": "Share of image tokens hidden, in [0, 1)."})
    pictures: int = field(default=200, metadata={"help": "Pictures to measure."})
    draws: int = field(default=8, metadata={"help": "Draws of time, noise and mask for each picture."})
    seed: int = field(default=0, metadata={"help": "What the draws derive from."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self):
        if bool(self.images) == bool(self.pairs):
            raise ValueError("Give held-out `images` or held-out `pairs`, one of them.")
        self.images = [as_source(source) for source in self.images]
        self.pairs = [as_source(source) for source in self.pairs]


def main(config: CheckConfig):
    pipeline = IOMMPipeline.from_pretrained(config.checkpoint)
    stream = build_stream(config.images, config.pairs, seed=config.seed)
    result = measure_condition_use(
        pipeline, stream, config.pictures, config.mask_ratio, draws=config.draws, seed=config.seed
    )
    print(result)
    if config.output is not None:
        write_json(Path(config.output), result.to_dict() | {"checkpoint": config.checkpoint})


if __name__ == "__main__":
    main(*TrlParser(CheckConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
