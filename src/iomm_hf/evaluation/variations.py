"""Does a variation show what its reference shows? Judged by the frozen MLLM's own eyes, among other references.

Each reference is varied once, nothing masked, and the variation looks for its source among all references by the cosine of
their vision tokens, centred over the references. One in N is found by chance; the control draws each variation from the next
reference and asks whether it finds the one it does not come from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..data.collate import sample_seed
from ..pipeline_iomm import IOMMPipeline
from .drawing import draw_batches
from .shapes import Share, wilson_share


@dataclass(frozen=True)
class VariationUse:
    r"""
    Args:
        pictures (`int`): References, and variations of them.
        top1 (`Share`): Variations whose nearest reference is their own.
        control (`Share`): The same where each was drawn from the next reference.
        chance (`float`): 1 / pictures.
        seed (`int`): What the noise derives from.
    """

    pictures: int
    top1: Share
    control: Share
    chance: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def picture_features(pipeline: IOMMPipeline, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Frozen vision tokens of each picture in one row, (N, tokens * D): where things are counts too."""
    inputs = pipeline.processor.encode([pipeline.processor.image_only(picture) for picture in pictures])
    features = pipeline.text_encoder.image_features(inputs["pixel_values"].to(pipeline.device))
    return features.float().flatten(1).cpu()


def nearest(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """For each row of `features` (N, D) the index of the nearest row of `references` (M, D)."""
    center = references.mean(0)
    return (F.normalize(features - center, dim=1) @ F.normalize(references - center, dim=1).T).argmax(1)


def measure_variations(
    pipeline: IOMMPipeline,
    pictures: Sequence[Image.Image],
    num_inference_steps: int = 30,
    guidance_scale: float = 3.0,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[VariationUse, list[Image.Image]]:
    r"""
    Draws a variation of each picture and lets it find its source.

    Args:
        pipeline ([`IOMMPipeline`]): The model.
        pictures (`Sequence[PIL.Image.Image]`): Held-out references of the pipeline's resolution.
        num_inference_steps, guidance_scale, batch_size, seed: How to draw.

    Returns:
        [`VariationUse`] and the variations.

    Raises:
        `ValueError`: fewer than two pictures.
    """
    if len(pictures) < 2:
        raise ValueError(f"{len(pictures)} pictures leave no other to be confused with.")
    references = picture_features(pipeline, pictures)
    own = torch.arange(len(pictures))
    seeds = [sample_seed(seed, str(number), 0) for number in range(len(pictures))]

    def draw(sources: list[Image.Image]) -> list[Image.Image]:
        return draw_batches(pipeline, seeds, num_inference_steps, guidance_scale, batch_size, image=sources)

    def share(variations: list[Image.Image]) -> Share:
        found = nearest(picture_features(pipeline, variations), references) == own
        return wilson_share(int(found.sum()), len(found))

    variations = draw(list(pictures))
    control = draw([*pictures[1:], pictures[0]])
    result = VariationUse(len(pictures), share(variations), share(control), 1 / len(pictures), seed)
    return result, variations
