"""Files that appear whole under their name or not at all, whatever ends the process that writes them."""

import json
import uuid
from pathlib import Path
from typing import Any


TEMPORARY = ".writing-"  # begins the name of what is not whole yet, which a killed process may leave behind


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
