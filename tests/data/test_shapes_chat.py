"""Questions and answers of the shapes world: true of their picture, and silent about what is held out."""

import numpy as np

from iomm_hf.data import shapes
from iomm_hf.data.shapes_chat import chat_example, instructions, questions, shapes_chat
from iomm_hf.tiny import shapes_tokenizer


def test_every_kind_is_asked_and_answers_are_true_of_the_scene():
    kinds = {"Describe": 0, "Does": 0, "How": 0, "What color": 0, "What is": 0}
    words = {"none": 0, "one": 1, "two": 2, "three": 3, "four": 4}
    for index in range(1500):
        scene, (question, answer) = chat_example(0, index)
        kinds[next(kind for kind in kinds if question.startswith(kind))] += 1
        if question.startswith("How"):
            (asked,) = [shape for shape in shapes.SHAPES if f" {shape}" in question]
            assert words[answer] == sum(item.shape == asked for item in scene.objects)
        elif question.startswith("What color"):
            (item,) = [item for item in scene.objects if item.shape == question.split()[-1].rstrip("?")]
            assert answer == item.color
        elif question.startswith("What is"):
            first, second = scene.objects
            (subject,) = [o for o in (first, second) if answer.split()[1:] == [o.color, o.shape]]
            reference = second if subject is first else first
            assert f"What is {shapes.relation_between(subject, reference)} the {reference.color}" in question
    assert min(kinds.values()) > 30 and 0.45 < kinds["Describe"] / 1500 < 0.55


def test_yes_and_no_follow_the_scene():
    answers = {"yes": 0, "no": 0}
    for index in range(300):
        scene, metadata = shapes.corpus_scene(3, index)
        question, answer = questions(scene, metadata, np.random.default_rng(index))["match"]
        assert (metadata["prompt"] in question) == (answer == "yes")
        answers[answer] += 1
    assert min(answers.values()) > 100


def test_nothing_names_what_is_held_out():
    prompts = {m["prompt"] for task in shapes.TASKS for m in shapes.list_metadata(task) if shapes.is_held_out(m)}
    pairs = [f"{color} {shape}" for color, shape in shapes.HELD_OUT_COLOR_PAIRS]
    for index in range(1500):
        _, (question, answer) = chat_example(1, index)
        assert not any(pair in f"{question} {answer}" for pair in pairs)
        assert answer not in prompts and question.removeprefix("Does the image show ").rstrip("?") not in prompts
        last = question.split()[-1].rstrip("?")
        if question.startswith("What color"):
            assert (answer, last) not in shapes.HELD_OUT_COLOR_PAIRS
        if question.startswith("What is"):  # question and answer together state a relation
            assert (answer.split()[-1], last) not in shapes.HELD_OUT_POSITION


def test_the_corpus_is_the_same_whoever_draws_it():
    example = list(shapes_chat(8))[7]
    scene, turn = chat_example(0, 7)
    assert (example.question, example.answer) == turn
    assert np.array_equal(np.asarray(example.image), shapes.render(scene))


def test_the_tokenizer_knows_all_wordings_as_words():
    tokenizer = shapes_tokenizer()
    for text in instructions():
        assert len(tokenizer.tokenize(text)) <= len(text.split()) + 3
