"""Questions and answers of the shapes world: true of their picture, and silent about what is held out."""

import itertools
import re

import numpy as np

from iomm_hf.data import shapes
from iomm_hf.data.shapes_chat import (
    NOUN_LABELS,
    chat_example,
    instructions,
    noun_labels,
    questions,
    read,
    shapes_chat,
)
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


def objects_of(text):
    """(colour or `None`, shape) in the order of naming, of "a red star and a ring" or "a star in red and a ring"."""
    phrases = re.split(", | and | left of | right of | above | below ", text)
    words = [phrase.replace(" in ", " ").split()[1:] for phrase in phrases]
    words = [pair[::-1] if pair[0] in shapes.SHAPES else pair for pair in words]
    return [(None, pair[0]) if len(pair) == 1 else tuple(pair) for pair in words]


def test_turns_about_texts_are_true_and_name_nothing_held_out():
    turns = [read(np.random.default_rng(index)) for index in range(1200)]
    asked = dict.fromkeys(
        ("Repeat", "Turn around", "Reword", "In order", "what color", "what is", "what is a", "where"), 0
    )
    for question, answer in turns:
        kind, text = question.split(": ")
        if kind not in asked:  # "a red star above a ring: where is the star?"
            kind, text = text, kind
        objects = objects_of(text)
        for one, two in itertools.permutations(objects, 2):
            assert (one[1], two[1]) not in shapes.HELD_OUT_POSITION
            if None not in one + two:
                assert not shapes.is_held_out(shapes.make_metadata("color_attr", *one, *two))
        relation = next((word for word in shapes.RELATIONS if f" {word} " in text), None)
        last = kind.rstrip("?").split()[-1]
        if kind in ("Repeat", "Reword"):
            assert objects_of(answer) == objects and (answer == text) == (kind == "Repeat")
        elif kind == "Turn around":
            assert objects_of(answer) == objects[::-1]
            assert relation is None or shapes.OPPOSITE[relation] in answer
        elif kind == "In order":
            turned = relation in ("right of", "below")
            wanted = sorted(objects, key=lambda item: item[1]) if relation is None else objects[:: -1 if turned else 1]
            assert objects_of(answer) == wanted
            assert relation is None or (shapes.OPPOSITE[relation] if turned else relation) in answer
        elif kind.startswith("what color"):
            kind = "what color"
            assert (answer, last) in objects
        elif kind.startswith("where"):
            kind = "where"
            assert answer == (relation if objects[0][1] == last else shapes.OPPOSITE[relation])
        elif relation is not None:
            kind = "what is a"  # what is left of the star?
            (subject,) = objects_of(answer)
            told = next(word for word in shapes.RELATIONS if f"is {word} the" in question)
            assert told == (relation if subject == objects[0] else shapes.OPPOSITE[relation])
            assert last == (objects[1] if subject == objects[0] else objects[0])[1]
        else:
            kind = "what is"
            assert (last, answer) in objects
        asked[kind] += 1
    assert min(asked.values()) > 30


def test_a_share_of_turns_has_no_picture():
    examples = list(shapes_chat(60, text_share=0.5))
    assert 15 < sum(example.image is None for example in examples) < 45
    assert all((example.image is None) == (": " in example.question) for example in examples)


def test_the_corpus_is_the_same_whoever_draws_it():
    example = list(shapes_chat(8))[7]
    scene, turn = chat_example(0, 7)
    assert (example.question, example.answer) == turn
    assert np.array_equal(np.asarray(example.image), shapes.render(scene))


def test_the_tokenizer_knows_all_wordings_as_words():
    tokenizer = shapes_tokenizer()
    for text in instructions():
        assert len(tokenizer.tokenize(text)) <= len(text.split()) + 3


def test_labels_of_nouns_say_what_the_caption_says():
    for index in range(300):
        _, metadata = shapes.corpus_scene(0, index)
        by_noun, in_full = noun_labels(metadata["prompt"])
        named = [
            {kind: names[place] for (kind, names), place in zip(NOUN_LABELS.items(), labels, strict=True)}
            for labels in (*by_noun.values(), *in_full)
        ]
        objects = metadata["include"]
        if metadata["tag"] == "position":
            reference, subject = objects
            relation = subject["position"][0]
            places = [None, shapes.OPPOSITE[relation], relation, shapes.OPPOSITE[relation]]
            objects = [subject, reference]
        else:
            places = [None] * (2 * len(objects))
        expected = [
            {
                "shape": o["class"],
                "color": o.get("color"),
                "number": shapes.NUMBER_WORDS.get(o["count"]),
                "place": place,
            }
            for o, place in zip([*objects, *objects], places, strict=True)
        ]
        assert named == expected, metadata["prompt"]
