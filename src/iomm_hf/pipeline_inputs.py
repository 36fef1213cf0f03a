"""What a call of [`IOMMPipeline`] takes, and what it refuses before anything is computed, with the value and what would do."""

from itertools import pairwise
from numbers import Integral
from typing import TypeAlias, get_args

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


# A list has one entry a prompt; several pictures of one prompt are a list in the list.
Prompts: TypeAlias = str | list[str] | list[str | None]
Pictures: TypeAlias = (
    Image.Image
    | list[Image.Image]
    | list[list[Image.Image]]
    | list[Image.Image | list[Image.Image] | None]
    | np.ndarray
    | torch.Tensor
)

Scheduler: TypeAlias = (
    FlowMatchEulerDiscreteScheduler
    | FlowMatchHeunDiscreteScheduler
    | FlowMatchLCMScheduler
    | UniPCMultistepScheduler
    | DPMSolverMultistepScheduler
)

CALLBACK_TENSORS = ["latents", "prompt_embeds", "denoised"]


def as_picture_lists(image: Pictures | None) -> list[list[Image.Image]] | None:
    """One list of pictures for each prompt; arrays (B, H, W, 3) and tensors (B, 3, H, W) in [0, 1] hold one a prompt."""
    if image is None:
        return None
    if isinstance(image, np.ndarray | torch.Tensor):
        channels = 1 if isinstance(image, torch.Tensor) else 3
        if image.ndim != 4 or image.shape[channels] != 3 or 0 in image.shape:
            wanted = "(batch, 3, height, width)" if channels == 1 else "(batch, height, width, 3)"
            raise ValueError(f"`image` must have the shape {wanted}, got {tuple(image.shape)}.")
        if not (image.min() >= 0 and image.max() <= 1):  # NaN is in no range
            raise ValueError(f"`image` must be in [0, 1], got values from {image.min()} to {image.max()}.")
        array = VaeImageProcessor.pt_to_numpy(image) if isinstance(image, torch.Tensor) else image
        return [[picture] for picture in VaeImageProcessor.numpy_to_pil(array)]
    lists = []
    for entry in [image] if isinstance(image, Image.Image) else image if isinstance(image, list) else [image]:
        pictures = [] if entry is None else entry if isinstance(entry, list) else [entry]
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise ValueError(
                    "`image` must be a PIL image, an array, a tensor, or a list with a PIL image, a list of them or"
                    f" None for each prompt, got {type(picture).__name__}."
                )
            if picture.mode == "F" and not np.isfinite(np.asarray(picture)).all():
                raise ValueError("`image` holds a picture of mode F with values that are NaN or infinite.")
            if 0 in picture.size:
                raise ValueError(f"`image` holds a picture of {picture.width}x{picture.height} pixels: it is empty.")
        lists.append(pictures)
    if not lists:
        raise ValueError("`image` is an empty list: give at least one picture, or leave it out.")
    return lists


def check_finite(name: str, tensor: torch.Tensor):
    """Refuses what would only show as a black picture, many steps later."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"`{name}` holds {bad} values that are NaN or infinite, of {tensor.numel()}.")


def check_scheduler(scheduler: SchedulerMixin, sigmas: list[float] | None):
    """Refuses schedulers, or settings of them, that do not integrate a velocity z - x from t = 1 to t = 0."""
    name, config = type(scheduler).__name__, scheduler.config
    if not isinstance(scheduler, Scheduler):
        raise ValueError(
            f"{name} does not integrate a velocity; use {', '.join(kind.__name__ for kind in get_args(Scheduler))}."
        )
    if isinstance(scheduler, UniPCMultistepScheduler | DPMSolverMultistepScheduler):
        spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        if (
            not config.use_flow_sigmas
            or config.prediction_type != "flow_prediction"
            or any(config.get(spacing) for spacing in spacings)
        ):
            raise ValueError(
                f"{name} is set for noise prediction; build it with `{name}.from_config(pipe.scheduler.config,"
                ' prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=pipe.scheduler.config.shift)`,'
                f" and without {', '.join(spacings)}."
            )
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} runs from image to noise: set invert_sigmas=False.")
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{name} wants its shift computed from the size: set use_dynamic_shifting=False and one `shift`"
            " (`flow_shift` in UniPC and DPM-Solver)."
        )
    if sigmas is not None and isinstance(scheduler, FlowMatchHeunDiscreteScheduler | DPMSolverMultistepScheduler):
        raise ValueError(f"{name} spaces its steps itself: leave out `sigmas`.")


def check_sampling(
    height: int,
    width: int,
    multiple: int,
    num_inference_steps: int,
    callback_on_step_end_tensor_inputs: list[str],
    guidance_scale: float = 1.0,
    image_guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    num_images_per_prompt: int = 1,
    sigmas: list[float] | None = None,
):
    """Refuses sizes, steps and guidance that cannot be drawn with; sides must be multiples of `multiple` pixels."""
    for name, number in (
        ("height", height),
        ("width", width),
        ("num_inference_steps", num_inference_steps),
        ("num_images_per_prompt", num_images_per_prompt),
    ):
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise ValueError(f"{name} must be a whole number, got {number!r}.")
    if height % multiple or width % multiple or height <= 0 or width <= 0:
        raise ValueError(f"height and width must be positive multiples of {multiple}, got {height} and {width}.")
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
    if unknown := [name for name in callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSORS]:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {CALLBACK_TENSORS}, got {unknown}.")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
    for name, value in (
        ("guidance_scale", guidance_scale),
        ("image_guidance_scale", image_guidance_scale),
        ("guidance_rescale", guidance_rescale),
    ):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number from 0, got {value}.")
    if guidance_rescale > 1:
        raise ValueError(f"guidance_rescale must be from 0 to 1, got {guidance_rescale}.")
    if not 0 <= guidance_interval[0] < guidance_interval[1] <= 1:
        raise ValueError(f"guidance_interval must be (start, end), 0 <= start < end <= 1, got {guidance_interval}.")
    if sigmas is not None and not (len(sigmas) and all(0 < sigma <= 1 for sigma in sigmas)):
        raise ValueError(f"sigmas must be noise levels above 0 and up to 1, got {sigmas}.")
    if sigmas is not None and any(after >= before for before, after in pairwise(sigmas)):
        raise ValueError(f"sigmas must fall from noise to picture, got {sigmas}.")


def check_embeds(name: str, embeds: torch.Tensor, mask: torch.Tensor | None, channels: int):
    """Refuses conditions (B, rows, channels), or a mask (B, rows) of them, that no generator of that width reads."""
    if embeds.ndim != 3 or embeds.shape[2] != channels or not embeds.numel():
        raise ValueError(f"`{name}` must have the shape (batch, rows, {channels}), got {tuple(embeds.shape)}.")
    if mask is not None and mask.shape != embeds.shape[:2]:
        raise ValueError(f"`{name}_mask` must have the shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}.")
    if mask is not None and not mask.bool().any(1).all():
        raise ValueError(f"`{name}_mask` hides every row of an entry: nothing is left to draw from.")
    check_finite(name, embeds)


def check_conditions(
    prompt,
    image: list[list[Image.Image]] | None,
    negative_prompt,
    prompt_embeds: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    image_guidance_scale: float | None = None,
):
    """Refuses what gives no condition for each picture, or not one for each."""
    if prompt_embeds is None and prompt is None and image is None:
        raise ValueError("Give a `prompt`, an `image`, both, or `prompt_embeds`.")
    if prompt_embeds is not None and (prompt is not None or image is not None):
        raise ValueError("`prompt_embeds` replace `prompt` and `image`: give one or the other.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("`negative_prompt_embeds` replace `negative_prompt`: give one or the other.")
    negative_prompts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
    if negative_prompts is not None and (
        not isinstance(negative_prompts, list)
        or not negative_prompts
        or not all(isinstance(text, str) for text in negative_prompts)
    ):
        raise ValueError(f"`negative_prompt` must be a str or a non-empty list of str, got {negative_prompt!r}.")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if prompts is not None and (
        not isinstance(prompts, list)
        or not prompts
        or not all(text is None or isinstance(text, str) for text in prompts)
    ):
        raise ValueError(f"`prompt` must be a str or a non-empty list of str, got {prompt!r}.")

    batch = len(prompt_embeds) if prompt_embeds is not None else None
    for name, entries in (("prompt", prompts), ("image", image), ("negative_prompt", negative_prompts)):
        if entries is None or (name == "negative_prompt" and len(entries) == 1):
            continue
        if batch is not None and len(entries) != batch:
            raise ValueError(
                f"`{name}` has {len(entries)} entries, the others have {batch}. Several pictures of one prompt are"
                " a list in the list."
            )
        batch = len(entries)
    if negative_prompt_embeds is not None and len(negative_prompt_embeds) != batch:
        raise ValueError(f"`negative_prompt_embeds` has {len(negative_prompt_embeds)} entries, expected {batch}.")
    for i, text in enumerate(prompts or []):
        if text is None and (image is None or not image[i]):
            raise ValueError(f"`prompt` and `image` are both missing for entry {i}: give one or both.")
        if text is not None and not text.strip():
            raise ValueError(f"`prompt` is blank, got {text!r}; to vary a picture, leave it out.")
    if prompts is None and image is not None and not all(image):
        raise ValueError("Without a `prompt`, each entry of `image` must hold a picture.")
    if image_guidance_scale is not None and (
        prompts is None or image is None or not all(image) or any(text is None for text in prompts)
    ):
        raise ValueError("image_guidance_scale needs a `prompt` and an `image` for each picture to draw.")
