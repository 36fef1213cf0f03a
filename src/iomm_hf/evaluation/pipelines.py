"""Any diffusers pipeline under one call: loaded without its repository's code, called by its own signature, named exactly.

A pipeline gets only arguments that its `__call__` has; one that was asked for and does not exist there is an error, never left
out. What is not asked for keeps the pipeline's own default, and every one is looked up and recorded.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image

from ..devices import move
from ..integrity import INDEX
from ..modeling_iomm import hash_weight_files
from ..pipeline_iomm import IOMMPipeline
from .drawing import draw_batch
from .geneval_models import public_name


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORDED = ("num_inference_steps", "guidance_scale", "height", "width")  # defaults worth a line in a result
GIVEN = ("prompt", "generator", "image")  # with every call


def load_pipeline(
    checkpoint: str | Path, *, revision: str | None = None, dtype: str = "float32", device: str | None = None
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """
    A pipeline of any class from a folder or a Hub id, and what it is. Code of the repository never runs, pickles are never read.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id. The commit is looked up either way.
        dtype (`str`, *optional*, defaults to `"float32"`): float32, bfloat16 or float16.
        device (`str`, *optional*): Such as cuda. Defaults to the accelerator, if there is one.

    Returns:
        The pipeline, and a `dict` with `name`, `revision`, `class`, `dtype`, `scheduler`, `weights_sha256` (of each part) and `ema`: whether the
        weights are averaged ones, `None` where no run says so.

    Raises:
        OSError: If nothing is found there, or it does not load.
        ValueError: If dtype or device do not exist.

    Example:

    ```python
    >>> from iomm_hf import shipped_model
    >>> pipe, about = load_pipeline(shipped_model(), device="cpu")
    >>> about["class"], sorted(about["weights_sha256"])
    ('IOMMPipeline', ['text_encoder', 'transformer', 'vae'])
    ```
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder, commit = Path(checkpoint), None
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"{checkpoint} is a folder and has no revision {revision!r}; give a Hub id, or leave it out."
            )
        index = folder / INDEX
        if not index.is_file():
            raise OSError(f"{folder} holds no {INDEX}; give a pipeline folder, such as final/ of a run, or a Hub id.")
    else:
        index, commit = fetch_index(str(checkpoint), revision)
    named = json.loads(index.read_text())["_class_name"]
    named = named if isinstance(named, str) else named[-1]
    loader = IOMMPipeline if named == IOMMPipeline.__name__ else DiffusionPipeline
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if loader is DiffusionPipeline:
        options["use_safetensors"] = True
    if commit is not None:
        safe = {"use_safetensors": True} if loader is DiffusionPipeline else {}
        folder = Path(loader.download(str(checkpoint), revision=commit, **safe))
    pipeline = loader.from_pretrained(folder, **options)
    move(pipeline, device)
    pipeline.set_progress_bar_config(disable=True)
    about = {
        "name": public_name(str(checkpoint)),
        "revision": commit,
        "class": type(pipeline).__name__,
        "dtype": dtype,
        "scheduler": scheduler_of(pipeline),
        "weights_sha256": hash_parts(folder),
        "ema": averaged(folder),
    }
    return pipeline, about


def fetch_index(checkpoint: str, revision: str | None) -> tuple[Path, str]:
    """
    The index of a pipeline on the Hub, and the commit that a branch, tag or commit stands for there.

    Raises:
        OSError: If it is not found.
    """
    try:
        index = Path(hf_hub_download(checkpoint, INDEX, revision=revision))
    except OSError as error:  # the Hub's client does not always say which id it misses
        raise OSError(f"{checkpoint}: {error}") from error
    return index, index.parent.name  # the Hub's cache names snapshots by their commit


def hash_parts(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights of each part of a pipeline folder."""
    return {part.name: hash_weight_files(part) for part in sorted(folder.iterdir()) if any(part.glob("*.safetensors"))}


def scheduler_of(pipeline: DiffusionPipeline) -> dict[str, Any] | None:
    """Class and settings of the sampler."""
    scheduler = pipeline.components.get("scheduler")
    if scheduler is None:
        return None
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **settings}


def averaged(folder: Path) -> bool | None:
    """Whether a run's pipeline folder holds averaged weights, by the `run.json` beside it; `None` where there is none."""
    run = folder.resolve().parent / "run.json"
    return bool(json.loads(run.read_text())["config"].get("ema_decay")) if run.is_file() else None


def call_arguments(pipeline: DiffusionPipeline, asked: Mapping[str, Any], *, edits: bool = False) -> dict[str, Any]:
    """
    The arguments to call a pipeline with, and nothing that it does not know.

    Args:
        pipeline (`DiffusionPipeline`): The model.
        asked (`dict`): Arguments by name; `None` leaves one to the pipeline.
        edits (`bool`, *optional*, defaults to `False`): Whether it must take a picture to change.

    Returns:
        `dict`: `asked` without `None`, with the pipeline's own defaults of steps, guidance, height and width where it has any.

    Raises:
        ValueError: If the pipeline does not draw from text with a seed of one's own, cannot edit, or has no such argument.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> pipe = tiny_pipeline()
    >>> call_arguments(pipe, {"num_inference_steps": 2, "height": None})
    {'num_inference_steps': 2, 'guidance_scale': 3.0}
    ```
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    name = type(pipeline).__name__
    needed = ("prompt", "generator", "image") if edits else ("prompt", "generator")
    missing = [argument for argument in needed if argument not in parameters]
    if missing:
        raise ValueError(f"{name} takes no {' and no '.join(missing)}, so it cannot be scored on this benchmark.")
    given = {argument: value for argument, value in asked.items() if value is not None}
    unknown = [argument for argument in given if argument not in parameters]
    if unknown:
        others = ", ".join(sorted(set(parameters) - {"self"}))
        raise ValueError(f"{name} has no argument {', '.join(unknown)}. It has: {others}.")
    defaults = {
        argument: parameters[argument].default
        for argument in RECORDED
        if argument in parameters and parameters[argument].default not in (None, inspect.Parameter.empty)
    }
    return defaults | given


def call_defaults(pipeline: DiffusionPipeline, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    The pipeline's own defaults of whatever it is not called with, as far as JSON can hold them: some, such as a second guidance
    or an instruction around each prompt, decide a score.

    Args:
        pipeline (`DiffusionPipeline`): The model.
        arguments (`dict`): What it is called with.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> defaults = call_defaults(tiny_pipeline(), {"guidance_scale": 3.0})
    >>> defaults["num_inference_steps"], defaults["negative_prompt"], "guidance_scale" in defaults
    (30, None, False)
    ```
    """
    defaults = {}
    for name, parameter in inspect.signature(type(pipeline).__call__).parameters.items():
        if parameter.default is inspect.Parameter.empty or name in arguments or name in GIVEN:
            continue
        try:
            defaults[name] = json.loads(json.dumps(parameter.default, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return defaults


def draw_pictures(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    arguments: Mapping[str, Any],
    sources: Sequence[Image.Image] | None = None,
) -> tuple[list[Image.Image], list[bool]]:
    """
    One picture for each prompt, and whether the pipeline's own filter took it away.

    Args:
        pipeline (`DiffusionPipeline`): The model.
        prompts (`list[str]`): One for each picture.
        seeds (`list[int]`): One for each picture; generators are on the CPU, so that every device starts from the same noise.
        arguments (`dict`): As [`call_arguments`] made them.
        sources (`list[PIL.Image.Image]`, *optional*): Pictures to change.

    Raises:
        ValueError: If the pipeline answers with another number of pictures or with something else than pictures.

    Example:

    ```python
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> pictures, filtered = draw_pictures(tiny_pipeline(), ["a star"], [0], {"num_inference_steps": 1})
    >>> pictures[0].size, filtered
    ((64, 64), [False])
    ```
    """
    inputs: dict[str, Any] = {"prompt": list(prompts)} | ({} if sources is None else {"image": list(sources)})
    output = draw_batch(pipeline, seeds, **inputs, **arguments)
    pictures = output.images
    if len(pictures) != len(prompts) or not all(isinstance(picture, Image.Image) for picture in pictures):
        kinds = sorted({type(picture).__name__ for picture in pictures})
        raise ValueError(
            f"{type(pipeline).__name__} answered {len(prompts)} prompts with {len(pictures)} of {', '.join(kinds)}; one PIL"
            " image each was expected. With batch_size 1 it is asked for one at a time."
        )
    # What diffusers' safety checkers report; pipelines without one have no such field.
    flags = output.get("nsfw_content_detected") or [False] * len(pictures)
    return pictures, [bool(flag) for flag in flags]
