"""The command line through typer's own runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from iomm_hf import IOMMPipeline, __version__, shipped_model
from iomm_hf.cli import app
from iomm_hf.evaluation.benchmarks import PROMPTS
from iomm_hf.hub.card import COMPONENTS
from iomm_hf.testing.judge_server import LocalJudge


DPG_PROMPTS = PROMPTS / "dpg.jsonl"
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


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


def test_the_version_is_the_packages():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.stdout.strip() == __version__


def test_plot_draws_a_run_and_refuses_what_is_none(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "grad_norm": 0.5, "learning_rate": 1e-3} for step in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(str(tmp_path), command="plot").stdout == f"Wrote {tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    nothing = run(str(tmp_path / "nothing"), command="plot")
    assert nothing.exit_code == 2 and "holds no log.jsonl" in nothing.stderr
    for output in ("nowhere/curves.png", "curves.xyz"):
        refused = run(str(tmp_path), "--output", str(tmp_path / output), command="plot")
        assert refused.exit_code == 2 and refused.stderr.startswith("Error: ")


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    done = run(str(tmp_path), command="plot")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "pip install 'iomm-hf[train]'" in done.stderr


def test_generate_draws_what_the_pipeline_draws(tmp_path):
    """With the shipped model, so right after installation and without a network (the environment of every test)."""
    output = tmp_path / "star.png"
    options = ("--steps", "2", "--num-images", "2", "--height", "32", "--width", "48", "--seed", "5")
    done = run("a red star", "a ring", *options, "--output", str(output), "--json", command="generate")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [(p["prompt"], p["seed"]) for p in report["pictures"]] == [
        ("a red star", 5),
        ("a red star", 6),
        ("a ring", 7),
        ("a ring", 8),
    ]
    assert (report["height"], report["width"], report["steps"]) == (32, 48, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"star-{i}.png" for i in range(4)]
    pipe = IOMMPipeline.from_pretrained(shipped_model())
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        ["a red star", "a ring"],
        num_images_per_prompt=2,
        height=32,
        width=48,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)],
    ).images
    for entry, picture in zip(report["pictures"], expected, strict=True):
        assert Image.open(entry["path"]).tobytes() == picture.tobytes()


def test_edit_and_ask_see_the_picture_upright(tmp_path):
    """A camera's sideways picture is the same to both as the one turned by hand."""
    upright = Image.new("RGB", (48, 64), "red")
    upright.paste("blue", (0, 0, 48, 20))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "camera.png", exif=exif)
    answers, pictures = [], []
    for name in ("upright", "camera"):
        source, output = str(tmp_path / f"{name}.png"), tmp_path / f"{name}-edited.png"
        done = run(source, "make it green", "--steps", "1", "--output", str(output), command="edit")
        assert done.stdout == f"Wrote {output}\n"
        pictures.append(output.read_bytes())
        answers.append(run(source, "--max-new-tokens", "12", command="ask").stdout)
    assert pictures[0] == pictures[1] and answers[0] == answers[1] != "\n"
    asked = run(source, "Is there a star?", "--max-new-tokens", "3", "--json", command="ask")
    assert json.loads(asked.stdout).keys() == {"image", "question", "answer"}


def test_edit_crops_as_training_does(tmp_path):
    wide = Image.new("RGB", (192, 64), "red")
    wide.paste("blue", (64, 0, 128, 64))
    wide.save(tmp_path / "wide.png")
    wide.crop((64, 0, 128, 64)).save(tmp_path / "middle.png")
    outputs = []
    for name in ("wide", "middle"):
        outputs.append(tmp_path / f"{name}-varied.png")
        run(str(tmp_path / f"{name}.png"), "--steps", "1", "--output", str(outputs[-1]), command="edit")
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_edit_without_an_instruction_varies(tmp_path):
    source, output = tmp_path / "source.png", tmp_path / "varied.png"
    Image.new("RGB", (64, 64), "red").save(source)
    done = run(str(source), "--steps", "1", "--output", str(output), "--json", command="edit")
    assert json.loads(done.stdout)["pictures"] == [{"path": str(output), "prompt": None, "seed": 0}]
    pipe = IOMMPipeline.from_pretrained(shipped_model())
    generator = torch.Generator().manual_seed(0)
    expected = pipe(image=Image.open(source), num_inference_steps=1, generator=generator).images[0]
    assert Image.open(output).tobytes() == expected.tobytes()


def test_pictures_are_not_replaced_unasked_and_leave_nothing_half_written(tmp_path, monkeypatch):
    output = tmp_path / "picture.png"
    output.write_text("mine")
    arguments = ("a ring", "--steps", "1", "--output", str(output))
    refused = run(*arguments, command="generate")
    assert refused.exit_code == 2 and "exists; choose another --output or give --overwrite" in refused.stderr
    assert output.read_text() == "mine"

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    failed = run(*arguments, "--overwrite", command="generate")
    assert failed.exit_code == 1 and "could not be written" in failed.stderr and failed.stderr.count("\n") == 1
    assert output.read_text() == "mine" and list(tmp_path.iterdir()) == [output]
    monkeypatch.undo()
    assert run(*arguments, "--overwrite", command="generate").exit_code == 0
    assert Image.open(output).size == (64, 64) and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", " "], "is blank"),
        (["generate", "a", "--height", "50"], "multiples of"),
        (["generate", "a", "--output", "picture.xyz"], "no picture is written as '.xyz'"),
        (["generate", "a", "--output", "nowhere/picture.png"], "there is no folder"),
        (["generate", "a", "--checkpoint", "nobody/nothing"], "nobody/nothing"),
        (["generate", "a", "--num-images", "0"], "num_images_per_prompt must be at least 1, got 0"),
        (["generate", "a", "--device", "abacus"], "The device 'abacus' cannot be used"),
        pytest.param(["generate", "a", "--device", "cuda"], "The device 'cuda' cannot be used", marks=WITHOUT_CUDA),
        (["edit", "missing.png", "make it blue"], "missing.png"),
        (["edit", "text.png", "make it blue"], "text.png: unknown_format"),
        (["ask", "text.png"], "text.png: unknown_format"),
        (["ask", "."], "Is a directory"),
    ],
)
def test_what_cannot_be_used_ends_with_two_and_says_why(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    done = run(*arguments[1:], command=arguments[0])
    assert done.exit_code == 2 and message in done.stderr and done.stdout == "", done.output
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


@pytest.mark.parametrize("command", ["generate", "edit", "ask", "evaluate", "demo", "publish", "publish-space"])
def test_help_names_every_option_without_loading_torch(command):
    code = f"import sys; from iomm_hf.cli import app; sys.argv = ['iomm-hf', '{command}', '--help']\n"
    code += "try: app()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.stdout.endswith("0 False\n"), done.stderr
    wanted = {"ask": "--device", "demo": "--device", "publish": "--licence", "publish-space": "--checkpoint"}
    assert all(option in done.stdout for option in ("--json", wanted.get(command, "--seed")))


def evaluate(output, *arguments: str):
    options = ("--steps", "1", "--guidance-scale", "1", "--device", "cpu", "--output", str(output))
    return run(*options, *arguments, command="evaluate")


def test_evaluate_prints_a_table_and_writes_what_report_compares(tmp_path):
    done = evaluate(tmp_path / "run", "--benchmark", "shapes", "--limit", "2")
    assert done.exit_code == 0, done.output
    assert "2 of 2 files" in done.stdout and "(only 2 items)" in done.stdout
    file = tmp_path / "run/scores/rules/result.json"
    again = evaluate(tmp_path / "run", "--benchmark", "shapes", "--limit", "2", "--step", "score", "--json")
    assert json.loads(again.stdout) == json.loads(file.read_text())
    both = run(
        str(file), str(file), "--output", str(tmp_path / "report"), "--name", "a", "--name", "b", command="report"
    )
    assert both.exit_code == 0 and "a (only 2 items) | b (only 2 items)" in both.stdout
    assert (tmp_path / "report/report.md").is_file()
    next((tmp_path / "run/pictures").iterdir()).unlink()
    missing = evaluate(tmp_path / "run", "--benchmark", "shapes", "--limit", "2", "--step", "score")
    assert (
        missing.exit_code == 1 and "1 of 2 pictures of shapes are missing" in missing.stderr and missing.stdout == ""
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "gen-eval"], "There is no benchmark 'gen-eval'; choose one of geneval, dpg"),
        (["--benchmark", "wise"], "name one with --judge MODEL"),
        (["--benchmark", "geneval", "--step", "draw"], "step must be generate, score or both, got 'draw'"),
        (["--benchmark", "shapes", "--argument", "true_cfg_scale=4"], "IOMMPipeline has no argument true_cfg_scale"),
        (["--benchmark", "shapes", "--argument", "scale"], "--argument takes NAME=VALUE, got 'scale'"),
        (["--benchmark", "shapes", "--limit", "0"], "limit must be from 1 to the 1200 items"),
        (["--benchmark", "shapes", "--price-in", "1"], "go together"),
        (
            ["--benchmark", "wise", "--judge", "m", "--judge-option", "speed=9"],
            "TransformersJudge has no option speed",
        ),
        (["nobody/nothing", "--benchmark", "shapes", "--limit", "1"], "nobody/nothing"),
        (["--benchmark", "shapes", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16"),
    ],
)
def test_evaluate_refuses_what_cannot_be_used(tmp_path, arguments, message):
    done = evaluate(tmp_path / "run", *arguments)
    assert done.exit_code == 2 and message in done.stderr and done.stdout == "", done.output
    assert not (tmp_path / "run").exists()


def questions_of_dpg(folder: Path) -> Path:
    """One question about each of DPG-Bench's items, as their authors lay it out."""
    (folder / "dpg_bench").mkdir(parents=True)
    rows = [f"{json.loads(line)['item_id']},1,0,Is it?" for line in DPG_PROMPTS.read_text().splitlines()]
    header = "item_id,proposition_id,dependency,question_natural_language\n"
    (folder / "dpg_bench/dpg_bench.csv").write_text(header + "\n".join(rows))
    return folder


def test_a_judge_is_not_asked_unasked(tmp_path, monkeypatch):
    """Nobody sits at the terminal of a test: what asking costs is told, and nothing is sent without --yes."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data = questions_of_dpg(tmp_path / "data")
    with LocalJudge(lambda request: "yes") as server:
        judge = ("--judge", "local-judge-1", "--judge-url", server.address, "--price-in", "1", "--price-out", "2")
        arguments = ("--benchmark", "dpg", "--limit", "1", "--data", str(data), *judge)
        refused = evaluate(tmp_path / "run", *arguments)
        assert (
            refused.exit_code == 2
            and "give --yes" in refused.stderr
            and "4 requests with 4 pictures" in refused.stderr
        )
        assert "about 0.00 and at most 0.02" in refused.stderr
        assert server.requests == [] and not (tmp_path / "run").exists()
        done = evaluate(tmp_path / "run", *arguments, "--yes", "--json")
        assert done.exit_code == 0, done.output
        assert len(server.requests) == 4 and json.loads(done.stdout)["scores"]["overall"]["value"] == 100.0


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_judge_is_asked_when_somebody_at_the_terminal_says_so(tmp_path):
    import pty

    data = questions_of_dpg(tmp_path / "data")
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    with LocalJudge(lambda request: "yes") as server:
        arguments = ["--benchmark", "dpg", "--limit", "1", "--steps", "1", "--device", "cpu", "--data", str(data)]
        arguments += ["--judge", "local-judge-1", "--judge-url", server.address, "--output", str(tmp_path / "run")]
        for said, code, asked in (("n", 2, 0), ("y", 0, 4)):
            here, there = pty.openpty()
            os.write(here, f"{said}\n".encode())
            done = subprocess.run(
                [sys.executable, "-m", "iomm_hf", "evaluate", *arguments],
                stdin=there,
                capture_output=True,
                text=True,
                env=environment,
            )
            os.close(here)
            os.close(there)
            assert done.returncode == code and len(server.requests) == asked, done.stderr
            assert "4 requests with 4 pictures" in done.stderr and "Go on? [y/N]" in done.stderr
            assert ("Not asked, as you wished." in done.stderr) is (said == "n")
            assert (tmp_path / "run").exists() is (said == "y")


def test_demo_without_gradio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    for command in (["demo"], ["publish-space", "me/demo"]):
        done = run(*command[1:], command=command[0])
        assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "pip install 'iomm-hf[demo]'" in done.stderr


def test_demo_refuses_what_it_cannot_show():
    missing = "abacus" if torch.cuda.is_available() else "cuda"
    for option, value in (("--checkpoint", "nobody/nothing"), ("--device", missing)):
        done = run(option, value, command="demo")
        assert done.exit_code == 2 and value in done.stderr and done.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["publish", "publish-space"])
def test_publishing_without_the_hub_ends_with_two_and_one_line(command, tmp_path):
    arguments = [command, "me/demo", "--output", str(tmp_path / "written")]
    if command == "publish":
        arguments.insert(1, str(shipped_model()))
        arguments += ["--steps", "1", *(f"--licence={part}=apache-2.0" for part in COMPONENTS)]
    # Read when the Hub's client is imported, so by a process of its own.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_nobody"}
    done = subprocess.run(
        [sys.executable, "-m", "iomm_hf", *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: the Hub was not reached")
