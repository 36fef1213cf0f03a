"""ImgEdit-Bench's basic suite: three scores of 1 to 5 for each edit, averaged over the edit, its type, and all types.

Read in PKU-YuanGroup/ImgEdit, Benchmark/Basic: `basic_bench.py`, `step1_get_avgscore.py`, `step2_typescore.py`. Their scripts take
whatever numbers they find and round on the way; here an answer has three scores or is not counted as one, and nothing is rounded.
They stop at types: that the overall score is the plain mean over types is unverified, so the mean over items stands beside it.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any


SCORES = 3  # of each edit: what was asked, how it looks, what was kept; their names differ by type
LINE = re.compile(
    r"[\W_]*(?:\d+[.)][\W_]*)?([A-Za-z][\w &/-]*?(?:[ *_]*\([^():]*\))?)[\W_]*:"
    r"[\W_]*([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*5)?[\W_]*"
)
PLACE_OF_PROMPT = "<edit_prompt>"  # where the judge's wording wants the instruction
WORDING_NAMES = {"alter": "adjust", "adjust": "alter"}  # basic_edit.json was read with one, its README with the other


def read_wordings(file: Path, types: Collection[str]) -> dict[str, str]:
    """
    The judge's task for each type of edit, from the authors' `prompts.json`.

    Raises:
        ValueError: If a type has none, or one without a place for the instruction.
    """
    wordings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(wordings, dict):
        raise ValueError(f'{file} must be JSON of {{"type of edit": "... {PLACE_OF_PROMPT} ...", ...}}.')
    found: dict[str, Any] = {name: wordings.get(name, wordings.get(WORDING_NAMES.get(name, ""))) for name in types}
    wrong = sorted(name for name, text in found.items() if not isinstance(text, str) or PLACE_OF_PROMPT not in text)
    if wrong:
        raise ValueError(
            f"{file} has no wording with {PLACE_OF_PROMPT} for edits of type {', '.join(wrong)}; it has {sorted(wordings)}."
        )
    return found


def read_answer(text: str) -> list[int] | None:
    """
    The three scores in a judge's answer; `None` where there are not exactly three lines that end in 1 to 5.

    Example:

    ```python
    >>> read_answer("Brief reasoning: fine.\\nPrompt Compliance: 5\\nVisual Seamlessness: 4\\n**Detail Fidelity**: 3")
    [5, 4, 3]
    >>> read_answer("Prompt Compliance: 5\\nVisual Seamlessness: 4") is None
    True
    ```
    """
    found = [match.group(2) for line in text.splitlines() if (match := LINE.fullmatch(line.strip()))]
    if len(found) != SCORES or not all(re.fullmatch("[1-5]", value) for value in found):
        return None
    return [int(value) for value in found]


def summarize(scores: Mapping[str, Sequence[int]], types: Mapping[str, str]) -> dict[str, Any]:
    """
    Means over edits, types and all.

    Args:
        scores (`dict[str, list[int]]`): The three scores of each edit.
        types (`dict[str, str]`): The type of each edit of the benchmark.

    Returns:
        `dict` with `overall` (mean of the types; `None` unless every type has edits), `mean_of_items` and `types`.

    Example:

    ```python
    >>> summarize({"1": [5, 4, 3], "2": [1, 1, 1], "3": [3, 3, 3]}, {"1": "add", "2": "style", "3": "style"})["overall"]
    {'value': 3.0}
    ```
    """
    groups: dict[str, list[float]] = {name: [] for name in sorted(set(types.values()))}
    for item, three in scores.items():
        groups[types[item]].append(fmean(three))
    means = {name: {"value": fmean(values), "items": len(values)} for name, values in groups.items() if values}
    return {
        "overall": {"value": fmean(mean["value"] for mean in means.values())} if len(means) == len(groups) else None,
        "mean_of_items": fmean(fmean(three) for three in scores.values()),
        "types": means,
    }
