"""Folders and files are there whole or not at all, whenever a run is killed."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from iomm_hf.files import write_json
from iomm_hf.training.checkpoints import list_checkpoints, remove_leftovers, rotate, whole_folder


def write_whole(path: Path, content: str):
    with whole_folder(path, Accelerator(cpu=True)) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(content)


def contents(path: Path) -> list[str]:
    return [file.read_text() for file in sorted(path.iterdir())]


def test_what_a_killed_run_was_writing_is_deleted(tmp_path):
    write_json(tmp_path / "run.json", {})
    (tmp_path / ".writing-log.jsonl").write_text('{"step": 1')
    (tmp_path / ".writing-checkpoint-00000002").mkdir()
    (tmp_path / ".writing-checkpoint-00000002" / "model").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("module", "function", "call", "left"),
    [
        (Path, "rename", 1, "old"),  # before the old folder is moved
        (Path, "rename", 2, "old"),  # between the two moves
        (shutil, "rmtree", 3, "new"),  # while the old one is deleted; the first two calls clear the way
    ],
)
def test_one_of_two_folders_is_whole_at_any_moment(tmp_path, monkeypatch, module, function, call, left):
    write_whole(tmp_path / "best", "old")
    original, calls = getattr(module, function), []

    def killed(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == call:
            if function == "rmtree":
                (path / "a").unlink()
            raise KeyboardInterrupt
        return original(path, *args, **kwargs)

    monkeypatch.setattr(module, function, killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "best", "new")
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert contents(tmp_path / "best") == [left, left]
    write_whole(tmp_path / "best", "newer")
    assert contents(tmp_path / "best") == ["newer", "newer"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("on the GPU"), torch.OutOfMemoryError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), OSError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598"), OSError),
        (RuntimeError("basic_ios::clear: iostream error"), OSError),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError),
        (RuntimeError("a shape"), RuntimeError),
    ],
)
def test_only_what_writing_fails_for_is_called_a_full_disk(tmp_path, error, raised):
    with pytest.raises(raised), whole_folder(tmp_path / "checkpoint", Accelerator(cpu=True)):
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_of_a_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoint-0000000{step}" / "state").mkdir(parents=True)
        (tmp_path / f"checkpoint-0000000{step}" / "state" / "trainer.json").write_text("{}")
        (tmp_path / f"checkpoint-0000000{step}" / "weights").touch()

    def killed(path):
        (path / "weights").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, keep=1)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000002"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000002"]


def test_a_linked_folder_is_written_whole_beside_what_it_links_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best").symlink_to(tmp_path / "disk/best")
    for content in ("old", "new"):
        write_whole(tmp_path / "run/best", content)
        assert contents(tmp_path / "disk/best") == [content, content]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["best"] and (tmp_path / "run/best").is_symlink()
