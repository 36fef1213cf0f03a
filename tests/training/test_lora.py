"""A LoRA's run: killed and resumed exactly, from pictures alone or with text, and nothing but the LoRA changes or is saved."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.data.shapes import corpus_scene, render
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import LoraTrainingConfig, loop, train
from iomm_hf.training.checkpoints import list_checkpoints
from iomm_hf.training.lora import hash_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline to adapt."""
    pipe = tiny_pipeline(connector_layers=1)
    for parameter in pipe.transformer.parameters():  # its last layer starts at zero, and would let no gradient through
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("base") / "my-base"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ten_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        Image.fromarray(render(corpus_scene(0, i)[0])).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def settings(base, ten_pictures, tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "init_from": str(base),
        "images": [str(ten_pictures)],
        "lora_rank": 2,
        "batch_size": 3,
        "num_workers": 0,
        "max_steps": 4,
        "save_every": 2,
        "log_every": 1,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "validate_every": 0,
    }


def kill_in_step(number: int, monkeypatch):
    """The next run stops inside an optimizer step, as by a signal."""
    steps = iter(range(1, number + 1))
    original = loop.update

    def update(*args):
        if next(steps) == number:
            monkeypatch.setattr(loop, "update", original)
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, "update", update)


def state_files(checkpoint: Path) -> dict[str, bytes]:
    """Weights, averages, optimizer and data order, as bytes."""
    names = ("trainable.safetensors", "ema.safetensors", "optimizer.bin", "rank-0.json")
    return {name: (checkpoint / "state" / name).read_bytes() for name in names}


def tensors_and_settings(file: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    with safe_open(file, "pt") as handle:
        settings = handle.metadata()
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}, settings


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_killed_and_resumed_from_pictures_alone_equals_an_unbroken_run(settings, base, tmp_path, monkeypatch):
    # 4 steps of 3 read 12 samples of 10: the runs cross an epoch.
    settings |= {"lora_on_adapter": True, "gradient_checkpointing": True, "ema_decay": 0.9}
    train(LoraTrainingConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    kill_in_step(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(LoraTrainingConfig(**settings))
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-00000002"]
    final = train(LoraTrainingConfig(**settings))
    for name in ("checkpoint-00000002", "checkpoint-00000004"):
        assert state_files(tmp_path / "unbroken" / name) == state_files(final.parent / name)
    file = "pytorch_lora_weights.safetensors"
    # The order of its settings in the file is another in every process.
    assert tensors_and_settings(final / file) == tensors_and_settings(tmp_path / "unbroken/final" / file)
    assert losses(final.parent) == losses(tmp_path / "unbroken") and len(losses(final.parent)) == 4

    # The LoRA alone trains and is kept, averaged; checkpoints load like the result.
    assert sorted(path.name for path in final.iterdir()) == ["README.md", file]
    checkpoint = list_checkpoints(final.parent)[-1]
    assert sorted(path.name for path in checkpoint.iterdir()) == [file, "state"]
    trained, averaged = (load_file(checkpoint / "state" / f"{name}.safetensors") for name in ("trainable", "ema"))
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {name.split(".")[0] for name in trained} == {"encoder", "transformer"}
    moved = [name for name, weight in trained.items() if ".lora_B." in name and weight.abs().max() > 0]
    assert len(moved) == len(trained) // 2
    saved = load_file(final / file)
    assert len(saved) == len(averaged)
    for name, weight in averaged.items():
        name = name.replace("encoder.", "text_encoder.", 1) if name.startswith("encoder.") else name
        assert torch.equal(saved[name.replace(".default", "")], weight)
    pipe = IOMMPipeline.from_pretrained(base)
    assert json.loads((final.parent / "run.json").read_text())["base_hash"] == hash_weights(pipe)
    for source in (final, checkpoint):
        pipe.load_lora_weights(source)
    card = (final / "README.md").read_text()
    for words in (
        "Unofficial",
        "| base | my-base |",
        "| rank, alpha | 2, 2 |",
        "| text | none |",
        "4 steps, 12 samples",
    ):
        assert words in card
    assert "adapter and connector" in card and str(base.parent) not in card and "base_model" not in card
    assert "| pictures from | files of the trainer's own |" in card


def test_with_captions_validation_and_a_best_score(settings, parts, tmp_path):
    settings |= {
        "images": [],
        "pairs": [{"path": str(parts / "pairs"), "caption_column": "json.prompt"}],
        "lora_targets": ["to_q", "conv1"],
        "lora_alpha": 4,
        "max_steps": 2,
        "validate_every": 2,
        "validation_prompts": ["a red circle", "two stars"],
        "validation_steps": 1,
        "eval_every": 2,
        "eval_pictures": 1,
    }
    final = train(LoraTrainingConfig(**settings))
    assert Image.open(final.parent / "samples/step-00000002.png").size == (2 * 64, 64)
    assert sorted(path.name for path in (final.parent / "best").iterdir()) == [
        "pytorch_lora_weights.safetensors",
        "score.json",
    ]
    card = (final / "README.md").read_text()
    assert "| rank, alpha | 2, 4 |" in card and "| text | captions |" in card and "`to_q`, `conv1`" in card
    pipe = IOMMPipeline.from_pretrained(settings["init_from"])
    pipe.load_lora_weights(final)
    assert pipe("a star", num_inference_steps=1).images[0].size == (64, 64)


def test_a_base_that_changed_is_not_resumed(settings, base, tmp_path):
    copy = tmp_path / "base"
    pipe = IOMMPipeline.from_pretrained(base)
    pipe.save_pretrained(copy)
    settings |= {"init_from": str(copy), "max_steps": 2}
    train(LoraTrainingConfig(**settings))
    with torch.no_grad():
        pipe.transformer.conv_in.bias += 1
    pipe.save_pretrained(copy)
    with pytest.raises(ValueError, match="weights in .*base have changed since this run began"):
        train(LoraTrainingConfig(**settings | {"max_steps": 4}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_targets": ["to_q", "to_z"]}, r"\['to_z'\] match no layer of UNet2DConditionModel"),
        ({"condition_tokens": "all"}, "brings its own condition_tokens"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_the_value(settings, change, message):
    with pytest.raises(ValueError, match=message):
        train(LoraTrainingConfig(**settings | change))


def test_an_adapter_without_layers_is_refused(settings, tmp_path):
    tiny_pipeline(adapter_type="plain").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="adapter and connector have no layers"):
        train(LoraTrainingConfig(**settings | {"init_from": str(tmp_path / "plain"), "lora_on_adapter": True}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give pictures"),
        ({"images": ["x"], "lora_rank": 0}, "lora_rank must be positive, got 0"),
        ({"images": ["x"], "lora_alpha": 0}, "lora_alpha must be positive, got 0"),
        ({"images": ["x"], "lora_targets": []}, "names no layer"),
        ({"images": ["x"], "fully_shard": True}, "leave it out"),
        ({"images": ["x"], "peak_tflops": 1.0}, "which a LoRA does not"),
    ],
)
def test_bad_settings_are_refused_with_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraTrainingConfig(**settings)


def test_sources_decide_the_mix_and_the_shipped_model_is_the_base():
    config = LoraTrainingConfig(images=["x"])
    assert config.mix_ratio == 1.0 and config.init_from == str(shipped_model())
    pairs = [{"path": "y", "caption_column": "txt"}]
    assert LoraTrainingConfig(pairs=pairs).mix_ratio == 0.0
    assert LoraTrainingConfig(images=["x"], pairs=pairs, mix_ratio=0.25).mix_ratio == 0.25
