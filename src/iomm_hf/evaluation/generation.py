"""The first of two steps: a benchmark's pictures, drawn into a folder in its official layout.

Files are drawn in groups that the batch size alone cuts, for sums of another batch are rounded otherwise. Ranks share out the groups
and never talk: each draws those that lack a file, and writes what is not there. A file appears whole or not at all, and one that
is there is never written again, so the same command goes on after an interruption, with any number of ranks, to the same pictures.
`generation.json` beside the pictures says how they are drawn; a folder that was begun otherwise is refused. `software/` says what
drew them: versions, commit and device of every session.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from ..data.images import load_image
from ..files import write_whole
from ..integrity import sha256
from .benchmarks import METADATA_FILE, Benchmark, Drawing
from .pipelines import call_arguments, call_defaults, draw_pictures
from .results import record_software, write_settings


PICTURES = "pictures"  # the folder that official scorers read
SETTINGS = "generation.json"
SCRATCH = ".writing"  # half-written files, beside the pictures and not among them
NOTE = "iomm-hf"  # the text chunk of each PNG


def generate(
    pipeline: DiffusionPipeline,
    benchmark: Benchmark,
    output: str | Path,
    *,
    about: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    rank: int = 0,
    num_ranks: int = 1,
) -> int:
    """
    Draws this rank's share of a benchmark's files that are not there yet, and whatever shares their batch.

    Args:
        pipeline (`DiffusionPipeline`): Any that draws from text, or, for ImgEdit-Bench, changes a picture as told.
        benchmark ([`Benchmark`]): What to draw.
        output (`str` or `Path`): Pictures go to `pictures/` in it.
        about (`dict`): What the model is, for `generation.json`.
        asked (`dict`, *optional*): Arguments for the pipeline; what is left out keeps the pipeline's own default.
        seed (`int`, *optional*, defaults to 0): The seed that `benchmark` was loaded with, for the record.
        batch_size (`int`, *optional*, defaults to 8): Pictures drawn at a time.
        rank, num_ranks (`int`, *optional*, defaults to 0 and 1): Which share; ranks may run apart, on one folder.

    Returns:
        `int`: How many files were written.

    Raises:
        OSError: If the folder was begun with other settings, or a file cannot be written.
        ValueError: If the pipeline cannot draw this benchmark.

    Example:

    ```python
    >>> import tempfile
    >>> from iomm_hf.evaluation.benchmarks import load_benchmark
    >>> from iomm_hf.tiny import tiny_pipeline
    >>> output = Path(tempfile.mkdtemp())
    >>> generate(tiny_pipeline(), load_benchmark("geneval", limit=1), output, about={}, asked={"num_inference_steps": 1})
    4
    >>> sorted(path.name for path in (output / "pictures/00000/samples").iterdir())
    ['0000.png', '0001.png', '0002.png', '0003.png']
    ```
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    output = Path(output)
    edits = any(drawing.source for drawing in benchmark.drawings)
    arguments = call_arguments(pipeline, asked or {}, edits=edits)
    settings = {
        "benchmark": benchmark.describe(),
        "model": dict(about),
        "arguments": arguments,
        "defaults": call_defaults(pipeline, arguments),
        "seed": seed,
        "batch_size": batch_size,  # sums of another batch are rounded otherwise
    }
    write_settings(output / SETTINGS, settings, "The pictures were")
    folder = output / PICTURES
    groups = in_batches(benchmark.drawings, batch_size)[rank::num_ranks]
    missing = {drawing.path for group in groups for drawing in group if not (folder / drawing.path).exists()}
    if missing:
        record_software(output, str(pipeline.device))
    progress = tqdm(total=len(missing), desc="Drawing", unit="file", disable=None if rank == 0 else True)
    for batch in groups:
        lacking = sum(drawing.path in missing for drawing in batch)
        if not lacking:
            continue
        prompts = [drawing.prompt for drawing in batch for _ in drawing.seeds]
        seeds = [number for drawing in batch for number in drawing.seeds]
        sources = [load_image(path.read_bytes()) for d in batch if (path := benchmark.source_picture(d))] or None
        pictures: list[Image.Image] = []
        flags: list[bool] = []
        for start in range(0, len(prompts), batch_size):  # a grid may be more than a batch
            part = slice(start, start + batch_size)
            drawn, filtered = draw_pictures(
                pipeline, prompts[part], seeds[part], arguments, None if sources is None else sources[part]
            )
            pictures += drawn
            flags += filtered
        for drawing in batch:
            count = len(drawing.seeds)
            own, pictures = pictures[:count], pictures[count:]
            filtered, flags = flags[:count], flags[count:]
            if drawing.path not in missing:
                continue
            if benchmark.name == "geneval":
                line = folder / drawing.item / METADATA_FILE
                if not line.exists():
                    write_whole(line, json.dumps(benchmark.metadata[drawing.item]).encode(), output / SCRATCH)
            content = as_png(grid(own), benchmark, drawing, filtered)
            write_whole(folder / drawing.path, content, output / SCRATCH)
        progress.update(lacking)
    progress.close()
    return len(missing)


def in_batches(drawings: Sequence[Drawing], batch_size: int) -> list[list[Drawing]]:
    """Drawings in groups of at most `batch_size` pictures, a grid of more alone."""
    batches: list[list[Drawing]] = []
    room = 0
    for drawing in drawings:
        if len(drawing.seeds) > room or not batches:
            batches.append([])
            room = batch_size
        batches[-1].append(drawing)
        room -= len(drawing.seeds)
    return batches


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """
    One picture as it is; four as a 2x2 grid, row by row.

    Raises:
        ValueError: If they are of different sizes.
    """
    if len(pictures) == 1:
        return pictures[0]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"The pictures of a grid must be of one size, got {sorted(sizes)}.")
    [(width, height)] = sizes
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % 2 * width, number // 2 * height))
    return sheet


def as_png(picture: Image.Image, benchmark: Benchmark, drawing: Drawing, filtered: Sequence[bool]) -> bytes:
    """A PNG that says itself what it is of: benchmark, item, prompt, seeds, the picture that it edits, and those that a filter took
    away."""
    note, source = PngInfo(), benchmark.source_picture(drawing)
    content = {
        "benchmark": benchmark.name,
        "item": drawing.item,
        "prompt": drawing.prompt,
        "seeds": list(drawing.seeds),
        "source": source and sha256(source),
    }
    note.add_itxt(NOTE, json.dumps(content | {"filtered": sum(filtered)}, ensure_ascii=False))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


def read_note(file: Path) -> dict[str, Any] | None:
    """What a PNG of ours says of itself; `None` for anybody else's."""
    with Image.open(file) as picture:
        text = picture.info.get(NOTE)
    return None if text is None else json.loads(text)
