"""By Hub id, against a local Hub and with the real clients: publishing, loading, referring to frozen parts, streaming."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.testing.hub_server import LocalHub
from iomm_hf.tiny import tiny_encoder, tiny_pipeline, tiny_vae


DRAW = """
def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a star", num_inference_steps=2, generator=generator, output_type="pt").images
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


def client(environment: dict[str, str], code: str, *arguments: str, fails_with: str | None = None) -> str:
    """Runs code in a fresh process, since clients read their settings at import."""
    code = f"import sys, torch\ntorch.set_num_threads(1)\n{DRAW}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if fails_with is None:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0 and fails_with in done.stderr, done.stderr[-3000:]
    return done.stdout


def folder_files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_pushed_pipeline_loads_by_id_pinned_and_offline(hub, tmp_path):
    environment = hub.environment(tmp_path / "home")
    client(
        environment,
        """
from iomm_hf.tiny import tiny_pipeline
pipe = tiny_pipeline()
pipe.push_to_hub("user/tiny")
torch.save(draw(pipe), sys.argv[1])
""",
        str(tmp_path / "picture.pt"),
    )
    first = hub.resolve("user/tiny").id
    # What must never be fetched: a resume's state, pickles, code.
    hub.commit_files("user/tiny", {"state/optimizer.bin": b"x", "unet/weights.pkl": b"x", "modeling_evil.py": b"x"})
    load = """
from iomm_hf import IOMMPipeline
pipe = IOMMPipeline.from_pretrained("user/tiny", revision=sys.argv[2])
assert torch.equal(draw(pipe), torch.load(sys.argv[1], weights_only=True))
"""
    fresh = hub.environment(tmp_path / "fresh")
    hub.requests.clear()
    client(fresh, load, str(tmp_path / "picture.pt"), "main")
    client(fresh, load, str(tmp_path / "picture.pt"), first)
    fetched = [path for method, path in hub.requests if "/resolve/" in path]
    assert any(path.endswith("model_index.json") for path in fetched)
    assert not [path for path in fetched if path.endswith((".bin", ".pkl", ".py")) or "/state/" in path]

    hub.requests.clear()
    client(fresh | {"HF_HUB_OFFLINE": "1"}, load, str(tmp_path / "picture.pt"), "main")
    assert hub.requests == []


@pytest.fixture(scope="module")
def frozen(hub, tmp_path_factory, processor):
    """Frozen parts on the Hub: an MLLM in InternVL's layout, an autoencoder in a folder of another repository."""
    folder = tmp_path_factory.mktemp("frozen")
    tiny_encoder(processor).mllm.save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "mllm")
    tiny_vae().save_pretrained(folder / "vae")
    return {
        "mllm": hub.commit_files("user/mllm", folder_files(folder / "mllm")),
        "vae": hub.commit_files("user/parts", folder_files(folder / "vae", "vae/")),
        "folder": folder,
    }


TRAIN = """
from iomm_hf.training import PretrainConfig, train
train(PretrainConfig(
    output_dir=sys.argv[1], preset="tiny", mllm="user/mllm", vae="user/parts", vae_subfolder="vae", images=[sys.argv[2]],
    batch_size=2, max_steps=int(sys.argv[3]), save_every=2, num_workers=0, shuffle_block=8, validate_every=0,
))
"""


def test_a_run_on_hub_ids_records_revisions_resumes_and_its_checkpoint_refers_to_them(hub, frozen, tmp_path):
    write_shards(tmp_path / "pictures", 16, captions=False, samples_per_shard=8)
    hub.commit_files("user/pictures", folder_files(tmp_path / "pictures"), repo_type="dataset")
    environment = hub.environment(tmp_path / "home")
    run = tmp_path / "run"
    client(environment, TRAIN, str(run), "user/pictures", "2")
    client(environment, TRAIN, str(run), "user/pictures", "4")  # streams on from the checkpoint
    assert ("GET", "/api/datasets/user/pictures/revision/main") in hub.requests or any(
        "user/pictures" in path for _, path in hub.requests
    )
    final = run / "final"
    encoder = json.loads((final / "text_encoder/config.json").read_text())
    index = json.loads((final / "model_index.json").read_text())
    assert (encoder["mllm_name_or_path"], encoder["mllm_revision"]) == ("user/mllm", frozen["mllm"])
    assert (index["vae_name_or_path"], index["vae_subfolder"]) == ("user/parts", "vae")
    assert index["vae_revision"] == frozen["vae"] and len(encoder["mllm_hash"]) == len(index["vae_hash"]) == 64
    assert not (final / "vae").exists()

    # A later commit to the MLLM does not reach a checkpoint that pins its revision.
    load = "from iomm_hf import IOMMPipeline\ndraw(IOMMPipeline.from_pretrained(sys.argv[1]))"
    changed = tiny_pipeline(seed=1).text_encoder.mllm
    changed.save_pretrained(tmp_path / "changed")
    hub.commit_files("user/mllm", folder_files(tmp_path / "changed"))
    client(hub.environment(tmp_path / "fresh"), load, str(final))

    # Another repository under the same name, or none, is an error that names what is wanted.
    config = final / "text_encoder/config.json"
    config.write_text(json.dumps(encoder | {"mllm_revision": "main"}))
    client(
        hub.environment(tmp_path / "fresh"),
        load,
        str(final),
        fails_with="not the one that this checkpoint was trained",
    )
    config.write_text(json.dumps(encoder | {"mllm_name_or_path": "user/gone", "mllm_revision": None}))
    client(hub.environment(tmp_path / "fresh"), load, str(final), fails_with="The frozen weights 'user/gone'")


def test_streams_read_hub_datasets_by_id_and_by_glob(hub, tmp_path):
    write_shards(tmp_path / "tars", 12, samples_per_shard=4)
    write_shards(tmp_path / "parquet", 12, samples_per_shard=6, layout="parquet")
    for layout in ("tars", "parquet"):
        hub.commit_files(f"user/{layout}", folder_files(tmp_path / layout), repo_type="dataset")
    code = """
from iomm_hf.data.streams import SampleStream, SourceConfig
for path, column in (
    ("user/tars", "json.prompt"), ("hf://datasets/user/tars/*.tar", "json.prompt"), ("user/parquet", "prompt"),
):
    make = lambda: SampleStream(SourceConfig(path, caption_column=column), block_size=4)
    stream = make()
    samples = iter(stream)
    epoch = [next(samples) for _ in range(12)]
    assert len({sample["key"] for sample in epoch}) == 12 and {sample["epoch"] for sample in epoch} == {0}
    assert all(sample["image"].size == (64, 64) and sample["caption"] for sample in epoch)
    first = make()
    taken = iter(first)
    for _ in range(5):
        next(taken)
    second = make()
    second.load_state_dict(first.state_dict())
    assert [sample["key"] for _, sample in zip(range(7), second)] == [sample["key"] for sample in epoch[5:]]
try:
    SampleStream(SourceConfig("user/nothing"))
except (ValueError, OSError) as error:
    assert "user/nothing" in str(error)
else:
    raise AssertionError("a missing dataset was opened")
"""
    client(hub.environment(tmp_path / "home"), code)
