"""What the log tells beside one loss: the loss by time and by source, for all ranks, and what a sample costs.

A step leaves sums and counts under flat names, so that averaging over steps and ranks is one plain mean of a row of numbers.
"""

import torch
from PIL import Image

from ..cost import MetaModel
from ..data.streams import MixedStream
from ..pipeline_iomm import IOMMPipeline
from .config import TrainingConfig
from .sharding import outline


BANDS = 4  # of the time t, from the picture to noise


def losses_by_group(
    losses: torch.Tensor, timesteps: torch.Tensor, sources: torch.Tensor, num_sources: int
) -> dict[str, float]:
    r"""
    A batch's losses, summed and counted by band of time and by source.

    Args:
        losses (`torch.Tensor` of shape `(batch_size,)`): One a sample.
        timesteps (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1], 1 for noise.
        sources (`torch.LongTensor` of shape `(batch_size,)`): Index of each sample's source.
        num_sources (`int`): Sources of the run.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.training.metrics import losses_by_group
    >>> row = losses_by_group(torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.9]), torch.tensor([0, 0]), 1)
    >>> row["time/3/sum"], row["time/3/count"], row["source/0/sum"]
    (0.25, 1.0, 0.75)
    ```
    """
    bands = (timesteps * BANDS).long().clamp(max=BANDS - 1)
    row: dict[str, float] = {}
    for name, groups, number in (("time", bands, BANDS), ("source", sources, num_sources)):
        sums = losses.new_zeros(number).index_add(0, groups, losses)
        counts = losses.new_zeros(number).index_add(0, groups, torch.ones_like(losses))
        for i, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            row |= {f"{name}/{i}/sum": total, f"{name}/{i}/count": count}
    return row


def mean_losses_by_group(means: dict[str, float], sources: list[str]) -> dict[str, dict[str, float]]:
    r"""
    From the means of such rows over steps and ranks, the mean loss of each group that had samples.

    Args:
        means (`dict[str, float]`): Means under the names of [`losses_by_group`].
        sources (`list[str]`): What to call the sources.

    Example:

    ```python
    >>> from iomm_hf.training.metrics import mean_losses_by_group
    >>> mean_losses_by_group({"time/0/sum": 1.0, "time/0/count": 2.0, "source/0/sum": 0.0, "source/0/count": 0.0}, ["photos"])
    {'loss_by_time': {'0-0.25': 0.5}, 'loss_by_source': {}}
    ```
    """
    labels = {"time": [f"{i / BANDS:g}-{(i + 1) / BANDS:g}" for i in range(BANDS)], "source": sources}
    return {
        f"loss_by_{name}": {
            label: means[f"{name}/{i}/sum"] / means[f"{name}/{i}/count"]
            for i, label in enumerate(names)
            if means.get(f"{name}/{i}/count")
        }
        for name, names in labels.items()
    }


def flops_per_sample(config: TrainingConfig, pipeline: IOMMPipeline, stream: MixedStream, mask_ratio: float) -> float:
    """FLOPs of forward and backward pass of a sample of this run, counted on the meta device (`iomm_hf.cost`). What is
    recomputed is not work that a sample needs, so it does not count; nor do padding, connector and alignment. Sequences are
    taken for as long as those of pictures."""
    copy = outline(pipeline)
    parts = tuple(part.to("meta") for part in (copy.text_encoder, copy.vae.requires_grad_(False), copy.transformer))
    processor = pipeline.processor
    whole = processor.encode([processor.image_only(Image.new("RGB", (64, 64)))])["input_ids"].shape[1]
    prefix_tokens = whole
    if pipeline.text_encoder.config.mask_mode == "drop":
        prefix_tokens -= round(mask_ratio * processor.image_seq_length)
    caches = [source.cache_info for source in stream.streams]
    flops = MetaModel(parts, pipeline.resolution, prefix_tokens, torch.float32).flops(  # type: ignore[arg-type]
        cached_latents=all(info is not None for info in caches),
        cached_vision_tokens=all(info is not None and info["vision_tokens"] for info in caches),
    )
    seen = config.mix_ratio * (1 - config.condition_dropout)  # by the vision tower
    return sum(flops.values()) - (1 - seen) * flops["vision tower"]
