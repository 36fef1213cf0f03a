"""The paper's runs: their settings, their public data in small copies on a local Hub, and their launchers."""

import io
import json
import math
import re
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from PIL import Image
from trl import TrlParser

from iomm_hf.presets import PRESETS
from iomm_hf.testing.hub_server import LocalHub
from iomm_hf.tiny import tiny_encoder, tiny_vae
from iomm_hf.training import FinetuneConfig, PretrainConfig


ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "recipes/accelerate"
CONFIGS = [
    path
    for size in ("base", "large", "xl")
    for path in sorted((ROOT / "recipes/configs").glob(f"{size}-*.yaml"))[::-1]
]
COMMAND = re.compile(r"accelerate launch --config_file (\S+) (\S+) --config (\S+)")


def settings(path: Path):
    config_class = PretrainConfig if "pretrain" in path.stem else FinetuneConfig
    return TrlParser(config_class).parse_args_and_config(["--config", str(path)])[0]


def test_each_of_the_papers_runs_has_a_config():
    assert sorted(path.stem for path in CONFIGS) == [
        *(f"{size}-{stage}" for size in ("base", "large") for stage in ("finetune-1024", "finetune-512", "pretrain")),
        *("xl-finetune-512", "xl-pretrain"),
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_are_the_papers(path):
    config, (size, stage, *pixels) = settings(path), path.stem.split("-")
    launcher, recipe, named = COMMAND.search(path.read_text()).groups()
    assert ROOT / named == path and (ROOT / recipe).is_file()
    processes = load_config_from_file(str(ROOT / launcher)).num_processes
    assert (
        f"\n# {processes} GPUs x {config.batch_size} samples x {config.gradient_accumulation} forward"
        in path.read_text()
    )

    global_batch = processes * config.batch_size * config.gradient_accumulation
    assert config.global_batch_size == global_batch
    if stage == "pretrain":
        assert global_batch == {"base": 1024, "large": 512, "xl": 4096}[size]
        assert config.resolution == 512 and config.mix_ratio == 1
    else:
        assert global_batch == {512: 256, 1024: 96}[config.resolution] and str(config.resolution) == pixels[0]
        assert (
            config.mix_ratio == 0.5
            and config.init_from == settings(path.with_stem(f"{size}-pretrain")).output_dir + "/final"
        )
        assert all("geneval_train*" in source.exclude for source in config.paired_sources if "BLIP3o" in source.path)
    assert config.mask_ratio == PRESETS[size].mask_ratio == (0.45 if size == "xl" else 0.85)
    assert config.optimizer == ("muon" if size == "xl" else "adamw")
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2) == (1e-4, 0.9, 0.95)
    assert (config.max_grad_norm, config.weight_decay) == (1.0, 0.0)
    assert config.ema_decay == (0.999 if size == "base" else 0)
    assert config.fully_shard == (size == "xl")
    assert (config.timestep_sampling, config.timestep_shift) == ("uniform", 1.0)


LAUNCHED = {  # variables that each launcher gives to its processes
    "cpu": {"ACCELERATE_MIXED_PRECISION": "no"},
    "ddp": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "fsdp2": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "multi-node": {"ACCELERATE_MIXED_PRECISION": "bf16"},
    "deepspeed-zero2": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in LAUNCHERS.glob("*.yaml")))
def test_launchers_are_understood_by_accelerate(name):
    arguments = ["--config_file", str(LAUNCHERS / f"{name}.yaml"), "--main_process_ip", "10.0.0.1", "recipe.py"]
    if name == "multi-node":
        arguments = ["--machine_rank", "3", *arguments]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if name == "deepspeed-zero2":
        parsed.deepspeed_fields_from_accelerate_config = ""
        environment = prepare_deepspeed_cmd_env(parsed)[1]
    else:
        environment = prepare_multi_gpu_env(parsed)
    assert environment.items() >= LAUNCHED[name].items()
    assert (parsed.nproc_per_node, parsed.num_processes) == {"cpu": ("2", 2), "multi-node": ("8", 64)}.get(
        name, ("8", 8)
    )
    if name == "multi-node":
        assert (parsed.nnodes, parsed.node_rank, parsed.rdzv_endpoint) == ("8", 3, "10.0.0.1:29500")


def test_deepspeed_would_shard_in_two_and_clip_as_the_configs_say(monkeypatch):
    """What Accelerate hands to DeepSpeed, which is not installed here and refused by `train`."""
    arguments = ["--config_file", str(LAUNCHERS / "deepspeed-zero2.yaml"), "recipe.py"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ""
    environment = prepare_deepspeed_cmd_env(parsed)[1]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    handed = DeepSpeedPlugin().deepspeed_config
    assert handed["zero_optimization"]["stage"] == 2
    assert {handed["zero_optimization"][f"offload_{what}"]["device"] for what in ("optimizer", "param")} == {"none"}
    for path in CONFIGS:
        config = settings(path)
        assert handed["gradient_clipping"] == config.max_grad_norm
        assert environment["ACCELERATE_MIXED_PRECISION"] == config.mixed_precision == "bf16"


def picture(number: int, kind: str = "JPEG") -> bytes:
    """One colour, which tells its number even after JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (72, 64), (10 * number, 100, 50)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def archive(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def lines(records: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def public_sets() -> dict[str, dict[str, bytes]]:
    """Small copies of the public sets, in the layouts that the README cites; text n belongs to colour n."""
    blip3o = (  # https://github.com/PeppaKing8/minit2i-jax, scripts/datasets/download_blip3o_60k.py
        *("dalle3", "geneval_train", "human_gestures", "journeyDB", "mscoco_human", "object_1", "object_2"),
        *("occupation_1", "occupation_2", "text_1", "text_2"),
    )
    echo = {}
    for folder, texts in (
        ("Instruction-Following-Image", "Instruction-Following-Image.jsonl"),
        ("Surrel-Fantasy-Image", "conflict.jsonl"),
    ):
        for start in (0, 4):
            files = {f"{n:05d}.jpg": picture(n) for n in range(start, start + 4)}
            echo[f"{folder}/images/{start}-{start + 4}.tar.gz"] = archive(files, "w:gz")
        path = f"/Echo-4o-Image/{folder}/images/"
        echo[f"{folder}/{texts}"] = lines(
            [
                {"task_type": "t2i", "instruction": str(n), "output_image": f"{path}{n:05d}.jpg", "type": "easy"}
                for n in range(8)
            ]
        )
    return {
        "drawthingsai/megalith-10m": {
            f"{shard:05d}.tar": archive({f"{shard:05d}{n:04d}.jpg": picture(n) for n in range(6)})
            for shard in range(2)
        }
        | {"00000.parquet": b"addresses, which are not read"},
        "jackyhate/text-to-image-2M": {
            f"{folder}/data_{shard:06d}.tar": archive(
                {
                    f"{n:08d}.{ending}": content
                    for n in range(6)
                    for ending, content in (("jpg", picture(n)), ("json", json.dumps({"prompt": str(n)}).encode()))
                }
            )
            for folder, shards in (("data_512_2M", 2), ("data_1024_10K", 1))
            for shard in range(shards)
        },
        "BLIP3o/BLIP3o-60k": {
            f"{name}.tar": archive(
                {
                    f"{n:05d}.{ending}": content
                    for n in range(2)
                    for ending, content in (("jpg", picture(n)), ("txt", f"{n}\n".encode()))
                }
            )
            for name in blip3o
        },
        "Yejy53/Echo-4o-Image": echo,
        "FreedomIntelligence/ShareGPT-4o-Image": {
            **{
                f"text_to_image_part_{shard}.tar": archive(
                    {f"image/{n}.png": picture(n, "PNG") for n in range(4 * shard, 4 * shard + 4)}
                )
                for shard in range(2)
            },
            "text_and_image_to_image_part_0.tar": archive({"image/0.png": b"not read"}),
            "text_to_image.json": json.dumps(
                [{"input_prompt": str(n), "output_image": f"image/{n}.png"} for n in range(8)]
            ).encode(),
        },
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory, processor):
    """The public sets, and tiny frozen parts under the names of the paper's."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_encoder(processor).mllm.save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "mllm")
    tiny_vae().save_pretrained(folder / "flux/vae")
    with LocalHub(folder / "served") as hub:
        for name, files in public_sets().items():
            hub.commit_files(name, files, repo_type="dataset")
        for name, part in ((PRESETS["base"].mllm, "mllm"), (PRESETS["base"].vae, "flux")):
            files = {
                str(p.relative_to(folder / part)): p.read_bytes() for p in (folder / part).rglob("*") if p.is_file()
            }
            hub.commit_files(name, files)
        yield hub


RUN = '''
"""Runs configs as they are, but for the size of everything."""
import os, runpy, sys
from dataclasses import replace
from pathlib import Path
from iomm_hf.presets import PRESETS

tiny = dict(condition_config=PRESETS["tiny"].condition_config, resolution=64)
flux = dict(
    in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32,
    joint_attention_dim=128, pooled_projection_dim=128, axes_dims_rope=(8, 12, 12),
)
z_image = dict(
    in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=128,
    axes_dims=[8, 12, 12], axes_lens=[128, 64, 64],
)
for name, config in (("base", flux), ("large", flux), ("xl", z_image)):
    PRESETS[name] = replace(PRESETS[name], transformer_config=config, **tiny)

output = Path(sys.argv[1])
for config in map(Path, sys.argv[2:]):
    size, stage, *_ = config.stem.split("-")
    recipe = config.parents[1] / ("pretrain_image_only.py" if stage == "pretrain" else "finetune_mixed.py")
    smaller = {
        "output_dir": output / config.stem, "max_steps": 2, "batch_size": 1, "gradient_accumulation": 1,
        "global_batch_size": int(os.environ.get("WORLD_SIZE", 1)), "resolution": 64, "shuffle_block": 4, "num_workers": 0, "log_every": 1, "tracker": "none",
    }
    if "WORLD_SIZE" not in os.environ:
        smaller["fully_shard"] = False  # one process has nobody to share with
    elif "ACCELERATE_USE_FSDP" in os.environ:
        smaller["fully_shard"] = True  # which fsdp2.yaml wants to be told
    if stage == "finetune":
        smaller["init_from"] = output / f"{size}-pretrain" / "final"
    sys.argv = [str(recipe), "--config", str(config)]
    for name, value in smaller.items():
        sys.argv += [f"--{name}", str(value)]
    runpy.run_path(str(recipe), run_name="__main__")
'''


def run(hub, folder: Path, configs: list[Path], *launchers: list[str]):
    """Runs them once, or once by each of these launchers at the same time: a machine each."""
    script = folder / "run.py"
    script.write_text(RUN)
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, str(script), str(folder), *map(str, configs)],
            env=hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for launcher in launchers or [[]]
    ]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]


def check(hub, folder: Path, configs: list[Path], processes: int):
    for config in configs:
        output = folder / config.stem
        rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
        assert rows[-1]["images"] == 2 * processes and rows[-1]["skipped"] == {}
        frozen = json.loads((output / "run.json").read_text())["frozen"]
        for part in ("mllm", "vae"):
            name = getattr(PRESETS["base"], part)
            assert (frozen[f"{part}_name_or_path"], frozen[f"{part}_revision"]) == (name, hub.resolve(name).id)
            assert len(frozen[f"{part}_hash"]) == 64
        assert json.loads((output / "final/text_encoder/config.json").read_text()).items() >= {
            (name, value) for name, value in frozen.items() if name.startswith("mllm")
        }


def test_every_config_runs_with_a_tiny_model_on_copies_of_its_data(hub, tmp_path):
    hub.requests.clear()
    run(hub, tmp_path, CONFIGS)
    check(hub, tmp_path, CONFIGS, processes=1)
    fetched = "\n".join(path for _, path in hub.requests if "/lfs/" in path or "/resolve/" in path)
    assert "dalle3.tar" in fetched and "geneval_train" not in fetched and "text_and_image" not in fetched
    assert "parquet" not in fetched


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "multi-node"])
def test_every_config_runs_on_two_ranks_of_every_launcher(hub, tmp_path, name):
    for config in CONFIGS:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / f"{name}.yaml")]
        if name != "cpu":
            with socket.socket() as listener:  # a port that is free
                listener.bind(("127.0.0.1", 0))
                port = str(listener.getsockname()[1])
            launcher += ["--num_processes", "2", "--main_process_port", port]
        launchers = [launcher]
        if name == "multi-node":
            machines = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--machine_rank"]
            launchers = [[*launcher, *machines, str(rank)] for rank in range(2)]
        run(hub, tmp_path, [config], *launchers)
    check(hub, tmp_path, CONFIGS, processes=2)


LAYOUTS = """
import json, sys
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream
for source, count in json.loads(sys.argv[1]):
    epoch = {}
    for sample in SampleStream(SourceConfig(**source), block_size=4):
        if sample["epoch"]:
            break
        assert sample["skipped"] == {}, sample
        epoch[sample["key"]] = sample
    assert len(epoch) == count, (source["path"], len(epoch))
    for sample in epoch.values():
        number = round(sample["image"].getpixel((0, 0))[0] / 10)
        assert sample["caption"] == (str(number) if source["caption_column"] else None), sample
"""


def test_each_public_set_is_streamed_whole_and_text_fits_picture(hub, tmp_path):
    pretrain, finetune = (
        settings(ROOT / f"recipes/configs/base-{stage}.yaml") for stage in ("pretrain", "finetune-512")
    )
    sources = [*pretrain.image_sources, *finetune.image_sources, *finetune.paired_sources]
    counts = [12, 18, *[20, 8, 8, 8] * 2]
    with_texts = vars(pretrain.image_sources[1]) | {"caption_column": "json.prompt"}
    arguments = [*zip(map(vars, sources), counts, strict=True), (with_texts, 18)]
    done = subprocess.run(
        [sys.executable, "-c", LAYOUTS, json.dumps(arguments)],
        env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
