"""From decoded samples to a training batch.

Whatever is random about a sample (dropout here; time, noise and mask in the module) comes from its key and epoch alone,
so that neither the batch around it, nor the number of ranks, nor a restart changes it.
"""

import hashlib
from typing import Any

import torch
from PIL import Image

from ..processing_iomm import Conversation, IOMMProcessor
from .images import resize_and_crop, to_tensor


UNSEEN = Image.new("RGB", (1, 1))  # in place of a picture whose vision tokens are known


def sample_seed(seed: int, key: str, epoch: int) -> int:
    """A 63-bit seed for one visit of one sample."""
    digest = hashlib.blake2b(f"{seed}|{key}|{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class IOMMCollator:
    r"""
    Builds the inputs of [`~iomm_hf.training.module.IOMMTrainingModule`].

    A sample with a caption becomes a text-to-image sequence, one without an image-only sequence over its own picture;
    a share `condition_dropout` of both becomes the unconditional instruction, for guidance.

    Args:
        processor ([`IOMMProcessor`]): Builds the token sequences.
        resolution (`int`): Side of the training picture: shorter edge resized to it, centre cropped. Samples that name
            their `size`, as those of [`~iomm_hf.data.buckets.BucketedStream`] do, are cropped to that instead.
        condition_dropout (`float`, *optional*, defaults to 0.1): The paper states none; 10 % is our choice.
        seed (`int`, *optional*, defaults to 0): The run's seed.

    Returns:
        `dict` with `input_ids` and `attention_mask` (B, L), `pixel_values` (images, 3, h, w) where the batch has any,
        `pixels` (B, 3, height, width) as uint8, `seed` and `source` (B,), `keys` (B strings), `num_captions` and `skipped`
        ({reason: count} of bad samples met on the way). From cached samples, `latent_mean` and `latent_logvar`
        (B, C, h, w) replace `pixels`, `image_features` (images, tokens, D) `pixel_values`, and where all samples have
        them there are `vision_tokens` (B, tokens, D), captioned or not.

    Raises:
        `ValueError`: cached samples and others in one batch, or samples of several sizes.
    """

    def __init__(self, processor: IOMMProcessor, resolution: int, condition_dropout: float = 0.1, seed: int = 0):
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout must be in [0, 1], got {condition_dropout}.")
        self.processor = processor
        self.resolution = resolution
        self.condition_dropout = condition_dropout
        self.seed = seed

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        cached = [sample["cached"] for sample in samples]
        if any(cached) and not all(cached):
            raise ValueError("Some sources of the run are cached and some are not: precompute all of them, or none.")
        sizes = {sample.get("size", (self.resolution, self.resolution)) for sample in samples}
        if len(sizes) > 1:
            raise ValueError(f"Samples of {sorted(sizes)} in one batch: bucket them by the loader's own batch size.")
        [size] = sizes
        known = all(item is not None and item.vision_tokens is not None for item in cached)
        conversations, pixels, seeds = [], [], []
        skipped: dict[str, int] = {}
        for sample in samples:
            image = sample["image"]
            if sample["cached"] is None:
                image = resize_and_crop(image, size)
                pixels.append(to_tensor(image))
            seeds.append(sample_seed(self.seed, sample["key"], sample["epoch"]))
            conversations.append(self._conversation(UNSEEN if known else image, sample["caption"], seeds[-1]))
            for reason, count in sample["skipped"].items():
                skipped[reason] = skipped.get(reason, 0) + count
        batch = {
            **self.processor.encode(conversations, see=not known),
            "seed": torch.tensor(seeds),
            "source": torch.tensor([sample.get("source", 0) for sample in samples]),
            "keys": [f"{sample['key']}@{sample['epoch']}" for sample in samples],
            "num_captions": sum(sample["caption"] is not None for sample in samples),
            "skipped": skipped,
        }
        if not all(cached):
            return batch | {"pixels": torch.stack(pixels)}
        batch["latent_mean"] = torch.stack([item.mean for item in cached])
        batch["latent_logvar"] = torch.stack([item.logvar for item in cached])
        if known:
            batch["vision_tokens"] = torch.stack([item.vision_tokens for item in cached])
            has_image = (batch["input_ids"] == self.processor.image_token_id).any(1)
            if has_image.any():
                batch["image_features"] = batch["vision_tokens"][has_image]
        return batch

    def _conversation(self, image, caption: str | None, seed: int) -> Conversation:
        generator = torch.Generator().manual_seed(seed ^ 1)  # the module's draws start from `seed` itself
        if torch.rand(1, generator=generator).item() < self.condition_dropout:
            return self.processor.unconditional()
        return self.processor.image_only(image) if caption is None else self.processor.text_to_image(caption)
