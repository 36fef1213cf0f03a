"""WISE in its two versions, which must never be mixed up: other prompts, another judge, other scores, other weights.

| | `wise` (legacy) | `wise-verified` |
|---|---|---|
| answer | Consistency, Realism, Aesthetic Quality, each 0 to 2 | one Score, 0 or 1 |
| of a picture | (0.7 C + 0.2 R + 0.1 A) / 2 | the score |
| weights of culture, time, space, biology, physics, chemistry | 0.4, 0.167, 0.133, 0.1, 0.1, 0.1 | 0.4, then 0.12 each |
| items | 400, 167, 133, 100, 100, 100 | 400, then 120 each |

Facts read in PKU-YuanGroup/WISE, README.md of both versions and gpt_eval.py. Which ids are which category was read for the legacy
version in its users' copies of Calculate.py; that time comes before space in ids 401-640 of the verified one, and biology, physics,
chemistry in this order in 641-1000, follows the order of its README: unverified.
"""

import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any


CATEGORIES = ("culture", "time", "space", "biology", "physics", "chemistry")
ITEMS = {"wise": (400, 167, 133, 100, 100, 100), "wise-verified": (400, 120, 120, 120, 120, 120)}
WEIGHTS = {"wise": (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), "wise-verified": (0.4, 0.12, 0.12, 0.12, 0.12, 0.12)}
ASPECTS = ("consistency", "realism", "aesthetic quality")


def category_of(version: str, item: int) -> str:
    """
    The category of an item, by its id.

    Raises:
        ValueError: If there is no such item.

    Example:

    ```python
    >>> category_of("wise", 567), category_of("wise-verified", 567)
    ('time', 'space')
    ```
    """
    last = 0
    for name, count in zip(CATEGORIES, ITEMS[version], strict=True):
        last += count
        if 0 < item <= last:
            return name
    raise ValueError(f"WISE has items 1 to 1000, got {item}.")


def read_answer(version: str, text: str) -> dict[str, int] | None:
    """
    The scores in a judge's answer; `None` where it does not hold them all, each once or repeated alike.

    Example:

    ```python
    >>> read_answer("wise", "**Consistency**: 2 / Realism: 1 / Aesthetic Quality: 0")
    {'consistency': 2, 'realism': 1, 'aesthetic quality': 0}
    >>> read_answer("wise", "Consistency: 2, and the rest is fine"), read_answer("wise-verified", "Score: 1")
    (None, {'score': 1})
    ```
    """
    names, highest = (ASPECTS, 2) if version == "wise" else (("score",), 1)
    scores = {}
    for name in names:
        # The name, perhaps its scale in brackets, which is no score, then what stands between them and the number.
        pattern = (
            rf"\b{name.replace(' ', '[ _]')}\b[^\w(\[]{{0,4}}(?:\([^)]*\)|\[[^\]]*\])?[^\w(\[]{{0,8}}(\d+(?:\.\d+)?)"
        )
        found = set(re.findall(pattern, text, re.IGNORECASE))
        if len(found) != 1 or not re.fullmatch(rf"[0-{highest}]", value := found.pop()):
            return None
        scores[name] = int(value)
    return scores


def wiscore(scores: Mapping[str, int]) -> float:
    """
    The score of one picture, from 0 to 1, whichever version it is of.

    Example:

    ```python
    >>> wiscore({"consistency": 2, "realism": 1, "aesthetic quality": 0}), wiscore({"score": 1})
    (0.8, 1.0)
    ```
    """
    if "score" in scores:
        return float(scores["score"])
    # (0.7 C + 0.2 R + 0.1 A) / 2, in whole numbers as long as possible
    return (7 * scores["consistency"] + 2 * scores["realism"] + scores["aesthetic quality"]) / 20


def summarize(version: str, scores: Mapping[int, float]) -> dict[str, Any]:
    """
    Category means and the weighted overall score.

    Args:
        version (`str`): "wise" or "wise-verified".
        scores (`dict[int, float]`): Score of each item by id.

    Returns:
        `dict` with `overall` (`None` unless every category has items) and `categories`.

    Example:

    ```python
    >>> summarize("wise", dict.fromkeys(range(1, 401), 1.0) | dict.fromkeys(range(401, 1001), 0.0))["overall"]["value"]
    0.4
    ```
    """
    groups: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    for item, score in scores.items():
        groups[category_of(version, item)].append(score)
    means = {name: {"value": fmean(values), "items": len(values)} for name, values in groups.items() if values}
    if len(means) < len(CATEGORIES):
        return {"overall": None, "categories": means}
    weighted = zip(CATEGORIES, WEIGHTS[version], strict=True)
    overall = sum(weight * means[name]["value"] for name, weight in weighted)
    return {"overall": {"value": overall}, "categories": means}
