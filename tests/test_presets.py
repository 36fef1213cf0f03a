import pytest
import torch
from transformers import InternVLConfig

from iomm_hf import IOMMConditionEncoder, IOMMConfig, get_preset
from iomm_hf.cost import INTERNVL3_2B
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


def test_an_encoder_on_internvl3_2b_has_the_papers_parts():
    """The sizes of OpenGVLab/InternVL3-2B-hf (ViT 0.30B, LM 1.54B, D = 1536), counted without memory."""
    mllm_config = InternVLConfig(**INTERNVL3_2B)
    with torch.device("meta"):
        encoder = IOMMConditionEncoder(IOMMConfig(mllm_config=mllm_config))

    def count(module) -> float:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(encoder.adapter) == 28_718_592
    assert count(encoder.mllm.model.language_model) == pytest.approx(1.54e9, rel=0.01)
    assert count(encoder.mllm.model.vision_tower) == pytest.approx(0.30e9, rel=0.02)
    assert {p.requires_grad for p in encoder.mllm.parameters()} == {False}
