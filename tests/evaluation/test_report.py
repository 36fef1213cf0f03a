"""The report says what was measured, beside the paper's rows and apart from them, and what does not compare."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from iomm_hf.evaluation.geneval import summarize
from iomm_hf.evaluation.geneval_rules import TASKS
from iomm_hf.evaluation.paper import PAPER
from iomm_hf.evaluation.report import columns_of, differences, pictures_of, write_report
from iomm_hf.integrity import sha256


def result(benchmark: str, scores: dict, **scorer) -> dict:
    about = {"name": benchmark, "version": "1", "prompts_sha256": "a", "rewriting": None, "subset": None, "items": 2}
    model = {"name": "runs/mine", "weights_sha256": {}, "ema": True}
    generation = {"model": model, "arguments": {"num_inference_steps": 30, "guidance_scale": 3.0}, "seed": 0}
    counts = {"expected": 8, "found": 8, "pictures": 8, "filtered": 0}
    return {
        "schema": "iomm-hf/evaluation/1",
        "benchmark": about,
        "scores": scores,
        "counts": counts,
        "scorer": {"kind": "detector", "detector": "d", **scorer},
        "generation": generation,
    }


def save(folder, content, lines=()):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(content))
    (folder / "details-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "result.json"


def cells(report: str, row: str) -> list[str]:
    [line] = [line for line in report.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture
def geneval(tmp_path):
    scores = summarize([(task, task == "colors") for task in TASKS for _ in range(4)])
    run = tmp_path / "run"
    (run / "pictures/00000/samples").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(run / "pictures/00000/samples/0000.png")
    line = {"key": "00000/samples/0000.png", "task": "counting", "prompt": "two dogs", "correct": False}
    line["picture"] = sha256(run / "pictures/00000/samples/0000.png")
    seen = {"reason": "expected dog>=2, found 1", "detections": [{"box": [1, 1, 9, 9]}]}
    return save(run / "scores/d", result("geneval", scores), [line | seen])


def test_geneval_stands_beside_the_papers_rows_marked_as_such(geneval, tmp_path):
    report = write_report([geneval], tmp_path / "report")
    columns = cells(report, "geneval")
    assert columns[0] == "runs/mine, 30 steps, guidance 3"
    assert columns[1:] == [f"{row.name} (paper)" for row in PAPER["geneval"]]
    assert cells(report, "overall")[0].startswith("0.167 [") and cells(report, "colors")[0].startswith("1.000 [")
    assert cells(report, "overall")[1] == "0.890" and cells(report, "position")[3] == "0.850"
    assert cells(report, "counting")[6:] == ["", ""]  # the paper gives no more than an overall score there
    assert "8 of 8 files, the benchmark's own prompts, looked at by d; averaged weights." in report
    names = {"report.md", "geneval-bars.png", "geneval-radar.png", "geneval-failures-0.png"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    assert all((tmp_path / "report" / name).stat().st_size > 2_000 for name in names if name.endswith("png"))


def test_results_that_do_not_compare_are_said_so(geneval, tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "matplotlib", None
    )  # as if it were not installed: tables are written all the same
    content = json.loads(geneval.read_text())
    twin = save(tmp_path / "twin", content)
    assert "do not compare" not in write_report([geneval, twin], tmp_path / "a", ["one", "two"])
    content["scorer"]["detector"] = "another"
    other = save(tmp_path / "other", content)
    report = write_report([geneval, other], tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["report.md"]
    assert "There are no plots, for matplotlib is not installed" in report
    assert "do not compare" in report and "guidance 3 (1)" in report and "guidance 3 (2)" in report
    with pytest.raises(ValueError, match="2 results need as many names, got 1"):
        write_report([geneval, other], tmp_path / "c", ["one"])
    with pytest.raises(ValueError, match="Each result of a benchmark needs a name of its own; one stands for several"):
        write_report([geneval, other], tmp_path / "c", ["one", "one"])


def test_a_model_keeps_its_name_over_benchmarks(geneval, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    dpg = save(tmp_path / "dpg", result("dpg", {"overall": {"value": 80.0}}, judge="j"))
    report = write_report([geneval, dpg], tmp_path / "report")
    assert cells(report, "geneval")[0] == cells(report, "dpg")[0] == "runs/mine, 30 steps, guidance 3"
    report = write_report([geneval, dpg], tmp_path / "report", ["mine", "mine"])
    assert cells(report, "geneval")[0] == cells(report, "dpg")[0] == "mine"


@pytest.mark.parametrize(
    ("one", "other", "differing"),
    [
        ({"clip": "a", "clip_revision": "1"}, {"clip": "a", "clip_revision": "2"}, ["clip_revision"]),
        ({"detector_sha256": "1"}, {"detector_sha256": "2"}, ["detector_sha256"]),
        ({"detector_sha256": "1"}, {}, []),  # older results do not say
        ({"unreadable": "error"}, {"unreadable": "lowest"}, ["unreadable"]),
        ({"wording": {"file": "a", "sha256": "1"}}, {"wording": {"file": "b", "sha256": "1"}}, []),
        ({"wording": {"file": "a", "sha256": "1"}}, {"wording": {"file": "a", "sha256": "2"}}, ["wording"]),
    ],
)
def test_what_results_must_share_to_compare(one, other, differing):
    scores = {"overall": {"value": 80.0}}
    assert differences([result("dpg", scores, **one), result("dpg", scores, **other)]) == differing


def test_a_run_that_moved_is_shown_with_its_pictures_from_inside_its_folder_too(geneval, tmp_path, monkeypatch):
    geneval.with_name("local.json").write_text(json.dumps({"pictures": str(tmp_path / "run/pictures")}))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(moved / "scores/d")
    assert pictures_of(Path("result.json")) == moved / "pictures"
    write_report(["result.json"], tmp_path / "report")
    assert (tmp_path / "report/geneval-failures-0.png").is_file()
    # Another picture under the same name is not shown as what was seen.
    Image.new("RGB", (32, 32), "blue").save(moved / "pictures/00000/samples/0000.png")
    write_report(["result.json"], tmp_path / "other")
    assert not (tmp_path / "other/geneval-failures-0.png").exists()
    # Pictures that came from elsewhere are there, and not among those that the run drew besides.
    (tmp_path / "given").mkdir()
    Path("local.json").write_text(json.dumps({"pictures": str(tmp_path / "given")}))
    assert pictures_of(Path("result.json")) == tmp_path / "given"


def test_plots_and_table_mark_a_part_of_a_benchmark(geneval, tmp_path):
    content = json.loads(geneval.read_text())
    content["benchmark"]["subset"] = 2
    geneval.write_text(json.dumps(content))
    columns = columns_of("geneval", {"mine": content})
    assert next(iter(columns)) == "mine (only 2 items)" and "mine" not in columns
    report = write_report([geneval], tmp_path / "report", ["mine"])
    assert cells(report, "geneval") == list(columns) and (tmp_path / "report/geneval-radar.png").is_file()


def test_parts_rewriting_and_unanswered_questions_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    content = result(
        "wise-verified", {"overall": {"value": 0.5}, "categories": {"culture": {"value": 0.25}}}, judge="j"
    )
    content["generation"]["model"]["ema"] = None
    content["benchmark"] |= {"subset": 2, "rewriting": {"file": "better.jsonl"}}
    content["counts"] |= {"unreadable": 2, "refused": 1}
    content["generation"]["software"], content["scorer"]["software"] = [{"commit": "a"}, {"commit": "b"}], [{}]
    report = write_report([save(tmp_path / "a", content)], tmp_path / "report")
    assert "(only 2 items)" in report and "rewritten prompts, looked at by j; nothing says whether" in report
    assert "3 questions without a readable answer counted as the lowest score (2 unreadable, 1 refused)" in report
    assert "; drawn by 2 different sets of packages, commit and device." in report
    assert "(paper) |" not in report.splitlines()[2]  # the paper has no row of the verified version
    assert cells(report, "culture") == ["0.250"]


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "score.json").write_text("{}")
    with pytest.raises(OSError, match="is no result of `iomm-hf evaluate`"):
        write_report([tmp_path / "score.json"], tmp_path / "report")
    with pytest.raises(OSError, match="cannot be read as a result"):
        write_report([tmp_path / "missing.json"], tmp_path / "report")
