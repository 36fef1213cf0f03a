"""Files of results: whole or not at all, never replaced, and good to go on from after a kill."""

import json

import pytest
from PIL import Image

from iomm_hf.evaluation.benchmarks import load_benchmark
from iomm_hf.evaluation.results import Details, build_result, folder_name, hash_pictures, write_settings
from iomm_hf.integrity import sha256


def test_half_a_line_is_passed_over_and_done_again(tmp_path):
    details = Details(tmp_path)
    details.add({"key": "a", "score": 1})
    with details.file.open("a") as file:
        file.write('{"key": "b", "sc')  # killed here
    assert Details(tmp_path).read() == {"a": {"key": "a", "score": 1}}
    again = Details(tmp_path)
    again.add({"key": "b", "score": 2})
    again.add({"key": "a", "score": 3})
    Details(tmp_path, rank=1).add({"key": "c", "score": 4})
    assert {key: line["score"] for key, line in Details(tmp_path).read().items()} == {"a": 3, "b": 2, "c": 4}


def test_lines_end_at_line_feeds_alone_and_a_cut_character_loses_only_its_line(tmp_path):
    details = Details(tmp_path)
    texts = [f"a{mark}b" for mark in ("\u2028", "\u2029", "\x85", "\x0c", "\r")]
    for number, text in enumerate(texts):
        details.add({"key": str(number), "text": text})
    with details.file.open("ab") as file:
        file.write('{"key": "b", "text": "caf\xe9'.encode()[:-1])  # killed inside a character
    Details(tmp_path).add({"key": "c", "text": "after"})
    assert [line["text"] for line in Details(tmp_path).read().values()] == [*texts, "after"]


def test_a_failure_on_another_rank_does_not_undo_an_answer(tmp_path):
    Details(tmp_path, rank=1).add({"key": "a", "read": None, "status": "failed"})
    Details(tmp_path, rank=0).add({"key": "a", "read": False, "status": "answered"})
    assert Details(tmp_path).read()["a"]["status"] == "answered"
    Details(tmp_path, rank=1).add({"key": "a", "read": True, "status": "answered"})
    assert Details(tmp_path).read()["a"]["read"] is True


def test_lines_are_read_for_the_pictures_that_they_are_about(tmp_path):
    Details(tmp_path).add({"key": "1.png#0/2", "read": True})  # about nobody knows which
    one, two = ({"1.png": {"picture": digest}} for digest in ("aa", "bb"))
    edit = {"1.png": {"picture": "aa", "source": "cc"}}
    assert Details(tmp_path, pictures=one).read() == Details(tmp_path, pictures={}).read() == {}
    Details(tmp_path, pictures=one).add({"key": "1.png#0/2", "read": True})
    Details(tmp_path, pictures=two).add({"key": "1.png#0/2", "read": None})
    assert Details(tmp_path, pictures=one).read()["1.png#0/2"]["read"] is True
    assert Details(tmp_path, pictures=two).read()["1.png#0/2"]["read"] is None
    assert Details(tmp_path, pictures=edit).read() == {}


def test_settings_may_be_repeated_but_not_changed(tmp_path):
    file = tmp_path / "settings.json"
    write_settings(file, {"steps": (1, 2)}, "Scoring was")
    write_settings(file, {"steps": [1, 2]}, "Scoring was")
    assert json.loads(file.read_text()) == {"steps": [1, 2]}
    with pytest.raises(OSError, match=r"Scoring was begun with other settings in .*: steps was \[1, 2\] and is now 3"):
        write_settings(file, {"steps": 3}, "Scoring was")
    with pytest.raises(OSError, match="judge was None and is now x"):
        write_settings(file, {"steps": [1, 2], "judge": "x"}, "Scoring was")


def test_names_of_models_become_harmless_folders():
    assert folder_name("Qwen/Qwen3-VL-8B") == "Qwen-Qwen3-VL-8B"
    assert folder_name("../../etc", "a b") == "etc-a-b"
    assert "/" not in folder_name("/abs/path") and len(folder_name("x" * 300)) == 100


def test_the_hash_of_pictures_is_of_names_and_contents(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    a, b = sha256(tmp_path / "a.png"), sha256(tmp_path / "b.png")
    whole = hash_pictures({"1.png": a, "2.png": b})
    assert whole == hash_pictures({"2.png": b, "1.png": a}) != hash_pictures({"1.png": b, "2.png": a})
    assert whole != hash_pictures({"1.png": a})


def test_a_result_holds_all_that_it_depends_on(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    benchmark = load_benchmark("geneval", limit=1)
    counts = {"expected": 4, "found": 4}
    result = build_result(
        benchmark,
        {"overall": None},
        scorer={"kind": "x"},
        counts=counts,
        pictures={"a.png": tmp_path / "a.png"},
        hashes={"a.png": sha256(tmp_path / "a.png")},
        generation=None,
    )
    assert result["picture_sizes"] == {"8x6": 1} and result["generation"] is None and result["files"] is None
    assert result["benchmark"]["prompts_sha256"] == load_benchmark("geneval").sha256  # of the whole, also for a part
    versions = result["software"]["versions"]
    assert {"iomm-hf", "torch", "transformers", "diffusers", "openai", "python"} <= set(versions)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
