"""GenEval's verdicts against cases worked out by hand from its rules, task by task, at and beside every threshold."""

import pytest

from iomm_hf.evaluation.benchmarks import load_benchmark
from iomm_hf.evaluation.geneval import summarize
from iomm_hf.evaluation.geneval_rules import CLASSES, COLORS, TASKS, Detection, judge_geneval


def found(label: str, score: float = 0.95, color: str | None = None, box=(0, 0, 100, 100)) -> Detection:
    return Detection(label, box, score, color)


def verdict(task: str, include: list[dict], *detections: Detection, exclude: list[dict] | None = None):
    metadata = {"tag": task, "include": include} | ({"exclude": exclude} if exclude else {})
    return judge_geneval(detections, metadata)


def one(name: str, **more) -> dict:
    return {"class": name, "count": 1, **more}


def test_single_object():
    bench = [one("bench")]
    assert verdict("single_object", bench, found("bench")) == (True, "")
    assert verdict("single_object", bench, found("bench"), found("bench"), found("dog")) == (
        True,
        "",
    )  # more is allowed
    assert verdict("single_object", bench) == (False, "expected bench>=1, found 0")
    assert verdict("single_object", bench, found("chair")) == (False, "expected bench>=1, found 0")


@pytest.mark.parametrize(("score", "right"), [(0.3, False), (0.3001, True), (0.0, False), (1.0, True)])
def test_an_object_counts_above_three_tenths(score, right):
    assert verdict("single_object", [one("bench")], found("bench", score))[0] is right


def test_two_objects_of_two_classes_and_of_one():
    both = [one("bench"), one("sports ball")]
    assert verdict("two_object", both, found("sports ball"), found("bench"))[0]
    assert verdict("two_object", both, found("bench"), found("bench")) == (False, "expected sports ball>=1, found 0")
    # Clauses do not use objects up: twice the same clause is met by one object.
    assert verdict("two_object", [one("cup"), one("cup")], found("cup"))[0]
    missing = verdict("two_object", both)
    assert missing == (False, "expected bench>=1, found 0; expected sports ball>=1, found 0")


def test_overlapping_objects_of_a_class_all_count():
    same_place = [found("clock", 0.95), found("clock", 0.94)]
    assert verdict("counting", [{"class": "clock", "count": 2}], *same_place)[0]


@pytest.mark.parametrize(("number", "right"), [(1, False), (2, True), (3, False)])
def test_counting_is_exact_through_exclude(number, right):
    clocks = [found("clock", 0.91)] * number
    include, exclude = [{"class": "clock", "count": 2}], [{"class": "clock", "count": 3}]
    correct, reason = verdict("counting", include, *clocks, exclude=exclude)
    assert correct is right
    assert reason == {1: "expected clock>=2, found 1", 2: "", 3: "expected clock<3, found 3"}[number]


def test_counting_wants_nine_tenths_and_other_tasks_do_not():
    include, exclude = [{"class": "clock", "count": 2}], [{"class": "clock", "count": 3}]
    sure = [found("clock", 0.95), found("clock", 0.9001)]
    assert verdict("counting", include, *sure, found("clock", 0.9), exclude=exclude) == (
        True,
        "",
    )  # 0.9 is not above 0.9
    assert verdict("counting", include, found("clock", 0.95), found("clock", 0.9)) == (
        False,
        "expected clock>=2, found 1",
    )
    assert verdict("two_object", include, found("clock", 0.95), found("clock", 0.9))[0]


def test_no_more_than_sixteen_of_a_class_are_seen():
    many = [found("bird", 0.95)] * 17
    assert verdict("counting", [{"class": "bird", "count": 16}], *many, exclude=[{"class": "bird", "count": 17}])[0]
    assert not verdict("counting", [{"class": "bird", "count": 17}], *many)[0]
    assert verdict("two_object", [one("bird"), one("cat")], *many, found("cat", 0.4))[0]  # of each class


def test_colors_are_those_of_the_most_confident():
    red = [one("apple", color="red")]
    assert verdict("colors", red, found("apple", 0.9, "red"), found("apple", 0.5, "green"))[0]
    wrong = verdict("colors", red, found("apple", 0.5, "red"), found("apple", 0.9, "green"))
    assert wrong == (False, "expected red apple>=1, found green")
    # An object below the threshold neither helps nor hurts.
    assert not verdict("colors", red, found("apple", 0.3, "red"))[0]
    assert verdict("colors", red, found("apple", 0.31, "red"), found("apple", 0.3, "green"))[0]


def test_of_two_equally_confident_the_first_is_taken():
    first, second = found("apple", 0.9, "red"), found("apple", 0.9, "green")
    assert verdict("colors", [one("apple", color="red")], first, second)[0]
    assert not verdict("colors", [one("apple", color="red")], second, first)[0]


def test_two_of_a_color_need_both():
    red = [{"class": "apple", "count": 2, "color": "red"}]
    assert verdict("colors", red, found("apple", 0.9, "red"), found("apple", 0.8, "red"))[0]
    assert not verdict("colors", red, found("apple", 0.9, "red"), found("apple", 0.8, "green"))[0]


def test_color_attribution_needs_both_colors_in_place():
    wanted = [one("wine glass", color="purple"), one("apple", color="black")]
    assert verdict("color_attr", wanted, found("apple", color="black"), found("wine glass", color="purple"))[0]
    swapped = verdict("color_attr", wanted, found("apple", color="purple"), found("wine glass", color="black"))
    assert swapped == (
        False,
        "expected purple wine glass>=1, found black; expected black apple>=1, found purple",
    )
    with pytest.raises(ValueError, match="a purple wine glass, but a detection has no colour"):
        verdict("color_attr", wanted, found("apple", color="black"), found("wine glass"))


RIGHT_OF = [one("teddy bear"), one("dog", position=["right of", 0])]


@pytest.mark.parametrize(
    ("dx", "dy", "relation"),
    [
        (300, 0, "right of"),
        (-300, 0, "left of"),
        (0, -300, "above"),
        (0, 300, "below"),
        (300, 300, "right of"),
        (300, 300, "below"),  # on the diagonal both hold: (300 - 20) / 424 = 0.66
    ],
)
def test_position_is_read_from_centres(dx, dy, relation):
    bear, dog = found("teddy bear"), found("dog", box=(dx, dy, dx + 100, dy + 100))
    wanted = [one("teddy bear"), one("dog", position=[relation, 0])]
    assert verdict("position", wanted, bear, dog) == (True, "")
    opposite = {"right of": "left of", "left of": "right of", "above": "below", "below": "above"}[relation]
    assert not verdict("position", [one("teddy bear"), one("dog", position=[opposite, 0])], bear, dog)[0]


def test_position_needs_more_than_a_tenth_of_both_sides():
    """Two boxes of side 100: the offset is reduced by 20, and half of the whole offset must be left. d - 20 > d / 2 from 40."""
    bear = found("teddy bear")
    for offset, right in ((20, False), (39, False), (40, False), (41, True)):
        dog = found("dog", box=(offset, 0, offset + 100, 100))
        assert verdict("position", RIGHT_OF, bear, dog)[0] is right, offset
    same = verdict("position", RIGHT_OF, bear, found("dog"))
    assert same == (False, "expected dog right of target, found too close to target")


def test_boxes_may_overlap_and_still_stand_in_relation():
    dog = found("dog", box=(80, 0, 180, 100))  # a fifth of it lies on the bear
    assert verdict("position", RIGHT_OF, found("teddy bear"), dog)[0]


def test_position_fails_without_its_reference():
    correct, reason = verdict("position", RIGHT_OF, found("dog", box=(300, 0, 400, 100)))
    assert not correct and reason == "expected teddy bear>=1, found 0; no target for dog to be right of"
    low = found("teddy bear", 0.2)
    assert not verdict("position", RIGHT_OF, low, found("dog", box=(300, 0, 400, 100)))[0]


def test_position_is_of_the_most_confident_pair():
    bear, left = found("teddy bear"), found("dog", 0.9, box=(-300, 0, -200, 100))
    assert verdict("position", RIGHT_OF, bear, left, found("dog", 0.8, box=(300, 0, 400, 100))) == (
        False,
        "expected dog right of target, found left of target",
    )


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="got 'colour'"):
        verdict("colour", [one("apple")], found("apple"))


def test_the_benchmark_asks_only_for_what_the_rules_know():
    benchmark = load_benchmark("geneval")
    for metadata in benchmark.metadata.values():
        assert metadata["tag"] in TASKS
        for entry in (*metadata["include"], *metadata.get("exclude", [])):
            assert entry["class"] in CLASSES and entry.get("color", "red") in COLORS
    # Every picture of it, drawn as asked, would be right: thus no prompt contradicts itself.
    places = {"left of": (-300, 0), "right of": (300, 0), "above": (0, -300), "below": (0, 300)}
    for metadata in benchmark.metadata.values():
        objects = []
        for entry in metadata["include"]:
            x, y = places[entry["position"][0]] if "position" in entry else (0, 0)
            box = (x, y, x + 100, y + 100)
            objects += [found(entry["class"], 0.95, entry.get("color"), box)] * entry["count"]
        assert judge_geneval(objects, metadata) == (True, ""), metadata["prompt"]


def test_the_score_is_the_plain_mean_of_six_tasks():
    sizes = {"single_object": (320, 316), "two_object": (396, 198), "counting": (320, 80)}
    sizes |= {"colors": (376, 376), "position": (400, 100), "color_attr": (400, 0)}
    verdicts = [(task, i < right) for task, (total, right) in sizes.items() for i in range(total)]
    scores = summarize(verdicts)
    assert scores["overall"]["value"] == pytest.approx((0.9875 + 0.5 + 0.25 + 1.0 + 0.25 + 0.0) / 6)
    assert scores["tasks"]["single_object"]["total"] == 320 and scores["tasks"]["single_object"]["low"] < 0.9875
    assert summarize(verdicts[:-400])["overall"] is None
