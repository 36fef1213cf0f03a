"""Files of results: whole or not at all, never replaced, and good to go on from after a kill."""

import json

import pytest
from PIL import Image

from iomm_hf.evaluation.benchmarks import load_benchmark
from iomm_hf.evaluation.results import Details, build_result, folder_name, hash_pictures, write_settings


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


def test_settings_may_be_repeated_but_not_changed(tmp_path):
    file = tmp_path / "settings.json"
    write_settings(file, {"steps": (1, 2), "software": "1"}, "Scoring was", free=("software",))
    write_settings(file, {"steps": [1, 2], "software": "2"}, "Scoring was", free=("software",))
    assert json.loads(file.read_text()) == {"steps": [1, 2], "software": "1"}
    with pytest.raises(OSError, match=r"Scoring was begun with other settings in .*: steps was \[1, 2\] and is now 3"):
        write_settings(file, {"steps": 3, "software": "1"}, "Scoring was", free=("software",))
    with pytest.raises(OSError, match="judge was None and is now x"):
        write_settings(file, {"steps": [1, 2], "judge": "x"}, "Scoring was", free=("software",))


def test_names_of_models_become_harmless_folders():
    assert folder_name("Qwen/Qwen3-VL-8B") == "Qwen-Qwen3-VL-8B"
    assert folder_name("../../etc", "a b") == "etc-a-b"
    assert "/" not in folder_name("/abs/path") and len(folder_name("x" * 300)) == 100


def test_the_hash_of_pictures_is_of_names_and_contents(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
    a, b = tmp_path / "a.png", tmp_path / "b.png"
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
        generation=None,
    )
    assert result["picture_sizes"] == {"8x6": 1} and result["generation"] is None and result["files"] is None
    assert result["benchmark"]["prompts_sha256"] == load_benchmark("geneval").sha256  # of the whole, also for a part
    versions = result["software"]["versions"]
    assert {"iomm-hf", "torch", "transformers", "diffusers", "openai", "python"} <= set(versions)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
