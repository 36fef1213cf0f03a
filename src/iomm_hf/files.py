"""Files and folders that appear whole under their name or not at all, whatever ends the process that writes them."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any


TEMPORARY = ".writing-"  # begins the name of what is not whole yet, which a killed process may leave behind
REPLACED = ".replaced-"  # of a folder that is deleted as soon as another lies in its place


def write_whole(path: Path, content: bytes, scratch: Path | None = None):
    r"""
    Writes a file under a temporary name and renames it; its folder is made.

    Args:
        path (`Path`): The file.
        content (`bytes`): All of it.
        scratch (`Path`, *optional*): Folder of the temporary file, on the same disk, for folders that others list, such as an
            official scorer. Defaults to the file's own.

    Raises:
        `OSError`: it cannot be written; a file that was there stays as it was.

    Example:

    ```python
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_whole(folder / "new" / "a.txt", b"whole")
    >>> [path.name for path in (folder / "new").iterdir()]
    ['a.txt']
    ```
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent if scratch is None else scratch
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any):
    """The same for JSON, indented."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def begin_folder(path: Path) -> Path:
    """An empty folder under a temporary name beside `path`, or beside what it links to, to be filled and given to
    [`replace_folder`]. What a killed process left of an earlier one is deleted, and what it was about to replace is brought back."""
    path = path.resolve()
    bring_back(path)
    temporary = path.with_name(TEMPORARY + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def replace_folder(new: Path, path: Path):
    r"""
    Gives a whole folder, which [`begin_folder`] made, its name. A folder that it replaces is deleted last, so that one of them
    is whole at any moment.

    Example:

    ```python
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model"
    >>> for content in ("old", "new"):
    ...     new = begin_folder(path)
    ...     _ = (new / "weights").write_text(content)
    ...     replace_folder(new, path)
    >>> (path / "weights").read_text(), [folder.name for folder in path.parent.iterdir()]
    ('new', ['model'])
    ```
    """
    path = path.resolve()
    if path.exists():
        path.rename(path.with_name(REPLACED + path.name))
    new.rename(path)
    flush(path.parent)
    bring_back(path)


def bring_back(path: Path):
    """Ends a folder's replacement that was cut short: the old one returns, unless the new one is there."""
    replaced = path.with_name(REPLACED + path.name)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(path)


def flush(path: Path):
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
