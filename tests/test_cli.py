"""The command line through typer's own runner."""

import json

from typer.testing import CliRunner

from iomm_hf.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["estimate", *arguments])


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
