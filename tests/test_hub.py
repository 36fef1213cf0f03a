"""By Hub id, against a local Hub and with the real clients: publishing, loading, referring to frozen parts, streaming."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iomm_hf.data.shapes_writer import write_shards
from iomm_hf.tiny import tiny_encoder, tiny_vae


def folder_files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


PUSH = """
from iomm_hf.tiny import tiny_pipeline
pipe = tiny_pipeline()
pipe.push_to_hub("user/tiny")
torch.save(draw(pipe), sys.argv[1])
"""
LOAD = """
from iomm_hf import IOMMPipeline
expected = torch.load(sys.argv[1], weights_only=True)
for revision in sys.argv[2:]:
    assert torch.equal(draw(IOMMPipeline.from_pretrained("user/tiny", revision=revision)), expected)
"""


def test_a_pushed_pipeline_loads_by_id_pinned_and_offline(hub, client, tmp_path):
    picture = str(tmp_path / "picture.pt")
    client(hub.environment(tmp_path / "publisher"), PUSH, picture)
    pushed = hub.resolve("user/tiny").id
    # What must never be fetched: a resume's state, pickles, code.
    hub.commit_files(
        "user/tiny",
        {"state/trainer.json": b"{}", "state/optimizer.bin": b"x", "unet/weights.pkl": b"x", "modeling_evil.py": b"x"},
    )
    reader = hub.environment(tmp_path / "reader")
    hub.requests.clear()
    client(reader, LOAD, picture, "main", pushed)
    fetched = [path for method, path in hub.requests if "/resolve/" in path]
    assert any(path.endswith("model_index.json") for path in fetched)
    assert not [path for path in fetched if path.endswith((".bin", ".pkl", ".py")) or "/state/" in path]

    hub.requests.clear()
    client(reader | {"HF_HUB_OFFLINE": "1"}, LOAD, picture, "main", pushed)
    assert hub.requests == []


@pytest.fixture(scope="module")
def frozen(hub, tmp_path_factory, processor) -> dict[str, str]:
    """Revisions of frozen parts on the Hub: an MLLM in InternVL's layout, an autoencoder in another repo's folder."""
    folder = tmp_path_factory.mktemp("frozen")
    tiny_encoder(processor).mllm.save_pretrained(folder / "mllm")
    processor.save_pretrained(folder / "mllm")
    tiny_vae().save_pretrained(folder / "vae")
    return {
        "mllm": hub.commit_files("user/mllm", folder_files(folder / "mllm")),
        "vae": hub.commit_files("user/parts", folder_files(folder / "vae", "vae/")),
    }


TRAIN = """
from iomm_hf.training import PretrainConfig, train
for argument in sys.argv[1:]:
    output_dir, max_steps = argument.split("@")
    train(PretrainConfig(
        output_dir=output_dir, preset="tiny", mllm="user/mllm", vae="user/parts", vae_subfolder="vae",
        images=["user/pictures", "hf://datasets/user/more/*.parquet"], batch_size=2, max_steps=int(max_steps),
        save_every=2, num_workers=0, shuffle_block=8, validate_every=0,
    ))
"""
LOAD_REFERRING = """
import json, pathlib, shutil
from huggingface_hub.constants import HF_HUB_CACHE
from iomm_hf import IOMMPipeline

folder, blob, revision = sys.argv[1:]
load = lambda: IOMMPipeline.from_pretrained(folder)

# Other content under the same commit, as a tampered mirror or cache would give, is found out by its hash.
blob = pathlib.Path(blob)
content = blob.read_bytes()
blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
assert "The autoencoder in" in (said := refusal(load)) and "is not the one" in said, said
blob.write_bytes(content)
shutil.rmtree(pathlib.Path(HF_HUB_CACHE) / "models--user--parts")

# The MLLM changed on the Hub since; the checkpoint pins what it was trained with.
pipe = load()
draw(pipe)
weights = pipe.text_encoder.mllm.state_dict()
torch.save(weights, folder + ".pt")

config = pathlib.Path(folder) / "text_encoder/config.json"
saved = json.loads(config.read_text())
for change, expected in (
    ({"mllm_revision": "main"}, ["The MLLM in", "is not the one that this checkpoint was trained with", "'main'"]),
    ({"mllm_revision": "0" * 40}, ["The frozen weights 'user/mllm'", "0" * 40]),
    ({"mllm_name_or_path": "user/gone"}, ["The frozen weights 'user/gone'", revision]),
    ({"mllm_name_or_path": None}, ["no mllm_name_or_path"]),
):
    config.write_text(json.dumps(saved | change))
    said = refusal(load)
    assert said.startswith("OSError") and all(part in said for part in expected), said
"""


def test_a_run_on_hub_ids_resumes_and_its_checkpoints_pin_frozen_parts(hub, client, frozen, tmp_path, processor):
    write_shards(tmp_path / "pictures", 16, captions=False, samples_per_shard=8)
    write_shards(tmp_path / "more", 8, seed=1, captions=False, layout="parquet")
    for name in ("pictures", "more"):
        hub.commit_files(f"user/{name}", folder_files(tmp_path / name), repo_type="dataset")
    home = hub.environment(tmp_path / "home")
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    client(home, TRAIN, f"{run}@2")
    client(home, TRAIN, f"{run}@6", f"{unbroken}@6")  # the first streams on from its checkpoint
    for file in ("trainable.safetensors", "ema.safetensors"):
        one, two = (load_file(path / "checkpoint-00000006/state" / file) for path in (run, unbroken))
        assert all(torch.equal(value, two[name]) for name, value in one.items())

    final = run / "final"
    encoder = json.loads((final / "text_encoder/config.json").read_text())
    index = json.loads((final / "model_index.json").read_text())
    assert (encoder["mllm_name_or_path"], encoder["mllm_revision"]) == ("user/mllm", frozen["mllm"])
    assert (index["vae_name_or_path"], index["vae_subfolder"]) == ("user/parts", "vae")
    assert index["vae_revision"] == frozen["vae"] and len(encoder["mllm_hash"]) == len(index["vae_hash"]) == 64
    assert not (final / "vae").exists()

    original = tiny_encoder(processor).mllm
    tiny_encoder(processor, seed=1).mllm.save_pretrained(tmp_path / "changed")
    hub.commit_files("user/mllm", folder_files(tmp_path / "changed"))
    weights = "vae/diffusion_pytorch_model.safetensors"
    blob = hub.blob_path(hub.resolve("user/parts").files[weights].sha256)
    client(hub.environment(tmp_path / "fresh"), LOAD_REFERRING, str(final), str(blob), frozen["mllm"])
    loaded = torch.load(f"{final}.pt", weights_only=True)
    assert all(torch.equal(value, loaded[name]) for name, value in original.state_dict().items())


def test_a_cut_connection_to_the_pictures_changes_nothing(hub, client, frozen, tmp_path):
    write_shards(tmp_path / "more", 16, seed=1, captions=False, samples_per_shard=8)
    hub.commit_files("user/cut", folder_files(tmp_path / "more"), repo_type="dataset")
    code = TRAIN.replace("hf://datasets/user/more/*.parquet", "user/cut").replace('"user/pictures", ', "")
    run, unbroken = tmp_path / "cut", tmp_path / "undisturbed"
    client(hub.environment(tmp_path / "one"), code, f"{unbroken}@3")
    files = hub.resolve("user/cut", repo_type="dataset").files
    cut = next(f"/lfs/{file.sha256}" for name, file in sorted(files.items()) if name.endswith(".tar"))
    hub.requests.clear()
    hub.fail_next(2, path_contains=cut, status=None)  # half of the tar's bytes, twice
    client(hub.environment(tmp_path / "two"), code, f"{run}@3")
    assert sum(method == "GET" and cut in path for method, path in hub.requests) > 2  # both cut, then whole
    one, two = (load_file(path / "checkpoint-00000003/state/trainable.safetensors") for path in (run, unbroken))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


PRECOMPUTE = """
import runpy
from iomm_hf.training import PretrainConfig, train

recipe = runpy.run_path(sys.argv[1])
settings = dict(preset="tiny", mllm="user/mllm", vae="user/parts", vae_subfolder="vae")
precompute = lambda output_dir, samples_per_shard: recipe["main"](recipe["CacheConfig"](
    source="user/originals", output_dir=output_dir, samples_per_shard=samples_per_shard, push_to_hub="user/cache", **settings
))
precompute(sys.argv[2], 4)
precompute(sys.argv[2], 4)  # finished, so it only looks at what is pushed
said = refusal(precompute, sys.argv[2] + "-other", 6)
assert "'user/cache' holds 'train-00001.parquet'" in said, said
train(PretrainConfig(
    output_dir=sys.argv[3], images=["user/cache"], batch_size=2, max_steps=2, num_workers=0, validate_every=0, **settings
))
"""


def test_a_pushed_cache_is_read_by_id(hub, client, frozen, tmp_path):
    write_shards(tmp_path / "pictures", 6, captions=False)
    hub.commit_files("user/originals", folder_files(tmp_path / "pictures"), repo_type="dataset")
    recipe = Path(__file__).parents[1] / "recipes/precompute_latents.py"
    hub.requests.clear()
    client(hub.environment(tmp_path / "home"), PRECOMPUTE, str(recipe), str(tmp_path / "cache"), str(tmp_path / "run"))
    files = hub.resolve("user/cache", repo_type="dataset").files
    shards = {"train-00000.parquet", "train-00001.parquet"}
    assert files.keys() == {".gitattributes", "README.md", "iomm_cache.json", *shards}  # `progress.json` is local
    here = folder_files(tmp_path / "cache")
    for name in {"README.md", *shards}:
        assert hub.read("user/cache", name, repo_type="dataset") == here[name]
    info = json.loads(here["iomm_cache.json"])
    assert info.pop("source")["path"] == "user/originals"  # may be a folder of this machine, so it stays here
    assert json.loads(hub.read("user/cache", "iomm_cache.json", repo_type="dataset")) == info
    uploads = Counter(path for method, path in hub.requests if method == "PUT")
    assert len(uploads) == 2 and set(uploads.values()) == {1}  # the second time nothing
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2 and log[-1]["skipped"] == {}


SHORT = """
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream

keys, skipped = [], {}
for sample in SampleStream(SourceConfig("user/short")):
    if sample["epoch"]:
        break
    keys.append(sample["key"])
    skipped |= sample["skipped"]
assert len(set(keys)) == len(keys) == 4 + 3, keys
assert {**skipped, **sample["skipped"]} == {"corrupt_shard": 1}, (skipped, sample["skipped"])
"""


def test_a_tar_on_the_hub_that_ends_inside_of_a_header_is_reported(hub, client, tmp_path):
    write_shards(tmp_path, 8, captions=False, samples_per_shard=4)
    files = folder_files(tmp_path)
    last = sorted(files)[-1]
    with tarfile.open(tmp_path / last) as archive:
        files[last] = files[last][: archive.getmembers()[-1].offset + 100]
    hub.commit_files("user/short", files, repo_type="dataset")
    client(hub.environment(tmp_path / "home"), SHORT)


STREAM = """
from iomm_hf import IOMMPipeline
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream
from iomm_hf.modeling_iomm import resolve_frozen

for path, column in (
    ("user/tars", "json.prompt"), ("hf://datasets/user/tars/*.tar", "json.prompt"), ("user/parquet", "prompt"),
):
    make = lambda: SampleStream(SourceConfig(path, caption_column=column), block_size=4)
    samples = iter(make())
    epoch = [next(samples) for _ in range(12)]
    assert len({sample["key"] for sample in epoch}) == 12 and {sample["epoch"] for sample in epoch} == {0}
    assert all(sample["image"].size == (64, 64) and sample["caption"] for sample in epoch)
    first, second = make(), make()
    for _ in zip(range(5), first):
        pass
    second.load_state_dict(first.state_dict())
    assert [sample["key"] for _, sample in zip(range(7), second)] == [sample["key"] for sample in epoch[5:]]

for open_it in (lambda: SampleStream(SourceConfig("user/nothing")), lambda: IOMMPipeline.from_pretrained("user/nothing")):
    assert "user/nothing" in refusal(open_it)

# The server answers 403 once, as for a gated repository whose terms were not accepted.
said = refusal(resolve_frozen, "user/mllm", None)
assert said.startswith("OSError: The frozen weights 'user/mllm'"), said
"""


def test_streams_read_datasets_by_id_and_by_glob_and_what_is_missing_is_named(hub, client, frozen, tmp_path):
    write_shards(tmp_path / "tars", 12, samples_per_shard=4)
    write_shards(tmp_path / "parquet", 12, samples_per_shard=6, layout="parquet")
    for layout in ("tars", "parquet"):
        hub.commit_files(f"user/{layout}", folder_files(tmp_path / layout), repo_type="dataset")
    hub.fail_next(1, path_contains="user/mllm", status=403)
    client(hub.environment(tmp_path / "home"), STREAM)
