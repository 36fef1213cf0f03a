"""One report over any number of results: a table a benchmark, bars, a radar, and sheets of failures with what was seen.

The paper's figures stand in columns marked "paper"; results that cannot be compared with each other (another detector, judge or
prompts) are said to be so under the table. Plots need matplotlib (the `eval` extra); a report without them says so.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..integrity import sha256
from .dpg import cut_grid
from .generation import PICTURES, read_note
from .geneval_models import load_picture
from .paper import PAPER
from .results import AVERAGED, LOCAL, PARTS, Details, picture_of, read_result, reservations, values_of


REPORT = "report.md"
SHEET = 24  # failures shown
# What results must share to compare: of the benchmark, of who looked, and of that what not every result says
ASKED = ("version", "prompts_sha256", "rewriting", "subset")
LOOKED = (
    "kind",
    "judge",
    "revision",
    "detector",
    "detector_revision",
    "clip",
    "clip_revision",
    "wording",
    "extra_body",
    "unreadable",
)
LOOKED_IF_KNOWN = ("revision_as_given", "weights_sha256", "detector_sha256", "clip_sha256")
HIGHEST = {"dpg": 100.0, "imgedit": 5.0}  # of the others 1


def write_report(results: Sequence[str | Path], output: str | Path, names: Sequence[str] | None = None) -> str:
    """
    Writes `report.md` with its pictures.

    Args:
        results (`list[str | Path]`): `result.json` files of any benchmarks; sheets of failures need what lies beside them.
        output (`str` or `Path`): The folder to write to.
        names (`list[str]`, *optional*): What to call each; results of different benchmarks may share one. By default
            the model's name and its sampling.

    Returns:
        `str`: The tables, in Markdown.

    Raises:
        OSError: If a file is no result.
        ValueError: If there are not as many names as results, or two of one benchmark share a name.
    """
    files = [Path(result) for result in results]
    if names is not None and len(names) != len(files):
        raise ValueError(f"{len(files)} results need as many names, got {len(names)}.")
    loaded = [read_result(file) for file in files]
    numbers: dict[str, list[int]] = {}
    for number, result in enumerate(loaded):
        numbers.setdefault(result["benchmark"]["name"], []).append(number)
    called = {
        benchmark: [names[i] for i in own] if names is not None else unique([name_of(loaded[i]) for i in own])
        for benchmark, own in numbers.items()
    }
    repeated = sorted({name for own in called.values() for name in own if own.count(name) > 1})
    if repeated:
        raise ValueError(
            f"Each result of a benchmark needs a name of its own; {', '.join(repeated)} stands for several."
        )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for benchmark, own in numbers.items():
        chosen = {name: (loaded[i], files[i]) for name, i in zip(called[benchmark], own, strict=True)}
        rows = {name: result for name, (result, _) in chosen.items()}
        text = f"## {benchmark}\n\n{table(benchmark, rows)}\n{remarks(rows)}"
        if find_spec("matplotlib") is not None:
            text += plots(benchmark, rows, {name: file for name, (_, file) in chosen.items()}, output)
        else:
            text += "\nThere are no plots, for matplotlib is not installed: pip install 'iomm-hf[eval]'.\n"
        sections.append(text)
    report = "\n\n".join(sections) + "\n"
    (output / REPORT).write_text(f"# Report\n\n{report}", encoding="utf-8")
    return report


def name_of(result: Mapping[str, Any]) -> str:
    """A result's model and how it drew, in a few words."""
    generation = result["generation"]
    if generation is None:
        return "pictures from elsewhere"
    arguments = generation["arguments"]
    parts = [generation["model"]["name"], f"{arguments.get('num_inference_steps', '?')} steps"]
    if "guidance_scale" in arguments:
        parts.append(f"guidance {arguments['guidance_scale']:g}")
    return ", ".join(parts)


def unique(names: Sequence[str]) -> list[str]:
    """
    Names with numbers where they repeat.

    Example:

    ```python
    >>> unique(["a", "b", "a", "a (1)"])
    ['a (2)', 'b', 'a (3)', 'a (1)']
    ```
    """
    taken, numbered = set(names), []
    for name in names:
        if names.count(name) > 1:
            name = next(free for i in count(1) if (free := f"{name} ({i})") not in taken)
            taken.add(name)
        numbered.append(name)
    return numbered


def column_of(name: str, result: Mapping[str, Any]) -> str:
    """A result's name, marked where it is of a part of its benchmark."""
    subset = result["benchmark"]["subset"]
    return name if subset is None else f"{name} (only {subset} items)"


def columns_of(benchmark: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """What a table and its plots compare: each result's values, and the paper's."""
    measured = {column_of(name, result): values_of(benchmark, result["scores"]) for name, result in results.items()}
    rows = PAPER.get(benchmark, [])
    return measured | {f"{row.name} (paper)": {"overall": row.overall, **row.tasks} for row in rows}


def table(benchmark: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """
    A table with one column a result and, where it has figures, one for each of the paper's rows.

    Example:

    ```python
    >>> scores = {"overall": {"value": 80.0}}
    >>> print(table("dpg", {"mine": {"scores": scores, "benchmark": {"subset": None}}}).splitlines()[0][:46])
    | dpg | mine | IOMM-B 512 (paper) | IOMM-B 102
    """
    columns = columns_of(benchmark, results)
    intervals: dict[tuple[str, str], str] = {}
    for name, result in results.items():
        column = column_of(name, result)
        described = {
            "overall": result["scores"]["overall"] or {},
            **result["scores"].get(PARTS.get(benchmark, ""), {}),
        }
        for part, value in described.items():
            if "low" in value:
                intervals[column, part] = f" [{shown(benchmark, value['low'])}, {shown(benchmark, value['high'])}]"
    parts = list(dict.fromkeys(part for values in columns.values() for part in values))
    lines = [f"| {benchmark} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for part in parts:
        cells = [
            "" if values.get(part) is None else shown(benchmark, values[part]) + intervals.get((column, part), "")
            for column, values in columns.items()
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(benchmark: str, value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if benchmark in HIGHEST else f"{value:.3f}"


def remarks(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What must be known to compare these results: who looked, at how many pictures, of which prompts."""
    lines = []
    for name, result in results.items():
        scorer, counts, about = result["scorer"], result["counts"], result["benchmark"]
        who = scorer.get("judge") or scorer.get("detector") or scorer.get("rules")
        commit = scorer.get("revision") or scorer.get("detector_revision")
        prompts = "rewritten prompts" if about["rewriting"] else "the benchmark's own prompts"
        # GenEval's folders hold their prompts, whoever drew them.
        if result["generation"] is None and about["name"] != "geneval" and counts.get("without_note", counts["found"]):
            prompts = "prompts unknown"
        text = f"- {name}: {counts['found']:,} of {counts['expected']:,} files, {prompts}, looked at by {who}"
        text += f" at {commit}" if commit else ""
        text += f"; {AVERAGED[result['generation']['model']['ema']]}" if result["generation"] is not None else ""
        text += "".join(f"; {remark}" for remark in reservations(result))
        lines.append(text + ".")
    differing = differences(list(results.values()))
    if differing:
        lines.append(f"- **These results differ in more than the model** ({', '.join(differing)}) and do not compare.")
    lines.append("- Columns marked (paper) were not measured here, and their judges and detectors need not be these.")
    return "\n".join(lines) + "\n"


def differences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    Names of what differs between results besides the model and how it drew.

    Example:

    ```python
    >>> about = {"version": "1", "prompts_sha256": "a", "rewriting": None, "subset": None}
    >>> scorers = {"judge": "j", "unreadable": "error"}, {"judge": "j", "unreadable": "lowest", "weights_sha256": "b"}
    >>> differences([{"benchmark": about, "scorer": scorer} for scorer in scorers])
    ['unreadable']
    ```
    """
    found: dict[str, set[str]] = {}
    for result in results:
        told = {name: result["benchmark"][name] for name in ASKED} | {
            name: result["scorer"].get(name) for name in LOOKED
        }
        told |= {name: result["scorer"][name] for name in LOOKED_IF_KNOWN if name in result["scorer"]}
        if told["wording"] is not None:  # the same words may lie in a file of another name
            told["wording"] = {name: value for name, value in told["wording"].items() if name != "file"}
        for name, value in told.items():
            found.setdefault(name, set()).add(str(value))
    return [name for name, values in found.items() if len(values) > 1]


def plots(benchmark: str, results: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path], output: Path) -> str:
    """Bars, a radar where there are three parts or more, and a sheet of failures for each result; returns the links to them."""
    from .figures import draw_bars, draw_radar, draw_sheet

    compared = columns_of(benchmark, results)
    highest = HIGHEST.get(benchmark, 1.0)
    text = ""
    draw_bars(compared, output / f"{benchmark}-bars.png", highest)
    text += f"\n![Scores of {benchmark}]({benchmark}-bars.png)\n"
    parts = [part for part in next(iter(compared.values())) if part != "overall"]
    if len(parts) >= 3:
        known = {
            name: [value for part in parts if (value := row.get(part)) is not None] for name, row in compared.items()
        }
        whole = {name: row for name, row in known.items() if len(row) == len(parts)}
        draw_radar(parts, whole, output / f"{benchmark}-radar.png", highest)
        text += f"\n![Parts of {benchmark}]({benchmark}-radar.png)\n"
    for number, (name, file) in enumerate(files.items()):
        lines = worst(Details(file.parent).read().values())
        pictures, sources = pictures_of(file), places_of(file).get("sources")
        if not lines or pictures is None:
            continue
        shown_lines = [line for line in lines[:SHEET] if is_about(line, pictures / picture_of(line))]
        if not shown_lines:
            continue
        columns = 6
        rows: dict[str, list[Image.Image]] = {}
        titles: dict[str, list[str]] = {}
        blank = Image.new("RGB", (8, 8), "white")
        for start in range(0, len(shown_lines), columns):
            part = shown_lines[start : start + columns]
            label = str(start + 1)
            images = [with_boxes(looked_at(line, pictures, sources), line) for line in part]
            rows[label] = images + [blank] * (columns - len(part))
            titles[label] = [caption(line, pictures) for line in part] + [""] * (columns - len(part))
        sheet = f"{benchmark}-failures-{number}.png"
        draw_sheet(rows, titles, output / sheet)
        text += f"\n![Failures of {name}, with what was seen]({sheet})\n"
    return text


def pictures_of(file: Path) -> Path | None:
    """Where a result's pictures are: in its run's folder, wherever that was moved to, or where this machine noted that they came from."""
    run = file.resolve().parents[2] / PICTURES
    given = places_of(file).get("pictures", run)
    return next((folder for folder in (given, run) if folder.is_dir()), None)


def places_of(file: Path) -> dict[str, Path]:
    """Folders of this machine that were noted beside a result."""
    local = file.parent / LOCAL
    return {name: Path(path) for name, path in json.loads(local.read_text()).items()} if local.is_file() else {}


def is_about(line: Mapping[str, Any], picture: Path) -> bool:
    """Whether a line tells of this very picture."""
    return picture.is_file() and line.get("picture") == sha256(picture)


def worst(lines: Any) -> list[Mapping[str, Any]]:
    """Lines about what is wrong, the lowest first, spread over the tasks."""
    failed = [line for line in lines if is_failure(line)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in sorted(failed, key=lambda line: grade(line)):
        groups.setdefault(line.get("task", ""), []).append(line)
    longest = max((len(group) for group in groups.values()), default=0)
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def is_failure(line: Mapping[str, Any]) -> bool:
    """Whether a line tells of less than full marks."""
    if "correct" in line:
        return not line["correct"]
    read = line.get("read")
    if isinstance(read, bool):
        return not read
    if isinstance(read, list):
        return min(read) < 5
    if isinstance(read, dict):
        return read != {"score": 1} and read != {"consistency": 2, "realism": 2, "aesthetic quality": 2}
    return True


def grade(line: Mapping[str, Any]) -> float:
    read = line.get("read")
    numbers = read if isinstance(read, list) else list(read.values()) if isinstance(read, dict) else [0]
    return math.fsum(numbers)


def looked_at(line: Mapping[str, Any], pictures: Path, sources: Path | None = None) -> Image.Image:
    """What a line tells of: a picture, of a grid the quarter, of an edit its source beside it where it is still there."""
    picture = load_picture(pictures / picture_of(line))
    if "quarter" in line:
        return cut_grid(picture)[line["quarter"]]
    source = sources / line["source_picture"] if sources is not None and "source_picture" in line else None
    if source is None or not source.is_file() or sha256(source) != line.get("source"):
        return picture
    before = load_picture(source)
    before = before.resize((max(1, before.width * picture.height // before.height), picture.height))
    both = Image.new("RGB", (before.width + picture.width, picture.height))
    both.paste(before)
    both.paste(picture, (before.width, 0))
    return both


def with_boxes(picture: Image.Image, line: Mapping[str, Any]) -> Image.Image:
    """A picture with a frame around each object that counted, where a detector looked."""
    pen = ImageDraw.Draw(picture)
    for item in line.get("detections", []):
        left, top, right, bottom = item["box"]
        pen.rectangle(
            (left, top, max(right - 1, left), max(bottom - 1, top)),
            outline="magenta",
            width=max(1, picture.width // 256),
        )
    return picture


def caption(line: Mapping[str, Any], pictures: Path) -> str:
    """What was asked, and what the judge or the detector saw in it."""
    note = read_note(pictures / picture_of(line))
    asked = line.get("question") or line.get("prompt") or (note["prompt"] if note is not None else line["key"])
    seen = line.get("reason") or f"{line.get('status', '')}: {line.get('text', '')}"
    return f"{asked[:90]} | {' '.join(seen.split())[:110]}"
