"""What the tabs do: the pipeline's own pictures, the mask that is really used, and a stop that stops."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from iomm_hf.data.shapes import corpus_scene, render
from iomm_hf.demo import model
from iomm_hf.demo.model import Order


@pytest.fixture(scope="module")
def scene():
    return Image.fromarray(render(corpus_scene(0, 15)[0], 256))


def drawn(order: Order) -> np.ndarray:
    *_, last = model.draw(order)
    return np.asarray(last.picture)


def test_draws_step_by_step_what_the_pipeline_draws(shipped):
    steps = list(model.draw(Order("a star", seed=3, steps=3)))
    assert [(step.step, step.steps) for step in steps] == [(1, 3), (2, 3), (3, 3), (3, 3)]
    expected = shipped("a star", num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images[0]
    assert steps[-1].picture.tobytes() == expected.tobytes()


def test_previews_show_where_the_drawing_leads(shipped, monkeypatch):
    monkeypatch.setattr(model, "PREVIEW_SECONDS", 0.0)
    previews = [step.picture for step in model.draw(Order("a red circle", seed=1, steps=8))]
    assert previews[-2] is None and all(previews[:-2])  # the last step's would be the picture itself
    final = np.asarray(previews[-1], dtype=int)
    distances = [np.abs(np.asarray(preview, dtype=int) - final).mean() for preview in previews[:-2]]
    assert distances[-1] < distances[0] / 3


def test_closing_stops_after_the_step_under_way(shipped):
    calls = []
    hook = shipped.transformer.register_forward_hook(lambda *_: calls.append(1))
    expected = drawn(Order("a star", steps=2))
    steps = model.draw(Order("a ring", steps=50))
    next(steps)
    steps.close()
    again = drawn(Order("a star", steps=2))  # waits for the stopped one and is not disturbed by it
    hook.remove()
    assert (again == expected).all()
    assert len(calls) < 30


@pytest.fixture
def talkative(shipped):
    """The MLLM goes on for a hundred tokens."""
    settings = shipped.text_encoder.mllm.generation_config
    settings.min_new_tokens = 100
    yield
    settings.min_new_tokens = None


def test_answers_word_by_word_what_the_pipeline_answers(shipped, scene):
    beginnings = list(model.answer(scene, "Describe the image."))
    assert beginnings[-1] == shipped.describe(scene) and len(set(beginnings)) > 3
    assert all(more.startswith(less) for less, more in pairwise(beginnings))


def test_closing_stops_an_answer_after_the_token_under_way(shipped, scene, talkative):
    calls = []
    hook = shipped.text_encoder.mllm.register_forward_hook(lambda *_: calls.append(1))
    words = model.answer(scene, "Describe the image.")
    next(words)
    words.close()
    drawn(Order("a star", steps=1))  # waits for the stopped answer
    hook.remove()
    assert 0 < len(calls) < 60


def test_an_edit_reads_text_and_picture(shipped, scene):
    edited = drawn(Order("make it blue", scene, steps=2))
    expected = shipped(
        "make it blue",
        image=scene.resize((64, 64), Image.Resampling.LANCZOS),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert edited.tobytes() == expected.tobytes()


def test_with_nothing_hidden_a_variation_is_the_pipelines_own(shipped, scene):
    expected = shipped(
        image=model.as_read(shipped, scene), num_inference_steps=2, generator=torch.Generator().manual_seed(5)
    ).images[0]
    assert drawn(Order(None, scene, seed=5, steps=2)).tobytes() == expected.tobytes()
    assert (drawn(Order(None, scene, seed=5, steps=2, mask_ratio=0.9)) != np.asarray(expected)).any()


def test_the_mask_that_is_shown_is_the_one_that_hides(shipped, scene):
    seen = []
    hook = shipped.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    shown = model.hidden_patches(0.5, seed=8)
    drawn(Order(None, scene, seed=8, steps=1, mask_ratio=0.5))
    hook.remove()
    [read] = [kwargs for kwargs in seen if kwargs.get("image_mask") is not None]
    tokens = read["input_ids"] == shipped.text_encoder.image_token_id
    assert read["image_mask"][tokens].tolist() == shown.flatten().tolist()
    assert int(read["image_mask"].sum()) == shown.sum() > 0


def test_a_higher_ratio_hides_more_and_shows_nothing_again(shipped, scene):
    masks = [model.hidden_patches(ratio, seed=2) for ratio in (0, 0.25, 0.5, 0.75, 0.95)]
    assert not masks[0].any()
    for less, more in pairwise(masks):
        assert (less <= more).all()
    assert masks[-1].sum() > masks[1].sum()


def test_patches_lie_where_their_tokens_look(shipped, scene):
    """A token is changed most by its own patch: rows and columns of the mask are those of the picture."""

    def tokens(picture):
        inputs = shipped.processor.encode([shipped.processor.image_only(picture)])
        with torch.no_grad():
            return shipped.text_encoder.image_features(inputs["pixel_values"])[0]

    read = model.as_read(shipped, scene)
    before, side = tokens(read), len(model.hidden_patches(0, 0))
    patch = read.width // side
    for index in (0, 1, side, side * side - 2):
        row, column = divmod(index, side)
        changed = read.copy()
        changed.paste("red", (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        assert int((tokens(changed) - before).norm(dim=1).argmax()) == index


def test_the_method_in_one_picture(shipped, scene):
    hidden = model.hidden_patches(0.5, seed=8)
    sheet = model.method_picture(scene, hidden, Image.new("RGB", (64, 64), "red"))
    side = sheet.height
    gap = (sheet.width - 3 * side) // 2
    patch = side // len(hidden)
    for (row, column), is_hidden in np.ndenumerate(hidden):
        middle = (column * patch + patch // 2, row * patch + patch // 2)
        whole, seen = (sheet.getpixel((middle[0] + tile * (side + gap), middle[1])) for tile in (0, 1))
        assert seen[:3] == (model.HIDDEN if is_hidden else whole[:3])
    assert sheet.getpixel((sheet.width - 5, 5)) == (255, 0, 0, 255)
    assert sheet.getpixel((side + 1, 1))[3] == 0  # fits light and dark pages
    assert model.method_picture(scene, hidden).getpixel((sheet.width - 5, 5))[3] < 255


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (Order(" "), "Say what to draw"),
        (Order("a" * 301), "301 characters long; at most 300"),
        (Order("a", size=65), "multiple of 16 up to 128, got 65"),
        (Order("a", size=1024), "up to 128, got 1024"),
        (Order("a", steps=51), "number of steps must be from 1 to 50, got 51"),
        (Order("a", guidance_scale=float("nan")), "guidance must be from 1 to 8.0, got nan"),
        (Order("a", seed=-1), "seed must be from 0"),
        (Order("a", mask_ratio=1.0), "share to hide must be from 0 to 0.95, got 1.0"),
    ],
)
def test_what_is_out_of_bounds_is_refused_before_anybody_waits(shipped, order, message):
    with pytest.raises(ValueError, match=message):
        model.check(order)


def test_what_the_pipeline_refuses_reaches_the_visitor(shipped):
    with pytest.raises(ValueError, match="multiples of"):
        list(model.draw(Order("a", size=50)))
