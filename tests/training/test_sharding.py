"""Two CPU ranks (gloo): their gradient is one rank's, whole or sharded, and what trains is divided up to its checkpoints."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from iomm_hf import IOMMPipeline
from iomm_hf.cost import count_weights
from iomm_hf.data.collate import IOMMCollator
from iomm_hf.data.streams import SourceConfig, build_stream
from iomm_hf.presets import build_transformer
from iomm_hf.tiny import tiny_pipeline
from iomm_hf.training import IOMMTrainingModule, PretrainConfig, train
from iomm_hf.training.checkpoints import save_in_parts, whole
from iomm_hf.training.loop import update
from iomm_hf.training.module import local_part
from iomm_hf.training.optimizers import build_optimizers
from iomm_hf.training.sharding import build_once, check_sharded, place


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def on_ranks(number: int, function, *arguments):
    """Runs a function in forked processes, which see this one's objects."""
    debug_launcher(function, arguments, num_processes=number)


@pytest.fixture
def pipeline(flux):
    """With a generator of next to nothing (Muon iterates in bf16, which some CPUs only emulate), whose every weight counts."""
    sizes = {"num_single_layers": 1, "num_attention_heads": 1}
    pipeline = tiny_pipeline(replace(flux, transformer_config=flux.transformer_config | sizes), connector_layers=1)
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return pipeline


def make_module(pipeline: IOMMPipeline) -> IOMMTrainingModule:
    return IOMMTrainingModule(pipeline.text_encoder, pipeline.transformer, pipeline.vae, mask_ratio=0.5).train()


def gradient_and_step(pipeline, batches: list[dict], config: PretrainConfig, file: Path):
    """Writes what a rank's batches, one of each rank in turn, make of gradient and weights."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=config.gradient_accumulation)
    module = make_module(build_once(lambda: pipeline, accelerator))
    place(module, accelerator, config.fully_shard)
    wrapped = accelerator.prepare_model(module, evaluation_mode=config.fully_shard)
    weights = [weight for weight in wrapped.parameters() if weight.requires_grad]
    mine = iter(batches[accelerator.process_index :: accelerator.num_processes])
    written = {}
    for name, limit in (("free", 1e9), ("clipped", 0.01)):
        config = replace(config, max_grad_norm=limit)
        _, norm, _ = update(accelerator, wrapped, weights, [], mine, config, 2, Counter())
        written[name] = {
            "norm": norm,
            "gradient": {key: whole(p.grad).clone() for key, p in module.named_parameters() if p.requires_grad},
        }
        module.zero_grad()
    update(accelerator, wrapped, weights, build_optimizers(config, module), mine, config, 2, Counter())
    written["weights"] = {key: whole(p.detach()) for key, p in module.named_parameters() if p.requires_grad}
    if accelerator.is_main_process:
        torch.save(written, file)


# Its iteration in bf16 takes most of a minute on CPUs that emulate it.
MUON = pytest.param("muon", marks=pytest.mark.slow)


@pytest.mark.parametrize("optimizer", ["adamw", MUON])
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_have_gradient_norm_clipping_and_step_of_one(
    pipeline, processor, settings, parts, tmp_path, sharded, optimizer
):
    pairs = SourceConfig(str(parts / "pairs"), caption_column="json.prompt")
    stream = iter(build_stream([SourceConfig(str(parts / "images"))], [pairs], 0.5))
    collate = IOMMCollator(processor, resolution=64, condition_dropout=0.2)
    # Three updates of four batches, two a rank, padded to different lengths.
    batches = [collate([next(stream)]) for _ in range(12)]
    config = PretrainConfig(**settings | {"optimizer": optimizer, "learning_rate": 1e-3})
    start = {name: value.clone() for name, value in make_module(pipeline).trainable_state().items()}

    sharded_config = replace(config, fully_shard=sharded, gradient_accumulation=2)
    on_ranks(2, gradient_and_step, pipeline, batches, sharded_config, tmp_path / "two")
    gradient_and_step(pipeline, batches, replace(config, gradient_accumulation=4), tmp_path / "one")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for name in ("free", "clipped"):
        assert two[name]["norm"] == pytest.approx(one[name]["norm"], rel=1e-5)
        gradient = one[name]["gradient"]
        assert gradient.keys() == two[name]["gradient"].keys() == start.keys()
        total = torch.stack([part.norm() for part in gradient.values()]).norm()
        for key, part in gradient.items():
            difference = (two[name]["gradient"][key] - part).norm()
            assert difference <= 1e-5 * part.norm() + 1e-8 * total, key
        assert total.item() == pytest.approx(one[name]["norm"] if name == "free" else 0.01, rel=1e-4)
    assert one["free"]["norm"] > 0.1 and one["clipped"]["norm"] > 0.1  # there was something to clip
    moved, apart = (
        torch.cat([(one["weights"][key] - other[key]).flatten() for key in start]).norm()
        for other in (start, two["weights"])
    )
    # Muon iterates in bf16, in which whole gradients of so few samples are 20 % from float32 too; parts that were
    # orthogonalised each by itself would be 70 % off.
    assert apart < (0.3 if optimizer == "muon" else 1e-3) * moved


def place_and_write(pipeline, folder: Path):
    """Checks the parts of a sharded module on each rank, and writes its generator."""
    accelerator = Accelerator(cpu=True)
    before = {name: value.clone() for name, value in pipeline.text_encoder.named_parameters()}

    def build():
        assert accelerator.is_main_process
        return pipeline

    built = build_once(build, accelerator)
    weights = [weight for part in (built.text_encoder, built.transformer, built.vae) for weight in part.parameters()]
    assert {weight.is_meta for weight in weights} == {not accelerator.is_main_process}
    module = make_module(built)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    place(module, accelerator, sharded=True)
    check_sharded(module)
    assert trained == module.trainable_state().keys()
    for name, weight in module.encoder.named_parameters():  # the first rank's, whole or in parts
        assert torch.equal(whole(weight), before[name]), name
    parts = sum(local_part(weight).numel() for weight in module.parameters() if weight.requires_grad)
    all_of_them = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    assert 0.45 * all_of_them < parts < 0.55 * all_of_them
    assert module.encoder.mllm.lm_head.weight is module.encoder.mllm.get_input_embeddings().weight
    units = {type(part).__name__.removeprefix("FSDP") for part in module.modules() if isinstance(part, FSDPModule)}
    assert units == {"IOMMTrainingModule", *built.transformer._no_split_modules}
    save_in_parts(folder, accelerator, module.transformer, max_shard_size="50KB")


def test_what_trains_is_divided_and_nothing_else(pipeline, tmp_path):
    pipeline.transformer.save_config(tmp_path)
    on_ranks(2, place_and_write, pipeline, tmp_path)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    written = type(pipeline.transformer).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, written[name]) for name, value in pipeline.transformer.state_dict().items())
    with pytest.raises(RuntimeError, match=r"but encoder\.adapter\.\S+ is a Parameter"):
        check_sharded(make_module(pipeline))


def memory(line: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most since it was last reset."""
    [value] = re.findall(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(value) / 1024


def measure_memory(preset, sharded: bool, file: Path):
    """Writes by how much each rank's memory grew at most, while the model was built and while it was placed."""
    accelerator = Accelerator(cpu=True)
    before = memory("VmRSS")
    grew = {}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    pipeline = build_once(lambda: tiny_pipeline(preset), accelerator)
    grew["built"] = memory("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")
    place(make_module(pipeline), accelerator, sharded)
    grew["placed"] = memory("VmHWM") - before
    file.with_suffix(f".{accelerator.process_index}").write_text(json.dumps(grew))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux counts")
def test_host_memory_for_building_does_not_grow_with_the_ranks(flux, tmp_path):
    sizes = {"num_single_layers": 22, "num_attention_heads": 12}
    preset = replace(flux, transformer_config=flux.transformer_config | sizes)
    weights = 4 * count_weights(build_transformer(preset, device="meta")) / 2**20
    assert weights > 200
    grew = {}
    for ranks, sharded in ((1, False), (2, False), (2, True)):
        file = tmp_path / f"{ranks}-{sharded}"
        on_ranks(ranks, measure_memory, preset, sharded, file)
        grew[ranks, sharded] = [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
    print(f"\n{weights:.0f} MiB of weights; growth by (ranks, sharded), of each rank in MiB: {grew}")
    [alone] = grew[1, False]
    assert alone["built"] > 0.9 * weights
    for sharded in (False, True):
        first, second = grew[2, sharded]
        assert first["built"] < 1.15 * alone["built"]
        assert second["built"] < 0.15 * weights  # an outline
    # CPU ranks have no other memory to place weights in: here whole ones, there half of them and one tensor at a time.
    assert grew[2, True][1]["placed"] < 0.8 * weights < grew[2, False][1]["placed"]


def train_each(*configs: PretrainConfig):
    """One run after the other: what a process needs but once for its first step takes seconds."""
    for config in configs:
        train(config)


def read(path: Path) -> list:
    """What a file of `state/` holds, comparable."""
    if path.suffix == ".json":
        return [path.read_text()]
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(content)]


def in_parts(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    """Both ranks' parts of the tensors in a file, put together."""
    one, two = (load_file(checkpoint / "state" / f"{name}-rank-{rank}.safetensors") for rank in range(2))
    return {key: torch.cat([one[key], two[key]]) for key in one}


@pytest.mark.parametrize("optimizer", ["adamw", MUON])
def test_a_sharded_run_resumes_exactly_and_writes_pipelines(pipeline, settings, tmp_path, optimizer):
    pipeline.save_pretrained(tmp_path / "start")
    settings = {key: value for key, value in settings.items() if key not in ("mllm", "vae")}
    settings |= {
        "init_from": str(tmp_path / "start"),
        "fully_shard": True,
        "optimizer": optimizer,
        "gradient_accumulation": 2,
        "gradient_checkpointing": True,
        "batch_size": 1,
        "max_steps": 2,
        "save_every": 1,
        "validate_every": 1,
        "validation_prompts": ["a red circle", "a star"],
        "validation_steps": 1,
    }
    unbroken, run, last = tmp_path / "unbroken", Path(settings["output_dir"]), "checkpoint-00000002"
    changes = ({"output_dir": str(unbroken)}, {"max_steps": 1})
    on_ranks(2, train_each, *(PretrainConfig(**settings | change) for change in changes))
    on_ranks(2, train, PretrainConfig(**settings))

    states = [{path.name: path for path in (folder / last / "state").iterdir()} for folder in (unbroken, run)]
    kinds = (
        "trainable-rank-{}.safetensors",
        "ema-rank-{}.safetensors",
        "optimizer-rank-{}.bin",
        *(["optimizer_1-rank-{}.bin"] if optimizer == "muon" else []),  # and AdamW for the rest
        "random_states_{}.pkl",
        "rank-{}.json",
    )
    assert states[0].keys() == {kind.format(rank) for kind in kinds for rank in range(2)} | {"trainer.json"}
    # But for what names the run's folder, and the global random state, from which a loader draws when it starts.
    for name in states[0].keys() - {"trainer.json", "random_states_0.pkl", "random_states_1.pkl"}:
        one, two = (read(paths[name]) for paths in states)
        assert one and one == two, name
    assert (unbroken / "samples/step-00000002.png").read_bytes() == (run / "samples/step-00000002.png").read_bytes()

    trained, averaged = in_parts(run / last, "trainable"), in_parts(run / last, "ema")
    assert not torch.equal(trained["encoder.adapter.queries"], averaged["encoder.adapter.queries"])
    for folder in (run / last, run / "final"):
        pipe = IOMMPipeline.from_pretrained(folder)
        weights = {f"transformer.{name}": value for name, value in pipe.transformer.state_dict().items()}
        weights |= {f"encoder.{name}": value for name, value in pipe.text_encoder.named_parameters()}
        assert all(torch.equal(value, weights[name]) for name, value in averaged.items())
        frozen = pipeline.text_encoder.mllm.state_dict()
        assert all(torch.equal(value, frozen[name]) for name, value in pipe.text_encoder.mllm.state_dict().items())
    assert not (run / last / "vae").exists() and (run / "final/vae").is_dir()
    with pytest.raises(
        Exception, match="written by 2 processes and .* by 3. Launch as many, or start a new .*--init_from"
    ):
        on_ranks(3, train, PretrainConfig(**settings | {"max_steps": 3}))
