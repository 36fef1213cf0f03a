"""Does a generator use its condition? A falling loss does not tell: a picture can be denoised without one.

Each held-out picture's loss under its own condition is compared with its loss under another picture's, with the same time
and noise. Pairing removes the large spread between pictures, so a small benefit shows in a few hundred of them.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from math import sqrt
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.collate import IOMMCollator
from ..pipeline_iomm import IOMMPipeline
from ..training.module import IOMMTrainingModule


@dataclass(frozen=True)
class ConditionUse:
    r"""
    Losses of held-out pictures under their own and under another's condition.

    Args:
        pictures (`int`): Pictures measured.
        draws (`int`): Draws of time, noise and mask averaged for each picture.
        seed (`int`): What they derive from.
        own, other (`float`): Mean losses.
        benefit (`float`): Mean of other - own: positive if conditions help.
        interval (`tuple[float, float]`): 95 % interval of `benefit`, from the spread of the paired differences.
        share_better (`float`): Share of pictures whose own condition gives the lower loss.
    """

    pictures: int
    draws: int
    seed: int
    own: float
    other: float
    benefit: float
    interval: tuple[float, float]
    share_better: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "used" if low > 0 else "not shown to be used"
        return (
            f"own {self.own:.4f}, another's {self.other:.4f}, benefit {self.benefit:.4f} [{low:.4f}, {high:.4f}] (95 %),"
            f" better for {self.share_better:.1%} of {self.pictures} pictures: the condition is {verdict}"
        )


@torch.no_grad()
def condition_losses(
    pipeline: IOMMPipeline,
    samples: Iterable[dict[str, Any]],
    pictures: int,
    mask_ratio: float,
    draws: int = 8,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The loss of each picture under its own and under another's condition. Draws belong to the picture, so models are compared
    on the same ones, picture by picture.

    Args:
        pipeline ([`IOMMPipeline`]): The model.
        samples (iterable of `dict`): Held-out samples of a [`~iomm_hf.data.streams.SampleStream`]; those with captions
            are conditioned on them, those without on their own masked picture.
        pictures (`int`): How many to take.
        mask_ratio (`float`): Share of image tokens hidden.
        draws (`int`, *optional*, defaults to 8): Draws of time, noise and mask for each picture.
        batch_size (`int`, *optional*, defaults to 16): Pictures a forward pass; conditions are exchanged within it.
        seed (`int`, *optional*, defaults to 0): What the draws derive from.

    Returns:
        Two `torch.DoubleTensor` of shape `(pictures,)`, each the mean over draws: own, another's.

    Raises:
        `ValueError`: fewer than two pictures in a pass, so there is no other, or not so many different ones.
    """
    chosen = list(islice(samples, pictures))
    if len(chosen) < 2 or batch_size < 2 or len(chosen) % batch_size == 1:
        raise ValueError(f"{len(chosen)} pictures in batches of {batch_size} leave one without another's condition.")
    if (different := len({sample["key"] for sample in chosen})) < len(chosen):  # an endless stream began anew
        raise ValueError(
            f"{len(chosen)} pictures were asked for, but a source began anew before: {different} of them are different. Ask"
            " for fewer, or measure each source by itself."
        )
    module = IOMMTrainingModule(pipeline.text_encoder, pipeline.transformer, pipeline.vae, mask_ratio).eval()
    device = pipeline.device
    own, other = torch.zeros(draws, len(chosen)), torch.zeros(draws, len(chosen))
    for draw in tqdm(range(draws), desc="Condition use", unit="draw"):
        collator = IOMMCollator(pipeline.processor, pipeline.resolution, condition_dropout=0.0, seed=seed + draw)
        for start in range(0, len(chosen), batch_size):
            part = slice(start, start + batch_size)
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in collator(chosen[part]).items()
            }
            neighbour = torch.arange(len(batch["seed"]), device=device).roll(1)
            own[draw, part] = module.sample_losses(batch).cpu()
            other[draw, part] = module.sample_losses(batch, conditions_from=neighbour).cpu()
    return own.double().mean(0), other.double().mean(0)


def measure_condition_use(
    pipeline: IOMMPipeline,
    samples: Iterable[dict[str, Any]],
    pictures: int,
    mask_ratio: float,
    draws: int = 8,
    batch_size: int = 16,
    seed: int = 0,
) -> ConditionUse:
    """Measures how much conditions help. Arguments and errors are those of [`condition_losses`]."""
    own, other = condition_losses(pipeline, samples, pictures, mask_ratio, draws, batch_size, seed)
    difference = other - own
    benefit = difference.mean().item()
    margin = 1.96 * difference.std().item() / sqrt(len(own))
    return ConditionUse(
        pictures=len(own),
        draws=draws,
        seed=seed,
        own=own.mean().item(),
        other=other.mean().item(),
        benefit=benefit,
        interval=(benefit - margin, benefit + margin),
        share_better=(difference > 0).double().mean().item(),
    )
