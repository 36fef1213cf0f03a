"""Whether a checkpoint binds words to each other: the shapes world's scenes under their caption and under its words exchanged.

python recipes/check_binding.py                                          # the model that comes with the package
python recipes/check_binding.py --checkpoint outputs/mine/final --scenes 400 --output binding.json
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes import BOUND_TASKS, corpus_scene
from iomm_hf.evaluation.binding import generator_binding, mllm_binding, reading
from iomm_hf.files import write_json


@dataclass
class BindingConfig:
    checkpoint: str | None = field(
        default=None, metadata={"help": "Pipeline folder or Hub id. Default: the shipped one."}
    )
    scenes: int = field(default=400, metadata={"help": "Scenes a task, and texts."})
    draws: int = field(default=8, metadata={"help": "Draws of time and noise for each scene."})
    seed: int = field(default=10**6, metadata={"help": "Their corpus; another one than was trained on."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


def main(config: BindingConfig):
    pipeline = IOMMPipeline.from_pretrained(config.checkpoint or shipped_model(), dtype=torch.float32)
    mllm, processor = pipeline.text_encoder.mllm, pipeline.processor
    result: dict[str, dict] = {"reading": {}}
    for kind, share in reading(mllm, processor, config.scenes, seed=config.seed).items():
        result["reading"][kind] = asdict(share)
        print(f"texts {kind:8} right in {share.accuracy:.3f} [{share.low:.3f}, {share.high:.3f}] of {share.total}")
    for task in BOUND_TASKS:
        scenes = [corpus_scene(config.seed, index, tasks=(task,)) for index in range(config.scenes)]
        shares = {
            "mllm": mllm_binding(mllm, processor, scenes),
            "generator": generator_binding(pipeline, scenes, config.draws, seed=config.seed),
        }
        result[task] = {part: asdict(share) for part, share in shares.items()}
        for part, share in shares.items():
            print(
                f"{task:10} {part:9} prefers the true caption in {share.accuracy:.3f} [{share.low:.3f}, {share.high:.3f}]"
                f" of {share.total} scenes (a bag of words: 0.5)"
            )
    if config.output is not None:
        write_json(
            Path(config.output), result | {"checkpoint": config.checkpoint, "seed": config.seed, "draws": config.draws}
        )


if __name__ == "__main__":
    main(*TrlParser(BindingConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
