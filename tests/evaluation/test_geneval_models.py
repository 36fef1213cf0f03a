"""The detector's and CLIP's side of GenEval, on tiny random models of the real classes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from iomm_hf.evaluation.geneval_models import GenEvalModels, class_names, cut_out, read_detections
from iomm_hf.evaluation.geneval_rules import CLASSES, COLORS
from iomm_hf.testing.tiny_detectors import save_tiny_detectors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    detector, clip = save_tiny_detectors(tmp_path_factory.mktemp("models"))
    return GenEvalModels(str(detector), str(clip))


def test_boxes_scores_and_masks_are_read_as_mmdet_reads_them():
    """Two queries on a 4 x 4 map of a 8 x 8 picture; class probabilities and mask means worked out by hand."""
    labels = ["cat", "dog"]
    chances = torch.tensor([[0.7, 0.1, 0.2], [0.25, 0.25, 0.5]])
    masks = torch.full((2, 4, 4), -8.0)
    masks[0, 1:3, 2:4] = 8.0  # an object at the right, in the middle
    found, read = read_detections(chances.log(), masks, (8, 8), labels)
    # Four pairs of query and class; the second query's mask is empty, so its two are none.
    assert [item.label for item in found] == ["cat", "dog"] and read.shape == (2, 8, 8)
    # Between 8 and -8 the resized map crosses zero half-way: rows 2 to 5, columns 4 to 7; the last two are exclusive.
    assert found[0].box == found[1].box == (4.0, 2.0, 8.0, 6.0)
    rows, columns = read[0].nonzero()
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (2, 6, 4, 8)
    resized = torch.nn.functional.interpolate(masks[:1][None], size=(8, 8), mode="bilinear", align_corners=False)[0, 0]
    inside = resized[resized > 0].sigmoid().mean().item()
    assert (
        inside < 1 and found[0].score == pytest.approx(0.7 * inside) and found[1].score == pytest.approx(0.1 * inside)
    )


def test_no_more_than_a_hundred_pairs_are_read():
    found, masks = read_detections(torch.zeros(40, 4), torch.ones(40, 2, 2), (3, 2), ["a", "b", "c"])
    assert len(found) == len(masks) == 100 and found[0].box == (0.0, 0.0, 3.0, 2.0)


def test_what_is_seen_belongs_to_the_picture(models, images):
    for picture in images[:2]:
        found, masks = models.detect(picture)
        assert masks.shape == (len(found), picture.height, picture.width) and len(found) > 0
        assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
        for item, mask in zip(found, masks, strict=True):
            rows, columns = mask.nonzero()
            assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert item.label in CLASSES and 0 < item.score <= 1
    again, _ = models.detect(images[0])
    assert again == models.detect(images[0])[0]


def test_an_object_is_cut_out_of_its_box_and_put_on_grey():
    """As the original does: `bgcolor` #999, outside of the mask, before the crop to the box."""
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False  # a hole
    mask[5, 7] = True  # a piece outside of the box
    cut = np.asarray(cut_out(Image.fromarray(pixels), (2.0, 1.0, 6.0, 4.0), mask))
    expected = np.full((3, 4, 3), 0x99, dtype=np.uint8)
    expected[:, :3] = pixels[1:4, 2:5]
    expected[1, 1] = 0x99
    assert (cut == expected).all()


def test_colors_are_classified_on_the_object_alone(models):
    """What lies outside the mask or the box changes nothing; the object itself does."""
    rng = np.random.default_rng(1)
    item = models.detect(Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)))[0][0]
    item = type(item)("dog", (10.0, 10.0, 30.0, 30.0), 0.9)
    mask = np.zeros((40, 40), dtype=bool)
    mask[12:28, 12:28] = True
    pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    outside = np.where(mask[..., None], pixels, 255 - pixels).astype(np.uint8)
    assert models.name_color(Image.fromarray(pixels), item, mask) == models.name_color(
        Image.fromarray(outside), item, mask
    )
    painted = [np.full((40, 40, 3), value, dtype=np.uint8) for value in rng.integers(0, 255, (30, 1, 1, 3))]
    assert len({models.name_color(Image.fromarray(array), item, mask) for array in painted}) > 1
    directions = models.color_classifier("dog")
    assert directions.shape == (len(COLORS), 16)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(len(COLORS)), atol=1e-5)
    assert not torch.allclose(directions, models.color_classifier("cat"))


def test_verdicts_come_with_what_was_seen_and_colors_only_where_asked(models, images):
    found, _ = models.detect(images[0])
    best = found[0]
    assert best.score > 0.3
    seen = models.score(images[0], {"tag": "single_object", "include": [{"class": best.label, "count": 1}]})
    assert seen["correct"] and seen["reason"] == "" and all(item["color"] is None for item in seen["detections"])
    colored = models.score(
        images[0], {"tag": "colors", "include": [{"class": best.label, "count": 1, "color": "red"}]}
    )
    named = [item for item in colored["detections"] if item["color"] is not None]
    assert [item["label"] for item in named] == [best.label] and named[0]["color"] in COLORS
    assert colored["correct"] is (named[0]["color"] == "red")
    assert {item["label"] for item in seen["detections"]} == {item.label for item in found if item.score > 0.3}


def test_the_size_at_which_pictures_are_looked_at_is_told(models):
    size = models.detector_processor.size
    told = (
        f"by its processor to longest_edge {size['longest_edge']}, shortest_edge {size['shortest_edge']}, where mmdet"
    )
    assert told in models.about["differs_from_original"]


def test_a_detector_of_other_classes_is_refused():
    names = dict(enumerate(CLASSES))
    assert class_names({**names, 56: "chair"}) == list(CLASSES)
    with pytest.raises(ValueError, match=r"of this one's 80, 1 are missing \(chair\) and 1 are others \(stool\)"):
        class_names({**names, 56: "Stool"})
    with pytest.raises(ValueError, match="of this one's 2, 79 are missing"):
        class_names({0: "person", 1: "wall"})


def test_detector_and_clip_of_the_hub_are_named_by_the_commits_that_were_read(hub, client, tmp_path):
    folders = save_tiny_detectors(tmp_path / "models")
    commits = {}
    for folder in folders:
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        commits[folder.name] = hub.commit_files(f"user/{folder.name}", files | {"pytorch_model.bin": b"a pickle"})
        hub.commit_files(f"user/{folder.name}", {"config.json": b"{}"})  # a later one, which is not asked for
    code = """
from iomm_hf.evaluation.geneval_models import GenEvalModels, resolve_model
commits = json.loads(sys.argv[1])
models = GenEvalModels(
    "user/detector", "user/clip", detector_revision=commits["detector"], clip_revision=commits["clip"]
)
folder, _ = resolve_model("user/detector", commits["detector"])
pathlib.Path(sys.argv[2]).write_text(json.dumps([models.about, [file.name for file in folder.iterdir()]]))
"""
    client(hub.environment(tmp_path / "home"), code, json.dumps(commits), str(tmp_path / "told.json"))
    about, files = json.loads((tmp_path / "told.json").read_text())
    assert (about["detector"], about["detector_revision"]) == ("user/detector", commits["detector"])
    assert (about["clip"], about["clip_revision"]) == ("user/clip", commits["clip"])
    here = GenEvalModels(*map(str, folders)).about
    assert here["detector_revision"] is None  # of a folder its weights tell
    assert all(about[name] == here[name] for name in ("detector_sha256", "clip_sha256"))
    assert "model.safetensors" in files and "pytorch_model.bin" not in files
