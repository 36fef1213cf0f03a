"""The Space: what its files promise, what is uploaded, and that this runs by itself."""

import json
import re
import tomllib

import pytest
import yaml
from typer.testing import CliRunner

from iomm_hf import shipped_model
from iomm_hf.cli import app
from iomm_hf.hub.space import FILES, SPACE_FILES


def publish(*arguments: str):
    return CliRunner().invoke(app, ["publish-space", *arguments])


def test_the_files_say_what_the_package_says(request):
    root = request.config.rootpath
    assert sorted(path.name for path in (root / "spaces_demo").iterdir() if path.name in SPACE_FILES) == sorted(
        SPACE_FILES
    )
    assert (root / "spaces_demo").resolve() == FILES.resolve()
    _, front, text = (FILES / "README.md").read_text().split("---\n", 2)
    settings = yaml.safe_load(front)
    assert (settings["sdk"], settings["app_file"], settings["license"]) == ("gradio", "app.py", "apache-2.0")
    assert len(settings["short_description"]) <= 60  # the Hub refuses more
    constraints = dict(line.split("==") for line in (root / "constraints.txt").read_text().split("\n") if "==" in line)
    assert settings["sdk_version"] == constraints["gradio"]
    assert "**Unofficial.**" in text and "not affiliated" in text and "no full-size weights" in text
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [line for line in project["dependencies"] if not line.startswith("huggingface-hub")]
    lines = (FILES / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == wanted
    # of Pythons that ZeroGPU has, one that the package takes
    assert settings["python_version"] == "3.12" and project["requires-python"] == ">=3.11"


def test_a_dry_run_writes_a_space_that_runs_without_the_installed_package(tmp_path):
    done = publish("me/demo", "--dry-run", "--checkpoint", "me/model", "--output", str(tmp_path / "space"), "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["commit"] is None and {"README.md", "app.py", "iomm_hf/__init__.py"} <= set(report["files"])
    assert not any(re.search(r"__pycache__|\.pyc|^\.", name) for name in report["files"])
    assert yaml.safe_load((tmp_path / "space/README.md").read_text().split("---\n")[1])["models"] == ["me/model"]
    assert [path.name for path in tmp_path.iterdir()] == ["space"]
    done = publish("me/demo", "--dry-run", "--output", str(tmp_path / "space"))
    assert done.exit_code == 0, done.output
    assert "me/model" not in (tmp_path / "space/README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "must be named as user/name, got 'demo'"),
        (["me/de mo"], "me/de mo"),
        (["me/demo", "--checkpoint", "outputs/mine/final"], "Publish it first: iomm-hf publish"),
        (["me/demo", "--output", "{mine}"], "holds something else than a written Space"),
    ],
)
def test_what_cannot_be_published_ends_with_two(tmp_path, arguments, message):
    (tmp_path / "mine.txt").write_text("mine")
    done = publish(*[argument.format(mine=tmp_path) for argument in arguments], "--dry-run")
    assert done.exit_code == 2 and message in done.stderr and done.stdout == "", done.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_demo_of_ones_own_is_not_written_over(tmp_path):
    names = {"README.md", "app.py", "requirements.txt", "thesis.txt", ".git"}
    (tmp_path / ".git").mkdir()
    for name in names - {".git"}:
        (tmp_path / name).write_text("mine")
    done = publish("me/demo", "--output", str(tmp_path), "--dry-run")
    assert done.exit_code == 2 and "holds something else than a written Space" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == names and (tmp_path / "app.py").read_text() == "mine"


UPLOAD = """
from iomm_hf.hub.space import publish_space
from huggingface_hub import HfApi

output, weights = sys.argv[1:]
api = HfApi()
api.create_repo("user/model")
api.upload_folder(repo_id="user/model", folder_path=weights, allow_patterns=["model_index.json"])
first = publish_space("user/demo", checkpoint="user/model", private=True, output_dir=output)
assert {key: v.value for key, v in api.get_space_variables("user/demo").items()} == {"IOMM_CHECKPOINT": "user/model"}
api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/demo", repo_type="space")
api.upload_file(path_or_fileobj=b"old", path_in_repo="iomm_hf/old.py", repo_id="user/demo", repo_type="space")
publish_space("user/demo", output_dir=output)
assert not api.get_space_variables("user/demo")
assert "nobody/nothing" in refusal(publish_space, "user/other", checkpoint="nobody/nothing", output_dir=output)
api.create_repo("user/open", repo_type="space", space_sdk="gradio")
assert "already and public" in refusal(publish_space, "user/open", private=True, output_dir=output)
"""


@pytest.mark.slow
def test_upload_to_a_space_and_again(hub, client, tmp_path):
    client(hub.environment(tmp_path / "home"), UPLOAD, str(tmp_path / "space"), str(shipped_model()))
    files = set(hub.resolve("user/demo", repo_type="space").files) - {".gitattributes"}
    written = {str(path.relative_to(tmp_path / "space")) for path in (tmp_path / "space").rglob("*") if path.is_file()}
    assert files == written | {"notes.txt"}
    assert hub.is_private("user/demo", "space")
