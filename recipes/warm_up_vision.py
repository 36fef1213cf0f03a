"""Stage 0: makes the tiny MLLM's vision tower see. At full size a published MLLM is downloaded instead.

    python recipes/warm_up_vision.py --output_dir outputs/mine/vision --minutes 20
    python recipes/warm_up_vision.py --output_dir outputs/mine/vision --max_steps 4500

Dense labels: for each patch of a picture of the shapes world, which shape and which colour. The caption loss alone teaches a
small tower colours but hardly any shapes. The language model behind it stays as it was: `sft_mllm.py` teaches it to speak.
Same seed and --max_steps, same weights; --minutes stops by the clock instead, so such a run is not repeatable step for step.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from trl import TrlParser

from iomm_hf.data.shapes import COLORS, SHAPES, Scene, corpus_scene, patch_labels, render
from iomm_hf.modeling_iomm import load_mllm
from iomm_hf.processing_iomm import IOMMProcessor
from iomm_hf.tiny import tiny_encoder, tiny_processor
from iomm_hf.training.stage0 import Budget, WarmUpConfig, save_mllm


BACKGROUND_WEIGHT = 0.2  # of a background patch against one of an object; most patches are background


@dataclass(kw_only=True)
class VisionConfig(WarmUpConfig):
    output_dir: str = field(
        default="outputs/mllm", metadata={"help": "Folder of the finished MLLM, in InternVL's layout."}
    )
    init_from: str | None = field(default=None, metadata={"help": "MLLM folder to go on from."})


class PatchLabeller(nn.Module):
    """A linear head that names shape and colour of each patch of the vision tower; thrown away afterwards."""

    def __init__(self, vision_tower: nn.Module):
        super().__init__()
        self.vision_tower = vision_tower
        self.head = nn.Linear(vision_tower.config.hidden_size, len(SHAPES) + 1 + len(COLORS) + 1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.vision_tower(pixel_values=pixel_values).last_hidden_state[:, 1:]  # (B, P * P, width), no CLS
        return self.head(F.layer_norm(features, features.shape[-1:])).split([len(SHAPES) + 1, len(COLORS) + 1], dim=-1)


class Corpus:
    """Scenes as pixels (N, 3, H, W), normalised as the MLLM reads them, and their patch labels (N, P * P, 2)."""

    def __init__(self, scenes: list[Scene], processor: IOMMProcessor, image_size: int, patch: int):
        pixels = np.stack([render(scene, image_size) for scene in tqdm(scenes, "Drawing scenes")])
        mean, std = (
            np.array(getattr(processor.image_processor, name), np.float32) for name in ("image_mean", "image_std")
        )
        self.pixel_values = torch.from_numpy((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2).float()
        self.labels = torch.from_numpy(np.stack([patch_labels(s, image_size, patch) for s in scenes])).flatten(1, 2)


def patch_loss(logits: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    loss = torch.zeros(())
    for part, target in zip(logits, labels.unbind(-1), strict=True):
        weight = torch.ones(part.shape[-1])
        weight[0] = BACKGROUND_WEIGHT
        loss = loss + F.cross_entropy(part.flatten(0, 1), target.flatten(), weight=weight)
    return loss


@torch.no_grad()
def measure(labeller: PatchLabeller, corpus: Corpus) -> dict[str, float]:
    """Shares of held-out object patches named right."""
    shapes, colors = [], []
    for part in torch.arange(len(corpus.labels)).split(64):
        labels, (shape, color) = corpus.labels[part], labeller(corpus.pixel_values[part])
        is_object = labels[..., 0] > 0
        shapes.append((shape.argmax(-1) == labels[..., 0])[is_object])
        colors.append((color.argmax(-1) == labels[..., 1])[is_object])
    return {
        "held_out": len(corpus.labels),
        "object_patches": sum(map(len, shapes)),
        "shapes_right": torch.cat(shapes).float().mean().item(),
        "colors_right": torch.cat(colors).float().mean().item(),
    }


def main(config: VisionConfig):
    processor = tiny_processor()
    mllm = tiny_encoder(processor, seed=config.seed).mllm if config.init_from is None else load_mllm(config.init_from)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    vision = mllm.config.vision_config
    corpus, held_out = (
        Corpus(
            [corpus_scene(seed, i, tasks=config.tasks)[0] for i in range(count)],
            processor,
            vision.image_size[0],
            vision.patch_size[0],
        )
        for seed, count in ((config.seed, config.num_scenes), (10**6, config.held_out))
    )
    labeller = PatchLabeller(mllm.model.vision_tower.requires_grad_(True)).train()
    output = Path(config.output_dir)
    log = output.with_name(f"{output.name}-log.jsonl")
    optimizer = torch.optim.AdamW(labeller.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    budget = Budget(optimizer, config.max_steps, config.minutes, log, "Dense labels", warmup=200)
    for _ in budget:
        chosen = rng.integers(config.num_scenes, size=config.batch_size)
        budget.update(patch_loss(labeller(corpus.pixel_values[chosen]), corpus.labels[chosen]))

    summary = {"steps": len(budget.losses)} | measure(labeller.eval(), held_out)
    save_mllm(output, mllm, processor, summary)


if __name__ == "__main__":
    main(*TrlParser(VisionConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
