"""Where a pipeline runs."""

import torch
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline


def default_device() -> str:
    """The accelerator, such as cuda or mps, or cpu without one or where Accelerate is told so by `ACCELERATE_USE_CPU`.

    Example:

    ```python
    >>> from iomm_hf.devices import default_device
    >>> default_device() in ("cpu", "cuda", "mps", "xpu")
    True
    ```
    """
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cpu"
    if torch.cuda.is_available():  # asked this way, ZeroGPU answers yes where it will only later lend a GPU
        return "cuda"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def move(pipeline: DiffusionPipeline, device: str | None = None) -> DiffusionPipeline:
    """
    Moves a pipeline to a device, or to the default one.

    Raises:
        ValueError: If torch does not know the device, was built without it, or there is none.

    Example:

    ```python
    >>> from iomm_hf.devices import move
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> move(tiny_pipeline(), "cpu").device
    device(type='cpu')
    ```
    """
    device = default_device() if device is None else device
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without
        raise ValueError(f"The device {device!r} cannot be used: {error}") from error
