"""The report of a study says no more than its seeds allow, and plots what it is about."""

from itertools import pairwise

import pytest
from PIL import Image

from iomm_hf.data.shapes import TASKS
from iomm_hf.evaluation.edits import KINDS
from iomm_hf.evaluation.studies import Arm, Study, write_study


ASKED = dict.fromkeys(TASKS, 2.0)


def report_of(value: float) -> dict:
    """As if it had been measured."""
    return {
        "overall": {"value": value, "low": value - 0.02, "high": value + 0.02},
        "tasks": {task: {"accuracy": value} for task in TASKS},
        "objects": {task: 10 * value for task in TASKS},
        "held_out_pairs": {"own": [value, value + 0.1], "another": [value + 0.2, value + 0.4]},
        "edits": {
            "overall": {"value": value / 2, "low": value / 2 - 0.02, "high": value / 2 + 0.02},
            "correct": {kind: {"accuracy": value / 2} for kind in KINDS},
        },
    }


@pytest.fixture
def table_of(tmp_path):
    def write(study: Study, values: dict[str, list[float]]) -> str:
        reports = {label: {seed: report_of(value) for seed, value in enumerate(of)} for label, of in values.items()}
        write_study(study, reports, ASKED, ["How it was measured."], tmp_path / "study")
        return (tmp_path / "study/table.md").read_text()

    return write


def test_seeds_alone_tell_arms_apart(table_of):
    arms = [
        Arm("mix", {}, {}, paper=0.89),
        Arm("pairs", {}, {}, paper=0.87),
        Arm("other", {}, {}),
        Arm("not run", {}, {}),
    ]
    comparisons = [("mix", "pairs"), ("mix", "other"), ("mix", "not run")]
    table = table_of(
        Study("Which is best", arms, comparisons, seeds=(0, 1, 2)),
        {"mix": [0.60, 0.62, 0.61], "pairs": [0.40, 0.43, 0.41], "other": [0.50, 0.70, 0.60]},
    )
    assert table.startswith("Which is best.\n") and table.endswith("How it was measured.\n")
    assert "| mix | 0.89 | 0.610 [0.585, 0.635] | 0.600 [0.580, 0.620]; 0.620 " in table
    assert "| mix against pairs | +0.02 | +0.197 [+0.182, +0.211] | 3 | above 0 |" in table
    assert "| mix against other |  | +0.010 [-0.214, +0.234] | 3 | not told apart |" in table
    assert "not run" not in table
    assert "| asked for | 2.00 | 2.00 | " in table and "| mix | 6.10 | 6.10 | " in table
    # New pairs: of several seeds their means count.
    assert "| pairs | 0.4633 | +0.2500 [+0.2500, +0.2500] | 3 |" in table
    assert "| mix against pairs | +0.1967 [+0.1823, +0.2110] | | 3 |" in table


def test_of_one_seed_pictures_and_pairs_count(table_of):
    arms = [Arm("more", {}, {}), Arm("less", {}, {})]
    table = table_of(Study("How much", arms, [("less", "more")]), {"more": [0.5], "less": [0.1]})
    assert (
        "| less against more |  | -0.400 [-0.428, -0.372] | 1 | below 0, by the pictures of one training each |"
        in table
    )
    assert "| less against more | -0.4000 [-0.4000, -0.4000] | | 1 |" in table  # each pair differs by the same


def test_a_study_of_edits_has_the_paper_beside_its_edits(table_of):
    arms = [Arm("pictures", {}, None, paper=2.82), Arm("pairs", {}, None, paper=2.61)]
    study = Study("Who edits better", arms, [("pictures", "pairs")], edits=True)
    scores, edits = table_of(study, {"pictures": [0.4], "pairs": [0.2]}).split("Edits that no training showed")
    assert "2.82" not in scores and "| pictures against pairs |  | +0.200 " in scores
    assert "| pictures | 2.82 | 0.200 |" in edits and "| pictures against pairs | +0.21 | +0.100 " in edits


@pytest.mark.parametrize("x_label", [None, "pairs"])
def test_bars_or_a_curve_a_series(table_of, tmp_path, x_label):
    labels = [f"{series}, {number}" for series in ("one", "other") for number in (1, 10)]
    arms = [Arm(label, {}, {}, x=int(label.split()[-1]), series=label.split(",")[0]) for label in labels]
    table_of(Study("How many", arms, [*pairwise(labels)], x_label=x_label), {label: [0.5] for label in labels})
    colours = Image.open(tmp_path / "study/scores.png").convert("RGB").getcolors(100_000)
    blue, orange = (31, 119, 180), (255, 127, 14)
    seen = {colour for count, colour in colours if count > 50}
    assert blue in seen and (orange in seen) == (x_label is not None)
