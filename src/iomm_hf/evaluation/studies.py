"""A study: ways to train, scored alike, and what may be said of their differences.

The report says no more than its seeds allow: of several, Student's interval over them; of a single one, the interval of its
pictures or pairs, which knows nothing of how much trainings differ. Needs SciPy and matplotlib (the `eval` extra).
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from scipy.stats import t as student

from ..data.shapes import TASKS
from ..files import write_whole
from .figures import save


@dataclass(frozen=True)
class Arm:
    r"""
    One way to train.

    Args:
        label (`str`): What it is called.
        pretrain (`dict`): Changes to the settings of pre-training.
        finetune (`dict`, *optional*): Changes to those of fine-tuning; `None` for pre-training alone.
        paper (`float`, *optional*): The paper's figure.
        x (`float`, *optional*, defaults to 0.0): Its place on the plot's axis.
        series (`str`, *optional*, defaults to `""`): The curve that it belongs to.
        num_pairs (`int`, *optional*): Pairs to train on; by default as many as in the study's other arms.
    """

    label: str
    pretrain: dict[str, Any]
    finetune: dict[str, Any] | None
    paper: float | None = None
    x: float = 0.0
    series: str = ""
    num_pairs: int | None = None


@dataclass(frozen=True)
class Study:
    r"""
    Arms to compare.

    Args:
        question (`str`): What it asks.
        arms (`list[Arm]`): The ways to train.
        comparisons (`list[tuple[str, str]]`): Pairs of labels whose difference the report tells.
        seeds (`tuple[int, ...]`, *optional*, defaults to `(0,)`): Seeds of every arm.
        x_label (`str`, *optional*): Name of the plot's axis; without it there are bars.
        edits (`bool`, *optional*, defaults to `False`): Whether it is about edits, and so are the paper's figures.

    Example:

    ```python
    >>> from iomm_hf.evaluation.studies import Arm, Study, difference
    >>> study = Study("Pictures or pairs?", [Arm("pictures", {}, None), Arm("pairs", {}, None)], [("pictures", "pairs")])
    >>> scores = {
    ...     "pictures": {0: {"value": 0.40, "low": 0.37, "high": 0.43}, 1: {"value": 0.42, "low": 0.39, "high": 0.45}},
    ...     "pairs": {0: {"value": 0.30, "low": 0.27, "high": 0.33}, 1: {"value": 0.33, "low": 0.30, "high": 0.36}},
    ... }
    >>> [round(number, 3) for number in difference(scores["pictures"], scores["pairs"])]  # of two seeds
    [0.095, 0.031, 0.159]
    >>> [round(number, 3) for number in difference({0: scores["pictures"][0]}, scores["pairs"])]  # of one: its pictures
    [0.1, 0.058, 0.142]
    ```
    """

    question: str
    arms: list[Arm]
    comparisons: list[tuple[str, str]]
    seeds: tuple[int, ...] = (0,)
    x_label: str | None = None
    edits: bool = False


def write_study(
    study: Study,
    reports: Mapping[str, Mapping[int, dict[str, Any]]],
    asked: Mapping[str, float],
    closing: list[str],
    folder: Path,
):
    r"""
    Writes `table.md` and `scores.png`.

    Args:
        study ([`Study`]): What is compared.
        reports (`dict[str, dict[int, dict]]`): By label and seed, of those that are scored: `overall`, `tasks`, `objects`,
            `edits` and `held_out_pairs`, as `recipes/compare_recipes.py` writes them.
        asked (`dict[str, float]`): Objects that a picture of each task is asked for.
        closing (`list[str]`): Lines under the tables: what they were measured on, how to make them again.
        folder (`Path`): Where to.
    """
    arms = [arm for arm in study.arms if arm.label in reports]
    papers = {arm.label: arm.paper for arm in arms}

    def of_each(*path: str) -> dict[str, dict[int, Any]]:
        found = {}
        for label, seeds in reports.items():
            found[label] = {seed: reduce(getitem, path, report) for seed, report in seeds.items()}
        return found

    scores, edits = of_each("overall"), of_each("edits", "overall")
    lines = [
        study.question + ".",
        "",
        *score_table(arms, scores, of_each("tasks"), {} if study.edits else papers),
        *difference_table(study, scores, {} if study.edits else papers),
        *object_table(asked, of_each("objects")),
        *loss_table(study, of_each("held_out_pairs")),
        "Edits that no training showed, change made and rest kept:",
        "",
        *score_table(arms, edits, of_each("edits", "correct"), papers if study.edits else {}),
        *difference_table(study, edits, papers if study.edits else {}),
        *closing,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "table.md", ("\n".join(lines) + "\n").encode())
    plotted = edits if study.edits else scores
    plot_scores(study, [(arm, list(plotted[arm.label].values())) for arm in arms], folder / "scores.png")


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval over seeds; infinitely wide for a single one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, -float("inf"), float("inf")
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def difference(one: dict[int, dict], other: dict[int, dict]) -> tuple[float, float, float]:
    """
    Mean and 95 % interval of the differences at the seeds of both. Of a single seed the interval is that of its pictures
    (MOVER), which knows nothing of how much trainings differ.
    """
    seeds = sorted(one.keys() & other.keys())
    values = [one[seed]["value"] - other[seed]["value"] for seed in seeds]
    if len(values) > 1:
        return interval(values)
    a, b = one[seeds[0]], other[seeds[0]]
    down = math.hypot(a["value"] - a["low"], b["high"] - b["value"])
    up = math.hypot(a["high"] - a["value"], b["value"] - b["low"])
    return values[0], values[0] - down, values[0] + up


def score_table(
    arms: list[Arm],
    scores: dict[str, dict[int, dict]],
    shares: dict[str, dict[int, dict]],
    papers: dict[str, float | None],
) -> list[str]:
    """A row an arm: the overall score, and the share of each task or kind, mean of seeds."""
    kinds = list(next(iter(shares[arms[0].label].values())))
    columns = ["", "paper", "overall, mean of seeds", "by seed, with the interval of its pictures", *kinds]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in arms:
        means = scores[arm.label].values()
        value, low, high = interval([mean["value"] for mean in means])
        spread = f" [{low:.3f}, {high:.3f}]" if len(means) > 1 else ""
        seeds = "; ".join("{value:.3f} [{low:.3f}, {high:.3f}]".format(**mean) for mean in means)
        by_kind = [statistics.fmean(of[kind]["accuracy"] for of in shares[arm.label].values()) for kind in kinds]
        paper = papers.get(arm.label)
        cells = ["" if paper is None else f"{paper:.2f}", f"{value:.3f}{spread}", seeds]
        lines.append(f"| {' | '.join([arm.label, *cells, *(f'{share:.2f}' for share in by_kind)])} |")
    return [*lines, ""]


def object_table(asked: Mapping[str, float], objects: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """How many objects are asked for in a picture, and by arm how many are found: GenEval's rules let others stand beside them."""
    lines = [f"| {' | '.join(['objects a picture', *TASKS])} |", "|---" * (1 + len(TASKS)) + "|"]
    rows: dict[str, list[Mapping[str, float]]] = {"asked for": [asked]}
    rows |= {label: list(seeds.values()) for label, seeds in objects.items()}
    for label, found in rows.items():
        means = [f"{statistics.fmean(of[task] for of in found):.2f}" for task in TASKS]
        lines.append(f"| {' | '.join([label, *means])} |")
    return [*lines, ""]


def mean_loss(seeds: list[list[float]]) -> str:
    """Mean and 95 % interval: of the means of seeds, or of the pairs of a single one."""
    value, low, high = interval(seeds[0] if len(seeds) == 1 else [statistics.fmean(losses) for losses in seeds])
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def loss_table(study: Study, losses: dict[str, dict[int, dict[str, list[float]]]]) -> list[str]:
    """A row an arm: its loss on new pairs, what a wrong caption adds, and the difference to what it is compared with, pair by pair."""

    def minus(one: list[float], other: list[float]) -> list[float]:
        return [a - b for a, b in zip(one, other, strict=True)]

    lines = ["| loss on new pairs | under their captions | more under another's | seeds |", "|---|---|---|---|"]
    for label, seeds in losses.items():
        own = statistics.fmean(statistics.fmean(of["own"]) for of in seeds.values())
        more = mean_loss([minus(of["another"], of["own"]) for of in seeds.values()])
        lines.append(f"| {label} | {own:.4f} | {more} | {len(seeds)} |")
    for one, other in study.comparisons:
        if both := sorted(losses.get(one, {}).keys() & losses.get(other, {}).keys()):
            less = mean_loss([minus(losses[one][seed]["own"], losses[other][seed]["own"]) for seed in both])
            lines.append(f"| {one} against {other} | {less} | | {len(both)} |")
    return [*lines, ""]


def difference_table(study: Study, scores: dict[str, dict[int, dict]], papers: dict[str, float | None]) -> list[str]:
    """A row a comparison that has seeds, and what its interval tells."""
    lines = ["| difference | paper | here, same seeds | seeds | |", "|---|---|---|---|---|"]
    for one, other in study.comparisons:
        seeds = scores.get(one, {}).keys() & scores.get(other, {}).keys()
        if not seeds:
            continue
        value, low, high = difference(scores[one], scores[other])
        verdict = "above 0" if low > 0 else "below 0" if high < 0 else "not told apart"
        if len(seeds) == 1:
            verdict += ", by the pictures of one training each"
        a, b = papers.get(one), papers.get(other)
        paper = "" if a is None or b is None else f"{a - b:+.2f}"
        cells = [f"{one} against {other}", paper, f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", str(len(seeds)), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def plot_scores(study: Study, scored: list[tuple[Arm, list[dict[str, float]]]], path: Path):
    """Curves over `x`, or bars where there is no curve yet; a dot a seed, on bars side by side, with the interval of its pictures."""

    def dots(x: float, seeds: list[dict[str, float]], color: str = "black", apart: float = 0.0):
        values = [seed["value"] for seed in seeds]
        ends = [[seed["value"] - seed["low"] for seed in seeds], [seed["high"] - seed["value"] for seed in seeds]]
        places = [x + apart * (number - (len(seeds) - 1) / 2) for number in range(len(seeds))]
        axis.errorbar(places, values, ends, fmt="o", color=color, markersize=3, capsize=3, zorder=2)

    def mean(seeds: list[dict[str, float]]) -> float:
        return statistics.fmean(seed["value"] for seed in seeds)

    figure, axis = plt.subplots(figsize=(7, 3.5))
    if study.x_label is None or len({arm.x for arm, _ in scored}) == 1:
        for position, (_, seeds) in enumerate(scored):
            axis.bar(position, mean(seeds), color="tab:blue")
            dots(position, seeds, apart=0.15)
        axis.set_xticks(range(len(scored)), [arm.label for arm, _ in scored], rotation=20)
    else:
        for number, series in enumerate(dict.fromkeys(arm.series for arm, _ in scored)):
            points = [(arm.x, seeds) for arm, seeds in scored if arm.series == series]
            axis.plot([x for x, _ in points], [mean(seeds) for _, seeds in points], f"C{number}", label=series)
            for x, seeds in points:
                dots(x, seeds, f"C{number}")
        if len({arm.series for arm, _ in scored}) > 1:
            axis.legend()
        if max(arm.x for arm, _ in scored) > 1:
            axis.set_xscale("log")
        measured = sorted({arm.x for arm, _ in scored})
        axis.set_xticks(measured, [f"{x:,g}" for x in measured])
        axis.minorticks_off()
        axis.set_xlabel(study.x_label)
    axis.set(ylabel="share of edits that are right" if study.edits else "overall score")
    axis.grid(alpha=0.3, axis="y")
    save(figure, path)
