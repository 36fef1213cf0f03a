"""Shared tiny components: real classes, random weights, seeded. Nothing here reaches a network."""

import os
from dataclasses import replace


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy test workers are slower with two threads each

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from iomm_hf.presets import PRESETS
from iomm_hf.tiny import tiny_encoder, tiny_processor


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
