"""What runs: versions of packages, and the commit that iomm-hf itself is at."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import Any


PACKAGES = ("iomm-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")


def software(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """
    Versions, `None` for packages that are not installed, and the commit of the git repository that this package runs
    out of; `None` where it was installed without one, whatever repository lies around it. Where tracked files of the
    package differ from that commit there is also `modified`, `True`.

    Example:

    ```python
    >>> sorted(software(("torch", "no-such-package"))["versions"])
    ['no-such-package', 'python', 'torch']
    ```
    """
    commit = own_commit()
    return {
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "commit": commit,
        **({"modified": True} if commit is not None and is_modified() else {}),
    }


def own_commit() -> str | None:
    file = Path(__file__).resolve()
    tracked = ask_git(file.parent, "ls-files", "--error-unmatch", file.name)
    return None if tracked is None else ask_git(file.parent, "rev-parse", "HEAD")


def is_modified() -> bool:
    """Whether tracked files of this package are not as its commit has them."""
    folder = Path(__file__).resolve().parent
    return bool(ask_git(folder, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no", "--", "."))


def ask_git(folder: Path, *arguments: str) -> str | None:
    """What git answers in a folder; `None` where it is not installed or fails."""
    if not which("git"):
        return None
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
