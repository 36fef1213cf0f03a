"""Draws pictures to be judged: each from its own noise, whatever the batch around it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..data.collate import sample_seed
from ..pipeline_iomm import IOMMPipeline
from .shapes import BenchmarkPicture


def draw_plan(
    pipeline: IOMMPipeline,
    plan: Sequence[BenchmarkPicture],
    num_inference_steps: int = 30,
    guidance_scale: float = 3.0,
    batch_size: int = 16,
    shuffle_conditions: bool = False,
) -> list[Image.Image]:
    r"""
    One picture for each entry of a plan.

    Args:
        pipeline ([`IOMMPipeline`]): The model.
        plan (`Sequence[BenchmarkPicture]`): What to draw.
        num_inference_steps (`int`, *optional*, defaults to 30): Sampling steps.
        guidance_scale (`float`, *optional*, defaults to 3.0): Strength of guidance.
        batch_size (`int`, *optional*, defaults to 16): Pictures drawn at a time.
        shuffle_conditions (`bool`, *optional*, defaults to `False`): Gives each entry the prompt of another one: the
            control that shows what a score owes to chance.

    Returns:
        `list[PIL.Image.Image]`, in the plan's order.

    Example:

    ```python
    >>> from iomm_hf.evaluation.shapes import benchmark_plan
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> len(draw_plan(tiny_pipeline(), benchmark_plan(pictures_per_task=1), num_inference_steps=1))
    6
    ```
    """
    prompts = [picture.metadata["prompt"] for picture in plan]
    seeds = [sample_seed(picture.seed, prompt, 0) for picture, prompt in zip(plan, prompts, strict=True)]
    if shuffle_conditions:
        order = np.random.default_rng(0).permutation(len(prompts))
        # Each entry's successor in a random order, so that none keeps its own.
        prompts = [
            prompts[after] for _, after in sorted(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
        ]
    return draw_batches(pipeline, seeds, num_inference_steps, guidance_scale, batch_size, prompt=prompts)


def draw_batches(
    pipeline: IOMMPipeline,
    seeds: Sequence[int],
    num_inference_steps: int = 30,
    guidance_scale: float = 3.0,
    batch_size: int = 16,
    **inputs: Any,
) -> list[Image.Image]:
    r"""
    One picture for each seed.

    Args:
        pipeline ([`IOMMPipeline`]): The model.
        seeds (`Sequence[int]`): Of each picture's noise.
        num_inference_steps, guidance_scale, batch_size: See [`draw_plan`].
        inputs: What to draw from, as the pipeline names it (`prompt`, `image`), one for each seed.

    Returns:
        `list[PIL.Image.Image]`, in the order of the seeds.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> [picture] = draw_batches(tiny_pipeline(), seeds=[0], num_inference_steps=1, prompt=["a red circle"])
    >>> picture.size
    (64, 64)
    ```
    """
    images: list[Image.Image] = []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(seeds), batch_size), desc="Drawing", unit="batch", leave=False):
        part = slice(start, start + batch_size)
        chosen: dict[str, Any] = {name: values[part] for name, values in inputs.items()}
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        images += draw_batch(pipeline, seeds[part], **chosen, **settings).images
    return images


def draw_batch(pipeline: DiffusionPipeline, seeds: Sequence[int], **arguments: Any) -> Any:
    r"""
    One call of any diffusers pipeline with a generator for each picture, on the CPU: the same noise on every device.

    Returns:
        What the pipeline returns, with `images` in the order of the seeds.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> len(draw_batch(tiny_pipeline(), [0, 1], prompt=["a star", "a ring"], num_inference_steps=1).images)
    2
    ```
    """
    return pipeline(generator=[torch.Generator().manual_seed(seed) for seed in seeds], **arguments)
