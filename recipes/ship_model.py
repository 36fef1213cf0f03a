"""Makes the model that comes with this package: a checkpoint whole in itself, in half precision, with its card.

    python recipes/ship_model.py --checkpoint outputs/shapes/stage2/best --score results/shapes/score.json

The card names what the model is, how it was made, and the scores in `--score` (from `score_shapes.py`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from trl import TrlParser

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes import TASKS
from iomm_hf.files import write_json
from iomm_hf.training.checkpoints import whole_folder


LIMIT = 20e6  # bytes, of all files together

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [iomm, shapes-world]
---

# Tiny IOMM of the shapes world

A unified model of {millions:.1f}M weights that draws and describes coloured shapes at 64x64 px: a frozen InternVL ({mllm:.1f}M), an adapter
({adapter:.1f}M), a U-Net ({transformer:.1f}M) and an autoencoder ({vae:.1f}M), all trained by the recipes of
iomm-hf on pictures that the package draws itself, on two CPU cores but for five minutes on a GPU. Every part is Apache-2.0.

**Unofficial.** An implementation of IOMM (Sun, Xie, Lin, CVPR 2026), not affiliated with the paper's authors. It knows nothing but
eight shapes in eight colours and is evidence neither for nor against the paper.

```python
import iomm_hf

pipe = iomm_hf.IOMMPipeline.from_pretrained(iomm_hf.shipped_model())
pipe("a red circle").images[0].show()
```

Share of {pictures} pictures that show their prompt, judged by rule ({steps} steps, guidance {guidance}), with 95 % intervals:

| | overall | {tasks} |
|---|---|{bars}
{rows}
"""


@dataclass
class ShipConfig:
    checkpoint: str = field(metadata={"help": "Pipeline folder of a finished run."})
    score: str = field(metadata={"help": "score.json of that checkpoint, from score_shapes.py."})
    output_dir: str = field(
        default_factory=lambda: str(shipped_model()), metadata={"help": "Where to write. Default: into the package."}
    )


def card(pipeline: IOMMPipeline, scores: dict) -> str:
    def millions(module) -> float:
        return sum(parameter.numel() for parameter in module.parameters()) / 1e6

    reports = {name: value for name, value in scores.items() if isinstance(value, dict) and "overall" in value}
    rows = []
    for name, report in reports.items():
        overall = report["overall"]
        cells = [f"{overall['value']:.2f} [{overall['low']:.2f}, {overall['high']:.2f}]"]
        cells += [f"{report['tasks'][task]['accuracy']:.2f}" for task in TASKS]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    encoder = pipeline.text_encoder
    parts = {
        "mllm": encoder.mllm,
        "adapter": encoder.adapter,
        "transformer": pipeline.transformer,
        "vae": pipeline.vae,
    }
    sizes = {name: millions(part) for name, part in parts.items()}
    return CARD.format(
        millions=sum(sizes.values()),
        **sizes,
        pictures=reports["model"]["pictures"],
        steps=scores["num_inference_steps"],
        guidance=scores["guidance_scale"],
        tasks=" | ".join(TASKS),
        bars="---|" * len(TASKS),
        rows="\n".join(rows),
    )


def without_paths(settings):
    """Settings without `_name_or_path`, in which libraries note where on this machine a part came from."""
    if isinstance(settings, dict):
        return {name: without_paths(value) for name, value in settings.items() if name != "_name_or_path"}
    return settings


def main(config: ShipConfig):
    pipeline = IOMMPipeline.from_pretrained(config.checkpoint).to(torch.float16)
    encoder_config = pipeline.text_encoder.config
    encoder_config.mllm_name_or_path = encoder_config.mllm_revision = encoder_config.mllm_hash = None
    pipeline.register_to_config(vae_name_or_path=None, vae_subfolder=None, vae_revision=None, vae_hash=None)
    output = Path(config.output_dir)
    with whole_folder(output, Accelerator(cpu=True)) as folder:
        pipeline.save_pretrained(folder)
        for file in folder.rglob("*.json"):
            if "_name_or_path" in (text := file.read_text()):
                write_json(file, without_paths(json.loads(text)))
        (folder / "README.md").write_text(card(pipeline, json.loads(Path(config.score).read_text())))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if size > LIMIT:
            raise ValueError(
                f"The model takes {size / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB that are shipped."
            )
    print(f"Wrote {output}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*TrlParser(ShipConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
