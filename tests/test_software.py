"""What a run says of its software is about this package and no other repository."""

import runpy
import shutil
import subprocess
from pathlib import Path

import iomm_hf.software
from iomm_hf.software import software


SOURCE = Path(iomm_hf.software.__file__)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_the_packages_own_and_not_that_of_the_folder_around(tmp_path, monkeypatch):
    """Started in a user's repository, and installed into a folder inside it that git does not track."""
    git(tmp_path, "init")
    (tmp_path / "mine.py").write_text("")
    git(tmp_path, "add", "mine.py")
    git(tmp_path, "commit", "-m", "mine")
    theirs = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    assert software(())["commit"] != theirs
    copy = tmp_path / "site-packages/software.py"
    copy.parent.mkdir()
    shutil.copy(SOURCE, copy)
    assert runpy.run_path(str(copy))["software"](())["commit"] is None
    git(tmp_path, "add", "--force", str(copy))  # a checkout of the package itself
    assert runpy.run_path(str(copy))["software"](())["commit"] == theirs


def test_changes_of_the_package_since_its_commit_are_told(tmp_path):
    git(tmp_path, "init")
    copy = tmp_path / "package/software.py"
    copy.parent.mkdir()
    shutil.copy(SOURCE, copy)
    (tmp_path / "notes.md").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a package")
    (tmp_path / "notes.md").write_text("not the package's code")
    (tmp_path / "package/untracked").write_text("")
    clean = runpy.run_path(str(copy))["software"](())
    assert clean["commit"] == git(tmp_path, "rev-parse", "HEAD") and "modified" not in clean
    copy.write_text(copy.read_text() + "\n")
    assert runpy.run_path(str(copy))["software"](()) == clean | {"modified": True}


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software(("torch", "no-such-package"))["commit"] is None
