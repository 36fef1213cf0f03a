"""Edits: true ones score 1, copies and fresh pictures 0, and each half is judged on its own."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from iomm_hf.data.shapes import HELD_OUT_COLOR_PAIRS, Background, render
from iomm_hf.evaluation.edits import KINDS, EditVerdict, box_overlap, edit_cases, judge_edit, score_edits


@pytest.fixture(scope="module")
def cases():
    return edit_cases(12)


def drawn(scene) -> Image.Image:
    return Image.fromarray(render(scene))


def of_kind(cases, kind):
    return [case for case in cases if case.kind == kind]


def test_true_edits_are_right_and_copies_blanks_and_others_are_not(cases):
    truth = score_edits([drawn(case.target) for case in cases], cases)
    assert {kind: share.accuracy for kind, share in truth.correct.items()} == dict.fromkeys(KINDS, 1.0)
    copies = score_edits([case.picture() for case in cases], cases)
    assert copies.overall.value == 0 and copies.kept["recolor"].accuracy == 1
    blank = score_edits([Image.new("RGB", (64, 64))] * len(cases), cases)
    assert blank.overall.value == 0 and blank.changed["remove"].accuracy == 1
    pictures = [drawn(case.target) for case in cases]
    assert score_edits(pictures[1:] + pictures[:1], cases).overall.value < 0.06


def test_the_rest_is_not_kept_when_something_else_changes(cases):
    case = of_kind(cases, "recolor")[0]
    [item] = case.target.objects
    moved = replace(case.target, objects=(replace(item, x=1 - item.x, y=1 - item.y, radius=0.12),))
    assert judge_edit(drawn(moved), case) == EditVerdict(changed=True, kept=False)
    other = "circle" if item.shape != "circle" else "cross"
    reshaped = replace(case.target, objects=(replace(item, shape=other),))
    assert judge_edit(drawn(reshaped), case) == EditVerdict(changed=True, kept=False)
    light = np.mean(case.source.background.start) > 128
    flipped = Background(*[(10, 10, 10) if light else (240, 240, 240)] * 2, 0.0)
    assert judge_edit(drawn(replace(case.target, background=flipped)), case) == EditVerdict(changed=True, kept=False)

    case = of_kind(cases, "remove")[0]
    [item] = case.target.objects
    color = "blue" if item.color != "blue" else "green"
    recolored = replace(case.target, objects=(replace(item, color=color),))
    assert judge_edit(drawn(recolored), case) == EditVerdict(changed=True, kept=False)


def test_cases_repeat_and_show_no_held_out_pair(cases):
    assert cases == edit_cases(12) and cases != edit_cases(12, seed=1)
    shown = {(item.color, item.shape) for case in cases for s in (case.source, case.target) for item in s.objects}
    assert not shown & set(HELD_OUT_COLOR_PAIRS)


def test_boxes_overlap_as_worked_out_by_hand():
    assert box_overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
