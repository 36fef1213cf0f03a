"""How well an MLLM describes scenes of the shapes world that it has not seen: shapes, colours, counts, whole captions.

python recipes/check_captions.py --mllm outputs/shapes/mllm/final --scenes 1000 --output captions.json
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

from iomm_hf.data.shapes import corpus_scene
from iomm_hf.evaluation.captions import score_captions
from iomm_hf.evaluation.shapes import Share
from iomm_hf.files import write_json
from iomm_hf.modeling_iomm import load_mllm, resolve_frozen
from iomm_hf.processing_iomm import IOMMProcessor


@dataclass
class CaptionsConfig:
    mllm: str = field(metadata={"help": "MLLM folder or Hub id, in InternVL's layout."})
    scenes: int = field(default=1000, metadata={"help": "Scenes to describe."})
    seed: int = field(default=10**6, metadata={"help": "Their corpus; another one than was trained on."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


def main(config: CaptionsConfig):
    folder = resolve_frozen(config.mllm, None)
    mllm, processor = load_mllm(folder, dtype=torch.float32), IOMMProcessor.from_pretrained(folder)
    scenes = [corpus_scene(config.seed, index)[0] for index in range(config.scenes)]
    result = score_captions(mllm, processor, scenes)
    for name, share in result.items():
        if isinstance(share, Share):
            print(f"{name:8} {share.accuracy:.3f} [{share.low:.3f}, {share.high:.3f}] of {share.total}")
    for pair in result["wrong"][:8]:
        print(f"  said {pair['said']!r}, wanted {pair['wanted']!r}")
    if config.output is not None:
        plain = {name: asdict(value) if isinstance(value, Share) else value for name, value in result.items()}
        write_json(Path(config.output), plain | {"mllm": config.mllm, "seed": config.seed})


if __name__ == "__main__":
    main(*TrlParser(CaptionsConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
