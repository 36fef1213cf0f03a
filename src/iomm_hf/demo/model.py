"""What the demo's tabs do, without the page: one pipeline a process, which draws for one visitor at a time.

On ZeroGPU a function that needs the GPU runs in a process of its own, forked for the call: hence functions of plain
data at the top of a module, which find the pipeline in a global. Elsewhere the decorator does nothing.
"""
# ruff: noqa: E402  (`spaces` comes first)

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any


ON_SPACES = find_spec("spaces") is not None
if ON_SPACES:
    import spaces  # before torch, whose CUDA calls it replaces

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..data.images import resize_and_crop
from ..devices import move
from ..modeling_iomm import draw_image_mask
from ..pipeline_iomm import IOMMPipeline
from ..shipped import shipped_model


MAX_TEXT = 300  # characters: far beyond every caption of training
MAX_STEPS = 50
MAX_GUIDANCE = 8.0
MAX_MASK_RATIO = 0.95
MAX_SIZE = 2  # times the resolution of training
PREVIEW_SECONDS = 0.25

TILE = 320  # px, about the side of a tile of the method's picture
HIDDEN, LINE = (128, 132, 140), (255, 255, 255)

gpu: Callable = spaces.GPU if ON_SPACES else lambda function: function

_pipeline: IOMMPipeline | None = None
_busy = threading.Lock()


@dataclass(frozen=True)
class Order:
    r"""
    What to draw: from a prompt, from a picture (a variation), or from both (an edit).

    Args:
        prompt (`str`, *optional*): What to draw, or with `picture` what to change.
        picture (`PIL.Image.Image`, *optional*): What to change or vary, in RGB.
        seed (`int`, *optional*, defaults to 0): Of the noise and of the mask.
        size (`int`, *optional*): Side of the result in pixels; defaults to the model's own.
        steps (`int`, *optional*, defaults to 30): Steps from noise to image.
        guidance_scale (`float`, *optional*, defaults to 3.0): Strength of guidance.
        mask_ratio (`float`, *optional*, defaults to 0.0): Share of a variation's image tokens that is hidden from the MLLM.
    """

    prompt: str | None = None
    picture: Image.Image | None = None
    seed: int = 0
    size: int | None = None
    steps: int = 30
    guidance_scale: float = 3.0
    mask_ratio: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step on the way to a picture: now and then with a preview, and the last one with the picture."""

    step: int
    steps: int
    picture: Image.Image | None = None


def load(checkpoint: str | None = None, device: str | None = None) -> IOMMPipeline:
    r"""
    Loads the model of this process.

    Args:
        checkpoint (`str`, *optional*): A pipeline folder or Hub id. Defaults to the tiny model of the package.
        device (`str`, *optional*): Such as `"cpu"`. Defaults to the accelerator, if there is one.

    Returns:
        [`IOMMPipeline`], which the other functions use from now on.

    Raises:
        `OSError`: there is no such checkpoint.
        `ValueError`: there is no such device.
    """
    global _pipeline
    try:
        pipeline = IOMMPipeline.from_pretrained(checkpoint or shipped_model())
    except OSError as error:  # the Hub's client does not always say which id it misses
        raise OSError(f"The checkpoint {checkpoint} does not load: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    _pipeline = move(pipeline, device)
    return _pipeline


def model() -> IOMMPipeline:
    """The pipeline that [`load`] loaded."""
    if _pipeline is None:
        raise RuntimeError("No model is loaded: call load() first.")
    return _pipeline


def check(order: Order):
    r"""
    Refuses what would not be drawn, before anybody waits for it.

    Raises:
        `ValueError`: with a sentence for the visitor.
    """
    if order.prompt is not None:
        check_text(order.prompt, "Say what to draw, such as “a red circle”.")
    multiple, largest = model().size_multiple, MAX_SIZE * model().resolution
    if order.size is not None and not (0 < order.size <= largest and order.size % multiple == 0):
        raise ValueError(f"The size must be a multiple of {multiple} up to {largest}, got {order.size}.")
    for name, value, low, high in (
        ("seed", order.seed, 0, 2**32 - 1),
        ("number of steps", order.steps, 1, MAX_STEPS),
        ("guidance", order.guidance_scale, 1, MAX_GUIDANCE),
        ("share to hide", order.mask_ratio, 0, MAX_MASK_RATIO),
    ):
        if not low <= value <= high:
            raise ValueError(f"The {name} must be from {low} to {high}, got {value}.")


def check_text(text: str, wanted: str):
    r"""
    Raises:
        `ValueError`: `text` is blank, when `wanted` is the message, or too long.
    """
    if not text.strip():
        raise ValueError(wanted)
    if len(text) > MAX_TEXT:
        raise ValueError(f"That is {len(text)} characters long; at most {MAX_TEXT} are read.")


@gpu
def draw(order: Order) -> Iterator[Step]:
    r"""
    Draws step by step. Closing the generator stops the drawing after the step under way.

    Args:
        order ([`Order`]): What to draw.

    Yields:
        [`Step`] after each step, the last one with the picture.

    Raises:
        `ValueError`: what the pipeline refuses, such as a prompt of too many tokens.

    Example:

    ```python
    >>> from iomm_hf.demo import model
    >>> _ = model.load(device="cpu")
    >>> [step.step for step in model.draw(model.Order("a red circle", steps=2))]
    [1, 2, 2]
    ```
    """
    pipeline = model()

    def work(tell: Callable[[Step], None], stop: threading.Event):
        shown = time.monotonic()

        def report(
            pipeline: IOMMPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
        ) -> dict:
            nonlocal shown
            preview, last = None, step + 1 == pipeline.num_timesteps
            if not last and time.monotonic() - shown > PREVIEW_SECONDS:
                [preview] = pipeline.decode(tensors["denoised"])
                shown = time.monotonic()
            tell(Step(step + 1, pipeline.num_timesteps, preview))
            pipeline._interrupt = stop.is_set()
            return {}

        [picture] = pipeline(
            **inputs(pipeline, order),
            height=order.size,
            width=order.size,
            num_inference_steps=order.steps,
            guidance_scale=order.guidance_scale,
            generator=torch.Generator().manual_seed(order.seed),
            callback_on_step_end=report,
            callback_on_step_end_tensor_inputs=["denoised"],
            return_dict=False,
        )[0]
        tell(Step(pipeline.num_timesteps, pipeline.num_timesteps, picture))

    yield from tellings(work)


def tellings(work: Callable[[Callable[[Any], None], threading.Event], None]) -> Iterator[Any]:
    """What `work(tell, stop)` tells while the model is its own. Closing the generator sets `stop`, which `work` heeds."""
    news: SimpleQueue[Any] = SimpleQueue()
    stop, done = threading.Event(), object()

    def run():
        try:
            with _busy:  # work that was stopped may still be at its last step
                if not stop.is_set():
                    work(news.put, stop)
            news.put(done)
        except Exception as error:  # raised again where the visitor waits
            news.put(error)

    # The model calls back and a generator is called: a thread between them turns the one into the other.
    threading.Thread(target=run, daemon=True).start()
    try:
        while (item := news.get()) is not done:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()


def inputs(pipeline: IOMMPipeline, order: Order) -> dict[str, Any]:
    """An order as the pipeline's arguments. A variation is read here as in training, with part of its picture hidden."""
    if order.picture is None:
        return {"prompt": order.prompt}
    if order.prompt is not None:
        return {"prompt": order.prompt, "image": resize_and_crop(order.picture, order.size or pipeline.resolution)}
    tokens = pipeline.processor.encode([pipeline.processor.image_only(as_read(pipeline, order.picture))])
    hidden = hidden_tokens(pipeline, tokens["input_ids"], order.mask_ratio, order.seed)
    device = pipeline._execution_device
    with torch.no_grad():
        output = pipeline.text_encoder(**tokens.to(device), image_mask=hidden.to(device))
    return {"prompt_embeds": output.condition, "prompt_embeds_mask": output.condition_mask}


def as_read(pipeline: IOMMPipeline, picture: Image.Image) -> Image.Image:
    """The middle of a picture in the pixels that the MLLM reads."""
    size = pipeline.processor.image_processor.size
    return resize_and_crop(picture, (size["width"], size["height"]))


def hidden_tokens(pipeline: IOMMPipeline, input_ids: torch.Tensor, mask_ratio: float, seed: int) -> torch.Tensor:
    """The mask over a sequence with one picture, as stage 1 draws it. Of one seed's masks, one of a higher ratio hides
    what those below it hide and more."""
    generator = torch.Generator().manual_seed(seed)
    return draw_image_mask(input_ids, pipeline.text_encoder.image_token_id, mask_ratio, [generator])


def hidden_patches(mask_ratio: float, seed: int) -> np.ndarray:
    r"""
    Which patches of any picture [`draw`] hides from the MLLM for a variation.

    Args:
        mask_ratio (`float`): Share that is hidden, on average.
        seed (`int`): As in the [`Order`].

    Returns:
        `np.ndarray` of shape `(rows, columns)`, True where a patch is hidden.
    """
    pipeline = model()
    count = pipeline.processor.image_seq_length
    # The words around the picture draw nothing, so its tokens alone do; the tokenizer is left to who draws.
    image = torch.full((1, count), pipeline.text_encoder.image_token_id)
    side = int(count**0.5)  # InternVL's tokens of a view are a square, row by row
    return hidden_tokens(pipeline, image, mask_ratio, seed).reshape(side, side).numpy()


@gpu
def answer(picture: Image.Image, question: str) -> Iterator[str]:
    r"""
    What the frozen MLLM says about a picture, as it says it. Closing the generator stops it after the token under way.

    Args:
        picture (`PIL.Image.Image`): The picture, in RGB.
        question (`str`): What to answer.

    Yields:
        `str`: what it has said so far, token by token, the last time the whole answer.

    Raises:
        `ValueError`: what the pipeline refuses, such as a question of too many tokens.

    Example:

    ```python
    >>> from PIL import Image
    >>> from iomm_hf.demo import model
    >>> _ = model.load(device="cpu")
    >>> *_, said = model.answer(Image.new("RGB", (64, 64)), "Describe the image.")
    >>> said == model.model().describe(Image.new("RGB", (64, 64)))
    True
    ```
    """
    pipeline = model()

    def work(tell: Callable[[str], None], stop: threading.Event):
        read = None  # tokens of picture and question, which come before the answer's

        def report(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            nonlocal read
            read = read or tokens.shape[1] - 1
            tell(pipeline.processor.tokenizer.decode(tokens[0, read:], skip_special_tokens=True).strip())
            return torch.full((len(tokens),), stop.is_set(), device=tokens.device)

        said = pipeline.ask(picture, question, stopping_criteria=[report])
        tell(said)  # type: ignore[arg-type]  # one picture, one question

    yield from tellings(work)


def method_picture(picture: Image.Image, hidden: np.ndarray, drawn: Image.Image | None = None) -> Image.Image:
    r"""
    The method in one picture: what was given, what the MLLM still sees of it, and what the generator makes of that.

    Args:
        picture (`PIL.Image.Image`): The picture, in RGB.
        hidden (`np.ndarray`): Its [`hidden_patches`].
        drawn (`PIL.Image.Image`, *optional*): The generator's picture, if there is one yet.

    Returns:
        `PIL.Image.Image` of three tiles in a row, transparent between them.
    """
    read = as_read(model(), picture)
    side = read.width * max(1, TILE // read.width)
    gap = side // 8
    whole = read.resize((side, side), Image.Resampling.NEAREST)
    seen = whole.copy()
    pen = ImageDraw.Draw(seen)
    patch = side // len(hidden)
    for row, column in zip(*np.nonzero(hidden), strict=True):
        left, top = int(column) * patch, int(row) * patch
        pen.rectangle((left, top, left + patch - 1, top + patch - 1), fill=HIDDEN)
    for tile in (whole, seen):
        pen = ImageDraw.Draw(tile, "RGBA")
        for line in range(patch, side, patch):
            pen.line((line, 0, line, side), fill=(*LINE, 150), width=2)
            pen.line((0, line, side, line), fill=(*LINE, 150), width=2)

    sheet = Image.new("RGBA", (3 * side + 2 * gap, side))
    made = Image.new("RGBA", (side, side), (*HIDDEN, 40)) if drawn is None else drawn.resize((side, side), 0)
    for number, tile in enumerate((whole, seen, made)):
        sheet.paste(tile, (number * (side + gap), 0))
    pen = ImageDraw.Draw(sheet)
    for number in (1, 2):
        left, middle, wing = number * (side + gap) - 3 * gap // 4, side // 2, gap // 4
        pen.polygon(
            [(left, middle - wing), (left + gap // 2, middle), (left, middle + wing)],
            fill=(*HIDDEN, 255),
        )
    return sheet
