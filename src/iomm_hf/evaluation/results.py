"""Result files: a number together with everything that it depends on, or no number at all.

`details-*.jsonl` hold one line a picture (what was seen, the verdict and its reason), written as scoring goes, so that it goes on
after an interruption. `result.json` is written once, when nothing is missing, and never replaced.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..files import write_whole
from ..software import software
from .benchmarks import METADATA_FILE, Benchmark


SCHEMA = "iomm-hf/evaluation/1"
RESULT = "result.json"
LOCAL = "local.json"  # where pictures from elsewhere, and those that are edited, are on this machine; stays on it
SOFTWARE = "software"  # folder of what worked on a run, beside its settings
# Where scores hold what the overall one is made of
PARTS = {
    "geneval": "tasks",
    "shapes": "tasks",
    "wise": "categories",
    "wise-verified": "categories",
    "imgedit": "types",
}
# What is said of the weights that drew, by the `ema` of their model
AVERAGED = {
    True: "averaged weights",
    False: "weights not averaged",
    None: "nothing says whether the weights are averaged (`--ema` and `--no-ema` do)",
}
PACKAGES = ("iomm-hf", "torch", "transformers", "diffusers", "accelerate", "openai", "numpy", "pillow", "scipy")


class Incomplete(Exception):
    """Pictures, answers or items are missing, so there is no score."""


def record_software(folder: Path, device: str | None):
    """
    Writes down what works on a folder from now on: package versions, commit and device. What is there already, such as that of a
    session that was interrupted or of another rank, stays beside it.

    Args:
        folder (`Path`): The record goes to `software/` in it.
        device (`str`, *optional*): That is worked on, as torch names it; `None` where the work is done elsewhere.

    Example:

    ```python
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> record_software(folder, "cpu")
    >>> record_software(folder, "cpu")
    >>> [record["device"] for record in read_software(folder)]
    ['cpu']
    ```
    """
    content = as_json(software(PACKAGES) | {"device": None if device is None else device_name(device)})
    name = hashlib.sha256(content).hexdigest()[:12]
    write_whole(folder / SOFTWARE / f"{name}.json", content, folder / ".writing")


def read_software(folder: Path) -> list[dict[str, Any]]:
    """All that has worked on a folder, one entry for each different one."""
    return [json.loads(file.read_bytes()) for file in sorted((folder / SOFTWARE).glob("*.json"))]


def changes_of_software(result: Mapping[str, Any]) -> list[str]:
    """What to say of a result that more than one set of packages, commit and device has worked on."""
    works = (("drawn", result["generation"] or {}), ("looked at", result["scorer"]))
    # The first results held one set, as a dict.
    counts = {done: len(by["software"]) for done, by in works if isinstance(by.get("software"), list)}
    return [
        f"{done} by {count} different sets of packages, commit and device"
        for done, count in counts.items()
        if count > 1
    ]


def reservations(result: Mapping[str, Any]) -> list[str]:
    """
    What must be said beside a result's numbers: answers that counted as the lowest score, pictures that a filter took
    away, and changes of what drew or looked.

    Example:

    ```python
    >>> reservations({"counts": {"unreadable": 2, "refused": 1, "filtered": 4}, "generation": None, "scorer": {}})[0]
    '3 questions without a readable answer counted as the lowest score (2 unreadable, 1 refused)'
    ```
    """
    counts = result["counts"]
    kinds = {kind: counts.get(kind, 0) for kind in ("unreadable", "refused", "cut off", "empty", "failed")}
    told = []
    if any(kinds.values()):
        each = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        told.append(f"{sum(kinds.values())} questions without a readable answer counted as the lowest score ({each})")
    if counts.get("filtered"):
        told.append(f"{counts['filtered']} pictures were taken away by the pipeline's filter")
    return told + changes_of_software(result)


def device_name(device: str) -> str:
    """A device's model where torch knows it, otherwise its kind; without a number, which differs between equal ones."""
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def write_settings(path: Path, settings: Mapping[str, Any], kind: str):
    """
    Writes settings beside what they belong to, or checks that they are those that it was begun with.

    Args:
        path (`Path`): The JSON file.
        settings (`dict`): What to write.
        kind (`str`): What was begun, for the message.

    Raises:
        OSError: If the file is there and says something else.

    Example:

    ```python
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "settings.json")
    >>> write_settings(file, {"steps": 30}, "The pictures were")
    >>> write_settings(file, {"steps": 30}, "The pictures were")  # the same again is welcome, anything else an error
    ```
    """
    plain = json.loads(json.dumps(settings))
    if not path.is_file():
        write_whole(path, as_json(plain), path.parent / ".writing")
    begun = json.loads(path.read_text())  # also where another rank was faster
    differing = [name for name in {**begun, **plain} if begun.get(name) != plain.get(name)]
    if differing:
        name = differing[0]
        raise OSError(
            f"{kind} begun with other settings in {path}: {name} was {begun.get(name)} and is now {plain.get(name)}. Give the"
            " settings that it was begun with, or another folder."
        )


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def folder_name(*names: str) -> str:
    """A folder's name out of a model's or a judge's: `Qwen/Qwen3-VL` becomes `Qwen-Qwen3-VL`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(names)).strip("-.")[:100]


class Details:
    """
    Lines about pictures, one JSON object each, in one file a rank. A line's `key` is the picture's path, or that and what it is
    asked about after a `#`.

    Args:
        folder (`Path`): Of the scorer.
        rank (`int`, *optional*, defaults to 0): Whose file is appended to.
        pictures (`dict[str, dict[str, str]]`, *optional*): By the path of each picture, what its lines depend on: SHA-256 of the
            `picture` and, of an edit, of its `source`. Lines then hold that, and those about other pictures, of whatever name, are not
            read. By default all are.

    Example:

    ```python
    >>> import tempfile
    >>> details = Details(Path(tempfile.mkdtemp()))
    >>> details.add({"key": "1.png", "score": 1})
    >>> details.read()
    {'1.png': {'key': '1.png', 'score': 1}}
    ```
    """

    def __init__(self, folder: Path, rank: int = 0, pictures: Mapping[str, Mapping[str, str]] | None = None):
        self.folder = folder
        self.file = folder / f"details-{rank}.jsonl"
        self.pictures = pictures
        self._begun = False

    def add(self, line: Mapping[str, Any]):
        """Appends one line; a line with a `key` that was there replaces it when they are read."""
        if not self._begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.file.is_file() and not self.file.read_bytes().endswith(b"\n"):
                with self.file.open("a") as file:
                    file.write("\n")  # after half a line, which a killed run left
            self._begun = True
        own = {} if self.pictures is None else self.pictures[picture_of(line)]
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **own}, ensure_ascii=False) + "\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """All ranks' lines by key; half a line, which only a killed run leaves, is passed over and done again, and a question
        that failed on one rank does not undo another's answer."""
        lines: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("details-*.jsonl")):
            # str.splitlines would also part lines at U+2028, which JSON holds raw.
            for content in file.read_bytes().split(b"\n"):
                try:
                    line = json.loads(content.decode())
                except ValueError:  # not JSON, or cut inside a character
                    continue
                if self.pictures is not None:
                    own = self.pictures.get(picture_of(line))
                    if own is None or any(line.get(name) != value for name, value in own.items()):
                        continue
                before = lines.get(line["key"], {})
                if line.get("read") is None and before.get("read") is not None:
                    continue
                lines[line["key"]] = line
        return lines


def picture_of(line: Mapping[str, Any]) -> str:
    """The path of the picture that a line of details is about."""
    return line["key"].partition("#")[0]


def find_pictures(benchmark: Benchmark, folder: Path) -> dict[str, Path]:
    """
    Where each file of a benchmark lies in a folder of its official layout, ours or another's.

    Raises:
        Incomplete: If any is missing, or GenEval's folders hold no prompts, other ones, or another number of pictures.

    Example:

    ```python
    >>> from iomm_hf.evaluation.benchmarks import load_benchmark
    >>> find_pictures(load_benchmark("shapes", limit=3), Path("nowhere"))
    Traceback (most recent call last):
    iomm_hf.evaluation.results.Incomplete: 3 of 3 pictures of shapes are missing in nowhere: 00000.png, 00400.png, 00800.png. A
    part of a benchmark has no score; draw the rest first (the same command goes on).
    ```
    """
    found = {}
    if benchmark.name == "geneval":
        found = find_geneval(benchmark, folder)
    else:
        found = {
            drawing.path: folder / drawing.path for drawing in benchmark.drawings if (folder / drawing.path).is_file()
        }
    missing = [drawing.path for drawing in benchmark.drawings if drawing.path not in found]
    if missing:
        raise Incomplete(
            f"{len(missing)} of {len(benchmark.drawings)} pictures of {benchmark.name} are missing in {folder}:"
            f" {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. A part of a benchmark has no score; draw the rest first"
            " (the same command goes on)."
        )
    return found


def find_geneval(benchmark: Benchmark, folder: Path) -> dict[str, Path]:
    """GenEval's pictures: any `<digits>.png` in `samples/`, in the order of their numbers, as the official scorer takes them; its
    generator names them with five digits, its README with four."""
    found: dict[str, Path] = {}
    for item, metadata in benchmark.metadata.items():
        samples = folder / item / "samples"
        if not samples.is_dir():
            continue
        line = folder / item / METADATA_FILE
        if not line.is_file():
            raise Incomplete(f"{line} is missing, so nothing says what {samples} was drawn for.")
        written = json.loads(line.read_bytes())
        wanted = {name: metadata.get(name) for name in ("tag", "include", "exclude")}
        prompts = {metadata["prompt"], *(drawing.prompt for drawing in benchmark.drawings if drawing.item == item)}
        if {name: written.get(name) for name in wanted} != wanted or written.get("prompt") not in prompts:
            raise Incomplete(
                f"{line} asks for {written.get('prompt')!r}; item {item} of the benchmark is {metadata['prompt']!r}. These are"
                " other prompts, or in another order."
            )
        pictures = sorted(
            (p for p in samples.iterdir() if re.fullmatch(r"\d+\.png", p.name)), key=lambda p: int(p.stem)
        )
        paths = [drawing.path for drawing in benchmark.drawings if drawing.item == item]
        if len(pictures) > len(paths):
            raise Incomplete(
                f"{samples} holds {len(pictures)} pictures, but GenEval is scored on {len(paths)} of each prompt."
            )
        found |= dict(zip(paths, pictures, strict=False))
    return found


def hash_pictures(hashes: Mapping[str, str]) -> str:
    """SHA-256 over the names of all pictures and the SHA-256 of each: the identity of what was scored."""
    digest = hashlib.sha256()
    for name in sorted(hashes):
        digest.update(f"{hashes[name]}  {name}\n".encode())
    return digest.hexdigest()


def picture_sizes(files: Iterable[Path]) -> dict[str, int]:
    """How many files there are of each width and height, in pixels."""
    sizes: Counter[str] = Counter()
    for file in files:
        with Image.open(file) as picture:
            sizes[f"{picture.width}x{picture.height}"] += 1
    return dict(sizes)


def build_result(
    benchmark: Benchmark,
    scores: Mapping[str, Any],
    *,
    scorer: Mapping[str, Any],
    counts: Mapping[str, int],
    pictures: Mapping[str, Path],
    hashes: Mapping[str, str],
    generation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """
    The content of `result.json`.

    Args:
        benchmark ([`Benchmark`]): What was scored.
        scores (`dict`): `overall` (`None` for a subset that leaves tasks out) and what it is made of.
        scorer (`dict`): Detectors or judge, with revisions and settings.
        counts (`dict[str, int]`): Expected, found, and whatever was not as it should be.
        pictures (`dict[str, Path]`): What was scored.
        hashes (`dict[str, str]`): SHA-256 of each.
        generation (`dict`, *optional*): Content of `generation.json`; `None` where pictures came from elsewhere.
    """
    return {
        "schema": SCHEMA,
        "benchmark": benchmark.describe(),
        "files": benchmark.data.describe() if benchmark.data is not None else None,
        "scores": dict(scores),
        "counts": dict(counts),
        "scorer": dict(scorer),
        "generation": dict(generation) if generation is not None else None,
        "picture_sizes": picture_sizes(pictures.values()),
        "pictures_sha256": hash_pictures(hashes),
        "software": software(PACKAGES),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def values_of(benchmark: str, scores: Mapping[str, Any]) -> dict[str, float | None]:
    """Overall and its parts, as numbers."""
    parts = scores.get(PARTS.get(benchmark, ""), {})
    overall = scores["overall"]
    return {
        "overall": None if overall is None else overall["value"],
        **{name: part.get("accuracy", part.get("value")) for name, part in parts.items()},
    }


def read_result(file: str | Path) -> dict[str, Any]:
    """
    A `result.json`.

    Raises:
        OSError: If it is none.
    """
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"{file} cannot be read as a result: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise OSError(f"{file} is no result of `iomm-hf evaluate`: it has no schema {SCHEMA!r}.")
    return result
