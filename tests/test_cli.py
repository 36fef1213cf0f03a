"""The command line through typer's own runner."""

import json
import sys

from typer.testing import CliRunner

from iomm_hf.cli import app


def run(*arguments: str, command: str = "estimate"):
    return CliRunner().invoke(app, [command, *arguments])


def test_estimate_prints_what_its_json_holds():
    options = ("--preset", "tiny", "--mixed-precision", "no", "--batch-size", "4")
    cost = json.loads(run(*options, "--json").stdout)
    text = run(*options)
    assert text.exit_code == 0
    assert f"{cost['memory']['gradients'] / 1e9:,.3f}" in text.stdout
    assert f"{cost['images_per_second']:,.1f} images/s" in text.stdout
    assert cost["memory"]["activations"] == 4 * cost["activations_per_sample"]["plain"]


def test_bad_usage_ends_with_two_and_one_line():
    unknown = run("--preset", "huge")
    assert unknown.exit_code == 2 and unknown.stderr.count("\n") == 1
    assert "'huge'; choose one of tiny, base" in unknown.stderr
    assert run("--gpus", "many").exit_code == 2


def test_plot_draws_a_run_and_refuses_what_is_none(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 0.5, "learning_rate": 1e-3} for step in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(str(tmp_path), command="plot").stdout == f"Wrote {tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    nothing = run(str(tmp_path / "nothing"), command="plot")
    assert nothing.exit_code == 2 and "holds no log.jsonl" in nothing.stderr


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    done = run(str(tmp_path), command="plot")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "pip install 'iomm-hf[train]'" in done.stderr
