"""What runs: versions of packages, and the commit that it was started from."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from shutil import which
from typing import Any


PACKAGES = ("iomm-hf", "torch", "transformers", "diffusers", "accelerate", "datasets")


def software(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """
    Versions, `None` for packages that are not installed, and the commit of the folder that this is started in, if it is a git
    repository.

    Example:

    ```python
    >>> sorted(software(("torch", "no-such-package"))["versions"])
    ['no-such-package', 'python', 'torch']
    ```
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True) if which("git") else None
    return {
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "commit": commit.stdout.strip() if commit is not None and commit.returncode == 0 else None,
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
