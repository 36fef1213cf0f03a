"""Publishing the demo as a Space: its three files and, beside them, this very package, so that the Space runs the code that
was tested here and needs no release of it on a package index. As with checkpoints, what is uploaded is first written whole
into a folder, which anybody can look at."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard
from huggingface_hub.utils import validate_repo_id

from ..files import begin_folder, replace_folder
from ..pipeline_iomm import IOMMPipeline
from .publish import Published, on_hub, upload


PACKAGE = Path(__file__).parents[1]
FILES = PACKAGE / "demo" / "space"  # also linked at the top of the repository, as spaces_demo
SPACE_FILES = ("README.md", "app.py", "requirements.txt")
VARIABLE = "IOMM_CHECKPOINT"  # what app.py reads

CHECK = """
import pathlib
import app, iomm_hf
assert pathlib.Path(iomm_hf.__file__).is_relative_to(pathlib.Path.cwd()), iomm_hf.__file__
from iomm_hf.demo import model
from iomm_hf.demo.app import build
build(device="cpu")
*_, last = model.draw(model.Order("a red circle", steps=2))
assert last.picture.size == (64, 64)
"""


def publish_space(
    repo_id: str,
    *,
    checkpoint: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
    output_dir: str | Path | None = None,
) -> Published:
    r"""
    Uploads the demo, after it built its page and drew in a fresh process from what is uploaded.

    Args:
        repo_id (`str`): The Space, `"user/name"`; created if it is not there, on the account's free hardware. ZeroGPU, if the
            account has it, is a choice in the Space's settings.
        checkpoint (`str`, *optional*): Hub id that the Space draws with, put into its variable `IOMM_CHECKPOINT`. Defaults
            to the tiny model, which is uploaded with the package. For a private one, give the Space a secret `HF_TOKEN`.
        private (`bool`, *optional*): Whether a new Space is private. By default as the account is set.
        dry_run (`bool`, *optional*, defaults to `False`): Write and check the folder, upload nothing.
        output_dir (`str` or `Path`, *optional*): Where the folder is written, anew each time. Defaults to `outputs/spaces/`
            and the Space's id.

    Returns:
        [`Published`].

    Raises:
        `ValueError`: an argument does not fit, or the Space is public and `private` was asked.
        `OSError`: the checkpoint is not on the Hub, or the written folder does not run.

    Example:

    ```python
    >>> from iomm_hf.hub.space import publish_space
    >>> publish_space("me/demo", checkpoint="outputs/mine/final")
    Traceback (most recent call last):
    ValueError: A Space draws with a checkpoint on the Hub, got 'outputs/mine/final'. Publish it first: iomm-hf publish.
    ```
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"The Space must be named as user/name, got {repo_id!r}.")
    if checkpoint is not None and not on_hub(checkpoint):
        raise ValueError(
            f"A Space draws with a checkpoint on the Hub, got {checkpoint!r}. Publish it first: iomm-hf publish."
        )
    output = Path("outputs/spaces", repo_id) if output_dir is None else Path(output_dir)
    written = {*SPACE_FILES, PACKAGE.name}  # exactly: others' Spaces and demos have the files as well
    if output.exists() and {path.name for path in output.iterdir()} not in (set(), written):
        raise ValueError(f"{output} holds something else than a written Space; name another output_dir.")

    # 1. The folder, there whole or not at all, and seen to run
    writing = begin_folder(output)
    for name in SPACE_FILES:
        shutil.copyfile(FILES / name, writing / name)
    shutil.copytree(PACKAGE, writing / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", FILES.name))
    if checkpoint is not None:
        card = SpaceCard.load(writing / "README.md")
        card.data.models = [checkpoint]
        card.save(writing / "README.md")
    run_in_a_fresh_process(writing)
    replace_folder(writing, output)
    if dry_run:
        return Published(output, repo_id, None)

    # 2. The upload
    if checkpoint is not None:
        IOMMPipeline.load_config(checkpoint)  # raises where there is none, before a Space is made for it
    api = HfApi()
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type="space").private:
        raise ValueError(f"{repo_id} is there already and public. Make it private in its settings, or name another.")
    if checkpoint is not None:
        api.add_space_variable(repo_id, VARIABLE, checkpoint)
    elif VARIABLE in api.get_space_variables(repo_id):  # of an earlier call
        api.delete_space_variable(repo_id, VARIABLE)
    done = upload(
        api,
        repo_id=repo_id,
        repo_type="space",
        folder_path=output,
        delete_patterns=[f"{PACKAGE.name}/*"],  # what an earlier version had, and nothing that its owner added
    )
    return Published(output, repo_id, done.oid)


def run_in_a_fresh_process(folder: Path):
    r"""
    Raises:
        `OSError`: the page is not built, or nothing is drawn, from the folder's own files.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", CHECK], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(f"The Space in {folder} was written but does not run:\n{done.stderr.strip()[-2000:]}")
