"""What each benchmark asks for: its items, its version, and the files that hold their pictures in the official layout.

A benchmark is plain data: a list of files to draw, each with a prompt and seeds that follow from its global number alone, so
that neither ranks nor batches nor a restart change a picture. Layouts, so that the authors' scorers read our folders and our
scorer theirs:

| benchmark | files | read in |
|---|---|---|
| geneval | `00000/metadata.jsonl`, `00000/samples/0000.png` ... `0003.png` | djghosh13/geneval, README.md |
| dpg | `<item_id>.png`, a 2x2 grid, row by row | TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py |
| wise, wise-verified | `1.png` ... `1000.png` | PKU-YuanGroup/WISE, README.md |
| imgedit | `<key>.png` | PKU-YuanGroup/ImgEdit, Benchmark/Basic/basic_bench_readme.md |
| shapes | `00000.png` ... | iomm-hf's own |
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.collate import sample_seed
from .authors_files import DPG_COMMIT, IMGEDIT_COMMIT, WISE_COMMIT, WISE_VERIFIED_COMMIT, BenchmarkData
from .shapes import benchmark_plan


NAMES = ("geneval", "dpg", "wise", "wise-verified", "imgedit", "shapes")
PROMPTS = Path(__file__).with_name("prompts")
PICTURES_PER_PROMPT = 4  # of GenEval and DPG-Bench
METADATA_FILE = "metadata.jsonl"  # of each GenEval folder
ITEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)  # what may become a file's name


@dataclass(frozen=True)
class Drawing:
    """
    One file of a benchmark.

    Args:
        number (`int`): Its place among all files of the benchmark, the same on every rank.
        item (`str`): The benchmark's own name of what is asked.
        path (`str`): Where the file lies in the folder of pictures.
        prompt (`str`): What to draw, or what to change.
        seeds (`tuple[int, ...]`): Of each picture's noise; four are one grid, row by row.
        source (`str`, *optional*): The picture to change, in the benchmark's folder of source pictures.
    """

    number: int
    item: str
    path: str
    prompt: str
    seeds: tuple[int, ...]
    source: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark's files and where they come from.

    Args:
        name, version (`str`): Such as "geneval", and the commit of its authors' repository; "1" of GenEval, whose prompts come with the
            package, and "iomm-hf" of the shapes.
        source (`str`): Where the prompts were taken from.
        sha256 (`str`): Of the prompts, as item and text.
        metadata (`dict[str, dict]`): What the scorer needs to know of each item.
        drawings (`list[Drawing]`): All files, in order.
        rewriting (`dict`, *optional*): Who rewrote the prompts; `None` when they are the benchmark's own.
        subset (`int`, *optional*): Number of items, where they are not all: no score of the benchmark then.
        data (`BenchmarkData`, *optional*): Files that came from the authors.
    """

    name: str
    version: str
    source: str
    sha256: str
    metadata: dict[str, dict[str, Any]] = field(repr=False)
    drawings: list[Drawing] = field(repr=False)
    rewriting: dict[str, Any] | None = None
    subset: int | None = None
    data: BenchmarkData | None = None

    def source_picture(self, drawing: Drawing) -> Path | None:
        """The picture that an edit starts from; `None` for what is drawn from text alone."""
        if drawing.source is None:
            return None
        assert self.data is not None
        return self.data.picture(drawing.source)

    def describe(self) -> dict[str, Any]:
        """What a result file says of it."""
        return {
            "name": self.name,
            "version": self.version,
            "source": self.source,
            "prompts_sha256": self.sha256,
            "items": len(self.metadata),
            "subset": self.subset,
            "rewriting": self.rewriting,
        }


def load_benchmark(
    name: str,
    *,
    seed: int = 0,
    limit: int | None = None,
    rewritten: str | Path | None = None,
    data: str | Path | None = None,
) -> Benchmark:
    """
    A benchmark by name.

    Args:
        name (`str`): One of `NAMES`.
        seed (`int`, *optional*, defaults to 0): The run's seed, of which every picture's seed is made.
        limit (`int`, *optional*): Only so many items, spread evenly over the benchmark: to try things out. The result is marked.
        rewritten (`str` or `Path`, *optional*): A file of JSON lines `{"item": ..., "prompt": ...}`, one for every item,
            that replace the benchmark's prompts. The result says so.
        data (`str` or `Path`, *optional*): A folder with the authors' files, instead of fetching them.

    Raises:
        ValueError: If the name is unknown, or the prompts, the limit or the rewritten prompts cannot be used.
        OSError: If a file of the authors' can be neither found nor fetched.

    Example:

    ```python
    >>> benchmark = load_benchmark("geneval")
    >>> len(benchmark.metadata), len(benchmark.drawings), benchmark.drawings[5].path
    (553, 2212, '00001/samples/0001.png')
    ```
    """
    if name not in NAMES:
        raise ValueError(f"There is no benchmark {name!r}; choose one of {', '.join(NAMES)}.")
    files = None if name in ("geneval", "shapes") else BenchmarkData(name, None if data is None else Path(data))
    benchmark = {
        "geneval": _geneval,
        "dpg": _dpg,
        "wise": _wise,
        "wise-verified": _wise,
        "imgedit": _imgedit,
        "shapes": _shapes,
    }[name](name, seed, files)
    if rewritten is not None:
        benchmark = with_rewritten_prompts(benchmark, Path(rewritten))
    return benchmark if limit is None else first_items(benchmark, limit)


def first_items(benchmark: Benchmark, limit: int) -> Benchmark:
    """
    A benchmark cut down to `limit` items, spread evenly, with the pictures that these have in the whole.

    Raises:
        ValueError: If there are not so many.

    Example:

    ```python
    >>> few = first_items(load_benchmark("geneval"), 6)
    >>> len(few.drawings), [few.metadata[item]["tag"] for item in few.metadata][::2]
    (24, ['single_object', 'counting', 'position'])
    ```
    """
    items = list(benchmark.metadata)
    if not 0 < limit <= len(items):
        raise ValueError(f"limit must be from 1 to the {len(items)} items of {benchmark.name}, got {limit}.")
    kept = {items[number * len(items) // limit] for number in range(limit)}
    return replace(
        benchmark,
        metadata={item: value for item, value in benchmark.metadata.items() if item in kept},
        drawings=[drawing for drawing in benchmark.drawings if drawing.item in kept],
        subset=limit,
    )


def with_rewritten_prompts(benchmark: Benchmark, file: Path) -> Benchmark:
    """
    A benchmark with other prompts, and a record of that.

    Raises:
        ValueError: If a line is of another form, or items are missing, doubled or unknown.
    """
    texts: dict[str, str] = {}
    for number, row in enumerate(read_lines(file), 1):
        if not isinstance(row, dict) or set(row) != {"item", "prompt"} or not str(row["prompt"]).strip():
            raise ValueError(f"{file}, line {number}: expected item and prompt, got {str(row)[:200]}.")
        if row["item"] in texts:
            raise ValueError(f"{file}, line {number}: item {row['item']!r} is there twice.")
        texts[row["item"]] = row["prompt"]
    missing = [item for item in benchmark.metadata if item not in texts]
    unknown = [item for item in texts if item not in benchmark.metadata]
    if missing or unknown:
        raise ValueError(
            f"{file} must rewrite each of the {len(benchmark.metadata)} items of {benchmark.name} once:"
            f" {len(missing)} are missing ({missing[:3]}), {len(unknown)} are unknown ({unknown[:3]})."
        )
    changed = {drawing.item for drawing in benchmark.drawings if texts[drawing.item] != drawing.prompt}
    record = {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "prompts_changed": len(changed),
    }
    drawings = [replace(drawing, prompt=texts[drawing.item]) for drawing in benchmark.drawings]
    return replace(benchmark, drawings=drawings, rewriting=record)


def check_item(name: object) -> str:
    """
    An item's name, which becomes a file's, if it is harmless.

    Raises:
        ValueError: If it is not made of letters, digits, "-" and "_".

    Example:

    ```python
    >>> check_item("../up")
    Traceback (most recent call last):
    ValueError: An item is named '../up'; a name of letters, digits, - and _ was expected. Is this the benchmark's own file?
    ```
    """
    text = str(name)
    if not ITEM.fullmatch(text):
        raise ValueError(
            f"An item is named {text!r}; a name of letters, digits, - and _ was expected. Is this the benchmark's own file?"
        )
    return text


def hash_prompts(prompts: Mapping[str, str]) -> str:
    """SHA-256 of items and prompts as JSON lines, the same however the file was laid out."""
    digest = hashlib.sha256()
    for item, prompt in prompts.items():
        digest.update(json.dumps([item, prompt], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines. Only a line feed ends one: a text may hold U+2028 and others that `str.splitlines` also parts at."""
    return [json.loads(line) for line in file.read_bytes().rstrip().split(b"\n")]


def expect_items(benchmark: str, found: Sequence[str], expected: int):
    """Raises ValueError unless there are as many items as the authors say, each once."""
    if len(found) != expected or len(set(found)) != expected:
        raise ValueError(
            f"{benchmark} has {expected} items, but {len(found)} were found, {len(set(found))} of them different."
            " Delete the file to fetch it anew, or give the authors' own."
        )


def _geneval(name: str, seed: int, data: BenchmarkData | None) -> Benchmark:
    metadata = {f"{index:05}": row for index, row in enumerate(read_lines(PROMPTS / "geneval.jsonl"))}
    expect_items(name, list(metadata), 553)
    drawings = [
        Drawing(
            number=index * PICTURES_PER_PROMPT + sample,
            item=item,
            path=f"{item}/samples/{sample:04}.png",
            prompt=row["prompt"],
            seeds=(sample_seed(seed, f"geneval/{index}", sample),),
        )
        for index, (item, row) in enumerate(metadata.items())
        for sample in range(PICTURES_PER_PROMPT)
    ]
    prompts = {item: row["prompt"] for item, row in metadata.items()}
    source = "djghosh13/geneval, prompts/evaluation_metadata.jsonl, in the package"
    return Benchmark(name, "1", source, hash_prompts(prompts), metadata, drawings)


def _dpg(name: str, seed: int, data: BenchmarkData | None) -> Benchmark:
    rows = {check_item(row["item_id"]): row for row in read_lines(PROMPTS / "dpg.jsonl")}
    expect_items(name, list(rows), 1065)
    drawings = [
        Drawing(
            number=index,
            item=item,
            path=f"{item}.png",
            prompt=row["prompt"],
            seeds=tuple(sample_seed(seed, f"dpg/{index}", sample) for sample in range(PICTURES_PER_PROMPT)),
        )
        for index, (item, row) in enumerate(rows.items())
    ]
    prompts = {item: row["prompt"] for item, row in rows.items()}
    source = "TencentQQGYLab/ELLA, dpg_bench/prompts, in the package"
    return Benchmark(name, DPG_COMMIT, source, hash_prompts(prompts), rows, drawings, data=data)


def _wise(name: str, seed: int, data: BenchmarkData | None) -> Benchmark:
    assert data is not None
    rows: dict[int, dict[str, Any]] = {}
    for file in data.prompt_files:
        for row in json.loads(data.path(file).read_text(encoding="utf-8")):
            missing = [key for key in ("prompt_id", "Prompt", "Explanation") if key not in row]
            if missing:
                raise ValueError(f"{file} holds an item without {', '.join(missing)}: {str(row)[:200]}")
            rows[int(row["prompt_id"])] = row
    if sorted(rows) != list(range(1, 1001)):
        raise ValueError(f"{name} has items 1 to 1000, each once; {len(rows)} different ones were found in its files.")
    metadata = {str(number): rows[number] for number in sorted(rows)}
    drawings = [
        Drawing(index, item, f"{item}.png", row["Prompt"], (sample_seed(seed, f"wise/{item}", 0),))
        for index, (item, row) in enumerate(metadata.items())
    ]
    version = WISE_COMMIT if name == "wise" else WISE_VERIFIED_COMMIT
    prompts = {item: row["Prompt"] for item, row in metadata.items()}
    source = "PKU-YuanGroup/WISE, " + ", ".join(data.prompt_files)
    return Benchmark(name, version, source, hash_prompts(prompts), metadata, drawings, data=data)


def _imgedit(name: str, seed: int, data: BenchmarkData | None) -> Benchmark:
    assert data is not None
    [file] = data.prompt_files
    rows = {check_item(key): row for key, row in json.loads(data.path(file).read_text(encoding="utf-8")).items()}
    expect_items(name, list(rows), 737)
    drawings = []
    for index, (item, row) in enumerate(rows.items()):
        missing = [key for key in ("id", "prompt", "edit_type") if key not in row]
        if missing:
            raise ValueError(f"{file}: item {item} has no {', '.join(missing)}.")
        seeds = (sample_seed(seed, f"imgedit/{item}", 0),)
        drawings.append(Drawing(index, item, f"{item}.png", row["prompt"], seeds, source=row["id"]))
    prompts = {item: row["prompt"] for item, row in rows.items()}
    source = f"PKU-YuanGroup/ImgEdit, {file}"
    return Benchmark(name, IMGEDIT_COMMIT, source, hash_prompts(prompts), rows, drawings, data=data)


def _shapes(name: str, seed: int, data: BenchmarkData | None) -> Benchmark:
    plan = benchmark_plan()
    metadata, drawings = {}, []
    for number, picture in enumerate(plan):
        item = f"{number:05}"
        metadata[item] = {**picture.metadata, "seed": picture.seed}
        # With seed 0 the pictures that recipes/score_shapes.py draws.
        noise = sample_seed(picture.seed + 1000 * seed, picture.metadata["prompt"], 0)
        drawings.append(Drawing(number, item, f"{item}.png", picture.metadata["prompt"], (noise,)))
    prompts = {item: row["prompt"] for item, row in metadata.items()}
    return Benchmark(name, "iomm-hf", "iomm_hf.evaluation.shapes", hash_prompts(prompts), metadata, drawings)
