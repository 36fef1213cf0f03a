"""What a pipeline folder must be before a weight of it is used: of the expected classes, whole, unaltered, no pickles.

A published folder carries `SHA256SUMS`, so a truncated or altered file is found by its hash, with or without iomm-hf
(`sha256sum -c SHA256SUMS`). Sums guard against damage and against whoever changes a file alone, not against whoever can
rewrite the whole repository: for that, pin a commit.

This file imports safetensors alone, because published checkpoints carry a copy of it.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open


CHECKSUMS = "SHA256SUMS"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # can run code when they are read
INDEX = "model_index.json"
CODE = ".py"  # not fetched where iomm-hf is installed


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_checksums(folder: Path, files: Iterable[str]):
    """Writes `SHA256SUMS` for these files of a folder, in the format of the program `sha256sum`."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(files)]
    (folder / CHECKSUMS).write_text("".join(lines))


def check_files(folder: Path, parts: Collection[str]):
    r"""
    Refuses a pipeline folder whose files are not those that were published, or whose weights cannot be read safely.

    Args:
        folder (`Path`): The pipeline folder.
        parts (`list[str]`): Names of the components that are about to be loaded from it.

    Raises:
        `OSError`: a part is missing, holds a pickle, or has a truncated or missing shard; or one of its files, or the
            index, is not as `SHA256SUMS` says, or not named there.

    Example:

    ```python
    >>> from iomm_hf import shipped_model
    >>> from iomm_hf.integrity import check_files
    >>> check_files(shipped_model(), ["transformer", "vae"])
    ```
    """
    for part in parts:
        if not (folder / part).is_dir():
            raise OSError(f"{folder} has no folder {part!r}, which its model_index.json names. Was it copied whole?")
        for file in sorted((folder / part).iterdir()):
            if file.suffix in PICKLES:
                raise OSError(
                    f"{file} may be a pickle, which can run any code when it is read: only safetensors are loaded."
                    " Remove it, or convert it if the part has no safetensors file."
                )
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, framework="pt"):
                        pass
                except SafetensorError as error:
                    raise OSError(
                        f"{file} is truncated or not a safetensors file ({error}). Copy or download it again."
                    ) from error
            if ".safetensors.index" in file.name:
                shards = set(json.loads(file.read_text())["weight_map"].values())
                missing = sorted(name for name in shards if not (file.parent / name).is_file())
                if missing:
                    raise OSError(
                        f"{file.parent} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}. Copy or"
                        " download it again."
                    )
    if not (folder / CHECKSUMS).is_file():
        return
    lines = [line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines()]
    published = {name for _, _, name in lines}
    for part in parts:
        for file in (folder / part).rglob("*"):
            name = file.relative_to(folder).as_posix()
            # One more file can change what is loaded: an index that names other shards goes before the weights beside it.
            if file.is_file() and file.suffix != CODE and name not in published:
                raise OSError(
                    f"{file} was not published: {CHECKSUMS} does not name it. Remove it, or download the folder again; if you"
                    f" added it yourself, publish again or delete {CHECKSUMS}."
                )
    for expected, _, name in lines:
        file = folder / name
        if (name != INDEX and name.split("/")[0] not in parts) or file.suffix == CODE:
            continue  # not read here, so perhaps not fetched
        found = sha256(file) if file.is_file() else "missing"
        if found != expected:
            raise OSError(
                f"{file} is not the file that was published: its SHA-256 is {found}, {CHECKSUMS} says {expected}."
                f" Download it again; if you changed it yourself, publish again or delete {CHECKSUMS}."
            )
