"""How the demo is started: by the command, as a Space, with another checkpoint, on ZeroGPU."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from iomm_hf import shipped_model
from iomm_hf.demo import app


SPACE = Path(app.__file__).parent / "space"


@pytest.mark.parametrize(
    "command",
    [["-m", "iomm_hf", "demo", "--device", "cpu", "--json"], [str(SPACE / "app.py")]],
    ids=["command", "space"],
)
def test_the_demo_starts_with_the_checkpoint_that_the_variable_names(command, tmp_path):
    shutil.copytree(shipped_model(), tmp_path / "mine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"IOMM_CHECKPOINT": str(tmp_path / "mine"), "GRADIO_SERVER_PORT": str(port)}
    with (tmp_path / "log").open("w") as log, (tmp_path / "out").open("w") as out:
        demo = subprocess.Popen([sys.executable, *command], env=os.environ | settings, stdout=out, stderr=log)
    try:
        for _ in range(1200):
            assert demo.poll() is None, (tmp_path / "log").read_text()
            try:
                page = httpx.get(f"http://127.0.0.1:{port}/config")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert page.status_code == 200 and f"<code>{tmp_path / 'mine'}</code>" in page.text
        for _ in range(600):  # it listens before it says so
            if "--json" not in command or (tmp_path / "out").read_text():
                break
            time.sleep(0.1)
    finally:
        demo.terminate()
        demo.wait(60)
    if "--json" in command:
        assert json.loads((tmp_path / "out").read_text())["url"] == f"http://127.0.0.1:{port}/"


def test_on_zerogpu_what_draws_and_answers_asks_for_a_gpu(tmp_path):
    # Stands for the package that Spaces have, which does the same there and nothing elsewhere.
    (tmp_path / "spaces.py").write_text(
        "wrapped = []\ndef GPU(function):\n    wrapped.append(function.__name__)\n    return function\n"
    )
    code = "import iomm_hf.demo.model, spaces; print(*spaces.wrapped)"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["draw", "answer"], done.stderr
