"""The shapes score: right on scenes that show their caption, wrong on scenes that do not, and honest in its report."""

import io
import json
import math
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import iomm_hf.evaluation.shapes as evaluation
from iomm_hf.data.shapes import (
    COLORS,
    SHAPES,
    TASKS,
    Background,
    Scene,
    SceneObject,
    falsify,
    is_held_out,
    list_metadata,
    make_metadata,
    render,
    scene_for,
)
from iomm_hf.evaluation.geneval_rules import Detection, judge, relative_position
from iomm_hf.evaluation.shapes import (
    benchmark_plan,
    benchmark_prompts,
    find_objects,
    mean_of_shares,
    render_truth,
    score_image,
    score_pictures,
    wilson_share,
)


NUM_SCENES = 150


# Kept, because making the 3136 prompts of color_attr takes longer than judging a picture.
prompts_of = lru_cache(list_metadata)


def sample(task: str, index: int) -> tuple[dict, np.random.Generator]:
    rng = np.random.default_rng([17, TASKS.index(task), index])
    prompts = prompts_of(task)
    return prompts[rng.integers(len(prompts))], rng


def degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What an autoencoder might do: blur of half a pixel, noise of 8 in 255, JPEG at quality 75."""
    blurred = ndimage.gaussian_filter(picture.astype(float), (0.5, 0.5, 0)) + rng.normal(0, 8, picture.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(np.rint(blurred), 0, 255).astype(np.uint8)).save(file, format="JPEG", quality=75)
    return np.asarray(Image.open(file))


# Both directions


@pytest.mark.parametrize("task", TASKS)
def test_rendered_truth_is_right(task):
    correct = 0
    for index in range(NUM_SCENES):
        metadata, rng = sample(task, index)
        correct += score_image(render(scene_for(metadata, rng)), metadata).correct
    assert correct >= 0.99 * NUM_SCENES


@pytest.mark.parametrize("task", TASKS)
def test_rendered_untruth_is_wrong(task):
    correct = 0
    for index in range(NUM_SCENES):
        metadata, rng = sample(task, index)
        correct += score_image(render(scene_for(falsify(metadata, rng), rng)), metadata).correct
    assert correct <= 0.02 * NUM_SCENES


def test_small_pictures_are_judged_alike():
    for task in TASKS:
        for index in range(20):
            metadata, rng = sample(task, index)
            assert score_image(render(scene_for(metadata, rng), 32), metadata).correct
            assert not score_image(render(scene_for(falsify(metadata, rng), rng), 32), metadata).correct


def test_degraded_pictures_are_mostly_right():
    correct = 0
    for task in TASKS:
        for index in range(40):
            metadata, rng = sample(task, index)
            correct += score_image(degrade(render(scene_for(metadata, rng)), rng), metadata).correct
    assert correct >= 0.95 * 40 * len(TASKS)


def test_noise_and_blank_score_nothing():
    rng = np.random.default_rng(0)
    blank = [np.full((64, 64, 3), color, dtype=np.uint8) for color in (*COLORS.values(), (0, 0, 0), (255, 255, 255))]
    uniform = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(10)]
    gaussian = [np.clip(rng.normal(128, 40, (64, 64, 3)), 0, 255).astype(np.uint8) for _ in range(10)]
    assert [find_objects(picture) for picture in blank + uniform + gaussian] == [[]] * 30


def test_coloured_clouds_score_next_to_nothing():
    # What a barely trained generator draws: blobs, of which now and then one is round.
    rng = np.random.default_rng(0)
    prompts = [metadata for task in TASKS for metadata in prompts_of(task)[:24]]
    correct = 0
    for _ in range(40):
        clouds = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (3, 3, 0))
        picture = np.clip(128 + 60 * clouds / clouds.std(), 0, 255).astype(np.uint8)
        found = find_objects(picture)
        correct += sum(judge(found, metadata)[0] for metadata in prompts)
    assert correct <= 0.02 * 40 * len(prompts)


# Objects


@pytest.mark.parametrize("background", [(8.0, 8.0, 12.0), (246.0, 250.0, 244.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_color_is_found_with_its_box(shape, background):
    for color in COLORS:
        scene = Scene((SceneObject(shape, color, 0.4, 0.55, 0.2),), Background(background, background, 0.0))
        (found,) = find_objects(Image.fromarray(render(scene)))
        assert (found.label, found.color) == (shape, color)
        left, top, right, bottom = found.box
        assert (left + right) / 2 == pytest.approx(0.4 * 64, abs=1) and (top + bottom) / 2 == pytest.approx(
            35.2, abs=2
        )
        assert right - left <= 27 and bottom - top <= 27


def test_touching_objects_of_two_colors_come_apart():
    white = Background((250.0, 250.0, 250.0), (250.0, 250.0, 250.0), 0.0)
    scene = Scene((SceneObject("circle", "red", 0.3, 0.5, 0.2), SceneObject("circle", "blue", 0.69, 0.5, 0.2)), white)
    assert {(found.color, found.label) for found in find_objects(render(scene))} == {
        ("red", "circle"),
        ("blue", "circle"),
    }


def test_gray_shapes_are_no_objects():
    rng = np.random.default_rng(0)
    picture = render(scene_for(make_metadata("single_object", "circle"), rng)).astype(float)
    gray = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    assert find_objects(gray) == []


def test_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"float64 \(64, 64, 3\)"):
        find_objects(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match=r"uint8 \(3, 64, 64\)"):
        find_objects(np.zeros((3, 64, 64), dtype=np.uint8))


def test_missing_scipy_is_named(monkeypatch):
    monkeypatch.setattr(evaluation, "is_scipy_available", False)
    with pytest.raises(ImportError, match=r"pip install iomm-hf\[eval\]"):
        find_objects(np.zeros((64, 64, 3), dtype=np.uint8))


# GenEval's rules


def test_extra_objects_are_judged_as_geneval_judges():
    star, ring = Detection("star", (0, 0, 10, 10), 0.9, "red"), Detection("ring", (30, 0, 40, 10), 0.8, "blue")
    assert judge([star, ring], make_metadata("single_object", "star"))[0]
    assert judge([star, star, ring], make_metadata("two_object", "ring", "star"))[0]
    assert judge([star, star, ring], make_metadata("counting", "two", "star")) == (True, "")
    assert judge([star, star, star], make_metadata("counting", "two", "star")) == (False, "expected star<3, found 3")
    assert judge([star], make_metadata("counting", "two", "star")) == (False, "expected star>=2, found 1")


def test_color_is_that_of_the_most_confident_object():
    red, blue = Detection("star", (0, 0, 10, 10), 0.9, "red"), Detection("star", (30, 0, 40, 10), 0.8, "blue")
    assert judge([blue, red], make_metadata("colors", "red", "star"))[0]
    assert judge([blue, red], make_metadata("colors", "blue", "star")) == (False, "expected blue star>=1, found red")
    with pytest.raises(ValueError, match="a detection has no colour"):
        judge([Detection("star", (0, 0, 10, 10), 0.9)], make_metadata("colors", "red", "star"))


def test_relations_follow_geneval():
    def relations(x, y, side=10):
        subject = Detection("star", (x, y, x + side, y + side), 1.0)
        return relative_position(subject, Detection("ring", (0, 0, side, side), 1.0))

    assert relations(-30, 0) == {"left of"} and relations(30, 5) == {"right of"}
    assert relations(0, -30) == {"above"} and relations(3, 30) == {"below"}
    assert relations(30, 30) == {"right of", "below"}
    # Sides of 10: offsets up to a tenth of both are no offset at all, and a relation needs half of what is left.
    assert relations(2, 0) == set() and relations(0, 0) == set() and relations(3.9, 0) == set()
    assert relations(4.1, 0) == {"right of"}


def test_position_needs_its_reference():
    star = Detection("star", (0, 0, 10, 10), 1.0)
    metadata = make_metadata("position", "star", "left of", "ring")
    assert judge([star], metadata) == (False, "expected ring>=1, found 0; no target for star to be left of")
    ring = Detection("ring", (30, 0, 40, 10), 1.0)
    assert judge([star, ring], metadata) == (True, "")
    assert judge([star, ring], make_metadata("position", "star", "above", "ring")) == (
        False,
        "expected star above target, found left of target",
    )


# Benchmark


def test_benchmark_prompts_hold_seen_and_held_out():
    prompts = benchmark_prompts()
    assert prompts == benchmark_prompts() and prompts != benchmark_prompts(seed=1)
    assert len({metadata["prompt"] for metadata in prompts}) == len(prompts)
    assert all(metadata["held_out"] == is_held_out(metadata) for metadata in prompts)
    sizes = {task: [metadata["held_out"] for metadata in prompts if metadata["tag"] == task] for task in TASKS}
    assert {task: (len(held_out), sum(held_out)) for task, held_out in sizes.items()} == {
        "single_object": (8, 0),
        "two_object": (50, 8),
        "counting": (24, 0),
        "colors": (50, 8),
        "position": (50, 10),
        "color_attr": (50, 10),
    }
    with pytest.raises(ValueError, match="Unknown task 'colour'"):
        benchmark_prompts(["colour"])


def test_plan_spreads_seeds_evenly():
    plan = benchmark_plan()
    pairs = [(picture.metadata["prompt"], picture.seed) for picture in plan]
    assert len(pairs) == len(set(pairs)) == 1200
    for task in TASKS:
        prompts = [picture.metadata["prompt"] for picture in plan if picture.metadata["tag"] == task]
        counts = [prompts.count(prompt) for prompt in set(prompts)]
        assert len(prompts) == 200 and max(counts) - min(counts) <= 1


# Report


def test_wilson_share_has_the_known_limits():
    share = wilson_share(8, 10)
    assert (share.low, share.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_share(0, 10).low == 0.0 and wilson_share(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson_share(3, 2)


def test_interval_of_the_mean_covers_as_it_says():
    # Six tasks of 200 pictures with unequal chances: about 95 % of intervals hold the true mean.
    chances = np.array([0.98, 0.9, 0.6, 0.8, 0.5, 0.3])
    draws = np.random.default_rng(0).binomial(200, chances, size=(1000, 6))
    means = [mean_of_shares({str(i): wilson_share(int(c), 200) for i, c in enumerate(row)}) for row in draws]
    covered = np.mean([mean.low <= chances.mean() <= mean.high for mean in means])
    assert 0.93 <= covered <= 0.97


def test_report_counts_and_averages():
    plan = benchmark_plan(pictures_per_task=25)
    pictures = render_truth(plan)
    blank = np.zeros_like(pictures[0])
    # Every held-out picture is missed, and every seen one of counting.
    pictures = [
        blank if picture.metadata["held_out"] or picture.metadata["tag"] == "counting" else truth
        for picture, truth in zip(plan, pictures, strict=True)
    ]
    report = score_pictures(
        (picture for picture in pictures),
        [picture.metadata for picture in plan],
        seeds=[picture.seed for picture in plan],
    )
    assert report.tasks["single_object"].accuracy == 1.0 and report.tasks["counting"].accuracy == 0.0
    assert report.overall.value == pytest.approx(np.mean([share.accuracy for share in report.tasks.values()]))
    assert report.overall.low < report.overall.value < report.overall.high
    assert report.overall.tasks == list(TASKS)
    assert report.seen_mean.value == 1.0 and report.held_out_mean.value == 0.0
    assert report.seen_mean.tasks == report.held_out_mean.tasks == ["two_object", "colors", "position", "color_attr"]
    for task in report.seen_mean.tasks:
        assert report.seen[task].total + report.held_out[task].total == report.tasks[task].total == 25
    assert report.pictures == 150 and report.seeds == [0, 1, 2, 3]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


def test_report_has_no_overall_unless_all_tasks_are_there():
    metadata = list_metadata("single_object")[:2]
    report = score_pictures([Image.new("RGB", (64, 64))] * 2, metadata)
    assert report.overall is None and report.held_out_mean is None and report.seeds == []
    assert math.isclose(report.tasks["single_object"].high, 0.6576, abs_tol=1e-4)


def test_pictures_and_metadata_must_match():
    metadata = list_metadata("single_object")[:2]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        score_pictures([Image.new("RGB", (64, 64))], metadata)
    with pytest.raises(ValueError, match="no pictures"):
        score_pictures([], [])
