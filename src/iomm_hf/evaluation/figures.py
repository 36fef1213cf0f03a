"""Pictures for people: sheets of drawings and curves of losses. Needs matplotlib (the `train` extra)."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

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
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        axis.plot([row["images"] for row in rows], [row["loss"] for row in rows], label=name)
    axis.set(xlabel="pictures seen in the stage", ylabel="flow-matching loss", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, path)


def plot_logs(files: Sequence[str | Path], path: str | Path):
    """Writes one panel a log: files of JSON lines with `step` and `loss`, as the recipes of stage 0 leave them."""
    figure, axes = plt.subplots(1, len(files), figsize=(4 * len(files), 3), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows])
        axis.set(title=Path(file).stem, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    save(figure, path)


def save(figure: plt.Figure, path: str | Path):
    figure.set_layout_engine("constrained")  # makes room for titles of two lines, as tight_layout did not
    figure.savefig(path, dpi=110)
    plt.close(figure)
