"""Every benchmark runs, at a size that says nothing about speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FLUX = ["--width", "128", "--layers", "1"]
SIZES = {
    "condition_path": ["--layers", "1", "--hidden_size", "256", "--image_tokens", "16", "--queries", "8"],
    "full_size": ["--preset", "tiny", "--cases", "1", "2+checkpointing+cached", "--draw", "1"],
    "growth": ["--width", "64", "--batch_sizes", "1", "2", "--queries", "8", "16", "--resolutions", "32", "64"],
    "data_path": ["--samples", "16", "--size", "64"],
    "pipeline": [*FLUX, "--resolution", "64", "--steps", "2"],
    "training_loop": [*FLUX, "--batch_size", "2"],
    "step_flops": None,  # counts, at any size in the same time
}


def test_each_has_a_size():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - {"timing", "models"} == set(SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_it_writes_its_results(name, tmp_path):
    size = [] if SIZES[name] is None else [*SIZES[name], "--rounds", "2"]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *size, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = tmp_path.glob(f"{name}*.json")
    results = json.loads(written.read_text())
    if name == "full_size":  # memory is measured on GPUs alone
        assert results["2+checkpointing+cached"]["images/s"] > 0
        return
    assert results["device"] and any(" / " in key for key in results)
    if name == "step_flops":  # the same on every machine, so the README can be held to it
        readme = (BENCHMARKS / "README.md").read_text()
        assert all(table in readme for table in done.stdout.split("\n\n")[:2])
