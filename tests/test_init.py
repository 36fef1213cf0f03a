import subprocess
import sys

import pytest

import iomm_hf


def test_import_is_lazy():
    code = (
        "import sys, iomm_hf; print([m for m in ('torch', 'transformers', 'diffusers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_loads():
    for name in iomm_hf.__all__:
        assert getattr(iomm_hf, name) is not None
    assert dir(iomm_hf) == sorted(iomm_hf.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'IOMMTrainer'"):
        iomm_hf.IOMMTrainer  # noqa: B018
