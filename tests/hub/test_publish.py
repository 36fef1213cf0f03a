"""Publishing to a local Hub, every way to load the result in a fresh process, and what is refused."""

import json
import re
import shutil
import subprocess

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.cli import app
from iomm_hf.hub.publish import REMOTE_CODE, everything_but_what_loading_needs, trained_until
from iomm_hf.integrity import CHECKSUMS
from iomm_hf.modeling_iomm import hash_weight_files
from iomm_hf.testing.hub_server import HubError


SETUP = """
LICENCES = {"mllm": "mit", "adapter": "apache-2.0", "transformer": "apache-2.0", "vae": "apache-2.0"}

def condition(model, processor):
    return model(**processor.encode([processor.text_to_image("a star")])).condition.detach()
"""
# No trick with the name alone: the package is also out of reach of a search.
WITHOUT_PACKAGE = """
import importlib.util, os, sys
sys.path[:] = [path for path in sys.path if not os.path.isdir(os.path.join(path or ".", "iomm_hf"))]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("iomm_hf") is None
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a training run leaves beside its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    config = {"preset": "tiny", "mask_ratio": 0.5, "batch_size": 32, "seed": 0, "pairs": ["/home/me/secret/*.tar"]}
    config["images"] = [{"path": "hf://datasets/user/pictures@main/*.tar"}, "user/others"]
    (folder / "run.json").write_text(json.dumps({"config": config, "versions": {"torch": "2.9"}, "commit": None}))
    rows = [
        {"step": step, "images": step * 32, "loss": 1 / step, "images_per_second": 3200 / 3600} for step in (50, 100)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


PUBLISH = (
    SETUP
    + """
from iomm_hf import IOMMPipeline, shipped_model
from iomm_hf.hub.publish import publish

output, run, score, expected = sys.argv[1:]
options = dict(output_dir=output, num_inference_steps=2, run=run, score=score, benchmark="user/shapes-world")
pipe = IOMMPipeline.from_pretrained(shipped_model())
torch.save({"picture": draw(pipe), "condition": condition(pipe.text_encoder, pipe.processor)}, expected)
# The connection breaks in the first file, then when all is sent but not yet committed; the same call goes on.
for _ in range(2):
    said = refusal(publish, shipped_model(), "user/shipped", LICENCES, **options)
    assert "403" in said, said
done = publish(shipped_model(), "user/shipped", LICENCES, **options)
pathlib.Path(expected).with_suffix(".json").write_text(json.dumps(done.commit))
"""
)


@pytest.fixture(scope="module")
def published(hub, client, run_folder, tmp_path_factory, request):
    """The shipped model on the Hub: its folder here, its commit, and what it draws."""
    folder = tmp_path_factory.mktemp("published")
    expected = folder / "expected.pt"
    score = request.config.rootpath / "results/shapes/score.json"
    hub.requests.clear()
    hub.fail_next(1, method="PUT", status=403)
    hub.fail_next(1, path_contains="/commit/", method="POST", status=403)
    client(
        hub.environment(folder / "home"),
        PUBLISH,
        *map(str, (folder / "shipped", run_folder, score, expected)),
    )
    sent = [path for method, path in hub.requests if method == "PUT"]
    return {
        "folder": folder / "shipped",
        "commit": json.loads(expected.with_suffix(".json").read_text()),
        "expected": expected,
        "sent": sent,
    }


def test_an_interrupted_upload_sends_nothing_twice_and_nothing_that_loading_does_not_need(hub, published):
    assert (
        len(published["sent"]) - 1 == len(set(published["sent"])) >= 4
    )  # weights and pictures, the refused one twice
    files = set(hub.resolve("user/shipped").files) - {".gitattributes"}
    assert files == {
        str(path.relative_to(published["folder"])) for path in published["folder"].rglob("*") if path.is_file()
    }
    assert hub.resolve("user/shipped").id == published["commit"]
    assert {f"{name}.py" for name in REMOTE_CODE} <= files
    for name in files:
        content = hub.read("user/shipped", name)
        assert name.endswith(".png") or (b"/home/" not in content and b"/work/" not in content), name


def test_the_card_says_what_the_checkpoint_is(published):
    card = ModelCard.load(published["folder"] / "README.md")
    text = card.text
    assert "**Unofficial.**" in text and "not affiliated" in text and "No full-size weights were trained" in text
    assert card.data.license == "other" and card.data.license_link.endswith("#parts-and-licences")
    assert card.data.datasets == ["user/pictures"]  # a name of two parts may be a folder
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert "| mit |" in rows["mllm"] and "1,753,600" in rows["mllm"] and "in this repository" in rows["vae"]
    assert rows["pictures seen"] == "| pictures seen | 3,200 |"
    assert "1.00 hours by the clock" in rows["time"] and rows["mask_ratio"] == "| mask_ratio | `0.5` |"
    assert rows["model"].startswith("| model | 0.") and "{{" not in text and "None" not in text
    assert "/home/me" not in text and "files of the trainer's own" in text
    tables = [line for line in text.splitlines() if line.startswith("|---")]
    for line in tables:  # a blank line would end a table
        lines = text.splitlines()
        assert lines[lines.index(line) + 1].startswith("|") and lines[lines.index(line) - 1].startswith("|")
    overall = next(result for result in card.data.eval_results if result.dataset_config == "overall")
    entries = parse_eval_result_entries(
        yaml.safe_load((published["folder"] / ".eval_results/shapes.yaml").read_text())
    )
    assert entries[0].dataset_id == "user/shapes-world" and entries[0].value == overall.metric_value
    assert all((published["folder"] / f"samples/{i:02d}.png").stat().st_size > 100 for i in range(4))
    done = subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=published["folder"])
    assert done.returncode == 0


LOAD = """
from iomm_hf import IOMMPipeline
from iomm_hf.modular_iomm import modular_pipeline

expected = torch.load(sys.argv[1], weights_only=True)
for revision in ("main", sys.argv[2]):
    pipe = IOMMPipeline.from_pretrained("user/shipped", revision=revision)
    assert torch.equal(draw(pipe), expected["picture"])
    assert type(pipe) is IOMMPipeline and type(pipe.text_encoder).__module__ == "iomm_hf.modeling_iomm"
generator = torch.Generator().manual_seed(0)
options = dict(prompt="a star", num_inference_steps=2, generator=generator, output_type="pt", output="images")
assert torch.equal(modular_pipeline(pipe)(**options), expected["picture"])
assert not [name for name in sys.modules if "_modules" in name and "iomm" in name]  # no code from the Hub ran
for revision, expected in zip(sys.argv[3:], ("is not the file that was published", "is truncated")):
    said = refusal(IOMMPipeline.from_pretrained, "user/shipped", revision=revision)
    assert expected in said and "vae/diffusion_pytorch_model.safetensors" in said, said
"""
LOAD_WITHOUT = (
    SETUP
    + WITHOUT_PACKAGE
    + """
from diffusers import DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from transformers import AutoModel, AutoProcessor

expected = torch.load(sys.argv[1], weights_only=True)
options = dict(revision=sys.argv[2]) if sys.argv[2] != "main" else {}
for load in (DiffusionPipeline.from_pretrained, lambda *a, **k: AutoModel.from_pretrained(*a, subfolder="text_encoder", **k)):
    said = refusal(load, "user/shipped", **options)
    assert "trust_remote_code" in said, said

trusted = dict(trust_remote_code=True, **options)
where = "user/shipped"
if constants.HF_HUB_OFFLINE:  # diffusers asks the Hub for the commit of remote code, even with all of it in the cache
    where = snapshot_download(where, **options)
safe = dict(use_safetensors=True, dtype=torch.float32)
pipe = DiffusionPipeline.from_pretrained(where, **safe, **trusted)  # or the encoder keeps the file's half
assert torch.equal(draw(pipe), expected["picture"])
model = AutoModel.from_pretrained("user/shipped", subfolder="text_encoder", **safe, **trusted)
processor = AutoProcessor.from_pretrained("user/shipped", subfolder="processor", **trusted)
assert torch.equal(condition(model, processor), expected["condition"])
for part in (pipe, pipe.text_encoder, pipe.processor, model, processor):
    assert type(part).__module__.startswith(("diffusers_modules.", "transformers_modules.")), type(part).__module__
assert "iomm_hf" not in sys.modules
if not constants.HF_HUB_OFFLINE:
    snapshot_download(where)  # whole, for later
"""
)


def test_it_loads_by_id_without_trust_pinned_and_offline_and_damage_is_found(hub, client, published, tmp_path):
    # What a truncated or altered upload looks like: other bytes on a branch of their own.
    weights = "vae/diffusion_pytorch_model.safetensors"
    content = hub.read("user/shipped", weights)
    changes = {"altered": content[:-1] + bytes([content[-1] ^ 1]), "truncated": content[:-1000]}
    for branch, changed in changes.items():
        hub.create_ref("branches", branch, "user/shipped", "main", "model")
        hub.commit_files("user/shipped", {weights: changed}, branch=branch)
    reader = hub.environment(tmp_path)
    arguments = (str(published["expected"]), published["commit"])
    hub.requests.clear()
    client(reader, LOAD, *arguments, "altered", "truncated")
    assert not [path for method, path in hub.requests if path.endswith((".py", ".png"))]
    hub.requests.clear()
    client(reader | {"HF_HUB_OFFLINE": "1"}, LOAD, *arguments)
    assert hub.requests == []


def test_it_loads_where_iomm_hf_is_not_installed_online_and_offline(hub, client, published, tmp_path):
    reader = hub.environment(tmp_path)
    reader.pop("PYTHONPATH", None)
    arguments = (str(published["expected"]), "main")
    client(reader, LOAD_WITHOUT, *arguments)
    hub.requests.clear()
    client(reader | {"HF_HUB_OFFLINE": "1"}, LOAD_WITHOUT, str(published["expected"]), published["commit"])
    assert hub.requests == []


@pytest.fixture(scope="module")
def frozen(hub, tmp_path_factory):
    """The shipped model, whole in itself but referring to frozen parts on the Hub, and without them."""
    root = tmp_path_factory.mktemp("frozen")
    pipe = IOMMPipeline.from_pretrained(shipped_model())
    for name, part in (("mllm", pipe.text_encoder.mllm), ("vae", pipe.vae)):
        part.save_pretrained(root / name)
        files = {path.name: path.read_bytes() for path in (root / name).iterdir()}
        commit = hub.commit_files(f"user/{name}", files)
        values = {"name_or_path": f"user/{name}", "revision": commit, "hash": hash_weight_files(root / name)}
        if name == "mllm":
            for field, value in values.items():
                setattr(pipe.text_encoder.config, f"mllm_{field}", value)
        else:
            pipe.register_to_config(**{f"vae_{field}": value for field, value in values.items()})
    pipe.save_pretrained(root / "whole")
    pipe.save_pretrained(root / "referring", include_frozen=False)
    (root / "referring/state").mkdir()
    (root / "referring/state/optimizer.bin").write_bytes(b"pickled")
    return root


PUBLISH_FROZEN = (
    SETUP
    + """
from iomm_hf import IOMMPipeline
from iomm_hf.hub.publish import publish

whole, referring, output, expected = sys.argv[1:]
torch.save(draw(IOMMPipeline.from_pretrained(whole)), expected)
options = dict(licences=LICENCES, num_inference_steps=2, prompts=["a star"])
published = publish(whole, "user/referring", include_frozen=False, private=True, revision="v1", output_dir=output, **options)
dry = publish(referring, "user/whole", dry_run=True, output_dir=output + "-whole", **options)
assert dry.commit is None
said = refusal(publish, referring, "user/public", private=True, output_dir=output + "-no", **options)
assert "user/public is there already and public" in said, said
index = pathlib.Path(output) / "model_index.json"
index.write_text(index.read_text().replace("user/vae", "user/gone"))
(pathlib.Path(output) / "SHA256SUMS").unlink()
said = refusal(IOMMPipeline.from_pretrained, output)
assert "The frozen weights 'user/gone'" in said, said
"""
)


SNIPPET = (
    WITHOUT_PACKAGE
    + """
from huggingface_hub import constants, snapshot_download

code, expected = sys.argv[1:]
folder = snapshot_download("user/referring", revision="v1")
if constants.HF_HUB_OFFLINE:
    code = code.replace('"user/referring"', repr(folder))
names = {}
exec(code, names)
pipe = names["pipe"]
assert torch.equal(draw(pipe), torch.load(expected, weights_only=True))
for part in (pipe, pipe.text_encoder, pipe.processor):
    assert type(part).__module__.startswith(("diffusers_modules.", "transformers_modules.")), type(part).__module__
assert "iomm_hf" not in sys.modules
"""
)


@pytest.mark.slow
def test_frozen_parts_in_or_out_private_on_a_branch_and_dry(hub, client, frozen, tmp_path):
    hub.create_repo("user/public")
    before = hub.resolve("user/public").id
    output = tmp_path / "referring"
    client(
        hub.environment(tmp_path / "home"),
        PUBLISH_FROZEN,
        *map(str, (frozen / "whole", frozen / "referring", output, tmp_path / "expected.pt")),
    )
    assert hub.is_private("user/referring") and set(hub.resolve("user/referring").files) == {".gitattributes"}
    files = hub.resolve("user/referring", "v1").files
    assert not [name for name in files if name.startswith("vae/") or "state" in name]
    weights = load_file(output / "text_encoder/model.safetensors")
    assert weights and not [name for name in weights if name.startswith("mllm.")]
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == ["user/mllm", "user/vae"] and "fetched at load" in card.text
    assert 'AutoencoderKL.from_pretrained("user/vae"' in card.text and 'revision="v1"' in card.text

    # What the card tells readers to run who have no iomm-hf, as it stands there, online and then as it says for offline
    code = re.search(r"```python\n(import torch\nfrom diffusers import .*?)```", card.text, re.DOTALL)[1]
    code = code.replace("<commit>", hub.resolve("user/referring", "v1").id)
    reader = hub.environment(tmp_path / "reader")
    reader.pop("PYTHONPATH", None)
    client(reader, SNIPPET, code, str(tmp_path / "expected.pt"))
    hub.requests.clear()
    client(reader | {"HF_HUB_OFFLINE": "1"}, SNIPPET, code, str(tmp_path / "expected.pt"))
    assert hub.requests == []

    with pytest.raises(HubError, match="user/whole"):
        hub.resolve("user/whole")
    whole = tmp_path / "referring-whole"
    assert (whole / "vae/diffusion_pytorch_model.safetensors").is_file() and not (whole / "state").exists()
    assert [n for n in load_file(whole / "text_encoder/model.safetensors") if n.startswith("mllm.")]
    assert hub.resolve("user/public").id == before


def test_checkpoints_and_best_know_their_step_and_final_is_of_the_whole_run(tmp_path):
    for name, file, content in (
        ("checkpoint-00000004", "state/trainer.json", {"step": 4}),
        ("best", "score.json", {"step": 2, "overall": 0.5}),
        ("scored", "score.json", {"model": {}}),  # of recipes/score_shapes.py, written into the folder
        ("final", "model_index.json", {}),
    ):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text(json.dumps(content))
    steps = {path.name: trained_until(path) for path in tmp_path.iterdir()}
    assert steps == {"checkpoint-00000004": 4, "best": 2, "scored": None, "final": None}


def test_folders_inside_a_part_are_published_and_hidden_ones_are_not(tmp_path):
    for name in ("chat_templates/tool.jinja", ".cache/found.json", "notes/todo.docx"):
        (tmp_path / "part" / name).parent.mkdir(parents=True)
        (tmp_path / "part" / name).write_text("x")
    shutil.copytree(tmp_path / "part", tmp_path / "out", ignore=everything_but_what_loading_needs)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["tool.jinja"]


def test_nothing_is_published_without_a_licence_for_each_part_or_with_a_pickle(tmp_path):
    def publish(*arguments: str):
        return CliRunner().invoke(app, ["publish", *arguments, "--dry-run", "--output", str(tmp_path / "out")])

    licences = [f"--licence={part}=mit" for part in ("mllm", "adapter", "transformer", "vae")]
    tiny = str(shipped_model())
    for arguments, expected in (
        ([tiny, "me/tiny"], "none was given for mllm, adapter, transformer, vae"),
        ([tiny, "me/tiny", *licences[:3]], "none was given for vae"),
        ([tiny, "me/tiny", *licences, "--licence=unet=mit"], "unet is not such a part"),
        ([tiny, "me/tiny", *licences[:3], "--licence=vae="], "got ''"),
        ([tiny, "me/tiny", "--licence=mit"], "takes PART=LICENCE"),
        ([tiny, "tiny", *licences], "user/name"),
        ([tiny, "me/tiny", *licences, "--reference-frozen"], "cannot be left out"),
    ):
        done = publish(*arguments)
        assert done.exit_code == 2 and expected in done.stderr, done.stderr
        assert not (tmp_path / "out").exists()
    shutil.copytree(tiny, tmp_path / "pickled")
    (tmp_path / "pickled/vae/diffusion_pytorch_model.bin").write_bytes(b"x")
    done = publish(str(tmp_path / "pickled"), "me/tiny", *licences)
    assert done.exit_code == 2 and "may be a pickle" in done.stderr
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("mine")
    done = CliRunner().invoke(app, ["publish", tiny, "me/tiny", *licences, "--output", str(tmp_path / "kept")])
    assert done.exit_code == 2 and "holds something else" in done.stderr and (tmp_path / "kept/notes.txt").exists()
    own = shutil.copytree(tiny, tmp_path / "published/own")
    for folder in (own, own.parent):
        (folder / CHECKSUMS).write_text("")  # as if it had been published before
        done = CliRunner().invoke(app, ["publish", str(own), "me/tiny", *licences, "--output", str(folder)])
        assert done.exit_code == 2 and "holds the checkpoint itself" in done.stderr
        assert (own / "transformer/config.json").is_file()


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(shipped_model(), tmp_path / "copy")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def alter_a_weight(copy):
    weights = {
        name: tensor.clone() for name, tensor in load_file(copy / "vae/diffusion_pytorch_model.safetensors").items()
    }
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def into_shards(copy, spoil):
    pipe = IOMMPipeline.from_pretrained(copy)
    (copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    pipe.transformer.save_pretrained(copy / "transformer", max_shard_size="8MB")
    spoil(sorted((copy / "transformer").glob("*-of-*.safetensors"))[-1])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


INDEX = "model_index.json"
DAMAGES = {
    "truncated shard": (lambda c: into_shards(c, truncate), "is truncated or not a safetensors file"),
    "missing shard": (lambda c: into_shards(c, lambda shard: shard.unlink()), "lacks 1 of "),
    "pickle": (lambda c: (c / "vae/diffusion_pytorch_model.bin").write_bytes(b"x"), "may be a pickle"),
    "no weights": (lambda c: (c / "transformer/diffusion_pytorch_model.safetensors").unlink(), "no file named"),
    "another part's class": (lambda c: edit_json(c / INDEX, vae=["os", "system"]), "expected AutoencoderKL"),
    "another pipeline": (lambda c: edit_json(c / INDEX, _class_name="FluxPipeline"), "holds a FluxPipeline"),
    "missing autoencoder": (lambda c: shutil.rmtree(c / "vae"), "has no folder 'vae'"),
    "no autoencoder named": (lambda c: edit_json(c / INDEX, vae=[None, None]), "no vae_name_or_path to load it from"),
    "missing MLLM": (
        lambda c: save_file(
            {k: v for k, v in load_file(c / "text_encoder/model.safetensors").items() if k.startswith("adapter.")},
            c / "text_encoder/model.safetensors",
            metadata={"format": "pt"},
        ),
        "holds no MLLM weights and its config no mllm_name_or_path",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(copy, damage):
    spoil, expected = DAMAGES[damage]
    spoil(copy)
    with pytest.raises((OSError, ValueError), match=expected.replace("(", r"\(")):
        IOMMPipeline.from_pretrained(copy)


def test_a_published_folder_is_refused_when_any_file_that_is_read_changed(published, tmp_path):
    for number, change in enumerate(
        (
            alter_a_weight,
            lambda c: truncate(c / "text_encoder/model.safetensors"),
            lambda c: (c / "processor/tokenizer.json").unlink(),
            lambda c: edit_json(c / INDEX, resolution=32),
        )
    ):
        copy = shutil.copytree(published["folder"], tmp_path / str(number))
        change(copy)
        with pytest.raises(OSError, match="is not the file that was published|is truncated"):
            IOMMPipeline.from_pretrained(copy)
    # An index beside the published weights would name foreign ones.
    foreign = shutil.copytree(published["folder"], tmp_path / "foreign")
    weights = foreign / "transformer/diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, foreign / "transformer/other.safetensors")
    names = {name: "other.safetensors" for name in load_file(weights)}
    (foreign / f"transformer/{weights.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(OSError, match="was not published: SHA256SUMS does not name it"):
        IOMMPipeline.from_pretrained(foreign)
    shutil.copytree(published["folder"], tmp_path / "card")
    (tmp_path / "card/README.md").write_text("edited")
    assert torch.is_tensor(IOMMPipeline.from_pretrained(tmp_path / "card").vae.encoder.conv_in.weight)
