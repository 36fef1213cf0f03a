"""GenEval's score: the share of right pictures in each of six tasks, and their plain mean.

553 prompts of 4 pictures. Read in djghosh13/geneval, evaluation/summary_scores.py, which averages over the tasks that it finds;
here there is no overall score unless all six are there.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .geneval_rules import TASKS
from .shapes import mean_of_shares, wilson_share


def summarize(verdicts: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """
    Scores of a set of pictures.

    Args:
        verdicts (`Iterable[tuple[str, bool]]`): Task of each picture, and whether it is right.

    Returns:
        `dict` with `overall` (the plain mean of the tasks with a 95 % interval; `None` unless all six are there) and `tasks` (for
        each `correct`, `total`, `accuracy` and Wilson's 95 % interval).

    Raises:
        ValueError: If there are no pictures, or a task is unknown.

    Example:

    ```python
    >>> scores = summarize([(task, task != "position") for task in TASKS])
    >>> round(scores["overall"]["value"], 4), scores["tasks"]["position"]["accuracy"]
    (0.8333, 0.0)
    ```
    """
    by_task: dict[str, list[bool]] = defaultdict(list)
    for task, correct in verdicts:
        if task not in TASKS:
            raise ValueError(f"Expected a task out of {', '.join(TASKS)}, got {task!r}.")
        by_task[task].append(correct)
    if not by_task:
        raise ValueError("There are no pictures to score.")
    shares = {task: wilson_share(sum(by_task[task]), len(by_task[task])) for task in TASKS if task in by_task}
    whole = len(shares) == len(TASKS)
    return {
        "overall": asdict(mean_of_shares(shares)) if whole else None,
        "tasks": {task: asdict(share) for task, share in shares.items()},
    }
