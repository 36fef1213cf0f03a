"""DPG-Bench, both WISEs and ImgEdit-Bench: what answers add up to, worked out by hand."""

import json

import pytest
from PIL import Image

from iomm_hf.evaluation import dpg, imgedit, wise
from iomm_hf.evaluation.dpg import Question


CHAIN = [Question(1, (), "a"), Question(2, (1,), "b"), Question(3, (2,), "c"), Question(4, (), "d")]


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        ([True, True, True, True], 1.0),
        ([False, True, True, True], 0.25),  # 2 falls with 1, and 3 with 2
        ([True, False, True, True], 0.5),
        ([True, True, False, True], 0.75),
        ([False, False, False, False], 0.0),
    ],
)
def test_a_no_zeroes_what_depends_on_it(answers, score):
    assert dpg.score_picture(CHAIN, dict(enumerate(answers, 1))) == score


def test_any_of_several_parents_is_enough_to_zero_a_child():
    questions = [Question(1, (), "a"), Question(2, (), "b"), Question(3, (1, 2), "c")]
    assert dpg.score_picture(questions, {1: True, 2: False, 3: True}) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"Questions \[3\] have no answer"):
        dpg.score_picture(questions, {1: True, 2: True})


HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"


def test_questions_are_read_with_the_first_line_and_all_parents(tmp_path):
    file = tmp_path / "dpg_bench.csv"
    file.write_text(
        HEADER
        + '0,"A dog, red",,1,0,entity,whole,entity - whole (dog),Is there a dog?\n'
        + "0,,,2,1,attribute,color,attribute - color (red),Is it red?\n"
        + '7,x,,1,0,entity,whole,t,"Is there a cat, or more?"\n7,x,,2,"0",entity,whole,t,q2\n7,x,,3,"1, 2",e,w,t,q3\n'
    )
    questions = dpg.read_questions(file)
    assert questions["0"] == [Question(1, (), "Is there a dog?"), Question(2, (1,), "Is it red?")]
    assert [question.parents for question in questions["7"]] == [(), (), (1, 2)]
    file.write_text(HEADER + "0,x,,2,1,e,w,t,q\n")
    with pytest.raises(ValueError, match=r"item 0 .* \[2\] depend on questions that it lacks"):
        dpg.read_questions(file)
    file.write_text("item_id,prompt\n0,x\n")
    with pytest.raises(ValueError, match="has no column proposition_id"):
        dpg.read_questions(file)


def test_a_grid_is_cut_row_by_row():
    sheet = Image.new("RGB", (4, 4))
    for number, place in enumerate([(0, 0), (2, 0), (0, 2), (2, 2)]):
        sheet.paste((number, 0, 0), (*place, place[0] + 2, place[1] + 2))
    assert [picture.getpixel((0, 0))[0] for picture in dpg.cut_grid(sheet)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="got 5 x 4"):
        dpg.cut_grid(Image.new("RGB", (5, 4)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), ("Yes, there is.", True), (" no", False), ("**No**", False), ("Yesterday", None), ("", None)],
)
def test_dpg_reads_yes_and_no(text, value):
    assert dpg.read_answer(text) is value


def test_dpg_is_a_mean_of_means_in_per_cent():
    assert dpg.summarize({"a": [1.0] * 4, "b": [0.5, 0.5, 0.0, 0.0]}, 2)["overall"]["value"] == 62.5
    with pytest.raises(ValueError, match="Expected scores of 3 items, got 1"):
        dpg.summarize({"a": [1.0]}, 3)


def test_the_two_wises_score_and_weigh_apart():
    assert wise.wiscore({"consistency": 2, "realism": 2, "aesthetic quality": 2}) == 1.0
    assert wise.wiscore({"consistency": 1, "realism": 0, "aesthetic quality": 2}) == pytest.approx(0.45)
    for version in wise.WEIGHTS:
        assert sum(wise.WEIGHTS[version]) == pytest.approx(1) and sum(wise.ITEMS[version]) == 1000
    groups = {
        version: [wise.category_of(version, item) for item in range(1, 1001)] for version in ("wise", "wise-verified")
    }
    for version, names in groups.items():
        assert [names.count(name) for name in wise.CATEGORIES] == list(wise.ITEMS[version])
    one_category = {item: float(name == "space") for item, name in enumerate(groups["wise"], 1)}
    assert wise.summarize("wise", one_category)["overall"]["value"] == pytest.approx(0.133)
    # The same scores mean something else by the other version's categories: 40 of its 120 are in `time`.
    other = wise.summarize("wise-verified", one_category)
    assert other["overall"]["value"] == pytest.approx(0.12 * 73 / 120 + 0.12 * 60 / 120)
    with pytest.raises(ValueError, match="got 1001"):
        wise.category_of("wise", 1001)


@pytest.mark.parametrize(
    ("version", "text", "value"),
    [
        (
            "wise",
            "Consistency: 2\nRealism: 1\nAesthetic Quality: 0",
            {"consistency": 2, "realism": 1, "aesthetic quality": 0},
        ),
        ("wise", "**consistency**: 0, *Realism* - 0, Aesthetic_Quality = 0", dict.fromkeys(wise.ASPECTS, 0)),
        ("wise", "Consistency: 3\nRealism: 1\nAesthetic Quality: 0", None),  # beyond the scale
        ("wise", "Consistency: 2\nRealism: 1", None),
        ("wise", "Consistency: 1.5\nRealism: 1\nAesthetic Quality: 0", None),
        ("wise", "Consistency: 2, no, Consistency: 1\nRealism: 1\nAesthetic Quality: 0", None),  # two answers are none
        (
            "wise",
            "Consistency (0-2): 2\n**Realism [0-2]**: 2\nAesthetic Quality: (0 to 2) 1",  # the scale is no score
            {"consistency": 2, "realism": 2, "aesthetic quality": 1},
        ),
        ("wise-verified", "Score (0 or 1): 1", {"score": 1}),
        ("wise", "Score: 1", None),  # the other version's
        ("wise-verified", "The plant is right.\nScore: 1", {"score": 1}),
        ("wise-verified", "score: 2", None),
        ("wise-verified", "Consistency: 1", None),
    ],
)
def test_wise_reads_its_own_answers_only(version, text, value):
    assert wise.read_answer(version, text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "Brief reasoning: no change.\nPrompt Compliance: 1\nVisual Seamlessness: 4\nPhysical & Detail Fidelity: 4",
            [1, 4, 4],
        ),
        ("- **Style Fidelity**: 5/5\n- Content Preservation: 5 / 5\n- Rendering Quality: 4", [5, 5, 4]),
        (
            "1. Prompt Compliance: 5\n2) **Visual Seamlessness (Edge & Texture Blend)**: 4\n3. Fidelity (1-5): 3/5",
            [5, 4, 3],
        ),
        ("**1. Compliance:** 5\n- 2. Seamlessness (edges): **4**\n(3) Fidelity: 3", [5, 4, 3]),
        ("Prompt Compliance: 6\nVisual Seamlessness: 4\nDetail: 4", None),
        ("Prompt Compliance: 0\nVisual Seamlessness: 4\nDetail: 4", None),
        ("A: 1\nB: 2\nC: 3\nD: 4", None),
        ("I cannot compare these.", None),
    ],
)
def test_imgedit_wants_three_scores(text, value):
    assert imgedit.read_answer(text) == value


def test_imgedit_averages_items_types_and_all():
    scores = {"1": [1, 1, 1], "2": [1, 4, 5], "3": [5, 5, 5], "4": [3, 3, 3]}
    types = {"1": "add", "2": "add", "3": "style", "4": "style"}
    result = imgedit.summarize(scores, types)
    assert (
        result["types"]["add"]["value"] == pytest.approx((1 + 10 / 3) / 2) and result["types"]["style"]["value"] == 4.0
    )
    assert result["overall"]["value"] == pytest.approx(((1 + 10 / 3) / 2 + 4) / 2)
    assert imgedit.summarize({"1": [1, 1, 1]}, types)["overall"] is None


def test_imgedit_wordings_are_those_of_the_types(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"adjust": "Grade <edit_prompt>.", "style": "No place."}))
    assert imgedit.read_wordings(file, {"alter"}) == {"alter": "Grade <edit_prompt>."}
    with pytest.raises(ValueError, match="for edits of type action, style"):
        imgedit.read_wordings(file, {"style", "action", "adjust"})
    file.write_text("[]")
    with pytest.raises(ValueError, match='must be JSON of {"type of edit": "... <edit_prompt> ..."'):
        imgedit.read_wordings(file, {"style"})
