"""What a run shows on the way changes nothing that it trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iomm_hf import IOMMPipeline
from iomm_hf.training import PretrainConfig, loop, train, validation


def rows(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


def test_the_best_of_the_scored_checkpoints_is_kept(settings, monkeypatch):
    overall = iter([0.25, 0.5, 0.375])
    scored = validation.score_pictures

    def with_known_mean(pictures, metadata):  # an untrained model scores 0 every time
        report = scored(pictures, metadata)
        return replace(report, overall=replace(report.overall, value=next(overall)))

    monkeypatch.setattr(validation, "score_pictures", with_known_mean)
    extra = {"max_steps": 6, "eval_every": 2, "eval_pictures": 1, "validation_steps": 1}
    final = train(PretrainConfig(**settings | extra))
    rows = [json.loads(line) for line in (final.parent / "evals.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and all(row["pictures"] == 6 for row in rows)
    assert rows[0]["colors"] == 0.0
    best = final.parent / "best"
    assert json.loads((best / "score.json").read_text())["step"] == 4
    weights = [IOMMPipeline.from_pretrained(path).transformer.conv_out.weight for path in (best, final)]
    assert not torch.equal(*weights)


def test_a_best_of_before_is_no_record_for_a_run_from_nothing(settings):
    output = Path(settings["output_dir"])
    (output / "best").mkdir(parents=True)
    (output / "best" / "score.json").write_text(json.dumps({"step": 1, "overall": 0.9}))
    (output / "evals.jsonl").write_text(json.dumps({"step": 1, "overall": 0.9}) + "\n")  # killed before a checkpoint
    train(PretrainConfig(**settings | {"max_steps": 1, "eval_every": 1, "eval_pictures": 1, "validation_steps": 1}))
    assert json.loads((output / "best" / "score.json").read_text())["overall"] < 0.9
    assert len((output / "evals.jsonl").read_text().splitlines()) == 1


def test_other_sampling_beats_no_record_and_has_none_to_beat(settings):
    scored = {"max_steps": 2, "save_every": 1, "eval_every": 1, "eval_pictures": 1, "validation_steps": 1}
    final = train(PretrainConfig(**settings | scored))
    row = json.loads((final.parent / "evals.jsonl").read_text().splitlines()[0])
    (final.parent / "evals.jsonl").write_text(json.dumps(row | {"overall": 0.9}) + "\n")
    for steps, best in ((1, 1), (2, 4)):
        more = {"max_steps": 2 + steps, "validation_steps": steps}
        train(PretrainConfig(**settings | scored | more))
        assert json.loads((final.parent / "best" / "score.json").read_text())["step"] == best


def test_records_of_before_sampling_was_noted_are_to_be_beaten(settings):
    scored = {"max_steps": 2, "save_every": 1, "eval_every": 1, "eval_pictures": 1, "validation_steps": 1}
    folder = train(PretrainConfig(**settings | scored)).parent
    old = {"step": 1, "overall": 0.9, "pictures": 6}
    (folder / "evals.jsonl").write_text(json.dumps(old) + "\n")
    (folder / "best" / "score.json").write_text(json.dumps(old))
    train(PretrainConfig(**settings | scored | {"max_steps": 3}))
    assert json.loads((folder / "best" / "score.json").read_text()) == old


def test_scoring_changes_nothing_that_is_trained(settings, tmp_path):
    train(PretrainConfig(**settings | {"max_steps": 4}))
    scored = {"output_dir": str(tmp_path / "scored"), "eval_every": 1, "eval_pictures": 1, "validation_steps": 1}
    train(PretrainConfig(**settings | {"max_steps": 4} | scored))
    runs = [Path(settings["output_dir"]), tmp_path / "scored"]
    for name in ("trainable.safetensors", "ema.safetensors"):
        one, two = (load_file(run / "checkpoint-00000004/state" / name) for run in runs)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    one, two = (json.loads((run / "checkpoint-00000004/state/rank-0.json").read_text()) for run in runs)
    assert one["loader"] == two["loader"]
    assert [row["loss"] for row in rows(runs[0])] == [row["loss"] for row in rows(runs[1])]


def test_a_run_compiled_in_blocks_draws_without_them(flux_settings, tmp_path, monkeypatch):
    """Otherwise drawing, which asks for two pictures at once, would have them compiled anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shown = {"validation_prompts": ["a star"], "validate_every": 1, "validation_steps": 1}
    plain, compiled = str(tmp_path / "plain"), str(tmp_path / "compiled")
    train(PretrainConfig(**flux_settings | shown | {"output_dir": plain}))
    graphs = []
    draw = loop.draw_validation

    def counted(*args):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        draw(*args)
        graphs.append((before, torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    monkeypatch.setattr(loop, "draw_validation", counted)
    train(PretrainConfig(**flux_settings | shown | {"output_dir": compiled, "compile": "blocks"}))
    assert len(graphs) == 2 and all(before == after >= 1 for before, after in graphs)
    losses = [[row["loss"] for row in rows(run)] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(list(Path(compiled, "samples").glob("*.png"))) == 2
    names = [
        load_file(Path(run, "final/transformer/diffusion_pytorch_model.safetensors")).keys()
        for run in (plain, compiled)
    ]
    assert names[0] == names[1]
