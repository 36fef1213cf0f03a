"""Shared tiny components: real classes, random weights, seeded. Nothing here reaches a network."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy test workers are slower with two threads each

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from iomm_hf.presets import PRESETS
from iomm_hf.testing.hub_server import LocalHub
from iomm_hf.tiny import tiny_encoder, tiny_pipeline, tiny_processor


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def flux():
    """The preset `tiny` with a generator of the class that the full-size presets use."""
    return replace(
        PRESETS["tiny"],
        transformer_class="FluxTransformer2DModel",
        transformer_config={
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 128,
            "axes_dims_rope": (8, 12, 12),
        },
    )


@pytest.fixture(scope="session")
def images():
    """Four different noisy pictures of odd sizes."""
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (50, 80), (31, 64), (90, 70)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


@pytest.fixture
def make_encoder(processor):
    """Builds an encoder that is read by its queries, unless told otherwise; its fresh adapter is loud enough for its gradients
    to be compared."""

    def make(**config):
        return tiny_encoder(processor, seed=0, **{"condition_tokens": "queries", "num_queries": 16} | config)

    return make


@pytest.fixture
def generators():
    """One CPU generator per sample."""
    return lambda count, seed=0: [torch.Generator().manual_seed(seed + i) for i in range(count)]


@pytest.fixture
def fresh_accelerate():
    """Accelerate holds one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pipe():
    """A pipeline that every weight counts in: the U-Net's last layer would start at zero."""
    pipe = tiny_pipeline()
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


CLIENT = """
import json, pathlib, sys
import torch
torch.set_num_threads(1)

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a star", num_inference_steps=2, generator=generator, output_type="pt").images

def refusal(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")
"""


@pytest.fixture(scope="session")
def client() -> Callable[..., None]:
    """`client(environment, code, *arguments)` runs code in a fresh process, since the Hub's clients read their settings at
    import. The code may use `draw` and `refusal`."""

    def run(environment: dict[str, str], code: str, *arguments: str):
        done = subprocess.run(
            [sys.executable, "-c", CLIENT + code, *arguments],
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run
