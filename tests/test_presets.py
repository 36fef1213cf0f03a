import pytest

from iomm_hf import get_preset
from iomm_hf.presets import PRESETS, build_transformer
from iomm_hf.tiny import tiny_pipeline


@pytest.mark.parametrize(("name", "billions"), [("base", 1.573), ("large", 2.730), ("xl", 6.155)])
def test_generator_has_the_papers_size(name, billions):
    transformer = build_transformer(get_preset(name), device="meta")
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(billions * 1e9, rel=0.01)


def test_mask_ratios_are_the_papers():
    assert {name: preset.mask_ratio for name, preset in PRESETS.items() if name != "tiny"} == {
        "base": 0.85,
        "large": 0.85,
        "xl": 0.45,
    }


def test_tiny_fits_into_twenty_megabytes_of_fp16():
    pipe = tiny_pipeline()
    modules = (pipe.text_encoder, pipe.transformer, pipe.vae)
    assert 2 * sum(p.numel() for module in modules for p in module.parameters()) < 20e6


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'huge'.*tiny, base, large, xl"):
        get_preset("huge")
