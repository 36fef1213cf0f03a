"""Pictures for people: sheets of drawings and curves of losses. Needs matplotlib (the `train` and `eval` extras)."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image


def draw_sheet(
    rows: Mapping[str, Sequence[Image.Image]], titles: Sequence[str] | Mapping[str, Sequence[str]], path: str | Path
):
    r"""
    Writes a sheet with one row a model and one column a prompt, or with a prompt over each picture.

    Args:
        rows (`dict[str, list[Image]]`): Pictures by the name of their row.
        titles (`list[str]` or `dict[str, list[str]]`): One a column, or one a picture by the name of its row.
        path (`str` or `Path`): The PNG to write.

    Raises:
        `ValueError`: a row with another number of pictures than there are titles.
    """
    columns = len(next(iter(rows.values()))) if isinstance(titles, Mapping) else len(titles)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.7 * columns, 1.9 * len(rows)), squeeze=False)
    for number, (row, (name, images)) in enumerate(zip(axes, rows.items(), strict=True)):
        over = titles[name] if isinstance(titles, Mapping) else titles
        for axis, image, title in zip(row, images, over, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0 or isinstance(titles, Mapping):
                axis.set_title("\n".join(textwrap.wrap(title, 22)), fontsize=8)
        row[0].set_ylabel(name, fontsize=9)
    save(figure, path)


def plot_losses(runs: Mapping[str, str | Path], path: str | Path):
    """Writes the loss curves of runs, each a folder with `log.jsonl`, by their names."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for name, folder in runs.items():
        rows = [row for row in read_log(Path(folder) / "log.jsonl") if "loss" in row]
        axis.plot([row["images"] for row in rows], [row["loss"] for row in rows], label=name)
    axis.set(xlabel="pictures seen in the stage", ylabel="flow-matching loss", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, path)


def plot_run(folder: str | Path, path: str | Path):
    """Writes all curves of a run, a folder with `log.jsonl`: losses as they are, by time and by source, the gradient's norm,
    the learning rate, the speed, the seconds that a forward pass waited for its data, and the bad samples left out, by reason."""
    rows = read_log(Path(folder) / "log.jsonl")
    panels: dict[str, dict[str, list]] = {"loss": {"flow matching": [row.get("loss") for row in rows]}}
    if any("alignment" in row for row in rows):
        panels["loss"]["alignment"] = [row.get("alignment") for row in rows]
    for name in ("loss_by_time", "loss_by_source", "skipped"):
        labels = sorted({label for row in rows for label in row.get(name, {})})
        missing = 0 if name == "skipped" else None
        panels[name] = {label: [row.get(name, {}).get(label, missing) for row in rows] for label in labels}
    for name in ("grad_norm", "learning_rate", "images_per_second", "seconds_waiting"):
        panels[name] = {"": [row.get(name) for row in rows]}
    figure, axes = plt.subplots(2, 4, figsize=(16, 6), squeeze=False)
    steps = [row["step"] for row in rows]
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=True):
        for label, values in curves.items():
            axis.plot(steps, [math.nan if value is None else value for value in values], label=label)
        if any(curves):
            axis.legend(fontsize=7)
        axis.set(title=name.replace("_", " "), xlabel="step")
        if name.startswith("loss"):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    save(figure, path)


def plot_logs(files: Sequence[str | Path], path: str | Path):
    """Writes one panel a log: files of JSON lines with `step` and `loss`, as the recipes of stage 0 leave them."""
    figure, axes = plt.subplots(1, len(files), figsize=(4 * len(files), 3), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        rows = read_log(file)
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows])
        axis.set(title=Path(file).stem, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    save(figure, path)


def draw_bars(rows: Mapping[str, Mapping[str, float | None]], path: str | Path, highest: float = 1.0):
    """
    Writes a group of bars for each part of a score, one bar a row; rows named "... (paper)" are hatched.

    Args:
        rows (`dict[str, dict[str, float]]`): Scores by part, by the name of their row; what is missing has no bar.
        path (`str` or `Path`): The PNG to write.
        highest (`float`, *optional*, defaults to 1.0): The best score there is.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    figure, axis = plt.subplots(figsize=(max(6, 1.1 * len(parts) + 2), 4))
    width = 0.85 / len(rows)
    for number, (name, row) in enumerate(rows.items()):
        known = [(i, value) for i, part in enumerate(parts) if (value := row.get(part)) is not None]
        places = [i + (number - (len(rows) - 1) / 2) * width for i, _ in known]
        hatch = "//" if name.endswith("(paper)") else None
        axis.bar(places, [value for _, value in known], width, label=name, hatch=hatch, alpha=0.5 if hatch else 1.0)
    axis.set(xticks=range(len(parts)), ylim=(0, highest), ylabel="score")
    axis.set_xticklabels(parts, fontsize=8)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axis.grid(axis="y", alpha=0.3)
    save(figure, path)


def draw_radar(parts: Sequence[str], rows: Mapping[str, Sequence[float]], path: str | Path, highest: float = 1.0):
    """
    Writes a radar of parts of a score, one line a row; rows named "... (paper)" are dashed.

    Args:
        parts (`list[str]`): Names of the axes.
        rows (`dict[str, list[float]]`): A score for each axis, by the name of its row.
        path (`str` or `Path`): The PNG to write.
        highest (`float`, *optional*, defaults to 1.0): The best score there is.
    """
    figure, axis = plt.subplots(figsize=(7, 4.5), subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * number / len(parts) for number in range(len(parts))]
    for name, values in rows.items():
        dashed = name.endswith("(paper)")
        axis.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            label=name,
            linestyle="--" if dashed else "-",
            alpha=0.5 if dashed else 1.0,
        )
    axis.set(xticks=angles, ylim=(0, highest))
    axis.set_xticklabels(parts, fontsize=8)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.1, 1))
    # A round axis keeps its shape: the constrained layout would cut the names at its sides and the legend.
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """Rows of JSON lines; a last one that is being written, or was when the run was killed, is left out."""
    *lines, last = Path(file).read_text().split("\n")
    rows = [json.loads(line) for line in lines]
    try:
        return [*rows, json.loads(last)]
    except json.JSONDecodeError:
        return rows


def save(figure: plt.Figure, path: str | Path):
    figure.set_layout_engine("constrained")  # makes room for titles of two lines, as tight_layout did not
    figure.savefig(path, dpi=110)
    plt.close(figure)
