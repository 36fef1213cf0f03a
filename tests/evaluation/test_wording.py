"""The judge's wording, read out of scripts that are never run."""

import json

import pytest

from iomm_hf.evaluation.wording import Message, fill_in, messages_of_script, read_wording


SCRIPT = '''
import os
os.system("touch /nowhere/else")  # would be run by anybody who imports it

NAMES = ["a", "b"]

def build(item, image):
    text = f"""Look at {{this}}.
PROMPT: "{item['Prompt']}"
""" + "Answer: Score: 1"
    return [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]},
    ]
'''


def test_literals_variables_and_fields_are_followed():
    system, user = messages_of_script(SCRIPT)
    assert system == Message("system", "Be strict.")
    assert user.has_pictures and user.text == 'Look at {{this}}.\nPROMPT: "{Prompt}"\nAnswer: Score: 1'
    [filled] = fill_in([user], {"Prompt": "a {plant}"})
    assert filled.text == 'Look at {this}.\nPROMPT: "a {plant}"\nAnswer: Score: 1'
    with pytest.raises(ValueError, match=r"names the field 'Prompt', which the item lacks"):
        fill_in([user], {"Other": ""})


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("x = 1", "holds no message with a picture"),
        ("[{'role': 'user', 'content': 'no picture'}]", "holds no message with a picture"),
        (
            "[{'role': 'user', 'content': [{'type': 'text', 'text': load()}]}]",
            "in a way that cannot be read off: load",
        ),
    ],
)
def test_what_cannot_be_read_says_what_to_give_instead(tmp_path, script, message):
    file = tmp_path / "judge.py"
    file.write_text(script)
    with pytest.raises(ValueError, match=message):
        read_wording(file)


@pytest.mark.parametrize("content", ["{}", '[{"text": "Of {Prompt}?"}]', '[{"role": "user", "text": 1}]', "[1]"])
def test_json_of_another_form_is_refused(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"mine.json must be JSON of \[{\"role\": \"system\""):
        read_wording(file)


def test_a_text_that_is_no_script_is_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Is it {Prompt}?")
    with pytest.raises(ValueError, match="mine.txt is no Python .*, and no .json by its name"):
        read_wording(file)


def test_a_wording_of_ones_own(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"role": "system", "text": "Judge."}, {"role": "user", "text": "Of {Prompt}?"}]))
    assert read_wording(file) == [Message("system", "Judge."), Message("user", "Of {Prompt}?", True)]
