"""DPG-Bench's score: yes-or-no questions about each picture, where a "no" also answers the questions that depend on it.

Read in TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py (Apache-2.0). Only the overall score is given: their categories are
averages over questions of the last of the four pictures alone. Two things differ. Their reader drops the first line of the
questions, so that the questions which depend on it have no parent and that item is lost in silence; we keep it. And their
judge is mPLUG-large, which only ModelScope runs: a score here names the model that answered, and compares with those of the same.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image


COLUMNS = ("item_id", "proposition_id", "dependency", "question_natural_language")
GRID = ((0, 0), (1, 0), (0, 1), (1, 1))  # column and row of each of the four pictures, in the official order


@dataclass(frozen=True)
class Question:
    """One question about an item: its number there, the numbers that it depends on, and its text."""

    number: int
    parents: tuple[int, ...]
    text: str


def read_questions(file: str | Path) -> dict[str, list[Question]]:
    """
    The questions of each item, in the file's order, from the authors' `dpg_bench.csv`.

    Raises:
        ValueError: If a column is missing, or a question depends on one that its item does not have.
    """
    questions: dict[str, list[Question]] = {}
    with Path(file).open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(
                f"{file} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or [])}."
            )
        for row in reader:
            parents = tuple(int(number) for number in row["dependency"].split(",") if int(number) != 0)
            question = Question(int(row["proposition_id"]), parents, row["question_natural_language"].strip())
            questions.setdefault(row["item_id"].strip(), []).append(question)
    for item, asked in questions.items():
        numbers = {question.number for question in asked}
        orphans = [question.number for question in asked if not set(question.parents) <= numbers]
        if orphans or len(numbers) < len(asked):
            raise ValueError(
                f"{file}: item {item} numbers a question twice, or {orphans} depend on questions that it lacks."
            )
    return questions


def score_picture(questions: list[Question], answers: Mapping[int, bool]) -> float:
    """
    The share of questions about one picture that hold, after each "no" has zeroed its children, and they theirs, in order.

    Args:
        questions (`list[Question]`): All of the item.
        answers (`dict[int, bool]`): "Yes" or not, by the question's number.

    Raises:
        ValueError: If a question has no answer.

    Example:

    ```python
    >>> dog, red, bow = Question(1, (), "A dog?"), Question(2, (1,), "Is it red?"), Question(3, (2,), "With a bow?")
    >>> score_picture([dog, red, bow], {1: False, 2: True, 3: True}), score_picture([dog, red], {1: True, 2: False})
    (0.0, 0.5)
    ```
    """
    missing = [question.number for question in questions if question.number not in answers]
    if missing:
        raise ValueError(f"Questions {missing} have no answer.")
    holds = {question.number: answers[question.number] for question in questions}
    for question in questions:
        if not all(holds[parent] for parent in question.parents):
            holds[question.number] = False
    return sum(holds.values()) / len(holds)


def cut_grid(sheet: Image.Image) -> list[Image.Image]:
    """
    The four pictures of a 2x2 grid.

    Raises:
        ValueError: If its sides are odd.

    Example:

    ```python
    >>> [picture.size for picture in cut_grid(Image.new("RGB", (8, 6)))]
    [(4, 3), (4, 3), (4, 3), (4, 3)]
    ```
    """
    width, height = sheet.width // 2, sheet.height // 2
    if sheet.width % 2 or sheet.height % 2:
        raise ValueError(f"A grid of four pictures has even sides, got {sheet.width} x {sheet.height}.")
    return [sheet.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)) for x, y in GRID]


def read_answer(text: str) -> bool | None:
    """
    Yes or no, at the start of an answer; `None` for anything else.

    Example:

    ```python
    >>> read_answer(" Yes."), read_answer("No, there is none"), read_answer("Nothing to see")
    (True, False, None)
    ```
    """
    word = text.strip().strip("*\"'").lower()
    for answer, value in (("yes", True), ("no", False)):
        if word.startswith(answer) and not word[len(answer) : len(answer) + 1].isalnum():
            return value
    return None


def summarize(scores: Mapping[str, list[float]], expected: int) -> dict[str, Any]:
    """
    The mean over items of the mean over their pictures, in per cent.

    Args:
        scores (`dict[str, list[float]]`): Each item's pictures' scores.
        expected (`int`): Items of the benchmark that was asked for.

    Raises:
        ValueError: If items are missing.

    Example:

    ```python
    >>> summarize({"0": [1.0, 0.5], "1": [0.25, 0.25]}, expected=2)
    {'overall': {'value': 50.0}}
    ```
    """
    if len(scores) != expected:
        raise ValueError(f"Expected scores of {expected} items, got {len(scores)}.")
    return {"overall": {"value": 100 * fmean(fmean(values) for values in scores.values())}}
