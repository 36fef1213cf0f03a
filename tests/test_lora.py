"""LoRAs of the pipeline: files hold them alone, several mix, scales scale, fusing and unloading leave nothing behind."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iomm_hf.presets import PRESETS
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training.lora import ADAPTER_LAYERS
from iomm_hf.training.setup import hash_module


FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="session")
def z_image():
    """The preset `tiny` with the generator class of `xl`."""
    config = {
        "in_channels": 4,
        "dim": 64,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 128,
        "axes_dims": [8, 12, 12],
        "axes_lens": [128, 64, 64],
    }
    return replace(PRESETS["tiny"], transformer_class="ZImageTransformer2DModel", transformer_config=config)


def make_pipe(preset=PRESETS["tiny"]):
    pipe = tiny_pipeline(preset, connector_layers=1)
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero: make every weight count
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add(pipe, name: str, seed: int, parts=("transformer", "text_encoder"), alpha: int = 8):
    """A LoRA of rank 4 that changes something: peft's start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        model = getattr(pipe, part)
        targets = TARGETS if part == "transformer" else ADAPTER_LAYERS
        model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets), name)
        for key, weight in model.named_parameters():
            if f"lora_A.{name}." in key or f"lora_B.{name}." in key:
                torch.nn.init.normal_(weight, std=0.3, generator=generator)


@torch.no_grad()
def draw(pipe, **kwargs) -> torch.Tensor:
    arguments = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "latent", "height": 32, "width": 32}
    return pipe("a star", generator=torch.Generator().manual_seed(0), **arguments | kwargs).images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """LoRAs of the U-Net pipeline: `both`, of generator and adapter, and `generator`, of it alone."""
    folder, pipe = tmp_path_factory.mktemp("loras"), make_pipe()
    add(pipe, "both", seed=1)
    add(pipe, "generator", seed=2, parts=("transformer",))
    for name in ("both", "generator"):
        pipe.save_lora_weights(folder / name, **pipe.lora_layers(name))
    return folder


@pytest.mark.parametrize("family", ["unet", "flux", "z_image"])
def test_saved_and_loaded_it_is_the_same_and_the_file_holds_nothing_else(family, request, tmp_path):
    preset = PRESETS["tiny"] if family == "unet" else request.getfixturevalue(family)
    pipe = make_pipe(preset)
    without = draw(pipe)
    add(pipe, "style", seed=1)
    adapted = draw(pipe)
    assert (adapted - without).abs().max() > 1e-2
    pipe.save_lora_weights(tmp_path, **pipe.lora_layers("style"))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    keys = load_file(tmp_path / FILE).keys()
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)
    assert {key.split(".")[0] for key in keys} == {"transformer", "text_encoder"}
    assert not any("mllm" in key for key in keys)

    fresh = make_pipe(preset)
    fresh.load_lora_weights(tmp_path)
    assert fresh.get_list_adapters() == {"transformer": ["default_0"], "text_encoder": ["default_0"]}
    assert torch.equal(draw(fresh), adapted)
    assert torch.equal(draw(fresh, attention_kwargs={"scale": 1.0}), adapted)
    fresh.unload_lora_weights()
    assert torch.equal(draw(fresh), without) and fresh.get_list_adapters() == {}
    if family == "unet":  # weights in memory and a file say the same as its folder
        fresh.load_lora_weights(
            load_file(tmp_path / FILE), "no-metadata"
        )  # alpha is taken for the rank, which is half
        fresh.set_adapters("no-metadata", 2.0)
        assert torch.allclose(draw(fresh), adapted, atol=1e-5)
        fresh.load_lora_weights(tmp_path / FILE)
        assert torch.equal(draw(fresh), adapted)


def test_scales_grow_from_nothing_to_all(folder):
    pipe = make_pipe()
    without = draw(pipe)
    pipe.load_lora_weights(folder / "both", adapter_name="both")
    full = draw(pipe)
    pipe.set_adapters("both", 0.0)
    assert torch.allclose(draw(pipe), without, atol=1e-6)
    pipe.set_adapters("both", 0.25)
    assert 0 < (draw(pipe) - without).norm() < (full - without).norm()
    pipe.set_adapters("both", {"transformer": 1.0, "text_encoder": 0.0})
    generator_alone = draw(pipe)
    assert (generator_alone - full).abs().max() > 1e-3 and (generator_alone - without).abs().max() > 1e-3
    pipe.set_adapters("both", {"transformer": 0.0, "text_encoder": 1.0})
    adapter_alone = draw(pipe)
    pipe.set_adapters("both")
    # For one call, `scale` reaches the generator's part.
    assert torch.allclose(draw(pipe, attention_kwargs={"scale": 0.0}), adapter_alone, atol=1e-6)
    assert torch.equal(draw(pipe), full)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), without)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), full)


def test_the_last_one_loaded_is_active_alone_and_several_mix(folder):
    pipe = make_pipe()
    pipe.load_lora_weights(folder / "generator", adapter_name="generator")
    alone = draw(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder / "both", adapter_name="both")
    both = draw(pipe)
    pipe.load_lora_weights(folder / "generator", adapter_name="generator")
    assert pipe.get_list_adapters() == {"transformer": ["both", "generator"], "text_encoder": ["both"]}
    assert pipe.get_active_adapters() == ["generator"]
    assert torch.equal(draw(pipe), alone)  # the adapter's part of `both` is off as well
    pipe.set_adapters(["both", "generator"], [1.0, 0.5])
    mixed = draw(pipe)
    assert min((mixed - alone).abs().max(), (mixed - both).abs().max()) > 1e-3
    pipe.set_adapters(["both", "generator"], [1.0, 0.0])
    assert torch.allclose(draw(pipe), both, atol=1e-5)
    pipe.delete_adapters("generator")
    pipe.set_adapters("both")
    assert torch.equal(draw(pipe), both)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fused_unfused_and_unloaded(folder, scale):
    pipe = make_pipe()
    weights = hash_module(pipe.transformer), hash_module(pipe.text_encoder)
    without = draw(pipe)
    pipe.load_lora_weights(folder / "both", adapter_name="both")
    full = draw(pipe)
    pipe.set_adapters("both", scale)
    adapted = draw(pipe)
    pipe.set_adapters("both")
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.fused_loras == {"both"}
    assert torch.allclose(draw(pipe), adapted, atol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert torch.allclose(draw(pipe), full, atol=1e-4)  # its scale is back as well
    pipe.set_adapters("both", 0.0)
    assert torch.allclose(draw(pipe), without, atol=1e-4)
    pipe.unload_lora_weights()

    kept = make_pipe()
    kept.load_lora_weights(folder / "both")
    kept.fuse_lora(lora_scale=scale)
    kept.unload_lora_weights()
    assert torch.allclose(draw(kept), adapted, atol=1e-4)
    kept_weights = hash_module(kept.transformer), hash_module(kept.text_encoder)
    assert kept_weights[0] != weights[0] and kept_weights[1] != weights[1]


def test_each_part_is_unfused_by_the_scale_that_it_was_fused_with(folder):
    pipe = make_pipe()
    pipe.load_lora_weights(folder / "both", adapter_name="both")
    full = draw(pipe)
    pipe.fuse_lora(["transformer"], lora_scale=0.5)
    pipe.fuse_lora(["text_encoder"], lora_scale=2.0)
    pipe.unfuse_lora()
    assert torch.allclose(draw(pipe), full, atol=1e-4)


def test_the_frozen_mllm_answers_as_before(folder, images):
    pipe = make_pipe()
    question = pipe.processor.encode([pipe.processor.understand("What is it?", images[0])])
    answer = pipe.text_encoder.generate(**question, max_new_tokens=4, do_sample=False)
    weights = hash_module(pipe.text_encoder.mllm)
    pipe.load_lora_weights(folder / "both")
    assert hash_module(pipe.text_encoder.mllm) == weights
    assert torch.equal(pipe.text_encoder.generate(**question, max_new_tokens=4, do_sample=False), answer)


def test_a_pipeline_with_a_lora_is_not_torn_apart_by_saving(folder, tmp_path):
    pipe = make_pipe()
    pipe.load_lora_weights(folder / "both", adapter_name="both")
    with pytest.raises(ValueError, match="LoRAs are loaded.*'both'.*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    fused = type(pipe).from_pretrained(tmp_path / "pipe")
    fused.set_progress_bar_config(disable=True)
    assert torch.equal(draw(fused), expected)


def test_what_cannot_be_loaded_is_refused_with_the_reason(folder, tmp_path):
    pipe = make_pipe()
    without = draw(pipe)
    good = load_file(folder / "both" / FILE)
    with pytest.raises(OSError, match="pytorch_lora_weights.safetensors"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="safetensors files alone, got 'lora.bin'"):
        pipe.load_lora_weights(folder / "both", weight_name="lora.bin")
    with pytest.raises(ValueError, match="there are none"):
        pipe.load_lora_weights({})
    for key in ("unet.conv.lora_A.weight", "text_encoder.mllm.q_proj.lora_A.weight", "transformer.conv_in.weight"):
        save_file(good | {key: torch.zeros(1)}, tmp_path / "foreign.safetensors")
        with pytest.raises(ValueError, match=f"no LoRA of an IOMM pipeline.*{key}"):
            pipe.load_lora_weights(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="nothing to save"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="no LoRA named 'default'"):
        pipe.lora_layers()
    assert torch.equal(draw(pipe), without)
    pipe.load_lora_weights(folder / "both", adapter_name="both")
    with pytest.raises(ValueError, match="'both' is taken"):
        pipe.load_lora_weights(folder / "generator", adapter_name="both")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("before", [False, True])
def test_one_that_does_not_fit_leaves_nothing_behind(folder, part, before):
    pipe = make_pipe()
    if before:
        pipe.load_lora_weights(folder / "both", adapter_name="good")
        pipe.set_adapters("good", 0.5)
    expected, loaded, active = draw(pipe), pipe.get_list_adapters(), pipe.get_active_adapters()
    wide = load_file(folder / "both" / FILE)
    key = next(key for key in wide if key.startswith(part) and ".lora_A." in key)
    wide[key] = torch.zeros(4, 7)
    with pytest.raises(ValueError, match="does not fit the pipeline and was not loaded"):
        pipe.load_lora_weights(wide, adapter_name="bad")
    assert torch.equal(draw(pipe), expected) and pipe.get_active_adapters() == active
    assert {name: names for name, names in pipe.get_list_adapters().items() if names} == loaded
    pipe.load_lora_weights(folder / "both", adapter_name="bad")  # the name is free
    assert not torch.equal(draw(pipe), expected)


def test_the_file_is_the_same_in_every_process_and_names_no_path(folder):
    with safe_open(folder / "both" / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.target_modules"] == sorted(TARGETS)
    assert metadata["transformer.lora_alpha"] == metadata["text_encoder.lora_alpha"] == 8
    assert metadata["text_encoder.base_model_name_or_path"] is None


@pytest.mark.slow
def test_without_peft_everything_but_loras_works(tmp_path):
    """peft belongs to the `train` extra: drawing needs none."""
    code = """
import sys
sys.modules["peft"] = None
import importlib.metadata as metadata, importlib.util as util
version, find = metadata.version, util.find_spec
def missing(name):
    if name == "peft":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = missing
util.find_spec = lambda name, *rest: None if name == "peft" else find(name, *rest)
from iomm_hf.tiny import tiny_pipeline
pipe = tiny_pipeline()
pipe("a star", num_inference_steps=1, height=32, width=32)
pipe.save_pretrained(sys.argv[1])
try:
    pipe.load_lora_weights(sys.argv[1])
except ImportError as error:
    assert "pip install peft" in str(error)
else:
    raise AssertionError("nothing was refused")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
