"""Pictures for people: sheets of drawings and curves of losses. Needs matplotlib (the `train` extra)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image


def draw_sheet(rows: Mapping[str, Sequence[Image.Image]], titles: Sequence[str], path: str | Path):
    r"""
    Writes a sheet with one row a model and one column a prompt.

    Args:
        rows (`dict[str, list[Image]]`): Pictures by the name of their row.
        titles (`list[str]`): One a column.
        path (`str` or `Path`): The PNG to write.

    Raises:
        `ValueError`: a row with another number of pictures than there are titles.
    """
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(1.7 * len(titles), 1.9 * len(rows)), squeeze=False)
    for number, (row, (name, images)) in enumerate(zip(axes, rows.items(), strict=True)):
        for axis, image, title in zip(row, images, titles, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(title, fontsize=8)
        row[0].set_ylabel(name, fontsize=9)
    save(figure, path)


def plot_losses(runs: Mapping[str, str | Path], path: str | Path):
    """Writes the loss curves of runs, each a folder with `log.jsonl`, by their names."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for name, folder in runs.items():
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        axis.plot([row["images"] for row in rows], [row["loss"] for row in rows], label=name)
    axis.set(xlabel="pictures seen in the stage", ylabel="flow-matching loss", ylim=(0, None))
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, path)


def save(figure: plt.Figure, path: str | Path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
