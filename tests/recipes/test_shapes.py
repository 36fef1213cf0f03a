"""The recipes around the shapes world at their smallest: data, scores, captions, the shipped model, the quickstart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iomm_hf import IOMMPipeline
from iomm_hf.data.shapes import BOUND_TASKS
from iomm_hf.tiny import tiny_pipeline


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline().save_pretrained(folder / "model")
    tiny_pipeline().text_encoder.mllm.save_pretrained(folder / "mllm")
    tiny_pipeline().processor.save_pretrained(folder / "mllm")
    return folder


@pytest.fixture(scope="module")
def score(recipe, checkpoint) -> Path:
    module = recipe("score_shapes")
    settings = {"checkpoint": str(checkpoint / "model"), "output_dir": str(checkpoint / "score")}
    settings["beside"] = [f"rival={checkpoint / 'model'}"]
    module.main(module.ScoreConfig(**settings, pictures_per_task=2, num_inference_steps=1))
    return checkpoint / "score/score.json"


def test_a_score_stands_beside_its_ceilings_and_controls(score):
    scores = json.loads(score.read_text())
    assert scores["rendered truth"]["overall"]["value"] == 1.0
    names = {"model", "rendered truth", "truth through the autoencoder", "variations of rendered truth"}
    names |= {"shuffled prompts", "untrained generator"}
    assert names <= scores.keys()
    assert all(scores[name]["pictures"] == 12 for name in names)
    assert scores["model"]["overall"]["high"] > 0.2 > scores["model"]["overall"]["value"]  # 12 pictures tell little
    assert scores["rival"] == scores["model"]  # the same checkpoint, prompts and noise
    assert score.with_name("sheet.png").stat().st_size > 10_000


def test_a_rival_without_a_name_is_refused(recipe):
    with pytest.raises(ValueError, match=r"NAME=FOLDER_OR_ID, got \['outputs/other'\]"):
        recipe("score_shapes").ScoreConfig(beside=["outputs/other"])


def test_edits_stand_beside_their_ceiling_and_controls(recipe, checkpoint, tmp_path):
    module = recipe("score_edits")
    settings = {"checkpoint": str(checkpoint / "model"), "output_dir": str(tmp_path)}
    module.main(module.EditsConfig(**settings, cases_per_kind=2, num_inference_steps=1))
    scores = json.loads((tmp_path / "edits.json").read_text())
    assert scores["true edits"]["overall"]["value"] == 1.0 and scores["copies"]["overall"]["value"] == 0.0
    assert scores["model"]["correct"]["remove"]["total"] == 2
    assert (tmp_path / "edits.png").stat().st_size > 5_000


def test_a_shipped_model_is_whole_small_and_says_what_it_is(recipe, checkpoint, score, tmp_path):
    module = recipe("ship_model")
    module.main(
        module.ShipConfig(checkpoint=str(checkpoint / "model"), score=str(score), output_dir=str(tmp_path / "tiny"))
    )
    card = (tmp_path / "tiny/README.md").read_text()
    assert "not affiliated" in card and "| rendered truth | 1.00 [" in card and "license: apache-2.0" in card
    pipe, original = IOMMPipeline.from_pretrained(tmp_path / "tiny"), tiny_pipeline()
    for name in ("text_encoder", "transformer", "vae"):
        weights = getattr(pipe, name).state_dict()
        assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}
        for key, weight in getattr(original, name).state_dict().items():
            assert torch.equal(weights[key], weight.half().to(weight.dtype)), key
    assert pipe.text_encoder.config.mllm_name_or_path is None
    assert not [file for file in (tmp_path / "tiny").rglob("*.json") if str(checkpoint) in file.read_text()]


def test_captions_are_checked(recipe, checkpoint, tmp_path, capsys):
    module = recipe("check_captions")
    module.main(module.CaptionsConfig(mllm=str(checkpoint / "mllm"), scenes=3, output=str(tmp_path / "captions.json")))
    result = json.loads((tmp_path / "captions.json").read_text())
    assert result["scenes"] == 3 and result["whole"]["correct"] == 0
    assert "whole    0.000 [0.000," in capsys.readouterr().out


def test_binding_is_checked(recipe, checkpoint, tmp_path, capsys):
    module = recipe("check_binding")
    config = module.BindingConfig(str(checkpoint / "model"), scenes=6, draws=1, output=str(tmp_path / "binding.json"))
    module.main(config)
    result = json.loads((tmp_path / "binding.json").read_text())
    assert [result[task][part]["total"] for task in BOUND_TASKS for part in ("mllm", "generator")] == [6] * 4
    assert "position   generator prefers the true caption in " in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "chat"])
def test_corpora_are_written(recipe, tmp_path, layout):
    module = recipe("make_shapes")
    module.main(module.ShapesArguments(output_dir=str(tmp_path), num_samples=6, layout=layout, samples_per_shard=4))
    assert len(list(tmp_path.glob("train-*"))) == 2


def test_the_quickstart_runs_from_any_folder(tmp_path):
    flags = ["--num_images", "40", "--num_pairs", "20", "--max_steps", "2", "--pictures_per_task", "2"]
    done = subprocess.run(
        [sys.executable, str(RECIPES / "quickstart.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs/quickstart"
    assert all((folder / name).stat().st_size > 5_000 for name in ("shipped.png", "sheet.png", "loss.png"))
    scores = json.loads((folder / "score.json").read_text())
    assert list(scores) == ["untrained", "after stage 1", "after stage 2", "shipped"]
    assert scores["shipped"]["pictures"] == 4
    assert IOMMPipeline.from_pretrained(folder / "stage2/final").resolution == 64
    assert "single_object" in done.stdout and "What it is not" in done.stdout
