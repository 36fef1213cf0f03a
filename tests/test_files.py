"""Files whole or not at all."""

import pytest

from iomm_hf.files import TEMPORARY, begin_folder, replace_folder, write_json, write_whole


def test_a_file_replaces_another_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "folder/run.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n' and list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file_and_no_half_one(tmp_path):
    path = tmp_path / "taken"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_whole(path, b"new")  # a folder is not replaced by a file
    assert (path / "inside").is_dir() and list(tmp_path.iterdir()) == [path]


def test_a_scratch_folder_keeps_the_targets_folder_clean(tmp_path, monkeypatch):
    seen = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, target: (seen.append(self), replace(self, target)))
    write_whole(tmp_path / "out/a.png", b"a", tmp_path / "scratch")
    [temporary] = seen
    assert temporary.parent == tmp_path / "scratch" and temporary.name.startswith(TEMPORARY)
    assert (tmp_path / "out/a.png").read_bytes() == b"a" and list((tmp_path / "scratch").iterdir()) == []


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    for content in ("old", "new"):
        writing = begin_folder(tmp_path / "out")
        (writing / "weights").write_text(content)
        replace_folder(writing, tmp_path / "out")
    assert (tmp_path / "big/weights").read_text() == "new" and (tmp_path / "out").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"big", "out"}
