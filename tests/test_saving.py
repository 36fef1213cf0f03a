"""Saving and loading is the identity, in every form that a checkpoint takes (Hub repositories: `test_hub.py`)."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from iomm_hf import IOMMPipeline
from iomm_hf.tiny import tiny_pipeline


@pytest.fixture
def pipe():
    pipe = tiny_pipeline(connector_layers=1)
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero: make every weight count
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "1MB"}, {"variant": "ema"}], ids=["folder", "sharded", "variant"]
)
def test_folder(pipe, tmp_path, options):
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
        assert len(list((tmp_path / "text_encoder").glob("*-of-*.safetensors"))) > 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    loaded = IOMMPipeline.from_pretrained(tmp_path, **{k: v for k, v in options.items() if k == "variant"})
    for name in ("text_encoder", "transformer", "vae"):
        one, two = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())
        assert not getattr(loaded, name).training
    assert torch.equal(draw(loaded), expected)


def test_half_precision_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "full")
    half = IOMMPipeline.from_pretrained(tmp_path / "full", dtype=torch.float16)
    assert {half.text_encoder.dtype, half.transformer.dtype, half.vae.dtype} == {torch.float16}
    half.save_pretrained(tmp_path / "half")
    back = IOMMPipeline.from_pretrained(tmp_path / "half", dtype=torch.float32)
    for name in ("text_encoder", "transformer", "vae"):
        for key, value in getattr(half, name).state_dict().items():
            assert torch.equal(value.float(), getattr(back, name).state_dict()[key].float()), key


def test_lora_of_the_generator(pipe, tmp_path):
    without = draw(pipe)
    targets = ["to_q", "to_k", "to_v"]
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:  # starts at zero, so it would change nothing
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    adapted = draw(pipe)
    assert (adapted - without).abs().max() > 1e-3
    pipe.transformer.save_lora_adapter(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 0.1 * 4 * sum(p.numel() for p in pipe.transformer.parameters())

    fresh = tiny_pipeline(connector_layers=1)
    state = {k: v for k, v in pipe.transformer.state_dict().items() if "lora" not in k}
    fresh.transformer.load_state_dict({k.replace(".base_layer", ""): v for k, v in state.items()})
    fresh.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    assert torch.equal(draw(fresh), without)
    fresh.transformer.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(draw(fresh), adapted, atol=1e-6)


SAVE = """
import json, pathlib, shutil, sys, torch
import iomm_hf
from iomm_hf import IOMMConditionEncoder, IOMMConfig, IOMMProcessor
from iomm_hf.hub.publish import REMOTE_CODE
from iomm_hf.tiny import tiny_pipeline

folder = pathlib.Path(sys.argv[1])
IOMMConfig.register_for_auto_class()
IOMMConditionEncoder.register_for_auto_class("AutoModel")
IOMMProcessor.register_for_auto_class()
pipe = tiny_pipeline()
pipe.save_pretrained(folder)
index = json.loads((folder / "model_index.json").read_text())
index |= {
    "_class_name": ["pipeline_iomm", "IOMMPipeline"],
    "text_encoder": ["modeling_iomm", "IOMMConditionEncoder"],
    "processor": ["processing_iomm", "IOMMProcessor"],
}
(folder / "model_index.json").write_text(json.dumps(index))
for name in REMOTE_CODE:
    shutil.copy(pathlib.Path(iomm_hf.__file__).parent / f"{name}.py", folder)
inputs = pipe.processor.encode([pipe.processor.text_to_image("a star")])
expected = {
    "condition": pipe.text_encoder(**inputs).condition.detach(),
    "picture": pipe("a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images,
}
torch.save(expected, folder / "expected.pt")
"""
LOAD = """
import sys
sys.modules["iomm_hf"] = None  # as if it were not installed
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoProcessor

folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt", weights_only=True)
model = AutoModel.from_pretrained(folder + "/text_encoder", trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder + "/processor", trust_remote_code=True)
condition = model(**processor.encode([processor.text_to_image("a star")])).condition
assert torch.equal(condition, expected["condition"])
assert "iomm_hf" not in type(model).__module__ and not model.mllm.training

pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
picture = pipe("a star", num_inference_steps=2, generator=generator, output_type="pt").images
assert torch.equal(picture, expected["picture"])
assert "iomm_hf" not in type(pipe).__module__ and "iomm_hf" not in type(pipe.text_encoder).__module__

for load in (lambda: AutoModel.from_pretrained(folder + "/text_encoder"), lambda: DiffusionPipeline.from_pretrained(folder)):
    try:
        load()
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError("remote code ran without being trusted")
"""


def test_remote_code_of_the_pipeline_and_its_parts(tmp_path, monkeypatch):
    """Code beside the weights gives the same condition and picture where iomm-hf is not installed."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    for script in (SAVE, LOAD):
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr[-3000:]
