"""The whole chain, from the tiny model to a result, with tiny detectors and a local judge; and what is no result."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from iomm_hf import shipped_model
from iomm_hf.evaluation.authors_files import REPOSITORIES
from iomm_hf.evaluation.benchmarks import load_benchmark
from iomm_hf.evaluation.drawing import draw_plan
from iomm_hf.evaluation.harness import EvaluationConfig, Ranks, evaluate, rank_device
from iomm_hf.evaluation.judges import TransformersJudge
from iomm_hf.evaluation.judging import ask_all, judged
from iomm_hf.evaluation.report import caption, looked_at, pictures_of, places_of, worst, write_report
from iomm_hf.evaluation.results import Details, Incomplete, read_result, values_of
from iomm_hf.evaluation.shapes import benchmark_plan, render_truth
from iomm_hf.integrity import sha256
from iomm_hf.pipeline_iomm import IOMMPipeline
from iomm_hf.testing.authors_files import write_authors_files
from iomm_hf.testing.judge_server import LocalJudge
from iomm_hf.testing.tiny_detectors import save_tiny_detectors


STEPS = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    return [str(folder) for folder in save_tiny_detectors(tmp_path_factory.mktemp("detectors"))]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run of two pictures by the shipped model, drawn and not scored."""
    output = tmp_path_factory.mktemp("drawn")
    evaluate(config("shapes", output, limit=2, step="generate"))
    return output


def config(benchmark: str, output: Path, **more) -> EvaluationConfig:
    arguments = {} if "pictures" in more else dict(STEPS)  # given pictures are scored as they are
    return EvaluationConfig(benchmark, output, **{"arguments": arguments, "device": "cpu", **more})


def judge_of(server: LocalJudge, **more) -> dict:
    return {"judge": "local-judge-1", "judge_url": server.address, **more}


def test_geneval_from_the_tiny_model_to_a_result_that_says_everything(detectors, tmp_path):
    options = {"limit": 6, "detector": detectors[0], "clip": detectors[1], "ema": True}
    result, file = evaluate(config("geneval", tmp_path, **options))
    assert read_result(file) == result and result["schema"] == "iomm-hf/evaluation/1"
    assert result["counts"] == {"expected": 24, "found": 24, "pictures": 24, "filtered": 0, "without_note": 0}
    assert set(result["scores"]["tasks"]) == {
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    }
    assert result["scores"]["tasks"]["position"]["total"] == 4 and result["scores"]["overall"] is not None
    assert result["benchmark"] == load_benchmark("geneval", limit=6).describe()
    assert result["benchmark"]["subset"] == 6 and result["benchmark"]["rewriting"] is None
    assert {"name", "version", "source", "prompts_sha256"} <= set(result["benchmark"])
    for model in ("detector", "clip"):
        assert {model, f"{model}_revision", f"{model}_sha256"} <= set(result["scorer"])
    generation = result["generation"]
    assert (
        generation["arguments"] == STEPS and generation["seed"] == 0 and generation["model"]["class"] == "IOMMPipeline"
    )
    assert set(generation["model"]["weights_sha256"]) == {"text_encoder", "transformer", "vae"}
    assert generation["model"]["ema"] is True and {"revision", "dtype"} <= set(generation["model"])
    assert generation["model"]["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert result["picture_sizes"] == {"64x64": 24} and result["scorer"]["kind"] == "detector"
    assert (
        result["software"]["versions"]["torch"]
        and str(tmp_path) not in file.read_text()
        and detectors[0] not in file.read_text()
    )
    [drew], [looked] = generation["software"], result["scorer"]["software"]
    assert drew == looked == result["software"] | {"device": "cpu"}
    lines = Details(file.parent).read()
    assert len(lines) == 24 and all(
        {"prompt", "correct", "reason", "detections"} <= set(line) for line in lines.values()
    )

    # Asked again it is the same; a picture that changes under it is found out, and one that is gone.
    assert evaluate(config("geneval", tmp_path, step="score", **options)) == (result, file)
    picture = tmp_path / "pictures/00000/samples/0000.png"
    Image.new("RGB", (64, 64)).save(picture)
    with pytest.raises(OSError, match="holds another result"):
        evaluate(config("geneval", tmp_path, step="score", **options))
    picture.unlink()
    with pytest.raises(Incomplete, match="1 of 24 pictures of geneval are missing"):
        evaluate(config("geneval", tmp_path, step="score", **options))


def test_shapes_are_drawn_and_scored_as_by_the_recipe(tmp_path):
    result, _ = evaluate(config("shapes", tmp_path, limit=4, batch_size=4))
    plan = benchmark_plan()
    chosen = [plan[number] for number in (0, 300, 600, 900)]
    drawn = draw_plan(IOMMPipeline.from_pretrained(shipped_model()), chosen, 1, 1.0, batch_size=4)
    for number, picture in zip((0, 300, 600, 900), drawn, strict=True):
        with Image.open(tmp_path / f"pictures/{number:05}.png") as mine:
            assert mine.tobytes() == picture.tobytes()
    assert result["scores"]["pictures"] == 4 and result["scores"]["overall"] is None  # not all tasks are there


@pytest.mark.parametrize(
    ("name", "reply", "overall"),
    [
        ("wise", "Consistency: 2\nRealism: 1\nAesthetic Quality: 0", 0.8),
        ("wise-verified", "<think>Score: 0?</think>Score: 1", 1.0),
    ],
)
def test_wise_is_judged_in_its_authors_words(tmp_path, name, reply, overall):
    write_authors_files(name, tmp_path / "data")
    pictures = tmp_path / "given"  # from elsewhere: no generation.json
    pictures.mkdir()
    benchmark = load_benchmark(name, data=tmp_path / "data", limit=25)
    for drawing in benchmark.drawings:
        Image.new("RGB", (16, 16), "red").save(pictures / drawing.path)
    costs = []
    with LocalJudge(lambda request: reply) as server:
        result, _ = evaluate(
            config(name, tmp_path / "run", data=tmp_path / "data", limit=25, pictures=pictures, **judge_of(server)),
            lambda cost: not costs.append(cost),
        )
    assert result["scores"]["overall"]["value"] == pytest.approx(overall) and len(server.requests) == 25
    texts = {request["messages"][1]["content"][0]["text"] for request in server.requests}
    assert 'Of "thing 1" (it is 1).' in texts and len(texts) == 25
    assert server.requests[0]["messages"][0]["content"] == "You judge {strictly}."
    assert "25 requests with 25 pictures" in costs[0] and server.address in costs[0]
    assert result["generation"] is None and result["counts"]["answered"] == 25
    assert result["scorer"]["models_that_answered"] == ["local-judge-1"]
    assert result["scorer"]["tokens"] == {"read": 250, "written": 125}
    assert set(result["files"]["sha256"]) == {*REPOSITORIES[name].prompts, REPOSITORIES[name].wording}


@pytest.mark.parametrize(
    ("name", "questions", "values"),
    [
        ("dpg", 16, {"overall": 0.0}),  # two questions about each of four pictures, of two items
        ("wise", 2, {"overall": None, "culture": 0.0, "time": 0.0}),
        ("wise-verified", 2, {"overall": None, "culture": 0.0, "time": 0.0}),
        ("imgedit", 2, {"overall": None, "add": 1.0}),  # no style among these
    ],
)
def test_judged_benchmarks_are_drawn_and_judged_by_models_that_run_here(vlm, tmp_path, name, questions, values):
    data = write_authors_files(name, tmp_path / "data")
    options = {"data": data, "limit": 2, "judge": str(vlm), "judge_options": {"max_tokens": 4}}
    result, _ = evaluate(config(name, tmp_path / "run", unreadable="lowest", **options))
    # A judge of random weights says nothing readable: that is told, and is the lowest score only because that was asked for.
    counts = result["counts"]
    assert counts["found"] == 2 and counts["without_note"] == 0
    assert counts["questions"] == questions == sum(counts[kind] for kind in ("unreadable", "cut off", "empty"))
    assert values_of(name, result["scores"]) == values and result["scorer"]["unreadable"] == "lowest"
    assert result["scorer"]["weights_sha256"] and len(result["generation"]["software"]) == 1


def test_the_two_wises_do_not_score_each_others_pictures(tmp_path):
    """Neither beside the record of how they were drawn, nor moved away from it; each has pictures and answers of its own."""
    for name in ("wise", "wise-verified"):
        write_authors_files(name, tmp_path / name)
    evaluate(config("wise", tmp_path / "run", data=tmp_path / "wise", limit=1, step="generate"))
    shutil.copytree(tmp_path / "run/pictures", tmp_path / "moved")
    with LocalJudge(lambda request: "Score: 1") as server:
        options = {"data": tmp_path / "wise-verified", "limit": 1, **judge_of(server)}
        with pytest.raises(OSError, match="were drawn with name 'wise', not 'wise-verified'"):
            evaluate(config("wise-verified", tmp_path / "run", step="score", **options))
        with pytest.raises(OSError, match="was drawn for the benchmark 'wise', and 'wise-verified' is asked for"):
            evaluate(config("wise-verified", tmp_path / "other", pictures=tmp_path / "moved", **options))
        with pytest.raises(OSError, match="holds no data_verified/"):
            evaluate(config("wise-verified", tmp_path / "other", **options | {"data": tmp_path / "wise"}))
    assert server.requests == []


def test_ranks_share_out_what_a_judge_that_runs_here_is_asked(vlm, tmp_path):
    data, given = write_authors_files("dpg", tmp_path / "data"), tmp_path / "given"
    given.mkdir()
    benchmark = load_benchmark("dpg", data=data, limit=1)
    [drawing] = benchmark.drawings
    Image.new("RGB", (32, 32), "red").save(given / drawing.path)
    task, judge = judged(benchmark, {drawing.path: given / drawing.path}), TransformersJudge(str(vlm), max_tokens=2)
    for rank in (2, 0, 1):
        ask_all(task, judge, Details(tmp_path, rank), rank=rank, num_ranks=3)
    files = sorted(tmp_path.glob("details-*.jsonl"))
    shares = [[json.loads(line)["key"] for line in file.open()] for file in files]
    assert [len(share) for share in shares] == [3, 3, 2]
    assert sorted(key for share in shares for key in share) == sorted(task.keys)


def test_what_is_not_answered_is_no_score_and_is_asked_again(tmp_path):
    write_authors_files("wise-verified", tmp_path / "data")
    benchmark = load_benchmark("wise-verified", data=tmp_path / "data", limit=8)
    (tmp_path / "given").mkdir()
    for drawing in benchmark.drawings:
        Image.new("RGB", (16, 16), "red").save(tmp_path / "given" / drawing.path)
    replies = {
        "thing 1": {"refusal": "no"},
        "thing 126": "It is lovely.",
        "thing 251": {"content": "Sc", "finish_reason": "length"},
    }
    healthy = {"now": False}

    def respond(request):
        text = request["messages"][1]["content"][0]["text"]
        wrong = next((reply for thing, reply in replies.items() if f'"{thing}"' in text), None)
        return "Score: 1" if wrong is None or healthy["now"] else wrong

    def run(confirm=lambda cost: True, **more):
        options = {"data": tmp_path / "data", "limit": 8, "pictures": tmp_path / "given", **judge_of(server), **more}
        options |= {"judge_options": {"workers": 1}, "judge_revision": "c0ffee"}
        return evaluate(config("wise-verified", tmp_path / "run", **options), confirm)

    with LocalJudge(respond) as server:
        server.fail_next("garbage")  # meets the first question, which is refused afterwards
        with pytest.raises(Incomplete, match="3 of 8 questions have no readable answer"):
            run()
        folder = tmp_path / "run/scores/local-judge-1-c0ffee"
        kept = Details(folder).read()
        told = {key: kept[key]["status"] for key in ("1.png", "126.png", "251.png", "376.png")}
        assert told == {"1.png": "failed", "126.png": "unreadable", "251.png": "cut off", "376.png": "answered"}
        assert kept["126.png"]["text"] == "It is lovely." and len(kept) == 8 and not (folder / "result.json").exists()

        server.fail_next("garbage")  # what the server failed at is no low score
        with pytest.raises(Incomplete, match="1 of 8 questions have no readable answer .*1 failed"):
            run(unreadable="lowest")
        assert not (folder / "result.json").exists()

        asked = len(server.requests)
        result, file = run(unreadable="lowest")
        assert len(server.requests) - asked == 3  # only what had no answer
        assert result["counts"]["refused"] == result["counts"]["unreadable"] == result["counts"]["cut off"] == 1
        assert result["scorer"]["unreadable"] == "lowest" and result["scorer"]["revision_as_given"] == "c0ffee"
        assert result["counts"]["questions"] == 8
        assert result["scores"]["categories"]["culture"]["value"] == 0.25

        # The result that is there is shown, or another one refused, before anything is asked or paid for.
        healthy["now"] = True
        asked, costs = len(server.requests), []
        assert run(unreadable="lowest", confirm=costs.append) == (result, file)
        with pytest.raises(
            OSError, match=r"\(unreadable differ\), and results are never replaced. Remove it, and what"
        ):
            run(confirm=costs.append)
        assert len(server.requests) == asked and costs == []
        file.unlink()
        assert run()[0]["scores"]["categories"]["culture"]["value"] == 1.0


def give_shapes(folder: Path, colour: str, limit: int) -> Path:
    """Pictures from elsewhere, of one colour, under the names of the benchmark."""
    folder.mkdir()
    for drawing in load_benchmark("shapes", limit=limit).drawings:
        Image.new("RGB", (64, 64), colour).save(folder / drawing.path)
    return folder


def test_what_was_seen_in_one_picture_is_not_said_of_another_of_its_name(tmp_path):
    """Scoring stopped before there was a result, and goes on with other pictures under the same names."""
    first = give_shapes(tmp_path / "first", "white", 6)
    other = tmp_path / "other"
    other.mkdir()
    truth = render_truth(benchmark_plan())
    for drawing in load_benchmark("shapes", limit=6).drawings:
        Image.fromarray(truth[drawing.number]).save(other / drawing.path)
    _, file = evaluate(config("shapes", tmp_path / "run", limit=6, pictures=first))
    file.unlink()
    result, _ = evaluate(config("shapes", tmp_path / "run", limit=6, pictures=other))
    assert result["scores"]["overall"]["value"] == 1.0
    file.unlink()
    again, _ = evaluate(config("shapes", tmp_path / "run", limit=6, pictures=first))
    assert again["scores"]["overall"]["value"] == 0.0
    assert len(file.with_name("details-0.jsonl").read_text().splitlines()) == 12  # each was looked at once


def test_an_answer_is_of_one_wording_of_questions_and_prompts(tmp_path):
    write_authors_files("wise-verified", tmp_path / "data")
    (tmp_path / "given").mkdir()
    for drawing in load_benchmark("wise-verified", data=tmp_path / "data", limit=2).drawings:
        Image.new("RGB", (16, 16), "red").save(tmp_path / "given" / drawing.path)

    def run(**more):
        options = {"data": tmp_path / "data", "limit": 2, "pictures": tmp_path / "given", **judge_of(server), **more}
        return evaluate(config("wise-verified", tmp_path / "run", **options))

    with LocalJudge(lambda request: "Score: 1") as server:
        _, file = run()
        file.unlink()
        prompts = tmp_path / "data" / REPOSITORIES["wise-verified"].prompts[0]
        rows = json.loads(prompts.read_text())
        prompts.write_text(json.dumps([{**row, "Explanation": "something else"} for row in rows]))
        with pytest.raises(OSError, match="begun with other settings in .*: files was"):
            run()
        prompts.write_text(json.dumps(rows))
        # What was kept as 0 by an older reading of it counts as it is read now, and nothing is asked for it again.
        lines = file.with_name("details-0.jsonl")
        old = [json.loads(line) | {"text": "Score (0 or 1): 1", "read": {"score": 0}} for line in lines.open()]
        lines.write_text("".join(json.dumps(line) + "\n" for line in old))
        result, _ = run(limit=2)
    assert result["scores"]["categories"]["culture"]["value"] == 1.0 and len(server.requests) == 2


def test_limits_and_a_no_stop_before_anything_is_asked_or_drawn(tmp_path):
    write_authors_files("wise", tmp_path / "data")
    with LocalJudge(lambda request: "") as server:
        options = {"data": tmp_path / "data", "limit": 8, **judge_of(server)}
        with pytest.raises(ValueError, match="8 requests would be sent, more than the 7"):
            evaluate(config("wise", tmp_path / "run", max_requests=7, **options))
        with pytest.raises(ValueError, match="Not asked"):
            evaluate(config("wise", tmp_path / "run", prices=(2.5, 10.0), **options), lambda cost: False)
    assert server.requests == [] and not (tmp_path / "run").exists()
    with pytest.raises(OSError, match="nobody/judge"):  # one that would run here, and is nowhere
        evaluate(config("wise", tmp_path / "run", data=tmp_path / "data", limit=8, judge="nobody/judge"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="has no default: name one with --judge"):
        config("wise", tmp_path / "run")


def test_dpg_asks_about_each_quarter_and_minds_dependence(tmp_path):
    write_authors_files("dpg", tmp_path / "data")
    (tmp_path / "given").mkdir()
    sheet = Image.new("RGB", (32, 32), "red")
    sheet.paste("blue", (16, 16, 32, 32))  # the last quarter is not red
    benchmark = load_benchmark("dpg", limit=2)
    for drawing in benchmark.drawings:
        sheet.save(tmp_path / "given" / drawing.path)

    def respond(request):
        import base64
        import io

        question, picture = request["messages"][0]["content"]
        content = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        red = Image.open(io.BytesIO(content)).getpixel((8, 8)) == (255, 0, 0)
        return "Yes" if red or "there" in question["text"] else "No."

    with LocalJudge(respond) as server:
        result, file = evaluate(
            config(
                "dpg",
                tmp_path / "run",
                data=tmp_path / "data",
                limit=2,
                pictures=tmp_path / "given",
                **judge_of(server),
            )
        )
    assert len(server.requests) == 2 * 4 * 2 and result["scores"]["overall"]["value"] == 75.0
    assert server.requests[0]["messages"][0]["content"][0]["text"].endswith("Answer with yes or no.")
    # The sheet of failures shows the one quarter that is not red, under the question.
    failed = worst(Details(file.parent).read().values())
    assert [(line["question"], line["quarter"]) for line in failed] == [("Is it red?", 3)] * 2
    assert looked_at(failed[0], tmp_path / "given").getcolors() == [(256, (0, 0, 255))]
    assert caption(failed[0], tmp_path / "given") == "Is it red? | answered: No."


def test_imgedit_draws_from_its_sources_and_shows_the_judge_both(tmp_path):
    data = write_authors_files("imgedit", tmp_path / "data")
    with LocalJudge(lambda request: "Compliance: 5\nSeamlessness: 4\nFidelity: 3") as server:
        result, file = evaluate(config("imgedit", tmp_path / "run", data=data, limit=2, **judge_of(server)))
    assert result["scores"]["mean_of_items"] == 4.0 and result["counts"]["found"] == 2
    assert result["scores"]["overall"] is None  # both items are of one type
    content = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[0]["text"] in ("Add edit 1!", "Style edit 369!", "Add edit 369!")
    source = {"animal/1.jpg": sha256(data / "pictures/animal/1.jpg")}
    assert result["files"]["pictures"] == {
        "repository": None,
        "commit": None,
        "sha256": source,
    }  # from a folder of one's own
    # The sheet of failures shows what was edited on the left, unless it is another file by now.
    line = Details(file.parent).read()["1.png"]
    pictures, sources = tmp_path / "run/pictures", places_of(file)["sources"]
    shown = looked_at(line, pictures, sources)
    assert pictures_of(file) == pictures and shown.size == (128, 64) and shown.getpixel((8, 8))[1] > 100
    assert looked_at(line | {"source": "another"}, pictures, sources).size == (64, 64)
    assert str(tmp_path) not in file.read_text()

    prompts = data / REPOSITORIES["imgedit"].prompts[0]
    items = json.loads(prompts.read_text())
    items["1"]["id"] = "../outside.jpg"
    prompts.write_text(json.dumps(items))
    with LocalJudge(lambda request: "") as server, pytest.raises(ValueError, match="leads out of its folder"):
        evaluate(config("imgedit", tmp_path / "evil", data=data, limit=1, **judge_of(server)))


def test_a_changed_source_picture_spoils_what_was_drawn_and_answered(tmp_path):
    data = write_authors_files("imgedit", tmp_path / "data")
    scores = iter((5, 5, 1, 1))
    with LocalJudge(
        lambda request: "Compliance: {0}\nSeamlessness: {0}\nFidelity: {0}".format(next(scores))
    ) as server:
        run = config("imgedit", tmp_path / "run", data=data, limit=2, **judge_of(server))
        _, file = evaluate(run)
        Image.new("RGB", (64, 64), "blue").save(data / "pictures/animal/1.jpg")
        with pytest.raises(OSError, match="another result \\(source pictures differ\\)"):
            evaluate(run)
        file.unlink()
        with pytest.raises(OSError, match="Its source picture has changed since: draw into another folder"):
            evaluate(run)
        assert len(server.requests) == 2
        for picture in (tmp_path / "run/pictures").glob("*.png"):
            Image.open(picture).save(picture)  # pictures from elsewhere do not say what they were drawn from
        result, _ = evaluate(run)
    assert result["scores"]["mean_of_items"] == 1.0 and len(server.requests) == 4  # old answers do not count


def test_other_pictures_than_were_drawn_are_refused(detectors, tmp_path):
    options = {"limit": 1, "detector": detectors[0], "clip": detectors[1]}
    evaluate(config("geneval", tmp_path, step="generate", limit=1))
    assert not (tmp_path / "scores").exists()
    file = tmp_path / "generation.json"
    settings = json.loads(file.read_text())
    settings["benchmark"]["rewriting"] = {"file": "mine.jsonl"}
    file.write_text(json.dumps(settings))
    with pytest.raises(OSError, match="were drawn with rewriting"):
        evaluate(config("geneval", tmp_path, step="score", **options))


def test_pictures_of_ours_are_not_scored_as_others_wherever_they_lie(drawn, tmp_path):
    """A folder of ours, moved away from its generation.json, still says in each picture what was drawn."""
    pictures = tmp_path / "moved"
    shutil.copytree(drawn / "pictures", pictures)
    result, file = evaluate(config("shapes", tmp_path / "own", limit=2, pictures=pictures))
    assert result["generation"] is None and result["counts"]["without_note"] == 0
    assert "the benchmark's own prompts" in write_report([file], tmp_path / "report")

    rewritten = tmp_path / "rewritten.jsonl"
    items = load_benchmark("shapes").metadata
    rows = [{"item": item, "prompt": f"a picture of {row['prompt']}"} for item, row in items.items()]
    rewritten.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(OSError, match=r"was drawn for the prompt '.*', and 'a picture of .*' is asked for"):
        evaluate(config("shapes", tmp_path / "run", limit=2, pictures=pictures, rewritten=rewritten))
    first, second = sorted(pictures.iterdir())
    first.write_bytes(second.read_bytes())
    with pytest.raises(OSError, match="was drawn for the item '00600', and '00000' is asked for"):
        evaluate(config("shapes", tmp_path / "run", limit=2, pictures=pictures))

    elsewhere = give_shapes(tmp_path / "elsewhere", "white", 2)
    result, file = evaluate(config("shapes", tmp_path / "theirs", limit=2, pictures=elsewhere))
    assert result["counts"]["without_note"] == 2
    assert "2 of 2 files, prompts unknown, looked at by" in write_report([file], tmp_path / "report")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint": "somebody/else"}, "checkpoint was .* and is now somebody/else"),
        ({"revision": "main"}, "revision was None and is now main"),
        ({"seed": 7}, "seed was 0 and is now 7"),
        ({"dtype": "bfloat16"}, "dtype was float32 and is now bfloat16"),
        ({"arguments": {"num_inference_steps": 50}}, "num_inference_steps was 1 and is now 50"),
        ({"arguments": {"height": 32}}, "height was None and is now 32"),
    ],
)
def test_a_model_or_sampling_that_did_not_draw_the_pictures_is_refused(drawn, given, message):
    with pytest.raises(OSError, match=f"were drawn with other settings: {message}"):
        evaluate(config("shapes", drawn, limit=2, step="score", **given))


def test_a_branch_stands_for_the_commit_that_drew_until_it_moves(hub, client, tmp_path):
    commit = hub.commit_files("user/drawer", {"model_index.json": b"{}"})
    model = {"name": "user/drawer", "revision": commit, "dtype": "float32", "ema": None}
    generation = {"model": model, "seed": 0, "batch_size": 8, "defaults": {}, "arguments": {}}
    (tmp_path / "generation.json").write_text(json.dumps(generation))
    code = """
from iomm_hf.evaluation.harness import EvaluationConfig, check_how_drawn
folder = pathlib.Path(sys.argv[1])
for revision in sys.argv[2:]:
    config = EvaluationConfig("shapes", folder, step="score", checkpoint="user/drawer", revision=revision)
    try:
        check_how_drawn(config, json.loads((folder / "generation.json").read_text()), folder)
    except OSError as error:
        (folder / "refused").write_text(str(error))
"""
    home = hub.environment(tmp_path / "home")
    client(home, code, str(tmp_path), "main", commit)
    assert not (tmp_path / "refused").exists()
    moved = hub.commit_files("user/drawer", {"model_index.json": b"[]"})
    client(home, code, str(tmp_path), "main")
    assert f"revision was {commit} and is now {moved}" in (tmp_path / "refused").read_text()


def test_the_model_and_sampling_that_drew_may_be_named_again(drawn, tmp_path):
    options = {"limit": 2, "checkpoint": str(shipped_model()), "seed": 0, "dtype": "float32", "batch_size": 8}
    named, _ = evaluate(config("shapes", drawn, step="score", **options))
    assert named == evaluate(config("shapes", drawn, step="score", limit=2, arguments={}))[0]
    # The same weights under the end of another's path are the same model; other weights there are not.
    other = tmp_path / shipped_model().resolve().parent.name / shipped_model().resolve().name
    shutil.copytree(shipped_model(), other)
    evaluate(config("shapes", drawn, step="score", **options | {"checkpoint": str(other)}))
    next((other / "vae").glob("*.safetensors")).write_bytes(b"other")
    with pytest.raises(OSError, match="weights was"):
        evaluate(config("shapes", drawn, step="score", **options | {"checkpoint": str(other)}))
    (drawn / "generation.json").rename(tmp_path / "generation.json")
    try:
        with pytest.raises(OSError, match="tells how its pictures were drawn: leave out seed"):
            evaluate(config("shapes", drawn, step="score", limit=2, arguments={}, seed=0))
    finally:
        (tmp_path / "generation.json").rename(drawn / "generation.json")


@pytest.mark.parametrize("name", ["dpg", "geneval", "shapes"])
def test_a_wording_that_would_not_be_asked_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"--wording replaces what wise, .* {name} has no such text"):
        config(name, tmp_path, judge="j", wording=tmp_path / "mine.json")


def test_given_pictures_are_not_told_how_they_were_drawn(tmp_path):
    with pytest.raises(ValueError, match="leave out checkpoint, seed, num_inference_steps, or the pictures"):
        config("shapes", tmp_path, pictures=tmp_path, checkpoint="a/b", seed=0, arguments={"num_inference_steps": 2})
    with pytest.raises(ValueError, match="leave out --step generate, or the pictures"):
        config("shapes", tmp_path, pictures=tmp_path, step="generate")


@pytest.mark.slow
def test_ranks_of_a_launcher_draw_and_score_what_one_process_does(detectors, tmp_path):
    accelerate_config = Path(__file__).parents[2] / "recipes/accelerate/cpu.yaml"
    options = ["--benchmark", "geneval", "--limit", "3", "--steps", "1", "--guidance-scale", "1", "--batch-size", "1"]
    options += ["--detector", detectors[0], "--clip", detectors[1], "--device", "cpu"]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    for start, output in ((launcher, tmp_path / "ranks"), ([], tmp_path / "one")):
        done = subprocess.run(
            [sys.executable, *start, "-m", "iomm_hf", "evaluate", *options, "--output", str(output)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    ranks, one = [next(path.rglob("result.json")) for path in (tmp_path / "ranks", tmp_path / "one")]
    assert sorted(path.name for path in ranks.parent.glob("details-*")) == ["details-0.jsonl", "details-1.jsonl"]
    assert read_result(ranks)["scores"] == read_result(one)["scores"]
    assert read_result(ranks)["pictures_sha256"] == read_result(one)["pictures_sha256"]


@pytest.mark.slow
def test_of_all_ranks_only_the_first_asks_a_served_judge(tmp_path):
    data = write_authors_files("dpg", tmp_path / "data")
    accelerate_config = Path(__file__).parents[2] / "recipes/accelerate/cpu.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config), "-m", "iomm_hf"]
    with LocalJudge(lambda request: "yes") as server:
        options = ["--benchmark", "dpg", "--data", str(data), "--limit", "3", "--steps", "1", "--batch-size", "4"]
        options += ["--judge", "local-judge-1", "--judge-url", server.address, "--yes", "--json"]
        done = subprocess.run(
            [sys.executable, *launcher, "evaluate", *options, "--output", str(tmp_path / "run")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.requests) == 3 * 4 * 2  # none twice
    [result] = (tmp_path / "run").rglob("result.json")
    assert read_result(result)["counts"]["answered"] == 24 and len(list(result.parent.glob("details-*"))) == 1


def test_each_rank_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    several, alone = Ranks(3, 8, lambda: None), Ranks(0, 1, lambda: None)
    assert rank_device(several, "cuda") == "cuda:3" and rank_device(several, "cpu") == "cpu"
    assert rank_device(alone, "cuda:1") == "cuda:1"
