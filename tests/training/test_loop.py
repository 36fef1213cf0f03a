"""Runs: killed and resumed exactly, refused when they cannot be, and nothing half-written."""

import io
import json
import resource
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.modeling_iomm import hash_weight_files, load_mllm
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import FinetuneConfig, PretrainConfig, loop, train
from iomm_hf.training.checkpoints import list_checkpoints


def same_state(first: Path, second: Path) -> bool:
    """Whether two checkpoints agree bit for bit: weights, averages, optimizer, data order, what was skipped. The processes' own
    random states may differ, as a loader draws from them when it begins: nothing of a run derives from them."""
    for name in ("trainable.safetensors", "ema.safetensors"):
        one, two = load_file(first / "state" / name), load_file(second / "state" / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    optimizers = sorted(path.name for path in (first / "state").glob("optimizer*.bin"))
    assert optimizers and optimizers == sorted(path.name for path in (second / "state").glob("optimizer*.bin"))
    for name in optimizers:
        one, two = (torch.load(path / "state" / name, weights_only=True) for path in (first, second))
        assert one["param_groups"] == two["param_groups"]
        for key, state in one["state"].items():
            assert all(torch.equal(state[name], two["state"][key][name]) for name in state)
    one, two = (json.loads((path / "state" / "rank-0.json").read_text()) for path in (first, second))
    if "dataset_state" in one["loader"]:
        one["loader"], two["loader"] = (state["loader"]["dataset_state"] for state in (one, two))
    assert one == two
    one, two = (json.loads((path / "state" / "trainer.json").read_text()) for path in (first, second))
    return {k: v for k, v in one.items() if k != "config"} == {k: v for k, v in two.items() if k != "config"}


@contextmanager
def killed_in_step(number: int):
    """Stops the run inside an optimizer step, as a signal would."""
    calls = []
    original = loop.update

    def update(*args):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args)

    loop.update = update
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        loop.update = original


def rows(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_and_resumed_stage_1_equals_an_unbroken_run(settings, tmp_path, num_workers):
    # 12 steps of 3 read 36 samples of 24: the runs cross an epoch.
    settings |= {"num_workers": num_workers}
    train(PretrainConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    with killed_in_step(7):
        train(PretrainConfig(**settings))
    assert [path.name for path in list_checkpoints(Path(settings["output_dir"]))] == ["checkpoint-00000004"]
    (Path(settings["output_dir"]) / ".writing-checkpoint-00000008").mkdir()  # a kill while saving leaves this
    final = train(PretrainConfig(**settings))

    names = ["checkpoint-00000008", "checkpoint-00000012"]
    for run in (tmp_path / "unbroken", Path(settings["output_dir"])):
        assert [path.name for path in list_checkpoints(run)] == names  # rotation kept two
        assert not list(run.glob(".writing-*"))
    for name in names:
        assert same_state(tmp_path / "unbroken" / name, Path(settings["output_dir"]) / name)
    assert hash_weight_files(final / "transformer") == hash_weight_files(tmp_path / "unbroken/final/transformer")
    losses = [
        [(row["step"], row["loss"]) for row in rows(run)] for run in (tmp_path / "unbroken", settings["output_dir"])
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [2, 4, 6, 8, 10, 12]


def test_killed_and_resumed_stage_2_equals_an_unbroken_run(settings, parts, tmp_path):
    settings |= {
        "pairs": [{"path": str(parts / "pairs"), "caption_column": "json.prompt"}],
        "gradient_accumulation": 2,
        "max_steps": 8,
        "gradient_checkpointing": True,
        "condition_tokens": "all",
        "connector_layers": 1,
        "timestep_sampling": "logit_normal",
    }
    train(FinetuneConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    with killed_in_step(6):
        train(FinetuneConfig(**settings))
    train(FinetuneConfig(**settings))
    name = "checkpoint-00000008"
    assert same_state(tmp_path / "unbroken" / name, Path(settings["output_dir"]) / name)


def test_killed_and_resumed_between_aspect_ratios_equals_an_unbroken_run(settings, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (40 + 7 * i, 160 - 5 * i), (12 * i, 0, 90)).save(folder / f"{i}.png")
    settings |= {"images": [str(folder)], "aspect_ratios": ["1:2", "1:1", "2:1"], "num_workers": 2}
    train(PretrainConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    with killed_in_step(7):
        train(PretrainConfig(**settings))
    train(PretrainConfig(**settings))
    for name in ("checkpoint-00000008", "checkpoint-00000012"):
        assert same_state(tmp_path / "unbroken" / name, Path(settings["output_dir"]) / name)


def test_killed_and_resumed_with_muon_equals_an_unbroken_run(settings, flux, tmp_path):
    # A generator of next to nothing: Muon iterates in bf16, which some CPUs only emulate.
    sizes = {"num_single_layers": 1, "num_attention_heads": 1}
    tiny_pipeline(replace(flux, transformer_config=flux.transformer_config | sizes)).save_pretrained(
        tmp_path / "start"
    )
    settings = {key: value for key, value in settings.items() if key not in ("mllm", "vae")}
    settings |= {"init_from": str(tmp_path / "start"), "optimizer": "muon", "max_steps": 3, "save_every": 1}
    train(PretrainConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    with killed_in_step(3):
        train(PretrainConfig(**settings))
    train(PretrainConfig(**settings))
    name = "checkpoint-00000003"
    assert len(list((tmp_path / "unbroken" / name / "state").glob("optimizer*.bin"))) == 2
    assert same_state(tmp_path / "unbroken" / name, Path(settings["output_dir"]) / name)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_bf16_run_without_an_adapter_rounds_no_frozen_weights(settings, parts):
    settings |= {"mixed_precision": "bf16", "num_queries": 0, "condition_tokens": "all", "max_steps": 1}
    pipe = IOMMPipeline.from_pretrained(train(PretrainConfig(**settings)))
    frozen = load_mllm(parts / "mllm").state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in pipe.text_encoder.mllm.state_dict().items())


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_bf16_run_resumes_and_rounds_neither_trained_nor_frozen_weights(settings, parts, tmp_path):
    settings |= {
        "mixed_precision": "bf16",
        "connector_layers": 1,
        "max_steps": 3,
        "save_every": 1,
        "validate_every": 1,
        "validation_prompts": ["a star"],
        "validation_steps": 1,
    }
    train(PretrainConfig(**settings | {"output_dir": str(tmp_path / "unbroken")}))
    with killed_in_step(3):
        train(PretrainConfig(**settings))
    final = train(PretrainConfig(**settings))
    name = "checkpoint-00000003"
    assert same_state(tmp_path / "unbroken" / name, Path(settings["output_dir"]) / name)
    pipe = IOMMPipeline.from_pretrained(final)
    assert pipe.text_encoder.dtype == torch.float32
    frozen = load_mllm(parts / "mllm").state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in pipe.text_encoder.mllm.state_dict().items())


def test_stage_2_starts_from_stage_1_and_frozen_parts_stay_the_same(settings, parts, tmp_path):
    first = train(PretrainConfig(**settings | {"max_steps": 2}))
    stage_2 = {key: value for key, value in settings.items() if key not in ("mllm", "vae")} | {
        "output_dir": str(tmp_path / "stage2"),
        "init_from": str(first),
        "pairs": [{"path": str(parts / "pairs"), "caption_column": "json.prompt"}],
        "max_steps": 4,
        "validate_every": 2,
        "validation_prompts": ["a red circle", "two stars", "a heart"],
        "validation_steps": 2,
    }
    final = train(FinetuneConfig(**stage_2))
    for part, folder in (("mllm", parts / "mllm"), ("vae", parts / "vae")):
        assert hash_weight_files(tmp_path / "stage2" / "frozen" / part) == hash_weight_files(folder)
    before, after = IOMMPipeline.from_pretrained(first), IOMMPipeline.from_pretrained(final)
    changed = [
        not torch.equal(value, after.transformer.state_dict()[name])
        for name, value in before.transformer.state_dict().items()
    ]
    assert sum(changed) > 0.9 * len(changed)
    assert not torch.equal(before.text_encoder.adapter.queries, after.text_encoder.adapter.queries)
    for name, value in before.text_encoder.mllm.state_dict().items():
        assert torch.equal(value, after.text_encoder.mllm.state_dict()[name])
    assert Image.open(tmp_path / "stage2/samples/step-00000004.png").size == (3 * 64, 64)
    assert after("a red circle", num_inference_steps=2).images[0].size == (64, 64)


def test_checkpoints_are_pipelines_without_frozen_weights(settings):
    train(PretrainConfig(**settings | {"max_steps": 4}))
    checkpoint = list_checkpoints(Path(settings["output_dir"]))[-1]
    assert not (checkpoint / "vae").exists()
    names = load_file(checkpoint / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("adapter.") for name in names)
    trainable = load_file(checkpoint / "state" / "trainable.safetensors")
    assert all(name.startswith(("encoder.adapter.", "transformer.")) for name in trainable)
    pipe = IOMMPipeline.from_pretrained(checkpoint)
    averaged = load_file(checkpoint / "state" / "ema.safetensors")
    assert all(
        torch.equal(value, averaged[f"transformer.{name}"]) for name, value in pipe.transformer.state_dict().items()
    )
    assert not any(torch.equal(trainable[name], averaged[name]) for name in ("encoder.adapter.queries",))


def test_without_averaging_the_checkpoint_holds_the_weights_themselves(settings):
    train(PretrainConfig(**settings | {"max_steps": 4, "ema_decay": 0.0}))
    checkpoint = list_checkpoints(Path(settings["output_dir"]))[-1]
    assert not (checkpoint / "state" / "ema.safetensors").exists()
    trainable = load_file(checkpoint / "state" / "trainable.safetensors")
    pipe = IOMMPipeline.from_pretrained(checkpoint)
    assert torch.equal(pipe.transformer.state_dict()["conv_in.weight"], trainable["transformer.conv_in.weight"])


ON_HUB = """
from iomm_hf.training import PretrainConfig, train

settings = json.loads(sys.argv[1])
train(PretrainConfig(**settings))
"""


def test_a_run_goes_on_with_the_data_that_it_began_with(settings, parts, tmp_path, hub, client):
    tars = {path.name: path.read_bytes() for path in sorted((parts / "images").glob("*.tar"))}
    commit = hub.commit_files("user/pictures", tars, repo_type="dataset")
    settings |= {"images": ["hf://datasets/user/pictures/*.tar"], "max_steps": 4, "save_every": 2, "num_workers": 1}
    run, unbroken, last = Path(settings["output_dir"]), tmp_path / "unbroken", "checkpoint-00000004"
    environment = hub.environment(tmp_path / "home")
    client(environment, ON_HUB, json.dumps(settings | {"output_dir": str(unbroken)}))
    client(environment, ON_HUB, json.dumps(settings | {"max_steps": 2}))
    assert json.loads((run / "run.json").read_text())["data"] == {"user/pictures": commit}
    hub.commit_files("user/pictures", {name: next(iter(tars.values())) for name in tars}, repo_type="dataset")
    client(environment, ON_HUB, json.dumps(settings))
    assert same_state(unbroken / last, run / last)
    record = json.loads((run / "run.json").read_text())
    assert record["data"] == {"user/pictures": commit} and [part["step"] for part in record["resumed"]] == [2]


SOON_GIVING_UP = """
import datasets.config
datasets.config.STREAMING_READ_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
"""


def test_a_network_that_stays_away_ends_a_run_which_goes_on_exactly(settings, parts, tmp_path, hub, client):
    tars = {path.name: path.read_bytes() for path in sorted((parts / "images").glob("*.tar"))}
    hub.commit_files("user/far-away", tars, repo_type="dataset")
    settings |= {"images": ["hf://datasets/user/far-away/*.tar"], "max_steps": 6, "save_every": 2}
    run, unbroken, last = Path(settings["output_dir"]), tmp_path / "unbroken", "checkpoint-00000006"
    environment = hub.environment(tmp_path / "home")
    hub.requests.clear()
    client(environment, ON_HUB, json.dumps(settings | {"output_dir": str(unbroken)}))
    read = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and path.endswith(".tar")]
    third = list(dict.fromkeys(read))[2]  # 8 pictures a tar, 3 a step: it is opened in the sixth

    hub.fail_next(10_000, third, status=None)
    ending = ON_HUB.replace("train(", "print(refusal(train, ").rstrip() + ")"
    client(environment, SOON_GIVING_UP + ending, json.dumps(settings))
    hub.stop_failing()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-00000002", "checkpoint-00000004"]
    client(environment, ON_HUB, json.dumps(settings))
    assert same_state(unbroken / last, run / last)
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(unbroken)]
    assert not any(row["skipped"] for row in rows(run))


def test_a_checkpoint_of_an_earlier_version_is_refused(settings):
    train(PretrainConfig(**settings | {"max_steps": 4}))
    state = list_checkpoints(Path(settings["output_dir"]))[-1] / "state/rank-0.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "recent"}))
    with pytest.raises(ValueError, match="checkpoint-00000004 was written by an earlier iomm-hf.*--init_from"):
        train(PretrainConfig(**settings))


def test_the_adapter_has_its_own_rate(settings):
    config = PretrainConfig(**settings | {"max_steps": 1, "warmup_steps": 0, "adapter_learning_rate": 1e-5})
    train(config)
    trained = load_file(list_checkpoints(Path(settings["output_dir"]))[-1] / "state" / "trainable.safetensors")
    set_seed(config.seed)
    start = loop.build_pipeline(config)
    # AdamW's first step moves a weight by the rate
    queries = trained["encoder.adapter.queries"] - start.text_encoder.adapter.queries
    assert queries.abs().max().item() == pytest.approx(1e-5, rel=0.05)
    projection = trained["transformer.conv_out.weight"] - start.transformer.conv_out.weight
    assert projection.abs().max().item() == pytest.approx(1e-3, rel=0.05)


@contextmanager
def full_disk(bytes_a_file: int):
    """The system refuses to write on, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_checkpoint_and_the_run_goes_on_exactly(settings, tmp_path, monkeypatch):
    used: dict[int, list[str]] = {}  # keys by step; a step that is made again replaces what was lost
    step, original = 0, loop.update

    def update(*args):
        nonlocal step
        losses, grad_norm, keys = original(*args)
        step += 1
        used[step] = keys
        return losses, grad_norm, keys

    unbroken, run, last = tmp_path / "unbroken", Path(settings["output_dir"]), "checkpoint-00000012"
    train(PretrainConfig(**settings | {"output_dir": str(unbroken)}))
    monkeypatch.setattr(loop, "update", update)
    train(PretrainConfig(**settings | {"max_steps": 4}))
    before = {path: path.read_bytes() for path in (run / "checkpoint-00000004").rglob("*") if path.is_file()}
    largest = max((unbroken / last / "state").iterdir(), key=lambda path: path.stat().st_size)
    assert largest.name == "optimizer.bin"
    # The first file of the checkpoint does not fit, and then only the largest, which torch writes.
    for room in (1_000_000, largest.stat().st_size - 1000):
        step = 4
        with full_disk(room), pytest.raises(OSError, match="checkpoint-00000008.*Free some space"):
            train(PretrainConfig(**settings))
        assert step == 8
        assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-00000004", "final"]
        assert all(path.read_bytes() == content for path, content in before.items())
    step = 4
    train(PretrainConfig(**settings))
    for name in ("checkpoint-00000008", last):
        assert same_state(unbroken / name, run / name)
    assert hash_weight_files(run / "final/transformer") == hash_weight_files(unbroken / "final/transformer")
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(unbroken)]
    keys = [key for number in sorted(used) for key in used[number]]
    assert sorted(used) == list(range(1, 13)) and len(keys) == len(set(keys)) == 36
    assert sum(key.endswith("@0") for key in keys) == 24  # the whole first epoch, and half of the second


def test_bad_samples_are_skipped_and_counted(settings, parts, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (64 + i, 70), (40 * i, 0, 90)).save(folder / f"{i}.png")
    (folder / "text.png").write_text("not a picture")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    train(PretrainConfig(**settings | {"images": [str(folder)], "max_steps": 4}))
    skipped = rows(settings["output_dir"])[-1]["skipped"]
    assert sum(skipped.values()) >= 2 and len(skipped) == 2


def test_a_caption_longer_than_the_mllm_takes_is_skipped_and_counted(settings, parts, tmp_path):
    table = {"image": [], "text": ["a red circle", "a blue star", "circle " * 600]}
    for i in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (80 * i, 0, 90)).save(buffer, "PNG")
        table["image"].append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    pairs = [{"path": str(tmp_path / "pairs.parquet"), "image_column": "image", "caption_column": "text"}]
    train(FinetuneConfig(**settings | {"pairs": pairs, "mix_ratio": 0.0, "max_steps": 4}))
    assert rows(settings["output_dir"])[-1]["skipped"]["long_caption"] >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "huge"}, "'huge'"),
        ({"preset": "base", "mllm": None}, "OpenGVLab/InternVL3-2B-hf"),
        ({"mllm": "/nowhere/mllm"}, "/nowhere/mllm"),
        ({"resolution": 60}, "multiple of 16, got 60"),
        ({"images": ["/nowhere/images"]}, "/nowhere/images"),
        ({"aspect_ratios": ["1:1", "1.5"]}, "got '1.5'"),
        ({"aspect_ratios": ["1:1", "9:10"]}, "both 64x64 pixels"),
        ({"max_steps": 4, "init_from": "x", "vae_revision": "main"}, "brings its own mllm, vae, vae_revision; leave"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_value(settings, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(PretrainConfig(**settings | change))


def test_frozen_parts_of_tiny_come_with_the_package_and_stay_beside_the_run(settings):
    own = {key: value for key, value in settings.items() if key not in ("mllm", "vae")}
    final = train(PretrainConfig(**own | {"max_steps": 2, "save_every": 1}))
    shipped, pipe = IOMMPipeline.from_pretrained(shipped_model()), IOMMPipeline.from_pretrained(final)
    for one, two in ((shipped.text_encoder.mllm, pipe.text_encoder.mllm), (shipped.vae, pipe.vae)):
        assert all(torch.equal(weight, two.state_dict()[name]) for name, weight in one.state_dict().items())
    checkpoint = list_checkpoints(final.parent)[-1]
    config = IOMMPipeline.from_pretrained(checkpoint).text_encoder.config
    assert Path(config.mllm_name_or_path) == final.parent.resolve() / "frozen/mllm"
    assert shipped.transformer.num_parameters() == pipe.transformer.num_parameters()


def test_what_would_cost_steps_later_is_refused_before_the_first(settings, monkeypatch):
    with pytest.raises(ValueError, match="A validation prompt has .* tokens, and .* fit: 'star star"):
        train(PretrainConfig(**settings | {"validation_prompts": ["a star", "star " * 2000]}))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="gradient_accumulation=1, but ACCELERATE_.* says 4: unset it"):
        train(PretrainConfig(**settings))
    assert not list(Path(settings["output_dir"]).glob("checkpoint-*"))
