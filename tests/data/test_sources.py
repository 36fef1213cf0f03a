"""Sources on the Hub are read at one commit, however the repository moves on."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from iomm_hf.data.sources import SourceConfig, hub_commits, pinned


def tar_of(colours: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, colour in enumerate(colours):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(picture, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(picture.getvalue())
            archive.addfile(info, io.BytesIO(picture.getvalue()))
    return buffer.getvalue()


def test_what_is_here_or_at_a_commit_is_not_looked_up(tmp_path):
    commit = "0123456789" * 4
    sources = [
        SourceConfig(str(tmp_path)),
        SourceConfig("photos/*.tar"),
        SourceConfig(f"hf://datasets/user/set@{commit}/*.tar"),
        SourceConfig("user/set", revision=commit),
        SourceConfig("photos/*.tar", caption_file="captions.json", caption_column="text"),
    ]
    assert hub_commits(sources) == {}
    assert [pinned(source, {"user/set": "x", "photos/*.tar": "y"}) for source in sources] == sources


def test_paths_ids_and_lists_of_texts_are_pinned():
    commits = {"a/b": "1" * 40, "a/b@v2": "2" * 40, "c/d": "3" * 40, "c/d@refs/pr/1": "4" * 40}
    both = pinned(
        SourceConfig("hf://datasets/a/b/x_*/*.tar", caption_file="hf://datasets/c/d/t.json", caption_column="t"),
        commits,
    )
    assert both.path == f"hf://datasets/a/b@{'1' * 40}/x_*/*.tar"
    assert both.caption_file == f"hf://datasets/c/d@{'3' * 40}/t.json"
    assert pinned(SourceConfig("hf://datasets/a/b@v2/*.tar"), commits).path == f"hf://datasets/a/b@{'2' * 40}/*.tar"
    assert pinned(SourceConfig("hf://datasets/c/d@refs%2Fpr%2F1/*.tar"), commits).path.count("4") == 40
    assert pinned(SourceConfig("a/b"), commits) == SourceConfig("a/b", revision="1" * 40)
    assert pinned(SourceConfig("a/b", revision="v2"), commits) == SourceConfig("a/b", revision="2" * 40)


def test_a_repository_that_cannot_be_found_is_refused_by_name():
    with pytest.raises(
        ValueError, match="cannot open 'user/set@v2', neither here nor on the Hub"
    ):  # tests are offline
        hub_commits([SourceConfig("hf://datasets/user/set@v2/*.tar")])


CHANGED = """
from huggingface_hub import HfApi
from iomm_hf.data.sources import SourceConfig, hub_commits, pinned
from iomm_hf.data.streams import SampleStream

def colours(stream):
    return {sample["image"].getpixel((0, 0)) for sample, _ in zip(stream, range(4))}

source = SourceConfig(sys.argv[1])
before = hub_commits([source])
stream = SampleStream(source)
[commit] = before.values()
assert len(commit) == 40 and all(f"@{commit}/" in file for file in stream.files), stream.files
red, state = colours(stream), stream.state_dict()

HfApi().upload_file(repo_id="user/set", repo_type="dataset", path_in_repo="0.tar", path_or_fileobj=sys.argv[2])
after = hub_commits([source])
assert after.keys() == before.keys() and after != before
changed = SampleStream(source)
assert colours(changed) == {(0, 0, 255)} != red
refused = refusal(changed.load_state_dict, state)
assert "the state belongs to another stream" in refused, refused

again = SampleStream(pinned(source, before))
again.load_state_dict(state)
assert colours(again) == red
"""


@pytest.mark.parametrize("path", ["hf://datasets/user/set/*.tar", "user/set"])
def test_a_set_that_changes_is_another_and_its_old_commit_the_same(hub, client, tmp_path, path):
    hub.commit_files("user/set", {"0.tar": tar_of(["red"] * 4)}, repo_type="dataset")
    (tmp_path / "new.tar").write_bytes(tar_of(["blue"] * 4))
    client(hub.environment(tmp_path), CHANGED, path, str(tmp_path / "new.tar"))


READ = """
import sys
from iomm_hf.data.sources import SourceConfig
from iomm_hf.data.streams import SampleStream

path, expected = sys.argv[1:]
try:
    read = str(next(iter(SampleStream(SourceConfig(path))))["image"].getpixel((0, 0)))
except ValueError as error:
    read = str(error)
assert expected in read, read
"""


def test_paths_in_a_strangers_table_are_not_followed_whatever_its_files_are_called(hub, client, tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "private.png")
    private, table = {"image": str(tmp_path / "private.png")}, io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": None, "path": private["image"]}]}), table)
    names = "---\nconfigs:\n- config_name: default\n  data_files: [a.parquet, b.parquet, z.json]\n---\n"
    tables = dict.fromkeys(["a.parquet", "b.parquet", "z.json"], table.getvalue())
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(picture, "PNG")
    hub.commit_files("user/lines", {"train.jsonl": json.dumps(private).encode() + b"\n"}, repo_type="dataset")
    hub.commit_files("user/tables", {"README.md": names.encode(), **tables}, repo_type="dataset")
    hub.commit_files("user/folder", {"a.png": picture.getvalue(), "b.png": picture.getvalue()}, repo_type="dataset")
    for name in ("user/lines", "user/tables"):
        client(hub.environment(tmp_path / "home"), READ, name, "skipped: {'no_image': ")
    client(hub.environment(tmp_path / "home"), READ, "user/folder", "(0, 0, 255)")
