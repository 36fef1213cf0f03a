"""Where a pipeline runs."""

import pytest
import torch

from iomm_hf.devices import default_device


@pytest.mark.parametrize("flag", ["true", "1", "yes"])
def test_what_tells_accelerate_to_use_the_cpu_is_heeded(monkeypatch, flag):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", flag)
    assert default_device() == "cpu"
