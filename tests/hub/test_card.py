"""Results of `iomm-hf evaluate` in a model card, in the Hub's own form, and only where they are this checkpoint's."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.evaluation.geneval import summarize
from iomm_hf.evaluation.geneval_rules import TASKS
from iomm_hf.evaluation.harness import EvaluationConfig, evaluate
from iomm_hf.evaluation.results import values_of
from iomm_hf.hub.card import COMPONENTS, Reference, Sample, describe_sources, read_run, write_card
from iomm_hf.modeling_iomm import hash_weight_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "transformer").symlink_to(shipped_model() / "transformer")
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return IOMMPipeline.from_pretrained(shipped_model())


def result(name: str, scores: dict) -> dict:
    weights = {"transformer": hash_weight_files(shipped_model() / "transformer")}
    return {
        "schema": "iomm-hf/evaluation/1",
        "benchmark": {
            "name": name, "version": "1", "prompts_sha256": "ab" * 32, "rewriting": None, "subset": None, "items": 553,
        },
        "scores": scores,
        "counts": {"expected": 2212, "found": 2212},
        "scorer": {"detector": "org/mask2former", "detector_revision": "c0ffee", "judge": None, "rules": None},
        "generation": {
            "model": {"name": "runs/final", "weights_sha256": weights, "ema": True},
            "arguments": {"num_inference_steps": 30, "guidance_scale": 3.0},
            "seed": 0,
            "software": [{"commit": "a"}, {"commit": "b"}],
        },
        "picture_sizes": {"512x512": 2212},
        "software": {"versions": {"iomm-hf": "0.1.0"}},
    }  # fmt: skip


def card(folder, pipeline, tmp_path, *contents, **options) -> ModelCard:
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content))
    licences = dict.fromkeys(COMPONENTS, "apache-2.0")
    samples = [Sample("a star", 0, "samples/00.png")]
    write_card(folder, "me/model", pipeline, licences, samples, steps=30, guidance=3.0, scores=files, **options)
    return ModelCard.load(folder / "README.md")


def test_figures_of_a_run_end_at_the_step_of_the_checkpoint(folder, pipeline, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "versions": {}, "commit": None}))
    rows = [{"step": s, "images": 32 * s, "loss": float(s), "images_per_second": 32 / 72} for s in (50, 100, 150)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {None: ("4,800", "150", "100.0000", "3.00"), 120: ("3,840", "120", "75.0000", "2.00")}
    for step, (images, steps, loss, hours) in expected.items():
        _, seen = read_run(tmp_path, step)
        assert (seen["pictures seen"], seen["steps taken"]) == (images, steps)
        assert seen["last logged loss"].startswith(loss) and seen["time"].startswith(f"{hours} hours by the clock")
    assert read_run(tmp_path, 20)[1] == {"steps taken": "20"}  # nothing was logged by then
    (tmp_path / "log.jsonl").write_text(json.dumps(rows[0] | {"loss": 0.0}).replace('"loss": 0.0, ', "") + "\n")
    assert "last logged loss" not in read_run(tmp_path)[1]
    text = card(folder, pipeline, tmp_path, run=tmp_path, step=50).text
    assert "| pictures seen | 1,600 |" in text and "1.00 hours by the clock in 50 training steps" in text


def test_results_are_the_cards_metadata_and_tables(folder, pipeline, tmp_path):
    geneval = summarize([(task, task != "counting") for task in TASKS for _ in range(4)])
    dpg = {"overall": {"value": 81.25}}
    loaded = card(folder, pipeline, tmp_path, result("geneval", geneval), result("dpg", dpg))
    found = {(r.dataset_type, r.dataset_config): r for r in loaded.data.eval_results}
    assert len(found) == 8 and found["geneval", "overall"].metric_value == pytest.approx(5 / 6, abs=1e-4)
    assert found["geneval", "counting"].metric_value == 0.0 and found["dpg-bench", "overall"].metric_value == 81.25
    assert (
        found["geneval", "overall"].dataset_revision == "1" and found["geneval", "overall"].metric_type == "accuracy"
    )
    for told in (
        "2,212 of 2,212 files",
        "num inference steps 30",
        "512x512 px",
        "org/mask2former",
        "c0ffee",
        "averaged weights, drawn by 2 different sets of packages, commit and device.",
    ):
        assert told in loaded.text
    assert "| runs/final | 0.833 |" in loaded.text and "| runs/final | 81.250 |" in loaded.text
    assert "No scores were given" not in loaded.text
    dpg = result("dpg", dpg)
    dpg["counts"] |= {"refused": 3, "filtered": 5}
    told = card(folder, pipeline, tmp_path, dpg).text
    assert (
        "3 questions without a readable answer counted as the lowest score (3 refused), 5 pictures were taken" in told
    )


def test_a_result_as_evaluate_writes_it_goes_into_the_card_when_it_is_whole(folder, pipeline, tmp_path):
    sampling = {"num_inference_steps": 1, "guidance_scale": 1.0}
    config = EvaluationConfig("shapes", tmp_path / "run", limit=6, arguments=sampling, device="cpu", ema=False)
    written, _ = evaluate(config)
    with pytest.raises(OSError, match="tells of 6 items of shapes only; a card takes whole benchmarks"):
        card(folder, pipeline, tmp_path, written)
    written["benchmark"]["subset"] = None  # as if these were all
    loaded = card(folder, pipeline, tmp_path, written)
    measured = {result.dataset_config: result.metric_value for result in loaded.data.eval_results}
    expected = {name: round(value, 4) for name, value in values_of("shapes", written["scores"]).items()}
    assert measured == expected and set(TASKS) < set(measured)
    assert (
        "6 of 6 files, num inference steps 1, guidance scale 1.0, 64x64 px, seed 0, prompts as published"
        in loaded.text
    )
    assert "weights not averaged." in loaded.text


def test_no_scores_say_so_and_two_belong_to_no_one_leaderboard(folder, pipeline, tmp_path):
    assert "No scores were given" in card(folder, pipeline, tmp_path).text
    dpg = result("dpg", {"overall": {"value": 80.0}})
    with pytest.raises(ValueError, match="but 2 scores were given"):
        card(folder, pipeline, tmp_path, dpg, dpg, benchmark="org/bench")
    card(folder, pipeline, tmp_path, dpg, benchmark="org/bench")
    [entry] = yaml.safe_load((folder / ".eval_results/dpg.yaml").read_text())
    assert entry["dataset"] == {"id": "org/bench", "task_id": "overall"} and entry["value"] == 80.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["benchmark"].update(subset=6, items=6), "tells of 6 items of dpg only"),
        (lambda r: r.update(generation=None), "does not know which model drew"),
        (
            lambda r: r["generation"]["model"]["weights_sha256"].update(transformer="ff"),
            "is of a generator whose weights hash to ff",
        ),
    ],
)
def test_what_is_not_this_checkpoints_whole_result_stays_out(folder, pipeline, tmp_path, change, message):
    content = result("dpg", {"overall": {"value": 80.0}})
    change(content)
    with pytest.raises((OSError, ValueError), match=message):
        card(folder, pipeline, tmp_path, content)


def test_scores_of_the_shapes_world_are_of_these_weights(folder, pipeline, tmp_path, pytestconfig):
    score = json.loads((pytestconfig.rootpath / "results/shapes/score.json").read_text())
    assert f"{score['model']['overall']['value']:.3f} [" in card(folder, pipeline, tmp_path, score).text
    with pytest.raises(ValueError, match="whose weights hash to ff"):
        card(folder, pipeline, tmp_path, score | {"weights_sha256": {"transformer": "ff"}})
    del score["weights_sha256"]
    with pytest.raises(OSError, match="score the checkpoint again"):
        card(folder, pipeline, tmp_path, score)


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("org/pictures", True),
        ("hf://datasets/org/pictures@main/*.parquet", True),
        ("https://example.org/a.tar", True),
        ("/home/me/secret/*.tar", False),
        ("../secret", False),
        ("file:///home/me/*.tar", False),
        ("s3://me/secret.tar", False),
        ("https://me:pw@example.org/a.tar", False),
        ("https://example.org/a.tar?key=secret", False),
        ("https://example.org/a.zip::file:///home/me", False),
    ],
)
def test_only_public_addresses_of_data_are_named(path, public):
    name = f"`{path}`" if public else "files of the trainer's own"
    sentence, datasets = describe_sources({"images": [path], "pairs": [{"path": path}]})
    assert sentence == f"Pictures without text: {name}. Pairs of picture and text: {name}."
    assert datasets == (["org/pictures"] if path.startswith("hf://") else [])


@pytest.mark.parametrize("vae_reference", [None, Reference("org/vae", None, "main")])
def test_every_snippet_loads_the_revision_and_no_pickles(folder, pipeline, tmp_path, vae_reference):
    text = card(folder, pipeline, tmp_path, revision="v1", vae_reference=vae_reference).text
    for call in (
        r'IOMMPipeline\.from_pretrained\("me/model", revision="v1"\)',
        r'snapshot_download\("me/model", revision="v1"\)',
        r'AutoModel\.from_pretrained\("me/model", subfolder="text_encoder", revision="v1", .*use_safetensors=True',
        r'AutoProcessor\.from_pretrained\("me/model", subfolder="processor", revision="v1", ',
        r'DiffusionPipeline\.from_pretrained\("me/model", revision="<commit>", .*use_safetensors=True',
    ):
        assert len(re.findall(call, text)) == 1, call
    assert text.count('("me/model"') == 5 and text.count('revision="v1"') == 4
    assert text.count("use_safetensors=True") == (2 if vae_reference is None else 3)
    assert "revision=" not in card(folder, pipeline, tmp_path).text.replace('revision="<commit>"', "").replace(
        "# revision=", ""
    )
