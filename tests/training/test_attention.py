"""What attention a run trains with, and which backends it refuses before the first step."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from iomm_hf.training import PretrainConfig, train
from iomm_hf.training.attention import attention_kernel


@pytest.mark.parametrize(
    ("device", "precision", "flash", "cudnn"),
    [
        ("cuda", "bf16", True, False),
        ("cuda", "no", True, False),
        ("cpu", "bf16", False, False),
        ("cpu", "no", True, True),
    ],
)
def test_attention_kernels_that_fail_or_are_slow_are_left_out(device, precision, flash, cudnn):
    with attention_kernel(torch.device(device), precision):
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()) == (flash, cudnn)
        assert torch.backends.cuda.math_sdp_enabled()


def test_an_attention_backend_is_the_generators_for_training(flux_settings, tmp_path, monkeypatch):
    losses = []
    called = []
    plain_math = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends,
        AttentionBackendName._NATIVE_MATH,
        lambda *args, **kwargs: called.append(1) or plain_math(*args, **kwargs),
    )
    for name in (None, "_native_math"):
        output_dir = str(tmp_path / str(name))
        train(PretrainConfig(**flux_settings | {"output_dir": output_dir, "attention_backend": name}))
        lines = Path(output_dir, "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        # It is tried, beside itself, and then called by each of three blocks in two steps.
        assert len(called) == (0 if name is None else 2 + 2 * 3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE  # as before


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_hub", "would run code from the Hub"),
        ("flash", "cannot train on this cpu: .*install `flash-attn"),
        ("fast", "cannot train on this cpu: .*not registered"),
    ],
)
def test_an_attention_backend_that_cannot_run_is_refused(flux_settings, backend, message):
    with pytest.raises(ValueError, match=message):
        train(PretrainConfig(**flux_settings | {"attention_backend": backend}))


def test_an_attention_backend_without_a_backward_pass_is_refused(flux_settings, monkeypatch):
    def forward_only(query, key, value, **kwargs):
        return value.detach().clone()

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_EFFICIENT, forward_only)
    with pytest.raises(ValueError, match="'_native_efficient' cannot train on this cpu: .*does not require grad"):
        train(PretrainConfig(**flux_settings | {"attention_backend": "_native_efficient"}))


def test_an_attention_backend_that_takes_masks_for_padding_at_the_end_is_refused(flux_settings, monkeypatch):
    plain_math = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def to_the_end(query, key, value, attn_mask=None, **kwargs):
        length = int(attn_mask.sum())
        return plain_math(query, key[:, :length], value[:, :length], **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_EFFICIENT, to_the_end)
    settings = flux_settings | {"attention_backend": "_native_efficient"}
    with pytest.raises(ValueError, match="'_native_efficient' does not answer as plain attention does"):
        train(PretrainConfig(**settings))


def test_an_attention_backend_that_a_unet_would_not_use_is_refused(settings):
    with pytest.raises(ValueError, match="is for a Flux or Z-Image"):
        train(PretrainConfig(**settings | {"attention_backend": "native"}))
