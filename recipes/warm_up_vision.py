"""Stage 0: makes the tiny MLLM see and speak. At full size a published MLLM is downloaded instead.

    python recipes/warm_up_vision.py --output_dir outputs/mine/mllm --minutes 30
    python recipes/warm_up_vision.py --output_dir outputs/mine/mllm --label_steps 4000 --caption_steps 2500

First dense labels: for each patch of a picture of the shapes world, which shape and which colour. Captions alone would
teach colours but hardly any shapes. Then captions, through the MLLM's own chat template; combinations that are held out
are never named. Same seed and step counts, same weights; --minutes stops by the clock instead, so such a run is not
repeatable step for step.
"""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from trl import TrlParser

from iomm_hf.data.shapes import COLORS, SHAPES, TASKS, Scene, corpus_scene, describe, patch_labels, render
from iomm_hf.modeling_iomm import load_mllm
from iomm_hf.processing_iomm import IOMMProcessor
from iomm_hf.tiny import tiny_encoder, tiny_processor
from iomm_hf.training.checkpoints import whole_folder, write_json
from iomm_hf.training.stage0 import Budget, check_budget


QUESTION = "Describe the image."
BACKGROUND_WEIGHT = 0.2  # of a background patch against one of an object; most patches are background


@dataclass
class VisionConfig:
    output_dir: str = field(
        default="outputs/mllm", metadata={"help": "Folder of the finished MLLM, in InternVL's layout."}
    )
    init_from: str | None = field(default=None, metadata={"help": "MLLM folder to go on from."})
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS), metadata={"help": "Kinds of scenes; see recipes/make_shapes.py."}
    )
    num_scenes: int = field(default=8000, metadata={"help": "Scenes to learn from, drawn once."})
    held_out: int = field(default=256, metadata={"help": "Further scenes, kept for the measurement."})
    batch_size: int = field(default=32, metadata={"help": "Scenes a step."})
    label_steps: int | None = field(default=None, metadata={"help": "Steps on dense labels; repeatable."})
    caption_steps: int | None = field(default=None, metadata={"help": "Steps on captions; repeatable."})
    minutes: float | None = field(default=None, metadata={"help": "Time for both, instead of numbers of steps."})
    caption_share: float = field(default=0.4, metadata={"help": "Share of the minutes for captions, in (0, 1)."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of AdamW."})
    seed: int = field(default=0, metadata={"help": "Everything random derives from it."})

    def __post_init__(self):
        if not 0 < self.caption_share < 1:
            raise ValueError(f"caption_share must be in (0, 1), got {self.caption_share}.")
        if not 1 <= self.batch_size <= self.num_scenes or self.held_out < 1:
            raise ValueError(
                "batch_size must be between 1 and num_scenes, and held_out at least 1, got"
                f" {self.batch_size}, {self.num_scenes} and {self.held_out}."
            )
        check_budget(self.minutes, label_steps=self.label_steps, caption_steps=self.caption_steps)


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
    """Scenes as pixels, patch labels (N, P * P, 2) and token sequences of a question and its answer."""

    def __init__(self, scenes: list[Scene], processor: IOMMProcessor, image_size: int, patch: int):
        self.captions = [describe(scene) for scene in scenes]
        pixels = np.stack([render(scene, image_size) for scene in tqdm(scenes, "Drawing scenes")])
        mean, std = (
            np.array(getattr(processor.image_processor, name), np.float32) for name in ("image_mean", "image_std")
        )
        self.pixel_values = torch.from_numpy((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2).float()
        self.labels = torch.from_numpy(np.stack([patch_labels(s, image_size, patch) for s in scenes])).flatten(1, 2)
        self.question = processor.encode([processor.understand(QUESTION, np.zeros_like(pixels[0]))])["input_ids"][0]
        tokenizer = processor.tokenizer
        answers = tokenizer([caption + tokenizer.eos_token for caption in self.captions])["input_ids"]
        self.answers = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(answer) for answer in answers], batch_first=True, padding_value=-100
        )

    def captioning_batch(self, chosen: np.ndarray, pad: int) -> dict[str, torch.Tensor]:
        answers = self.answers[chosen]
        answers = answers[:, : int((answers >= 0).sum(1).max())]
        question = self.question.expand(len(chosen), -1)
        ids = torch.cat([question, answers.clamp(min=0).where(answers >= 0, torch.tensor(pad))], dim=1)
        mask = torch.cat([torch.ones_like(question), (answers >= 0).long()], dim=1)
        labels = torch.cat([torch.full_like(question, -100), answers], dim=1)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": self.pixel_values[chosen]}


def patch_loss(logits: tuple[torch.Tensor, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    loss = torch.zeros(())
    for part, target in zip(logits, labels.unbind(-1), strict=True):
        weight = torch.ones(part.shape[-1])
        weight[0] = BACKGROUND_WEIGHT
        loss = loss + F.cross_entropy(part.flatten(0, 1), target.flatten(), weight=weight)
    return loss


@torch.no_grad()
def measure(mllm, labeller: PatchLabeller, corpus: Corpus, processor: IOMMProcessor) -> dict[str, float]:
    """Shares right on held-out scenes: shapes and colours of object patches, and whole captions, greedily spoken."""
    shapes, colors, spoken = [], [], []
    for part in torch.arange(len(corpus.labels)).split(64):
        labels, (shape, color) = corpus.labels[part], labeller(corpus.pixel_values[part])
        is_object = labels[..., 0] > 0
        shapes.append((shape.argmax(-1) == labels[..., 0])[is_object])
        colors.append((color.argmax(-1) == labels[..., 1])[is_object])
        question = corpus.question.expand(len(part), -1)
        answer = mllm.generate(
            input_ids=question,
            attention_mask=torch.ones_like(question),
            pixel_values=corpus.pixel_values[part],
            max_new_tokens=corpus.answers.shape[1],
            do_sample=False,
        )
        spoken += processor.tokenizer.batch_decode(answer[:, question.shape[1] :], skip_special_tokens=True)
    right = sum(said.strip() == wanted for said, wanted in zip(spoken, corpus.captions, strict=True))
    return {
        "held_out": len(corpus.captions),
        "patch_shapes": torch.cat(shapes).float().mean().item(),
        "patch_colors": torch.cat(colors).float().mean().item(),
        "whole_captions": right / len(corpus.captions),
    }


def main(config: VisionConfig):
    processor = tiny_processor()
    mllm = tiny_encoder(processor, seed=config.seed).mllm if config.init_from is None else load_mllm(config.init_from)
    mllm.requires_grad_(True).train()
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
    labeller = PatchLabeller(mllm.model.vision_tower)
    output = Path(config.output_dir)
    minutes = {"labels": None, "captions": None}
    if config.minutes is not None:
        captioning = config.minutes * config.caption_share
        minutes = {"labels": config.minutes - captioning, "captions": captioning}

    optimizer = torch.optim.AdamW(labeller.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    log = output.with_name(f"{output.name}-labels-log.jsonl")
    budget = Budget(optimizer, config.label_steps, minutes["labels"], log, "Dense labels", warmup=200)
    for _ in budget:
        chosen = rng.integers(config.num_scenes, size=config.batch_size)
        budget.update(patch_loss(labeller(corpus.pixel_values[chosen]), corpus.labels[chosen]))

    optimizer = torch.optim.AdamW(
        chain(mllm.parameters(), labeller.head.parameters()), config.learning_rate, (0.9, 0.95)
    )
    log = output.with_name(f"{output.name}-captions-log.jsonl")
    budget = Budget(optimizer, config.caption_steps, minutes["captions"], log, "Captions", warmup=200)
    for _ in budget:
        chosen = rng.integers(config.num_scenes, size=config.batch_size)
        # The labels go on at a low weight, so that the tower keeps what it learned.
        dense = patch_loss(labeller(corpus.pixel_values[chosen]), corpus.labels[chosen])
        spoken = mllm(**corpus.captioning_batch(chosen, processor.tokenizer.pad_token_id)).loss
        budget.update(spoken + 0.1 * dense)

    mllm.eval()
    summary = measure(mllm, labeller.eval(), held_out, processor)
    with whole_folder(output, Accelerator(cpu=True)) as folder:
        mllm.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(folder / "summary.json", summary)
    print(f"{output}: {summary}")


if __name__ == "__main__":
    main(*TrlParser(VisionConfig, description=__doc__.splitlines()[0]).parse_args_and_config())
